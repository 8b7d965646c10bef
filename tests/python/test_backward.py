"""Gradients of the public functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import DTYPES, offsets, same_bits, tensors, varlen_tensors

from flash_attn import (
    _native,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn._attention import Options, _arguments, draw_seed

# Of max |gradient - oracle| / bound; those of tests/cpp/backward_test.cc.
GRADIENT_BOUND = {torch.float32: 4e-6, torch.float16: 2 * 2.0**-11, torch.bfloat16: 2 * 2.0**-8}
# A result may be lost below this.
UNDERFLOW = {torch.float32: 2.0**-112, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-112}


@pytest.fixture(autouse=True)
def gradients_are_recorded() -> Iterator[None]:
    with torch.enable_grad():
        yield


def options_of(**options: Any) -> Options:
    defaults: dict[str, Any] = dict(
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    )
    return Options(**{**defaults, **options})


def oracle(
    inputs: dict[str, torch.Tensor], dout: torch.Tensor, options: Options, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients in fp64 and their bounds, of q, k, v and of what there is beside."""
    names = ("q", "k", "v", "attn_bias", "learnable_sink")

    def like_inputs() -> list[torch.Tensor | None]:
        return [
            torch.zeros(inputs[name].shape, dtype=torch.float64) if name in inputs else None
            for name in names
        ]

    plain = {name: inputs[name].detach() for name in inputs}
    bias, sink = plain.get("attn_bias"), plain.get("learnable_sink")
    q, k, v = plain["q"], plain["k"], plain["v"]
    with torch.no_grad():
        gradients, bounds = like_inputs(), like_inputs()
        # The oracle computes out and lse by itself.
        arguments = _arguments(q, k, v, None, None, None, bias, sink, options, seed)
        _native.backward_oracle(dout, *gradients, *bounds, *arguments)
    return [x for x in gradients if x is not None], [x for x in bounds if x is not None]


def check(function: Any, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """The gradients that autograd gives meet the oracle."""
    for tensor in inputs.values():
        tensor.requires_grad_()
    torch.manual_seed(7)
    out = function(**inputs, **options)
    dout = torch.randn(out.shape).to(out.dtype)
    actual = torch.autograd.grad(out, list(inputs.values()), dout)
    torch.manual_seed(7)
    seed = draw_seed() if options.get("dropout_p") else 0
    expected, bounds = oracle(inputs, dout, options_of(**options), seed)
    dtype = inputs["q"].dtype
    for name, got, want, bound in zip(inputs, actual, expected, bounds):
        error = (got.double() - want).abs() - UNDERFLOW[dtype]
        ratio = torch.where(error > 0, error / bound, 0.0)
        worst = ratio.max().item() if ratio.numel() else 0.0
        assert worst <= GRADIENT_BOUND[dtype], f"d{name} is off by {worst:.3g}"


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 5)},
    "softcap": {"softcap": 3.0},
    "scale": {"softmax_scale": 0.3},
    "dropout": {"dropout_p": 0.3},
    "alibi": {"alibi_slopes": torch.tensor([0.02, 0.05, 0.1, 0.2]), "causal": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_dense_gradients_meet_the_oracle(case, dtype):
    check(flash_attn_func, dict(zip("qkv", tensors(dtype=dtype))), **CASES[case])


@pytest.mark.parametrize("shape", [(2, 4, 65, 97), (1, 1, 1, 97), (2, 1, 65, 97), (65, 97), ()])
def test_attn_bias_has_a_gradient(shape):
    inputs = dict(zip("qkv", tensors())) | {"attn_bias": torch.randn(shape)}
    check(flash_attn_func, inputs)


def test_learnable_sink_has_a_gradient():
    inputs = dict(zip("qkv", tensors())) | {"learnable_sink": torch.randn(4)}
    check(flash_attn_func, inputs, causal=True)


def test_a_boolean_bias_hides_and_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors())
    mask = torch.rand(2, 1, 65, 97) > 0.3
    out = flash_attn_func(q, k, v, attn_bias=mask)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    same = flash_attn_func(q, k, v, attn_bias=additive)
    dout = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(same, (q, k, v), dout)
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_gradients_meet_the_oracle(dtype):
    lengths_q, lengths_k = [30, 0, 65, 7], [40, 9, 65, 0]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=dtype)
    check(
        flash_attn_varlen_func,
        {"q": q, "k": k, "v": v},
        cu_seqlens_q=offsets(lengths_q),
        cu_seqlens_k=offsets(lengths_k),
        max_seqlen_q=65,
        max_seqlen_k=65,
        causal=True,
    )


