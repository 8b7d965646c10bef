"""Norms of sums against a plain composition in fp64: residuals, dropout, scales, two outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from flash_attn.ops import layer_norm as ops_layer_norm
from flash_attn.ops import rms_norm as ops_rms_norm
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

from .plain import DTYPES, assert_first_order_only, assert_rounded_once

N = 24
EPS = 1e-3


def plain_norm(z, weight, bias, is_rms_norm, zero_centered=False):
    """In z's dtype."""
    if not is_rms_norm:
        z = z - z.mean(-1, keepdim=True)
    y = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y * (weight + 1.0 if zero_centered else weight)
    return y if bias is None else y + bias


def tensors(dtype, *names, rows=(3, 5), weight_dtype=None):
    """x, residual and x1 [*rows, N] of dtype; weights and biases [N] of weight_dtype."""
    made = {}
    for name in names:
        is_parameter = name.startswith(("weight", "bias", "colscale"))
        shape = (N,) if is_parameter else rows if name == "rowscale" else (*rows, N)
        made[name] = torch.randn(shape).to(weight_dtype or dtype if is_parameter else dtype)
        if name == "x":
            # A mean far from zero shows a variance that cancels.
            made[name] += 4.0
    return made


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm(is_rms_norm, dtype, weight_dtype, zero_centered):
    t = tensors(dtype, "x", "weight", "bias", weight_dtype=weight_dtype)
    exact = plain_norm(
        t["x"].double(), t["weight"].double(), t["bias"].double(), is_rms_norm, zero_centered
    )
    out = layer_norm_fn(**t, eps=EPS, is_rms_norm=is_rms_norm, zero_centered_weight=zero_centered)
    assert out.dtype == dtype
    assert_rounded_once(out, exact, slack=5e-6)
    if is_rms_norm:
        again = rms_norm_fn(**t, eps=EPS, zero_centered_weight=zero_centered)
        assert torch.equal(again, out)
    wide = layer_norm_fn(
        **t,
        eps=EPS,
        is_rms_norm=is_rms_norm,
        zero_centered_weight=zero_centered,
        out_dtype=torch.float32,
    )
    assert wide.dtype == torch.float32
    assert_rounded_once(wide, exact, slack=5e-6)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual(is_rms_norm, dtype, residual_dtype):
    """The norm is that of the sum before it is rounded to the residual's dtype."""
    t = tensors(dtype, "x", "weight", "bias")
    residual = torch.randn(3, 5, N).to(residual_dtype)
    z = t["x"].double() + residual.double()
    exact = plain_norm(z, t["weight"].double(), t["bias"].double(), is_rms_norm)
    y, total = layer_norm_fn(**t, residual=residual, eps=EPS, prenorm=True, is_rms_norm=is_rms_norm)
    assert y.dtype == dtype and total.dtype == residual_dtype
    assert_rounded_once(y, exact, slack=5e-6)
    assert_rounded_once(total, z)
    alone = layer_norm_fn(**t, residual=residual, eps=EPS, is_rms_norm=is_rms_norm)
    assert torch.equal(alone, y)


@pytest.mark.parametrize("in_fp32", [False, True])
def test_prenorm_without_a_residual(in_fp32):
    t = tensors(torch.bfloat16, "x", "weight", "bias")
    _, total = layer_norm_fn(**t, prenorm=True, residual_in_fp32=in_fp32)
    assert total.dtype == (torch.float32 if in_fp32 else torch.bfloat16)
    assert torch.equal(total, t["x"].to(total.dtype))


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("with_x1", [False, True])
def test_two_outputs(is_rms_norm, with_x1):
    t = tensors(torch.float32, "x", "weight", "bias", "weight1", "bias1", "residual")
    x1 = torch.randn(3, 5, N) if with_x1 else None
    y, y1, total = layer_norm_fn(**t, x1=x1, eps=EPS, prenorm=True, is_rms_norm=is_rms_norm)
    d = {name: tensor.double() for name, tensor in t.items()}
    z = d["x"] + d["residual"] + (x1.double() if with_x1 else 0.0)
    assert_rounded_once(total, z)
    assert_rounded_once(y, plain_norm(z, d["weight"], d["bias"], is_rms_norm), slack=5e-6)
    assert_rounded_once(y1, plain_norm(z, d["weight1"], d["bias1"], is_rms_norm), slack=5e-6)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(is_rms_norm, p):
    """The masks that are returned are those that were applied; each tensor has one of its own."""
    t = tensors(torch.float32, "x", "x1", "weight", "bias", rows=(40, 5))
    y, total, mask, mask1 = layer_norm_fn(
        **t, eps=EPS, dropout_p=p, prenorm=True, is_rms_norm=is_rms_norm, return_dropout_mask=True
    )
    assert mask.dtype == mask1.dtype == torch.bool and mask.shape == mask1.shape == y.shape
    for one in (mask, mask1):
        assert abs(one.float().mean() - (1.0 - p)) < 0.03
    assert p == 1.0 or (mask != mask1).any()
    kept = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    z = (t["x"].double() * mask + t["x1"].double() * mask1) * kept
    assert_rounded_once(total, z)
    exact = plain_norm(z, t["weight"].double(), t["bias"].double(), is_rms_norm)
    assert_rounded_once(y, exact, slack=5e-6)


