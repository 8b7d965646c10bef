"""Dropout, residual and layer norm in one, under the names of the original's CUDA extension.

    z = dropout(x0 * rowscale * layerscale) + residual,    y = layer_norm(z) * weight + bias

Computed in fp32 on every device; the formulas stand in ops._norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._norm import NormOptions, NormResult, add_norm

__all__ = [
    "DropoutAddLayerNorm",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "layer_norm",
]

Outputs = torch.Tensor | tuple[torch.Tensor | None, ...]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Layer norm over the last dimension of x [..., N], in x's dtype."""
    return add_norm(x, weight, bias, NormOptions(eps=epsilon)).y


def dropout_add_layer_norm(
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
    """Layer norm of dropout(x0 * rowscale * layerscale) + residual.

    Arguments:
        x0: [..., N], any floating dtype.
        residual: None, or x0's shape.
        weight, bias: [N]; bias may be None.
        dropout_p: the probability of dropping an element.
        epsilon: added to the variance.
        rowscale: None, or x0's shape without its last dimension.
        layerscale: None, or [N].
        prenorm: whether to return the sum z too.
        residual_in_fp32: whether z is fp32 where residual is None; else z has residual's dtype.
        return_dropout_mask: whether to return the mask too, uint8, 1 where kept.

    Returns:
        y [..., N] in x0's dtype; or a tuple of those that are asked for, of (y, z, mask).

    Raises:
        ValueError: a shape or a dtype does not fit, or weight is None.
    """
    options = NormOptions(epsilon, dropout_p, prenorm, residual_in_fp32)
    result = add_norm(
        x0, weight, bias, options, residual=residual, rowscale=rowscale, colscale=layerscale
    )
    return single_outputs(result, prenorm, return_dropout_mask)


def single_outputs(result: NormResult, prenorm: bool, masks: bool) -> Outputs:
    """What a function with one output returns."""
    outputs = [result.y]
    if prenorm:
        outputs.append(result.z)
    if masks:
        outputs.append(_as_bytes(result.mask, result.y))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def parallel_outputs(result: NormResult, prenorm: bool, masks: bool) -> Outputs:
    """What a function with two outputs returns."""
    outputs = [result.y, result.y1]
    if prenorm:
        outputs.append(result.z)
    if masks:
        outputs.extend(_as_bytes(mask, result.y) for mask in (result.mask, result.mask1))
    return tuple(outputs)


def _as_bytes(mask: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return torch.ones(y.shape, dtype=torch.uint8, device=y.device)
    return mask.view(torch.uint8)


def dropout_add_layer_norm_parallel_residual(
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
    """Two layer norms, of different weights, of dropout(x0) + dropout(x1) + residual.

    Arguments:
        x0: [..., N]. x1, residual: None, or x0's shape.
        weight0, bias0, weight1, bias1: [N]; the biases and weight1 may be None.
        The other arguments are those of dropout_add_layer_norm.

    Returns:
        (y0, y1), y1 None without weight1; and, where asked for, z, and the masks of x0 and x1.

    Raises:
        ValueError: a shape or a dtype does not fit, or weight0 is None.
    """
    options = NormOptions(epsilon, dropout_p, prenorm, residual_in_fp32)
    result = add_norm(
        x0, weight0, bias0, options, residual=residual, x1=x1, weight1=weight1, bias1=bias1
    )
    return parallel_outputs(result, prenorm, return_dropout_mask)


class DropoutAddNorm(torch.nn.Module):
    """What DropoutAddLayerNorm and ops.rms_norm.DropoutAddRMSNorm share."""

    function: Callable[..., Outputs]  # dropout_add_layer_norm, or dropout_add_rms_norm
    has_bias: bool

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = torch.empty_like(self.weight) if self.has_bias else None
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x0: torch.Tensor, residual: torch.Tensor | None = None) -> Outputs:
        """y [..., hidden_size]; with prenorm (y, z)."""
        return self.function(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


class DropoutAddLayerNorm(DropoutAddNorm):
    """dropout_add_layer_norm with its weight and bias [hidden_size]; dropout in training only."""

    function = staticmethod(dropout_add_layer_norm)
    has_bias = True
