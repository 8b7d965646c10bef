"""Activations, linear layers and MLPs: values, gradients, recomputation, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.mlp import GatedMlp, Mlp
from flash_attn.ops.activations import (
    bias_gelu,
    bias_gelu_back,
    bias_gelu_impl,
    fast_gelu_impl,
    gelu_bwd,
    gelu_fwd,
    relu_bwd,
    sqrelu_bwd,
    sqrelu_fwd,
    swiglu,
    swiglu_bwd,
    swiglu_fwd,
)
from flash_attn.ops.fused_dense import FusedDense, FusedMLP, fused_dense_func, fused_mlp_func

from .plain import DTYPES, assert_first_order_only, assert_rounded_once


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gradient(function, *inputs, dout):
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, dout.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    x, g = torch.randn(2, 7, 33).to(dtype) * 3, torch.randn(7, 33).to(dtype)
    x, y = x
    exact = {
        gelu_fwd: (gelu, gelu_bwd),
        sqrelu_fwd: (lambda x: x.clamp(min=0) ** 2, sqrelu_bwd),
    }
    for forward, (plain, backward) in exact.items():
        assert_rounded_once(forward(x), plain(x.double()), slack=2e-5)
        (dx,) = gradient(plain, x, dout=g)
        assert backward(g, x).dtype == dtype
        assert_rounded_once(backward(g, x), dx, slack=2e-5)
    assert torch.equal(fast_gelu_impl(x), gelu_fwd(x))
    (dx,) = gradient(F.relu, x, dout=g)
    assert_rounded_once(relu_bwd(g, x), dx)
    assert torch.equal(relu_bwd(torch.ones(1), torch.zeros(1)), torch.ones(1))

    def plain(x, y):
        return x * y / (1 + torch.exp(-x))

    assert swiglu_fwd(x, y).dtype == dtype
    assert_rounded_once(swiglu_fwd(x, y), plain(x.double(), y.double()))
    for actual, exact_dx in zip(swiglu_bwd(x, y, g), gradient(plain, x, y, dout=g)):
        assert actual.dtype == dtype
        assert_rounded_once(actual, exact_dx, slack=4e-6)


def test_gelu_of_a_sum():
    y, bias = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    dout = torch.randn_like(y)
    torch.testing.assert_close(bias_gelu(y, bias), gelu(y + bias))
    exact = gradient(lambda y, b: gelu(y + b), y, bias, dout=dout)
    for actual, expected in zip(bias_gelu_back(dout, y, bias), exact):
        torch.testing.assert_close(actual, expected)
    leaves = [y.requires_grad_(), bias.requires_grad_()]
    assert gradcheck(bias_gelu_impl, leaves)
    assert bias_gelu(y.half(), bias).dtype == torch.float16


def test_differentiable_activations():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    for function in (fast_gelu_impl, gelu_fwd, sqrelu_fwd):
        assert gradcheck(function, x)
    assert gradcheck(swiglu, (x, y))
    mixed = swiglu(x.float(), y.half())
    assert mixed.dtype == torch.float32
    with pytest.raises(ValueError, match="x, y: must have one shape"):
        swiglu(x, y[:1])


@pytest.mark.parametrize("return_residual", [False, True])
def test_linear(return_residual):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    result = fused_dense_func(x, weight, bias, return_residual)
    out = result[0] if return_residual else result
    torch.testing.assert_close(out, x @ weight.t() + bias)
    assert not return_residual or result[1] is x
    assert gradcheck(lambda *args: fused_dense_func(*args, return_residual), (x, weight, bias))
    module = FusedDense(8, 5, return_residual=return_residual)
    result = module(x.float())
    out = result[0] if return_residual else result
    torch.testing.assert_close(out, F.linear(x.float(), module.weight, module.bias))


PLAIN = {"gelu_approx": gelu, "relu": F.relu, "sqrelu": lambda x: F.relu(x) ** 2}


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_mlp(activation, level, with_bias):
    shapes = [(2, 3, 6), (10, 6), (4, 10), *([(10,), (4,)] if with_bias else [])]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*tensors):
        return fused_mlp_func(*tensors, activation=activation, checkpoint_lvl=level)

    x, weight1, weight2, *biases = leaves
    hidden = PLAIN[activation](F.linear(x, weight1, biases[0] if biases else None))
    torch.testing.assert_close(call(*leaves), F.linear(hidden, weight2, *biases[1:]))
    assert gradcheck(call, leaves)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_gradients_of_an_mlp_are_of_first_order_only(activation, level):
    """Whichever of the inputs require them."""
    shapes = [(2, 3, 6), (10, 6), (4, 10), (10,), (4,)]
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    for requiring in ((0,), (1,), (2,), range(5)):
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in requiring)
        assert_first_order_only(
            lambda *args: fused_mlp_func(*args, activation=activation, checkpoint_lvl=level),
            *tensors,
        )


def test_gradients_of_swiglu_are_of_first_order_only():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_first_order_only(swiglu, x.requires_grad_(), y)
    assert_first_order_only(swiglu, x, y.requires_grad_())


@pytest.mark.parametrize(
    ("level", "save", "kept"), [(0, True, 2), (1, True, 1), (2, True, 0), (0, False, 0)]
)
def test_levels_keep_less(level, save, kept):
    """How many tensors of the hidden layer's size are kept for the backward pass."""
    x, weight1, weight2 = (
        torch.randn(3, 6),
        torch.randn(10, 6, requires_grad=True),
        torch.randn(4, 10),
    )
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_mlp_func(x, weight1, weight2, save_pre_act=save, checkpoint_lvl=level)
    assert sizes.count((3, 10)) == kept