def test_masks_without_dropout_are_none():
    t = tensors(torch.float32, "x", "weight", "bias", "residual")
    y, mask, mask1 = layer_norm_fn(**t, return_dropout_mask=True)
    assert mask is None and mask1 is None and y.shape == t["x"].shape
    seen = layer_norm_fn(**t, dropout_p=0.5, return_dropout_mask=True)
    assert seen[1] is not None and seen[2] is None


def test_rowscale():
    t = tensors(torch.float32, "x", "weight", "bias", "residual", "rowscale")
    y, total = layer_norm_fn(**t, eps=EPS, prenorm=True)
    z = t["x"].double() * t["rowscale"].double()[..., None] + t["residual"].double()
    assert_rounded_once(total, z)
    exact = plain_norm(z, t["weight"].double(), t["bias"].double(), False)
    assert_rounded_once(y, exact, slack=5e-6)
    with pytest.raises(NotImplementedError, match="rowscale"):
        layer_norm_fn(**t, x1=t["x"])


def test_given_outputs_are_written():
    t = tensors(torch.float32, "x", "weight", "bias", "residual")
    out, residual_out = torch.empty(3, 5, N, dtype=torch.float64), torch.empty(3, 5, N)
    y, total = layer_norm_fn(**t, prenorm=True, out=out, residual_out=residual_out)
    assert y.data_ptr() == out.data_ptr() and total.data_ptr() == residual_out.data_ptr()
    assert torch.equal(y, out) and torch.equal(total, residual_out)
    expected, expected_total = layer_norm_fn(**t, prenorm=True)
    torch.testing.assert_close(out, expected.double())
    assert torch.equal(residual_out, expected_total)
    layer_norm_fn(t["x"], t["weight"], None, residual_out=residual_out)
    assert torch.equal(residual_out, t["x"])


def test_given_outputs_serve_every_step():
    """They stay out of the graph, which what is returned is in."""
    t = tensors(torch.float32, "x", "weight", "bias", "residual")
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    out, residual_out = torch.empty(2, 3, 5, N)
    exact = layer_norm_fn(**t, prenorm=True)
    expected = torch.autograd.grad(exact, leaves, exact)
    for _ in range(3):
        results = layer_norm_fn(**t, prenorm=True, out=out, residual_out=residual_out)
        assert not out.requires_grad and not residual_out.requires_grad
        for one, buffer, other in zip(results, (out, residual_out), exact):
            assert one.data_ptr() == buffer.data_ptr() and torch.equal(buffer, other)
        for one, other in zip(torch.autograd.grad(results, leaves, exact), expected):
            assert torch.equal(one, other)