def test_gradients_agree_with_a_plain_attention_in_fp64():
    q, k, v = (x.requires_grad_() for x in tensors(num_heads=4, num_heads_kv=4))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", exact[0], exact[1]) / 8
    mask = torch.ones(65, 97, dtype=torch.bool).tril(32)
    probabilities = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected_out = torch.einsum("bhij,bjhd->bihd", probabilities, exact[2])
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(expected_out, exact, dout.double())
    for got, want in zip(actual, expected):
        assert (got - want).abs().max() < 2e-5


def test_packed_gradients_are_packed_and_equal_those_of_the_parts():
    qkv = torch.randn(2, 50, 3, 4, 32, requires_grad=True)
    dout = torch.randn(2, 50, 4, 32)
    (packed,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
    parts = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(2)]
    separate = torch.autograd.grad(flash_attn_func(*parts, causal=True), parts, dout)
    assert packed.is_contiguous() and torch.equal(packed, torch.stack(separate, 2))
    q, kv = parts[0], torch.stack([x.detach() for x in parts[1:]], 2).requires_grad_()
    dq, dkv = torch.autograd.grad(flash_attn_kvpacked_func(q, kv, causal=True), (q, kv), dout)
    assert torch.equal(dq, separate[0]) and torch.equal(dkv, torch.stack(separate[1:], 2))
    flat = qkv.detach().flatten(0, 1).requires_grad_()
    out = flash_attn_varlen_qkvpacked_func(flat, offsets([50, 50]), 50, causal=True)
    (dflat,) = torch.autograd.grad(out, flat, dout.flatten(0, 1))
    assert torch.equal(dflat, packed.flatten(0, 1))


def test_gradients_are_bitwise_equal_for_every_number_of_threads():
    q, k, v = (x.requires_grad_() for x in tensors(2, 200, 260, dtype=torch.bfloat16))
    dout = torch.randn(2, 200, 4, 64).bfloat16()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        out = flash_attn_func(q, k, v, dropout_p=0.1, causal=True)
        results.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_broadcast_dout_and_unusual_strides():
    q, k, v = tensors(num_heads_kv=4)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    plain = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(flash_attn_func(*plain).sum(), plain)
    actual = torch.autograd.grad(flash_attn_func(*strided).sum(), strided)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    last = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in plain]
    actual = torch.autograd.grad(flash_attn_func(*last).sum(), last)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_only_what_requires_a_gradient_gets_one():
    q, k, v = tensors()
    bias = torch.zeros(65, 97, requires_grad=True)
    flash_attn_func(q, k, v, attn_bias=bias).sum().backward()
    assert bias.grad is not None and q.grad is None


def test_softmax_lse_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors())
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.requires_grad and not lse.requires_grad


def test_a_gradient_through_pages_is_refused():
    q, k, v = tensors(1, 4, 16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    q = q[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q, k, v, offsets([4]), offsets([16]), 4, 16, block_table=table)


def test_no_queries_give_zero_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(2, 0, 5))
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v))
    assert dq.shape == q.shape and not dk.any() and not dv.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_head_is_differentiated_alike_by_one_task_and_by_many(dtype):
    """Long heads are cut into chunks of keys; few threads take them whole, many chunk by chunk."""
    threads = torch.get_num_threads()
    q, k, v = (x.requires_grad_() for x in tensors(1, 1100, 1100, 2, 2, 128, dtype=dtype))
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            out = flash_attn_func(q, k, v, causal=True)
            results.append(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    finally:
        torch.set_num_threads(threads)
    exact = [x.detach().double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(*exact, is_causal=True)
    for gradients in results[1:]:
        assert all(map(torch.equal, gradients, results[0]))
    wanted = torch.autograd.grad(out, exact, torch.ones_like(out))
    for gradient, oracle in zip(results[0], wanted):
        error = (gradient.double() - oracle.transpose(1, 2)).abs().max()
        assert error <= GRADIENT_BOUND[dtype] * oracle.abs().max()


def test_a_bias_behind_a_sequences_end_does_not_leak():
    lengths_q, lengths_k = [30, 9], [40, 21]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    bias = torch.randn(2, 4, 30, 40)
    wrong = bias.clone()
    wrong[1, :, 9:] = wrong[1, :, :, 21:] = math.nan

    def gradients(bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.requires_grad_() for x in varlen_tensors(lengths_q, lengths_k))
        bias = bias.clone().requires_grad_()
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 40, attn_bias=bias)
        return torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    for actual, expected in zip(gradients(wrong), gradients(bias)):
        assert same_bits(actual, expected)
