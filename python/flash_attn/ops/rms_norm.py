"""Dropout, residual and RMS norm in one, under the names of the original's CUDA extension.

    z = dropout(x0 * rowscale * layerscale) + residual,    y = z / rms(z) * weight + bias

Computed in fp32 on every device; the formulas stand in ops._norm.
"""

from __future__ import annotations

from typing import Any

import torch

from ._norm import NormOptions, add_norm
from .layer_norm import DropoutAddNorm, Outputs, parallel_outputs, single_outputs

__all__ = [
    "DropoutAddRMSNorm",
    "RMSNorm",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "rms_norm",
]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm over the last dimension of x [..., N], in x's dtype."""
    return add_norm(x, weight, None, NormOptions(eps=epsilon, is_rms_norm=True)).y


def dropout_add_rms_norm(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    rowscale=None,
    layerscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
) -> Outputs:
    """RMS norm of dropout(x0 * rowscale * layerscale) + residual.

    Arguments, results and errors are those of ops.layer_norm.dropout_add_layer_norm.
    """
    options = NormOptions(epsilon, dropout_p, prenorm, residual_in_fp32, is_rms_norm=True)
    result = add_norm(
        x0, weight, bias, options, residual=residual, rowscale=rowscale, colscale=layerscale
    )
    return single_outputs(result, prenorm, return_dropout_mask)


def dropout_add_rms_norm_parallel_residual(
    x0,
    x1,
    residual,
    weight0,
    bias0,
    weight1,
    bias1,
    dropout_p,
    epsilon,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
) -> Outputs:
    """Two RMS norms, of different weights, of dropout(x0) + dropout(x1) + residual.

    Arguments, results and errors are those of
    ops.layer_norm.dropout_add_layer_norm_parallel_residual.
    """
    options = NormOptions(epsilon, dropout_p, prenorm, residual_in_fp32, is_rms_norm=True)
    result = add_norm(
        x0, weight0, bias0, options, residual=residual, x1=x1, weight1=weight1, bias1=bias1
    )
    return parallel_outputs(result, prenorm, return_dropout_mask)


class RMSNorm(torch.nn.Module):
    """rms_norm with its weight [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., hidden_size], in x's dtype."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(DropoutAddNorm):
    """dropout_add_rms_norm with its weight [hidden_size]; dropout in training only."""

    function = staticmethod(dropout_add_rms_norm)
    has_bias = False