@pytest.mark.parametrize("level", [0, 1, 2])
def test_mlp_under_autocast(level):
    module = FusedMLP(6, 10, checkpoint_lvl=level)
    x = torch.randn(5, 6, requires_grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == module.fc1.weight.grad.dtype == torch.float32
    exact = module.fc2(gelu(module.fc1(x)))
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
    gradient = torch.autograd.grad(exact.sum(), module.fc1.weight)[0]
    torch.testing.assert_close(module.fc1.weight.grad, gradient, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("training", [False, True])
def test_mlp_module(training):
    module = FusedMLP(6, activation="sqrelu", return_residual=True).train(training)
    assert module.fc1.weight.shape == (24, 6) and module.fc2.weight.shape == (6, 24)
    x = torch.randn(2, 6)
    out, residual = module(x)
    assert residual is x
    torch.testing.assert_close(out, module.fc2(F.relu(module.fc1(x)) ** 2))


def test_wrong_options_are_refused():
    x = torch.zeros(2, 6)
    for options, message in (
        ({"activation": "tanh"}, "activation: must be one of"),
        ({"checkpoint_lvl": 3}, "checkpoint_lvl"),
        ({"heuristic": 7}, "heuristic"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_mlp_func(x, torch.zeros(4, 6), torch.zeros(6, 4), **options)
        with pytest.raises(ValueError, match=message):
            FusedMLP(6, **options)


def test_plain_mlp():
    module, x = Mlp(6, return_residual=True), torch.randn(2, 6)
    out, residual = module(x)
    assert residual is x and module.fc1.out_features == 24
    torch.testing.assert_close(out, module.fc2(F.gelu(module.fc1(x))))
    module = Mlp(6, 5, 4, activation=torch.tanh, bias1=False, bias2=False)
    torch.testing.assert_close(module(x), module.fc2(torch.tanh(module.fc1(x))))
    assert module.fc1.bias is None and module.fc2.bias is None and module(x).shape == (2, 4)


@pytest.mark.parametrize("activation", [F.sigmoid, F.silu, F.gelu])
def test_gated_mlp(activation):
    module, x = GatedMlp(12, activation=activation, multiple_of=10), torch.randn(2, 12)
    assert module.fc2.in_features == 40 and module.fc1.out_features == 80
    value, gate = module.fc1(x).chunk(2, -1)
    torch.testing.assert_close(module(x), module.fc2(value * activation(gate)))
    assert GatedMlp(12).fc2.in_features == 128 and GatedMlp(12, 130).fc2.in_features == 256


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_patches_are_a_convolution(fused, flatten):
    module = PatchEmbed((8, 12), (4, 3), 2, 5, torch.nn.LayerNorm, flatten, fused_bias_fc=fused)
    x = torch.randn(2, 2, 8, 12)
    kernel = module.proj.weight.view(5, 2, 4, 3)
    tokens = F.conv2d(x, kernel, module.proj.bias, stride=(4, 3)).permute(0, 2, 3, 1)
    assert module.num_patches == 8 and module.grid_size == (2, 4)
    expected = module.norm(tokens.flatten(1, 2) if flatten else tokens)
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(ValueError, match=r"images of size \[8, 12\]"):
        module(torch.randn(2, 2, 12, 8))


def test_as_lumina_uses_it():
    """swiglu of gate and up projections, in bf16, with gradients."""
    gate, up = torch.randn(2, 5, 16, dtype=torch.bfloat16).requires_grad_()
    out = swiglu(gate, up)
    assert_rounded_once(out.detach(), F.silu(gate.detach().double()) * up.detach().double())
    out.sum().backward()
