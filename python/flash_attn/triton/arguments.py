"""The arguments of kernels that follow from a call's metadata, by the names of their parameters."""

from __future__ import annotations

from typing import Any

import torch

from .._call import Call
from .vocabulary import Dims, Options

# Bounds are compared with int32 positions.
_UNBOUNDED = 2**30
_SMALLEST_DIM = 16  # what a matrix product of Triton takes


def padded(dim: int) -> int:
    """The power of two that a dimension is padded to."""
    return max(_SMALLEST_DIM, 1 << (dim - 1).bit_length())


def strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """Strides of [B, S, H, D] or [total, H, D]."""
    batch, row, head = (*tensor.stride()[:3],) if tensor.dim() == 4 else (0, *tensor.stride()[:2])
    return {f"stride_{name}_batch": batch, f"stride_{name}": row, f"stride_{name}_head": head}


def lse_strides(lse: torch.Tensor | None) -> dict[str, int]:
    """Strides of [B, H, Sq] or [H, total_q]."""
    batch, head = 0, 0
    if lse is not None:
        batch, head = lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))
    return {"stride_lse_batch": batch, "stride_lse_head": head}


def scores(call: Call) -> dict[str, Any]:
    """What scores and dropout are made of, and what a kernel is compiled for."""
    left, right = call.band
    bias = call.bias_over_scores()
    of_bias = (0, 0, 0, 0)
    if bias is not None:
        of_bias = tuple(s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape))
    slopes = call.alibi_slopes
    return {
        "stride_slopes": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        **{f"stride_bias_{d}": s for d, s in zip(("batch", "head", "i", "j"), of_bias)},
        "scale": float(call.scale),
        "softcap": float(call.softcap),
        "left": min(max(left, 0), _UNBOUNDED),
        "right": min(max(right, 0), _UNBOUNDED),
        "threshold": call.dropout_threshold,
        "keep_scale": 1.0 / (1.0 - call.dropout_p),
        "OPTIONS": Options(
            has_left=left >= 0,
            has_right=right >= 0,
            softcap=call.softcap > 0.0,
            alibi=slopes is not None,
            bias=bias is not None,
            boolean=is_boolean(call),
            dropout=call.dropout_p > 0.0,
        ),
        "DIMS": dims(call),
    }


def dims(call: Call) -> Dims:
    """head_dim as kernels know it."""
    d, dv = call.q.size(-1), call.v.size(-1)
    return Dims(d, dv, padded(d), padded(dv))


def is_boolean(call: Call) -> bool:
    """Whether attn_bias says what to keep."""
    return call.attn_bias is not None and not call.attn_bias.is_floating_point()


def features(call: Call) -> tuple[bool, ...]:
    """What else a tile is chosen by."""
    return (
        call.causal,
        call.softcap > 0.0,
        call.attn_bias is not None,
        call.alibi_slopes is not None,
        call.dropout_p > 0.0,
        call.block_table is not None,
    )


def words(call: Call) -> tuple[int, int, int]:
    """The words of dropout's key, as int32."""
    if call.dropout_p == 0.0:
        return 0, 0, 0
    key0, key1, counter3 = (w - 2**32 if w >= 2**31 else w for w in call.dropout_key)
    return key0, key1, counter3
