"""Layer norm and RMS norm: the one implementation behind ops.triton.layer_norm, ops.layer_norm and
ops.rms_norm.

    z = dropout(x * rowscale * colscale) + dropout(x1) + residual
    y = (z - mean(z)) * rstd * weight + bias,    rstd = 1 / sqrt(mean((z - mean(z))^2) + eps)

(Ba et al., "Layer Normalization", 2016); RMS norm has no mean(z) (Zhang and Sennrich, "Root Mean
Square Layer Normalization", 2019). Computed in fp32, or fp64 for fp64 tensors. The backward pass
keeps z in the residual's dtype, one number or two per row, and the dropout masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .._first_order import Tensors, first_order_only


@dataclass(frozen=True)
class NormOptions:
    """What autograd does not see of a call of a norm; out and residual_out are to be written."""

    eps: float = 1e-6
    dropout_p: float = 0.0
    prenorm: bool = False
    residual_in_fp32: bool = False
    zero_centered_weight: bool = False
    is_rms_norm: bool = False
    out_dtype: torch.dtype | None = None
    out: torch.Tensor | None = None
    residual_out: torch.Tensor | None = None


class NormResult(NamedTuple):
    """y; with weight1 y1; z, with prenorm at least; with dropout the masks of x and x1, true where
    kept."""

    y: torch.Tensor
    y1: torch.Tensor | None
    z: torch.Tensor | None
    mask: torch.Tensor | None
    mask1: torch.Tensor | None


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: NormOptions,
    *,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    rowscale: torch.Tensor | None = None,
    colscale: torch.Tensor | None = None,
) -> NormResult:
    """The norm of a sum, differentiable in all tensors; see the module.

    Arguments:
        x, residual, x1: [..., N], of any floating dtypes.
        weight, bias, weight1, bias1, colscale: [N]; weight1 asks for a second output y1.
        rowscale: x's shape without its last dimension.

    Raises:
        ValueError: a shape or a dtype does not fit, weight is None, or bias1 is given without
            weight1.
    """
    _require("weight", weight)
    buffers = {"out": options.out, "residual_out": options.residual_out}
    _check_like_x(x, residual=residual, x1=x1, **buffers)
    parameters = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    _check_shape(x.shape[-1:], **parameters, colscale=colscale)
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1: needs weight1, which is None")
    if rowscale is not None:
        if rowscale.numel() * x.shape[-1] != x.numel():
            raise ValueError(f"rowscale: must have shape {_shape(x)[:-1]}, has {_shape(rowscale)}")
        rowscale = rowscale.reshape(*x.shape[:-1], 1)
    if not 0.0 <= options.dropout_p <= 1.0:
        raise ValueError(f"dropout_p: must be in [0, 1], is {options.dropout_p}")
    result = _AddNorm.apply(
        options, x, residual, x1, rowscale, colscale, weight, bias, weight1, bias1
    )
    return NormResult(*result)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: NormOptions,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        x1: torch.Tensor | None,
        rowscale: torch.Tensor | None,
        colscale: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight1: torch.Tensor | None,
        bias1: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        dtype = _dtype_of_computation(x)
        mask = _draw_mask(x, options.dropout_p)
        mask1 = None if x1 is None else _draw_mask(x1, options.dropout_p)
        z = _scaled(x.to(dtype), rowscale, colscale, mask, options.dropout_p)
        if x1 is not None:
            z = z + _scaled(x1.to(dtype), None, None, mask1, options.dropout_p)
        z = _plus_residual(z, residual)
        z_out = None
        if options.prenorm or options.residual_out is not None or any(ctx.needs_input_grad):
            z_out = _rounded_sum(z, x, residual, options)
        z_hat, mean, rstd = _normalize(z, options)
        y1 = None
        out_dtype = options.out_dtype or x.dtype
        if weight1 is not None:
            y1 = _affine(z_hat.clone(), weight1, bias1, options).to(out_dtype)
        y = _written(_affine(z_hat, weight, bias, options), out_dtype, options.out)

        # The gradients of the scales are the only ones that need x itself.
        needs_x = any(ctx.needs_input_grad[4:6])
        ctx.save_for_backward(
            z_out,
            mean,
            rstd,
            weight,
            weight1,
            rowscale,
            colscale,
            mask,
            mask1,
            x if needs_x else None,
        )
        ctx.options = options
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, x1, bias, bias1)]
        ctx.set_materialize_grads(False)
        if mask is not None:
            ctx.mark_non_differentiable(*(m for m in (mask, mask1) if m is not None))
        # What is saved of z is an output, or the input x: first_order_only() asks for that.
        return y, y1, z_out, mask, mask1

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any,
        saved: Tensors,
        dy: torch.Tensor | None,
        dy1: torch.Tensor | None,
        dz_out: torch.Tensor | None,
        *_: None,
    ) -> Tensors:
        z, mean, rstd, weight, weight1, rowscale, colscale, mask, mask1, x = saved
        x_dtype, residual_dtype, x1_dtype, bias_dtype, bias1_dtype = ctx.dtypes
        z = z.to(rstd.dtype)
        dz, dweight, dbias = _norm_backward(dy, z, mean, rstd, weight, ctx.options)
        dz1, dweight1, dbias1 = _norm_backward(dy1, z, mean, rstd, weight1, ctx.options)
        dz = _sum_of_present(dz, dz1, dz_out)
        if dz is None:
            return (None,) * 10
        p = ctx.options.dropout_p
        dx = _scaled(dz, rowscale, colscale, mask, p).to(x_dtype)
        drowscale = dcolscale = None
        if ctx.needs_input_grad[4]:
            product = _scaled(dz, None, colscale, mask, p) * x
            drowscale = product.sum(-1, keepdim=True).to(rowscale.dtype)
        if ctx.needs_input_grad[5]:
            product = _scaled(dz, rowscale, None, mask, p) * x
            dcolscale = _sum_of_rows(product).to(colscale.dtype)
        return (
            None,
            dx,
            None if residual_dtype is None else dz.to(residual_dtype),
            None if x1_dtype is None else _scaled(dz, None, None, mask1, p).to(x1_dtype),
            drowscale,
            dcolscale,
            dweight,
            None if bias_dtype is None or dbias is None else dbias.to(bias_dtype),
            dweight1,
            None if bias1_dtype is None or dbias1 is None else dbias1.to(bias1_dtype),
        )


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    options: NormOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer of the norm of a sum: (F.linear(y, linear_weight, linear_bias), z or None).

    y is computed again in the backward pass rather than kept. Under autocast y and the linear layer
    are in its dtype.
    """
    _require("norm_weight", norm_weight)
    _require("linear_weight", linear_weight)
    _check_like_x(x, residual=residual)
    _check_shape(x.shape[-1:], norm_weight=norm_weight, norm_bias=norm_bias)
    rows = linear_weight.shape[:1]
    _check_shape((*rows, x.shape[-1]), linear_weight=linear_weight)
    _check_shape(rows, linear_bias=linear_bias)
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    # Cast outside of the function, so that autograd casts the gradients back.
    linear_weight = linear_weight.to(dtype)
    linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    return _NormLinear.apply(
        options, dtype, x, norm_weight, norm_bias, linear_weight, linear_bias, residual
    )


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: NormOptions,
        dtype: torch.dtype,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        linear_weight: torch.Tensor,
        linear_bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        z = _plus_residual(x.to(_dtype_of_computation(x)), residual)
        z_out = _rounded_sum(z, x, residual, options)
        z_hat, mean, rstd = _normalize(z, options)
        y = _affine(z_hat, weight, bias, options).to(dtype)
        ctx.save_for_backward(z_out, mean, rstd, weight, bias, linear_weight)
        ctx.options = options
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return F.linear(y, linear_weight, linear_bias), z_out  # an output, as in _AddNorm

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, saved: Tensors, dout: torch.Tensor | None, dz_out: torch.Tensor | None
    ) -> Tensors:
        z, mean, rstd, weight, bias, linear_weight = saved
        z = z.to(rstd.dtype)
        dy = dlinear_weight = dlinear_bias = None
        if dout is not None:
            dy = dout @ linear_weight
            rows = dout.reshape(-1, dout.shape[-1])
            if ctx.needs_input_grad[5]:
                z_hat = z * rstd if mean is None else (z - mean).mul_(rstd)
                y = _affine(z_hat, weight, bias, ctx.options).to(dout.dtype)
                dlinear_weight = rows.t() @ y.reshape(-1, y.shape[-1])
            dlinear_bias = rows.sum(0) if ctx.needs_input_grad[6] else None
        dz, dweight, dbias = _norm_backward(dy, z, mean, rstd, weight, ctx.options)
        dz = _sum_of_present(dz, dz_out)
        return (
            None,
            None,
            None if dz is None else dz.to(ctx.x_dtype),
            dweight,
            None if bias is None or dbias is None else dbias.to(bias.dtype),
            dlinear_weight,
            dlinear_bias,
            None if dz is None or ctx.residual_dtype is None else dz.to(ctx.residual_dtype),
        )


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _require(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        raise ValueError(f"{name}: must be given, is None")


def _check_like_x(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: must be of a floating dtype, is {tensor.dtype}")
        if tensor.shape != x.shape:
            raise ValueError(f"{name}: must have x's shape {_shape(x)}, has {_shape(tensor)}")


def _check_shape(shape: tuple[int, ...], **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: must have shape {[*shape]}, has {_shape(tensor)}")


def _dtype_of_computation(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _draw_mask(x: torch.Tensor, p: float) -> torch.Tensor | None:
    if p == 0.0:
        return None
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)


def _scaled(
    x: torch.Tensor,
    rowscale: torch.Tensor | None,
    colscale: torch.Tensor | None,
    mask: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """x * rowscale * colscale, of which the mask keeps some, times 1 / (1 - p)."""
    if rowscale is not None:
        x = x * rowscale
    if colscale is not None:
        x = x * colscale
    if mask is not None:
        x = (x / (1.0 - p) if p < 1.0 else x).masked_fill(~mask, 0.0)
    return x


def _plus_residual(z: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """z + residual, contiguous whatever the strides of the inputs, as is all that is made of it."""
    return (z if residual is None else z + residual).contiguous()


def _rounded_sum(
    z: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, options: NormOptions
) -> torch.Tensor:
    """z in the dtype of the residual stream; x itself where z is nothing else."""
    if residual is not None:
        dtype = residual.dtype
    else:
        dtype = torch.float32 if options.residual_in_fp32 else x.dtype
    return _written(z, dtype, options.residual_out)


def _written(x: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor | None) -> torch.Tensor:
    """x in dtype; or in the buffer's memory, by a tensor of its own, for the buffer itself is to
    stay out of the graph."""
    return x.to(dtype) if buffer is None else buffer.copy_(x).detach()


def _normalize(
    z: torch.Tensor, options: NormOptions
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(normalized z in memory of its own, mean or None, rstd); the last two are [..., 1]."""
    if not options.is_rms_norm:
        # On a CPU one such pass takes a tenth of var_mean's time.
        return torch.native_layer_norm(z, z.shape[-1:], None, None, options.eps)
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    rstd = norm.square_().div_(z.shape[-1]).add_(options.eps).rsqrt_()
    return z * rstd, None, rstd


def _gain(weight: torch.Tensor, dtype: torch.dtype, options: NormOptions) -> torch.Tensor:
    weight = weight.to(dtype)
    return weight + 1.0 if options.zero_centered_weight else weight


def _affine(
    z_hat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: NormOptions
) -> torch.Tensor:
    """z_hat * weight + bias, in z_hat's memory."""
    y = z_hat.mul_(_gain(weight, z_hat.dtype, options))
    return y if bias is None else y.add_(bias)


def _norm_backward(
    dy: torch.Tensor | None,
    z: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    options: NormOptions,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dz, dweight, dbias); dbias in the dtype of the computation.

    With g = dy * weight: dz = rstd * (g - mean(g) - z_hat * mean(g * z_hat)), and no mean(g) in RMS
    norm.
    """
    if dy is None or weight is None:
        return None, None, None
    dy = dy.to(z.dtype)
    gain = _gain(weight, z.dtype, options)
    if mean is not None:
        dz, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy, z, gain.shape, mean, rstd, gain, gain, [True, True, True]
        )
        return dz, dweight.to(weight.dtype), dbias
    z_hat = z * rstd
    product = dy * z_hat
    dweight, dbias = _sum_of_rows(product).to(weight.dtype), _sum_of_rows(dy)
    projection = product.mul_(gain).mean(-1, keepdim=True)
    return (dy * gain).addcmul_(z_hat, projection, value=-1).mul_(rstd), dweight, dbias


def _sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., N] -> [N]."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def _sum_of_present(*tensors: torch.Tensor | None) -> torch.Tensor | None:
    """The sum in the first one's dtype, of those that are not None."""
    total = None
    for tensor in tensors:
        if tensor is not None:
            total = tensor if total is None else total + tensor
    return total
