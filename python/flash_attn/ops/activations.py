"""Activation functions and their gradients: GELU by its tanh approximation, squared ReLU, SwiGLU.

Functions ending in _bwd and _back are gradients, for backward passes that are written by hand; the
others are differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._first_order import Tensors, first_order_only

__all__ = [
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]


def gelu_fwd(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of gelu_fwd at x, times g; in x's dtype."""
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh").to(x.dtype)


def fast_gelu_impl(input: torch.Tensor) -> torch.Tensor:
    """gelu_fwd, differentiable."""
    return gelu_fwd(input)


def bias_gelu(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_fwd(y + bias), in y's dtype; y [..., N], bias [N]."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(
    g: torch.Tensor, y: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of bias_gelu in y and in bias, times g; in the dtypes of y and bias."""
    dx = gelu_bwd(g, y + bias)
    return dx.to(y.dtype), dx.reshape(-1, dx.shape[-1]).sum(0, dtype=bias.dtype)


def bias_gelu_impl(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """bias_gelu, differentiable in both."""
    return bias_gelu(input, bias)


def relu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g where x >= 0, else 0; in x's dtype."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (So et al., "Primer", 2021)."""
    return F.relu(x).square()


def sqrelu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of sqrelu_fwd at x, times g; in x's dtype."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


def swiglu_fwd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x) y, computed in fp32 and rounded once (Shazeer, "GLU Variants", 2020)."""
    out = F.silu(x.to(_dtype_of_computation(x))) * y
    return out.to(torch.promote_types(x.dtype, y.dtype))


def swiglu_bwd(
    x: torch.Tensor, y: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of swiglu_fwd in x and in y, times g; in the dtypes of x and y."""
    dtype = _dtype_of_computation(x)
    x_, g_ = x.to(dtype), g.to(dtype)
    dx = torch.ops.aten.silu_backward(g_ * y, x_)
    return dx.to(x.dtype), (F.silu(x_) * g_).to(y.dtype)


class _SwiGLU(torch.autograd.Function):
    """Keeps x and y alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: Tensors, dout: torch.Tensor) -> Tensors:
        return swiglu_bwd(*saved, dout)


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x) y, differentiable; x and y are of one shape, the result of their common dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"x, y: must have one shape, have {list(x.shape)} and {list(y.shape)}")
    return _SwiGLU.apply(x, y)


def _dtype_of_computation(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