def test_a_sum_that_was_overwritten_has_no_gradient():
    t = tensors(torch.float32, "x", "weight", "bias", "residual")
    residual_out = torch.empty(3, 5, N)
    y = layer_norm_fn(t.pop("x").requires_grad_(), **t, residual_out=residual_out)
    residual_out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients(is_rms_norm, zero_centered, dropout_p):
    """Of every input, through every output, against the plain composition with the same masks."""
    names = ("x", "residual", "x1", "weight", "bias", "weight1", "bias1")
    t = tensors(torch.float64, *names, rows=(4,))
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    y, y1, total, mask, mask1 = layer_norm_fn(
        **t,
        eps=EPS,
        dropout_p=dropout_p,
        prenorm=True,
        zero_centered_weight=zero_centered,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=True,
    )
    kept = (1.0, 1.0) if mask is None else (mask / (1 - dropout_p), mask1 / (1 - dropout_p))
    z = t["x"] * kept[0] + t["x1"] * kept[1] + t["residual"]
    plain = (
        plain_norm(z, t["weight"], t["bias"], is_rms_norm, zero_centered),
        plain_norm(z, t["weight1"], t["bias1"], is_rms_norm, zero_centered),
        z,
    )
    douts = [torch.randn_like(z) for _ in plain]
    for outputs in ((0, 1, 2), (0,), (1,), (2,)):
        chosen = [[all_[i] for i in outputs] for all_ in ((y, y1, total), plain, douts)]
        options = {"retain_graph": True, "allow_unused": True}
        actual = torch.autograd.grad(chosen[0], leaves, chosen[2], **options)
        exact = torch.autograd.grad(chosen[1], leaves, chosen[2], **options)
        for name, one, other in zip(names, actual, exact):
            other = torch.zeros_like(one) if other is None and one is not None else other
            assert (one is None and other is None) or torch.allclose(one, other), (outputs, name)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_gradcheck_with_scales(is_rms_norm):
    function = (
        ops_rms_norm.dropout_add_rms_norm if is_rms_norm else ops_layer_norm.dropout_add_layer_norm
    )
    t = tensors(torch.float64, "x", "residual", "weight", "bias", "rowscale", "colscale", rows=(3,))
    leaves = [tensor[..., :6].clone().requires_grad_() for tensor in t.values()]
    leaves[4] = t["rowscale"].requires_grad_()

    def call(x, residual, weight, bias, rowscale, colscale):
        return function(x, residual, weight, bias, 0.0, EPS, rowscale, colscale, prenorm=True)

    assert gradcheck(call, leaves)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_keep_their_dtypes(is_rms_norm, dtype):
    t = tensors(dtype, "x", "weight", "bias", weight_dtype=torch.float32)
    residual = torch.randn(3, 5, N, requires_grad=True)
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
    y, total = layer_norm_fn(
        **leaves, residual=residual, eps=EPS, prenorm=True, is_rms_norm=is_rms_norm
    )
    dy, dtotal = torch.randn_like(y), torch.randn_like(total)
    torch.autograd.backward((y, total), (dy, dtotal))
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    wide = residual.detach().double().requires_grad_()
    z = exact["x"] + wide
    plain = plain_norm(z, exact["weight"], exact["bias"], is_rms_norm)
    torch.autograd.backward((plain, z), (dy.double(), dtotal.double()))
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        assert_rounded_once(leaf.grad, exact[name].grad, slack=1e-5)
    assert residual.grad.dtype == torch.float32
    assert_rounded_once(residual.grad, wide.grad, slack=1e-5)


def test_strides_and_one_dimension():
    x, weight = torch.randn(N, 6).t(), torch.randn(N)
    exact = plain_norm(x.double(), weight.double(), None, True)
    assert_rounded_once(rms_norm_fn(x, weight, None, eps=EPS), exact, slack=5e-6)
    assert_rounded_once(rms_norm_fn(x[0], weight, None, eps=EPS), exact[0], slack=5e-6)
    assert rms_norm_fn(torch.zeros(0, N), weight, None).shape == (0, N)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", ["x", "residual", "both", "x alone"])
def test_results_are_contiguous(is_rms_norm, dtype, strided):
    """Whatever the strides of the inputs, so that clients may view() them."""
    linear_weight = torch.randn(7, N).to(dtype)
    for order in ((1, 0, 2), (2, 1, 0)):
        t = tensors(dtype, "x", "residual", "weight", "weight1")
        permuted = {
            name: t[name].permute(order).contiguous().permute(order)
            for name in (("x", "residual") if strided == "both" else (strided.split()[0],))
        }
        if strided == "x alone":
            del t["residual"]
        options = {"bias": None, "prenorm": True, "is_rms_norm": is_rms_norm}
        results = layer_norm_fn(**{**t, **permuted}, **options)
        for one, other in zip(results, layer_norm_fn(**t, **options)):
            assert torch.equal(one.view(-1, N), other.view(-1, N))
        t = {**t, **permuted}
        out, z = layer_norm_linear_fn(
            t["x"],
            t["weight"],
            None,
            linear_weight,
            None,
            t.get("residual"),
            prenorm=True,
            is_rms_norm=is_rms_norm,
        )
        assert out.view(-1, 7).shape == (15, 7) and torch.equal(z.view(-1, N), other.view(-1, N))


