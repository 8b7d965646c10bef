"""What the tests of the names around attention share: one measure of rounding, plain attention."""

from __future__ import annotations

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, slack: float = 2e-6) -> None:
    """actual is exact (fp64), computed in fp32 and rounded to actual's dtype."""
    assert actual.shape == exact.shape
    info = torch.finfo(actual.dtype)
    unit = 0.5 * info.eps if actual.dtype != torch.float32 else 0.0
    # An absolute part for sums that cancel, and the spacing of subnormal numbers.
    allowed = (unit + slack) * exact.abs() + slack * exact.abs().mean() + info.smallest_normal
    worst = ((actual.double() - exact).abs() / allowed).max().item() if exact.numel() else 0.0
    assert worst <= 1.0, f"off by {worst:.3g} times what rounding allows"


def assert_first_order_only(function, *tensors):
    """function's gradients are the same with create_graph=True, and raise when differentiated
    again, also as a part of a sum."""
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    expected = torch.autograd.grad(function(*tensors).square().sum(), leaves)
    for weighed in (False, True):
        out = function(*tensors)
        dout = out.detach().clone().requires_grad_() if weighed else torch.ones_like(out)
        gradients = torch.autograd.grad(out, leaves, dout, create_graph=True)
        for gradient in gradients:
            assert gradient.requires_grad
            penalty = gradient.square().sum() + sum(leaf.square().sum() for leaf in leaves)
            for inputs in (leaves, leaves[:1]):
                with pytest.raises(NotImplementedError, match="second-order gradients"):
                    torch.autograd.grad(penalty, inputs, retain_graph=True, allow_unused=True)
            with pytest.raises(NotImplementedError, match="second-order gradients"):
                penalty.backward(retain_graph=True)
    for gradient, exact in zip(gradients, expected):
        torch.testing.assert_close(2.0 * gradient, exact)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [B, Sq, H, D], k and v [B, Sk, Hk, D], visible [B or 1, 1, Sq, Sk] -> [B, Sq, H, D]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def not_after(seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """Causal visibility, aligned to the bottom right: [1, 1, Sq, Sk]."""
    return torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
