"""Eager calls under what PyTorch wraps around them: autocast, checkpointing, torch.func."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import offsets, same_bits, tensors
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)


@pytest.fixture(autouse=True)
def gradients_are_recorded() -> Iterator[None]:
    with torch.enable_grad():
        yield


def leaves(*arguments: int, **options: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.requires_grad_() for x in tensors(*arguments, **options))


def test_autocast_casts_nothing_forward_or_backward():
    q, k, v = leaves()
    expected = flash_attn_func(q, k, v)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v)
        assert same_bits(out.detach(), expected.detach())
        again = torch.autograd.grad(out, (q, k, v), dout)
        assert all(same_bits(a, b) for a, b in zip(gradients, again))
        # As in the original: what a linear layer gives and what it was given do not mix.
        with pytest.raises(ValueError, match=r"k: dtype is float32.*bfloat16"):
            flash_attn_func(q.bfloat16(), k, v)


def test_autocast_around_a_model_keeps_its_dtypes():
    x = torch.randn(2, 9, 32)
    projection = torch.nn.Linear(32, 3 * 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        qkv = projection(x).unflatten(-1, (3, 4, 8))
        out = flash_attn_qkvpacked_func(qkv, causal=True)
    assert out.dtype == qkv.dtype == torch.bfloat16
    out.float().sum().backward()
    assert projection.weight.grad is not None and projection.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_dropout_mask(use_reentrant):
    q, k, v = leaves(1, 40, 40)

    def step(q, k, v):
        # Two draws: the second is replayed only where the first is.
        return flash_attn_func(flash_attn_func(q, k, v, 0.5), k, v, 0.5)

    results = []
    for run in (step, lambda *inputs: checkpoint(step, *inputs, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        out = run(q, k, v)
        torch.rand(3)  # the generator moves on before the backward
        for x in (q, k, v):
            x.grad = None
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in (q, k, v))])
    assert all(same_bits(a, b) for a, b in zip(*results))


def calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list:
    lengths = offsets([q.shape[-3]])
    one_head = k[..., :1, :]
    return [
        lambda q: flash_attn_func(q, k, v),
        lambda q: flash_attn_kvpacked_func(q, torch.stack((k, v), 2)),
        lambda q: flash_attn_varlen_func(q[0], k[0], v[0], lengths, lengths, 16, 16),
        lambda q: flash_attn_with_kvcache(q, one_head, one_head, cache_seqlens=3),
    ]


@pytest.mark.parametrize("call", range(4))
def test_transforms_are_refused_by_name(call):
    q, k, v = tensors(1, 16, 16)
    function = calls(q, k, v)[call]
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap.*batch"):
        torch.func.vmap(function)(q[None].repeat(2, 1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad.*torch\.autograd\.grad"):
        torch.func.grad(lambda q: function(q).sum())(q)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.jvp"):
        torch.func.jvp(function, (q,), (q,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=r"forward_ad"):
            function(forward_ad.make_dual(q, q))
        assert function(q).shape[-1] == q.shape[-1]  # nothing dual: nothing to refuse


def test_gradients_of_many_vectors_at_once_are_refused_by_name():
    q, k, v = (x.requires_grad_() for x in tensors(1, 16, 16))
    out = flash_attn_func(q, k, v)
    vectors = torch.ones(3, *out.shape)
    with pytest.raises(NotImplementedError, match=r"vmap.* its gradient .*loop"):
        torch.autograd.grad(out, (q, k, v), vectors, is_grads_batched=True)


@pytest.mark.parametrize("call", [0, 3])
def test_what_transforms_do_not_touch_is_computed(call):
    q, k, v = tensors(1, 17, 16)
    function = calls(q, k, v)[call]
    for _ in range(2):  # then it is a call of a kind that is known

        def around(x: torch.Tensor) -> torch.Tensor:
            return x + function(q)

        zeros = torch.zeros_like(q)
        batched = torch.func.vmap(around)(torch.stack((zeros, zeros)))
        gradient = torch.func.grad(lambda x: around(x).sum())(zeros)
        out, _ = torch.func.jvp(around, (zeros,), (zeros,))
        expected = function(q).detach()
        assert all(same_bits(x, expected) for x in (*batched, out)) and gradient.eq(1).all()


def test_forward_mode_through_a_bias_or_sink_is_refused():
    q, k, v = tensors(1, 16, 16)
    bias, sink = torch.zeros(16, 16), torch.zeros(4)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward_ad"):
            flash_attn_func(q, k, v, attn_bias=forward_ad.make_dual(bias, bias))
        with pytest.raises(NotImplementedError, match="forward_ad"):
            flash_attn_func(q, k, v, learnable_sink=forward_ad.make_dual(sink, sink))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda bias: flash_attn_func(q, k, v, attn_bias=bias))(bias[None])


@pytest.mark.parametrize("probabilities", [False, True])
def test_second_order_gradients_are_refused_only_where_they_are_taken(probabilities):
    q, k, v = leaves(1, 16, 16)
    other = torch.randn(3, requires_grad=True)
    out = flash_attn_func(q, k, v, return_attn_probs=probabilities)
    out = out[0] if probabilities else out
    dout = torch.randn_like(out).requires_grad_()
    dq, dother = torch.autograd.grad(
        (out, other.pow(3)), (q, other), (dout, torch.ones(3)), create_graph=True
    )
    (plain,) = torch.autograd.grad(flash_attn_func(q, k, v), q, dout)
    assert same_bits(dq.detach(), plain)
    dother.sum().backward()
    assert torch.allclose(other.grad, 6 * other)
    for input in (q, dout):
        with pytest.raises(NotImplementedError, match="second-order gradients of attention"):
            torch.autograd.grad(dq.sum(), input, retain_graph=True)


def test_anomaly_detection_and_hooks_on_saved_tensors():
    q, k, v = leaves(1, 16, 16)
    expected = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v))
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly():
        gradients = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v))
    assert all(same_bits(a, b) for a, b in zip(expected, gradients))
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        k += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
