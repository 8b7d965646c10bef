"""Layer norm and RMS norm of a sum, under the original's names.

    z = dropout(x * rowscale) + dropout(x1) + residual
    y = norm(z) * weight + bias,    y1 = norm(z) * weight1 + bias1

Computed in fp32 on every device; the formulas stand in ops._norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .._norm import NormOptions, NormResult, add_norm, norm_linear

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]

Outputs = torch.Tensor | tuple[torch.Tensor | None, ...]


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
) -> Outputs:
    """The norm of x, or of a sum of x and others.

    Arguments:
        x: [..., N], any floating dtype.
        weight, bias: [N]; bias may be None.
        residual: None, or x's shape; added after dropout.
        x1: None, or x's shape; added after a dropout of its own. Not together with rowscale.
        weight1, bias1: None, or [N], for a second output of the same normalized sum.
        eps: added to the variance.
        dropout_p: the probability of dropping an element of x, and of x1.
        rowscale: None, or x's shape without its last dimension; multiplies the rows of x.
        prenorm: whether to return the sum z too.
        residual_in_fp32: whether z is fp32 where residual is None; else z has residual's dtype.
        zero_centered_weight: whether weight + 1 and weight1 + 1 are the weights.
        is_rms_norm: whether to divide by the root mean square, without subtracting the mean.
        return_dropout_mask: whether to return the masks of x and x1 too, bool, true where kept;
            None without dropout, or without x1.
        out_dtype: of y and y1; None is x's dtype.
        out, residual_out: None, or tensors of x's shape to write y and z to, in their dtypes. What
            is returned shares their memory, and has the gradients; they themselves have none.

    Returns:
        y [..., N]; or a tuple of those that are asked for, of (y, y1, z, mask, mask1).

    Raises:
        ValueError: a shape or a dtype does not fit, or weight is None.
        NotImplementedError: rowscale and x1 are both given.
    """
    if rowscale is not None and x1 is not None:
        raise NotImplementedError("rowscale: is not supported together with x1")
    options = NormOptions(
        eps=eps,
        dropout_p=dropout_p,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        zero_centered_weight=zero_centered_weight,
        is_rms_norm=is_rms_norm,
        out_dtype=out_dtype,
        out=out,
        residual_out=residual_out,
    )
    result = add_norm(
        x,
        weight,
        bias,
        options,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        rowscale=rowscale,
    )
    return _asked_for(result, weight1 is not None, prenorm, return_dropout_mask)


def _asked_for(result: NormResult, both: bool, prenorm: bool, masks: bool) -> Outputs:
    outputs = [result.y]
    if both:
        outputs.append(result.y1)
    if prenorm:
        outputs.append(result.z)
    if masks:
        outputs.extend((result.mask, result.mask1))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
) -> Outputs:
    """layer_norm_fn with is_rms_norm=True; arguments, results and errors are its."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(torch.nn.Module):
    """RMS norm with a weight [hidden_size], of x or, after dropout, of the sum of x and a residual.

    Arguments:
        hidden_size: the size of the last dimension.
        eps: added to the mean square.
        dropout_p: the probability of dropping an element of x in training.
        zero_centered_weight: whether weight + 1 is the weight; it starts at zero then.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Outputs:
        """y [..., hidden_size]; with prenorm (y, z)."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
) -> Outputs:
    """A linear layer of the norm of x + residual, without keeping the norm for the backward pass.

    Arguments:
        x: [..., N].
        norm_weight, norm_bias: [N]; norm_bias may be None.
        linear_weight: [M, N]. linear_bias: [M] or None.
        residual, eps, prenorm, residual_in_fp32, is_rms_norm: as in layer_norm_fn.

    Returns:
        [..., M], in x's dtype or autocast's; with prenorm (that, z [..., N]).

    Raises:
        ValueError: a shape or a dtype does not fit, or a weight is None.
    """
    options = NormOptions(
        eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm
    )
    out, z = norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, residual, options)
    return (out, z) if prenorm else out


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
) -> Outputs:
    """layer_norm_fn as one would write it, for tests: in the arguments' dtypes, or fp32 if upcast.

    dropout_mask, dropout_mask1: None, or bool of x's shape, true where an element is kept.
    """

    def norm(z, weight, bias):
        return F.layer_norm(z.to(weight.dtype), z.shape[-1:], weight, bias, eps)

    inputs = (x, residual, x1, weight, bias, weight1, bias1)
    masks = (dropout_mask, dropout_mask1)
    return _reference(
        norm, inputs, dropout_p, masks, rowscale, prenorm, zero_centered_weight, upcast
    )


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
) -> Outputs:
    """rms_norm_fn as one would write it, for tests; the arguments are those of layer_norm_ref."""

    def norm(z, weight, bias):
        y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    inputs = (x, residual, x1, weight, bias, weight1, bias1)
    masks = (dropout_mask, dropout_mask1)
    return _reference(
        norm, inputs, dropout_p, masks, rowscale, prenorm, zero_centered_weight, upcast
    )


def _reference(
    norm: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor | None, ...],
    p: float,
    masks: tuple[torch.Tensor | None, torch.Tensor | None],
    rowscale: torch.Tensor | None,
    prenorm: bool,
    zero_centered_weight: bool,
    upcast: bool,
) -> Outputs:
    dtype = inputs[0].dtype
    if upcast:
        inputs = tuple(None if t is None else t.float() for t in inputs)
    x, residual, x1, weight, bias, weight1, bias1 = inputs
    if rowscale is not None and x1 is not None:
        raise NotImplementedError("rowscale: is not supported together with x1")

    def drop(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if p == 0.0:
            return x
        return F.dropout(x, p) if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - p)

    z = drop(x if rowscale is None else x * rowscale[..., None], masks[0])
    if x1 is not None:
        z = z + drop(x1, masks[1])
    if residual is not None:
        z = (z + residual).to(z.dtype)
    outputs = []
    for w, b in ((weight, bias), (weight1, bias1)):
        if w is not None:
            outputs.append(norm(z, w + 1.0 if zero_centered_weight else w, b).to(dtype))
    if prenorm:
        outputs.append(z)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
