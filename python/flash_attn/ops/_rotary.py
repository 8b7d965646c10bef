"""Rotary position embedding: the one implementation behind layers.rotary and ops.triton.rotary.

A token at position p has the pairs (x0_i, x1_i), i < rotary_dim / 2, of its first rotary_dim
elements turned by the angles of row p of the tables (Su et al., "RoFormer", 2021):

    x0' = x0 cos - x1 sin,    x1' = x0 sin + x1 cos

Interleaved, a pair is (2i, 2i + 1); otherwise (i, i + rotary_dim / 2). Computed in fp32, or fp64
for fp64 tensors, and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Angles(NamedTuple):
    """Cosines and sines of the tokens of a tensor, [*tokens, rotary_dim / 2].

    Dense: tokens is [seqlen] or [batch, seqlen], and token_dims is 2. Packed: [total], and 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    token_dims: int

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[-1]


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Rotates the first rotary_dim elements of each head.

    Gradients flow as through any PyTorch operators; layers.rotary keeps less for them.

    Arguments:
        x: [batch, seqlen, heads, head_dim]; with cu_seqlens [total, heads, head_dim]. Any floating
            dtype, any strides.
        cos, sin: [positions, rotary_dim / 2], any floating dtype; rotary_dim <= head_dim.
        seqlen_offsets: the position of each sequence's first token: an int, or [batch], int32 or
            int64.
        cu_seqlens: [batch + 1], int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: with cu_seqlens, the longest sequence's length.
        interleaved: whether a pair is (2i, 2i + 1), else (i, i + rotary_dim / 2).
        inplace: whether to write the result to x.
        conjugate: whether to turn backwards.

    Returns:
        A tensor of x's shape and dtype, which is x itself when inplace. With cu_seqlens or a tensor
        of offsets, tokens at positions that the tables do not have, and tokens of no sequence, are
        left as they are.

    Raises:
        ValueError: shapes do not fit, or the tables are too short.
    """
    check_rank("x", x, 4 if cu_seqlens is None else 3)
    angles = angles_of_tokens(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if inplace:
        # Within an autograd.Function x may be one of several views of a tensor, all of them rotated
        # in place: nothing is recorded there, and nobody is to be told.
        to = x if torch.is_grad_enabled() else x.data
        rotate(to, to, angles, interleaved, conjugate)
        return x
    return rotated(x, angles, interleaved, conjugate)


def rotated(
    x: torch.Tensor, angles: Angles, interleaved: bool, conjugate: bool = False
) -> torch.Tensor:
    """A copy of x with the first rotary_dim elements of each head rotated."""
    out = torch.empty_like(x)
    rotate(out, x, angles, interleaved, conjugate)
    out[..., angles.rotary_dim :].copy_(x[..., angles.rotary_dim :])
    return out


def rotate(
    out: torch.Tensor, x: torch.Tensor, angles: Angles, interleaved: bool, conjugate: bool = False
) -> None:
    """Writes the rotated first rotary_dim elements of x [*tokens, ..., head_dim] to out.

    `out` may be x; its other elements are left as they are.
    """
    heads = x.dim() - 1 - angles.token_dims
    shape = (*angles.cos.shape[:-1], *(1,) * heads, angles.cos.shape[-1])
    cos, sin = angles.cos.reshape(shape), angles.sin.reshape(shape)
    if conjugate:
        sin = -sin
    x0, x1 = (half.to(cos.dtype) for half in _halves(x, angles.rotary_dim, interleaved))
    rotated0 = (x0 * cos).addcmul_(x1, sin, value=-1)
    rotated1 = (x0 * sin).addcmul_(x1, cos)
    # Autograd wants the second view to be made after the first was written.
    _halves(out, angles.rotary_dim, interleaved)[0].copy_(rotated0)
    _halves(out, angles.rotary_dim, interleaved)[1].copy_(rotated1)


def _halves(
    x: torch.Tensor, rotary_dim: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


def angles_of_tokens(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Angles:
    """The rows of the tables for the tokens of x, in the dtype of the computation.

    x: [batch, seqlen, ..., head_dim]; with cu_seqlens [total, ..., head_dim]. The other arguments
    are those of apply_rotary.
    """
    _check_tables(x, cos, sin)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        batch, longest = x.shape[:2]
    elif max_seqlen is None:
        raise ValueError("max_seqlen: must be given with cu_seqlens, is None")
    else:
        batch, longest = cu_seqlens.shape[0] - 1, int(max_seqlen)
    in_tensor = isinstance(seqlen_offsets, torch.Tensor)
    first = 0 if in_tensor else seqlen_offsets
    if first < 0 or first + longest > cos.shape[0]:
        raise ValueError(
            f"cos, sin: must have a row for each position, have {cos.shape[0]} rows for positions"
            f" {first} to {first + longest - 1}"
        )
    if in_tensor:
        _check_offsets(seqlen_offsets, batch)
    if cu_seqlens is None and not in_tensor:
        rows = slice(first, first + longest)
        return Angles(cos[rows].to(dtype), sin[rows].to(dtype), 2)
    if cu_seqlens is None:
        positions = seqlen_offsets[:, None] + torch.arange(longest, device=x.device)
    else:
        positions = _positions_of_packed_tokens(x.shape[0], cu_seqlens, seqlen_offsets)
    # A row of its own, which turns by nothing, for the positions without one.
    present = (positions >= 0) & (positions < cos.shape[0])
    rows = positions.clamp(0, max(cos.shape[0] - 1, 0))
    token_dims = 2 if cu_seqlens is None else 1
    return Angles(
        cos[rows].to(dtype).masked_fill_(~present[..., None], 1.0),
        sin[rows].to(dtype).masked_fill_(~present[..., None], 0.0),
        token_dims,
    )


def _positions_of_packed_tokens(
    total: int, cu_seqlens: torch.Tensor, seqlen_offsets: int | torch.Tensor
) -> torch.Tensor:
    """[total] positions; -1 for tokens before the first sequence or after the last."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    after = torch.searchsorted(cu_seqlens, tokens, right=True)  # sequences begun, of [0, batch + 1]
    batch = cu_seqlens.shape[0] - 1
    outside = (after == 0) | (after > batch)
    sequence = (after - 1).clamp(0, max(batch - 1, 0))
    positions = tokens - cu_seqlens[sequence]
    if isinstance(seqlen_offsets, torch.Tensor):
        positions = positions + seqlen_offsets[sequence]
    else:
        positions = positions + seqlen_offsets
    return positions.masked_fill(outside, -1)


def check_rank(name: str, x: torch.Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name}: must have {rank} dimensions, has shape {list(x.shape)}")


def _check_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "cos, sin: must both have shape [positions, rotary_dim / 2], have"
            f" {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos, sin: must have at most {x.shape[-1] // 2} columns, half of head_dim, have"
            f" {cos.shape[1]}"
        )


def _check_offsets(seqlen_offsets: torch.Tensor, batch: int) -> None:
    if seqlen_offsets.shape != (batch,):
        raise ValueError(
            f"seqlen_offsets: must have shape [{batch}], has {list(seqlen_offsets.shape)}"
        )
    if seqlen_offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seqlen_offsets: must be int32 or int64, is {seqlen_offsets.dtype}")