def test_contiguous_inputs_are_not_copied():
    x, weight = torch.randn(3, N), torch.ones(N)
    assert rms_norm_fn(x, weight, None, prenorm=True)[1].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_linear", [False, True])
def test_gradients_are_of_first_order_only(is_rms_norm, with_residual, dtype, with_linear):
    """Whichever of the inputs require them."""
    names = ["x", "weight", "bias", *(["residual"] if with_residual else [])]
    t = tensors(dtype, *names)
    linear_weight = torch.randn(7, N).to(dtype)

    def call(x, weight, bias, residual=None):
        options = {"residual": residual, "eps": EPS, "is_rms_norm": is_rms_norm}
        if with_linear:
            return layer_norm_linear_fn(x, weight, bias, linear_weight, None, **options)
        return layer_norm_fn(x, weight, bias, **options)

    for requiring in (*names[:2], *names[3:], names):
        for name, tensor in t.items():
            tensor.requires_grad_(name in requiring)
        assert_first_order_only(call, *t.values())


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_references(is_rms_norm, dtype):
    """The reference functions, which clients' tests call, agree with the functions."""
    names = ("x", "residual", "x1", "weight", "bias", "weight1", "bias1")
    t = tensors(dtype, *names)
    options = {"eps": EPS, "prenorm": True, "zero_centered_weight": True}
    reference, function = (
        (rms_norm_ref, rms_norm_fn) if is_rms_norm else (layer_norm_ref, layer_norm_fn)
    )
    upcast = reference(**t, **options, upcast=True)
    for one, other in zip(upcast, function(**t, **options)):
        torch.testing.assert_close(one.to(dtype), other, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        reference(t["x"], t["weight"], None, eps=EPS, upcast=True),
        function(t["x"], t["weight"], None, eps=EPS),
    )
    p, mask = 0.5, torch.rand(3, 5, N) < 0.5
    z = reference(t["x"], t["weight"], None, dropout_p=p, dropout_mask=mask, prenorm=True)[1]
    torch.testing.assert_close(z, t["x"] * mask * 2)
    scale = torch.rand(3, 5).to(dtype)
    z = reference(t["x"], t["weight"], None, rowscale=scale, prenorm=True)[1]
    torch.testing.assert_close(z, t["x"] * scale[..., None])


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_and_linear(is_rms_norm, with_residual):
    t = tensors(torch.float64, "x", "weight", "bias", "residual", rows=(4,))
    linear_weight = torch.randn(7, N, dtype=torch.float64)
    linear_bias = torch.randn(7, dtype=torch.float64)
    leaves = [*t.values(), linear_weight, linear_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    residual = t["residual"] if with_residual else None
    out, total = layer_norm_linear_fn(
        t["x"],
        t["weight"],
        t["bias"],
        linear_weight,
        linear_bias,
        residual,
        EPS,
        True,
        is_rms_norm=is_rms_norm,
    )
    z = t["x"] + t["residual"] if with_residual else t["x"] * 1.0
    plain = F.linear(plain_norm(z, t["weight"], t["bias"], is_rms_norm), linear_weight, linear_bias)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(total, z)
    douts = (torch.randn_like(out), torch.randn_like(z))
    used = [leaf for leaf in leaves if with_residual or leaf is not t["residual"]]
    actual = torch.autograd.grad((out, total), used, douts)
    exact = torch.autograd.grad((plain, z), used, douts)
    for one, other in zip(actual, exact):
        torch.testing.assert_close(one, other)
    alone = layer_norm_linear_fn(
        t["x"], t["weight"], None, linear_weight, None, eps=EPS, is_rms_norm=is_rms_norm
    )
    plain = F.linear(plain_norm(t["x"], t["weight"], None, is_rms_norm), linear_weight)
    torch.testing.assert_close(alone, plain)


def test_norm_and_linear_under_autocast():
    t = tensors(torch.float32, "x", "weight", "bias")
    linear = torch.nn.Linear(N, 7)
    x = t["x"].requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = layer_norm_linear_fn(x, t["weight"], t["bias"], linear.weight, linear.bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == linear.weight.grad.dtype == torch.float32
    exact = F.linear(
        F.layer_norm(x, (N,), t["weight"], t["bias"], 1e-6), linear.weight, linear.bias
    )
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_names_of_the_extension(is_rms_norm, prenorm):
    """dropout_add_*: scales, masks as bytes, and ones without dropout."""
    t = tensors(torch.float32, "x", "residual", "weight", "bias", "rowscale", "colscale")
    d = {name: tensor.double() for name, tensor in t.items()}
    module = ops_rms_norm if is_rms_norm else ops_layer_norm
    function = module.dropout_add_rms_norm if is_rms_norm else module.dropout_add_layer_norm
    results = function(
        *(t[name] for name in ("x", "residual", "weight", "bias")),
        0.25,
        EPS,
        t["rowscale"],
        t["colscale"],
        prenorm,
        return_dropout_mask=True,
    )
    mask = results[-1]
    assert len(results) == 2 + prenorm and mask.dtype == torch.uint8
    z = d["x"] * d["rowscale"][..., None] * d["colscale"] * mask / 0.75 + d["residual"]
    exact = plain_norm(z, d["weight"], d["bias"], is_rms_norm)
    assert_rounded_once(results[0], exact, slack=5e-6)
    if prenorm:
        assert_rounded_once(results[1], z)
    y, ones = function(t["x"], None, t["weight"], t["bias"], 0.0, EPS, return_dropout_mask=True)
    assert ones.all() and ones.dtype == torch.uint8
    assert_rounded_once(y, plain_norm(d["x"], d["weight"], d["bias"], is_rms_norm), slack=5e-6)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_parallel_residual(is_rms_norm):
    t = tensors(torch.float32, "x", "x1", "residual", "weight", "bias", "weight1", "bias1")
    function = (
        ops_rms_norm.dropout_add_rms_norm_parallel_residual
        if is_rms_norm
        else ops_layer_norm.dropout_add_layer_norm_parallel_residual
    )
    d = {name: tensor.double() for name, tensor in t.items()}
    y, y1, total, mask, mask1 = function(*t.values(), 0.25, EPS, True, return_dropout_mask=True)
    z = (d["x"] * mask + d["x1"] * mask1) / 0.75 + d["residual"]
    assert_rounded_once(total, z)
    assert_rounded_once(y, plain_norm(z, d["weight"], d["bias"], is_rms_norm), slack=5e-6)
    assert_rounded_once(y1, plain_norm(z, d["weight1"], d["bias1"], is_rms_norm), slack=5e-6)
    y, none = function(t["x"], None, None, t["weight"], None, None, None, 0.0, EPS)
    assert none is None
    assert_rounded_once(y, plain_norm(d["x"], d["weight"], None, is_rms_norm), slack=5e-6)


def test_modules():
    x, residual = torch.randn(2, 3, 5, N)
    for module in (
        RMSNorm(N, eps=EPS),
        RMSNorm(N, eps=EPS, zero_centered_weight=True),
        ops_rms_norm.RMSNorm(N, eps=EPS),
        ops_rms_norm.DropoutAddRMSNorm(N, eps=EPS),
    ):
        one = torch.ones(N, dtype=torch.float64)
        assert_rounded_once(module(x).detach(), plain_norm(x.double(), one, None, True), slack=5e-6)
        assert sorted(module.state_dict()) == ["weight"] and module.bias is None
    module = ops_layer_norm.DropoutAddLayerNorm(N, prenorm=True, p=0.5, eps=EPS).eval()
    y, total = module(x, residual)
    z = x.double() + residual.double()
    assert_rounded_once(y.detach(), plain_norm(z, 1.0, None, False), slack=5e-6)
    assert_rounded_once(total.detach(), z)
    y, total = RMSNorm(N, dropout_p=0.5).train()(x, residual=residual, prenorm=True)
    dropped = (total - residual).abs() < 1e-6
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close((total - residual)[~dropped], 2.0 * x[~dropped])


def test_wrong_arguments_are_refused():
    x, weight = torch.zeros(2, N), torch.zeros(N)
    for change, message in (
        ({"residual": torch.zeros(2, N - 1)}, "residual: must have x's shape"),
        ({"x1": torch.zeros(N)}, "x1: must have x's shape"),
        ({"weight": torch.zeros(N - 1)}, rf"weight: must have shape \[{N}\]"),
        ({"bias": torch.zeros(1)}, "bias: must have shape"),
        ({"bias1": weight}, "bias1: needs weight1"),
        ({"rowscale": torch.zeros(3)}, r"rowscale: must have shape \[2\]"),
        ({"dropout_p": 1.5}, "dropout_p"),
        ({"weight": None}, "weight: must be given, is None"),
        ({"x": x.long()}, r"x: must be of a floating dtype, is torch\.int64"),
        ({"residual": x.int()}, r"residual: must be of a floating dtype, is torch\.int32"),
        ({"x1": x.bool()}, r"x1: must be of a floating dtype, is torch\.bool"),
        ({"out": x.long()}, r"out: must be of a floating dtype, is torch\.int64"),
        ({"out": torch.zeros(1, 2, N)}, "out: must have x's shape"),
        ({"residual_out": torch.zeros(3, N)}, "residual_out: must have x's shape"),
    ):
        for function in (layer_norm_fn, rms_norm_fn):
            with pytest.raises(ValueError, match=message):
                function(**{"x": x, "weight": weight, "bias": None, **change})
    for function in (ops_layer_norm.dropout_add_layer_norm, ops_rms_norm.dropout_add_rms_norm):
        with pytest.raises(ValueError, match="weight: must be given, is None"):
            function(x, None, None, None, 0.0, EPS)


def test_wrong_arguments_of_norm_and_linear_are_refused():
    x, weight = torch.zeros(2, N), torch.zeros(N)
    right = {"norm_weight": weight, "norm_bias": None, "linear_weight": torch.zeros(7, N)}
    for change, message in (
        ({"norm_weight": torch.ones(1)}, rf"norm_weight: must have shape \[{N}\], has \[1\]"),
        ({"norm_weight": torch.ones(7)}, rf"norm_weight: must have shape \[{N}\], has \[7\]"),
        ({"norm_weight": None}, "norm_weight: must be given, is None"),
        ({"norm_bias": torch.ones(1)}, rf"norm_bias: must have shape \[{N}\], has \[1\]"),
        ({"linear_weight": torch.ones(7, 1)}, rf"linear_weight: must have shape \[7, {N}\]"),
        ({"linear_weight": weight}, "linear_weight: must have shape"),
        ({"linear_weight": None}, "linear_weight: must be given, is None"),
        ({"linear_bias": torch.ones(1)}, r"linear_bias: must have shape \[7\], has \[1\]"),
        ({"residual": torch.zeros(1, N)}, "residual: must have x's shape"),
        ({"x": x.long()}, r"x: must be of a floating dtype, is torch\.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_norm_linear_fn(**{"x": x, "linear_bias": None, **right, **change})


def test_as_nanotron_and_xtuner_use_it():
    """TritonRMSNorm's call, and rms_norm_fn with bias by keyword."""
    t = tensors(torch.bfloat16, "x", "residual", "weight")
    out = layer_norm_fn(
        t["x"],
        t["weight"],
        None,
        residual=t["residual"],
        eps=EPS,
        dropout_p=0.0,
        prenorm=False,
        residual_in_fp32=False,
        is_rms_norm=True,
        return_dropout_mask=False,
    )
    z = t["x"].double() + t["residual"].double()
    assert_rounded_once(out, plain_norm(z, t["weight"].double(), None, True), slack=5e-6)
    again = rms_norm_fn(t["x"], t["weight"], bias=None, residual=t["residual"], eps=EPS)
    assert torch.equal(again, out)


def test_as_axolotl_uses_it():
    """A norm of transformers replaced by a subclass of RMSNorm."""

    class LlamaRMSNorm(ops_rms_norm.RMSNorm):
        def __init__(self, hidden_size, eps=1e-6):
            super().__init__(hidden_size, eps=eps)

    x = torch.randn(2, 3, N, dtype=torch.bfloat16)
    out = LlamaRMSNorm(N, EPS).to(torch.bfloat16)(x)
    assert_rounded_once(out.detach(), plain_norm(x.double(), 1.0, None, True), slack=5e-6)
