"""Rotary position embedding, differentiable (Su et al., "RoFormer", 2021; xPos: Sun et al., 2022).

The formula, the meaning of the options and the errors are those of ops.triton.rotary.apply_rotary.
Gradients flow to the rotated tensors; the tables are constants. Functions with a trailing
underscore, and inplace=True, write to their argument. Autograd knows of that only through the
tensor that they return: go on with that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..ops._rotary import Angles, angles_of_tokens, check_rank, rotate, rotated

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

Offsets = int | torch.Tensor
Tables = tuple[torch.Tensor | None, ...]  # cos, sin, cos_k, sin_k


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """(x0, x1) -> (-x1, x0) for each pair of x [..., rotary_dim]: a turn by 90 degrees."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x0, x1 = x.chunk(2, dim=-1)
    return torch.cat((-x1, x0), dim=-1)


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """The rotation as one would write it, in the arguments' dtypes; differentiable in all three.

    Arguments:
        x: [batch, seqlen, heads, head_dim].
        cos, sin: [seqlen, rotary_dim / 2] or [batch, seqlen, rotary_dim / 2].
        interleaved: whether a pair is (2i, 2i + 1), else (i, i + rotary_dim / 2).

    Returns:
        [batch, seqlen, heads, head_dim].
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(
            f"cos, sin: must have at most {x.shape[-1] // 2} columns, half of head_dim, have"
            f" {cos.shape[-1]}"
        )

    def per_element(table: torch.Tensor) -> torch.Tensor:
        both = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return both.unsqueeze(-2)

    head = x[..., :rotary_dim]
    turned = head * per_element(cos) + rotate_half(head, interleaved) * per_element(sin)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotates the first rotary_dim elements of each head.

    Arguments:
        x: [batch, seqlen, heads, head_dim]; with cu_seqlens [total, heads, head_dim]. Any floating
            dtype.
        cos, sin: [positions, rotary_dim / 2], any floating dtype.
        interleaved: whether a pair is (2i, 2i + 1), else (i, i + rotary_dim / 2).
        inplace: whether to write the result to x.
        seqlen_offsets: the position of each sequence's first token: an int, or [batch], int32 or
            int64.
        cu_seqlens: [batch + 1], int32; with it max_seqlen, the longest sequence's length.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: shapes do not fit, or the tables are too short.
    """
    check_rank("x", x, 4 if cu_seqlens is None else 3)
    return _rotation(
        "x", x, (cos, sin), interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )


# The name of an earlier version, which clients still import.
apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Rotates q and k within a tensor that holds q, k and v, in place.

    Arguments:
        qkv: [batch, seqlen, 3, heads, head_dim]; or [batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim], which needs num_heads_q.
        cos, sin: [positions, rotary_dim / 2]; for q alone where cos_k and sin_k, of that shape too,
            are given.
        interleaved, seqlen_offsets: as in apply_rotary_emb.

    Returns:
        qkv.

    Raises:
        ValueError: shapes do not fit, or the tables are too short.
    """
    tables = (cos, sin, cos_k, sin_k)
    return _rotation("qkv", qkv, tables, interleaved, True, seqlen_offsets, None, None, num_heads_q)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> torch.Tensor:
    """Rotates k within a tensor that holds k and v, in place.

    Arguments:
        kv: [batch, seqlen, 2, heads, head_dim].
        cos, sin: [positions, rotary_dim / 2].
        interleaved, seqlen_offsets: as in apply_rotary_emb.

    Returns:
        kv.

    Raises:
        ValueError: shapes do not fit, or the tables are too short.
    """
    return _rotation("kv", kv, (cos, sin), interleaved, True, seqlen_offsets)


class ApplyRotaryEmb:
    """apply_rotary_emb under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb)


class ApplyRotaryEmbQKV_:
    """apply_rotary_emb_qkv_ under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb_qkv_)


class ApplyRotaryEmbKV_:
    """apply_rotary_emb_kv_ under the name of the original's autograd.Function."""

    apply = staticmethod(apply_rotary_emb_kv_)


def _rotation(
    layout: str,
    x: torch.Tensor,
    tables: Tables,
    interleaved: bool,
    inplace: bool,
    seqlen_offsets: Offsets,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    options = (layout, interleaved, max_seqlen, num_heads_q)
    return _Rotation.apply(x, options, inplace, seqlen_offsets, cu_seqlens, *tables)


class _Rotation(torch.autograd.Function):
    """A rotation; its gradient is the gradient turned backwards.

    The result of an in-place rotation is not marked dirty: that would refuse leaves and parts of a
    split, which the original accepts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        options: tuple[Any, ...],
        inplace: bool,
        seqlen_offsets: Offsets,
        cu_seqlens: torch.Tensor | None,
        *tables: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.options = options
        in_tensor = isinstance(seqlen_offsets, torch.Tensor)
        ctx.seqlen_offset = None if in_tensor else seqlen_offsets
        ctx.save_for_backward(seqlen_offsets if in_tensor else None, cu_seqlens, *tables)
        # Autograd refuses the other parts of a split once it has seen one of them being written.
        # A compiler does not tell parts from other tensors.
        is_part = torch.compiler.is_compiling() or x._is_view()
        target = x.data if inplace and ctx.needs_input_grad[0] and is_part else x
        out = _turn(target, options, inplace, False, seqlen_offsets, cu_seqlens, tables)
        return x if inplace else out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        offsets, cu_seqlens, *tables = ctx.saved_tensors
        offsets = ctx.seqlen_offset if offsets is None else offsets
        dx = _turn(dout, ctx.options, False, True, offsets, cu_seqlens, tuple(tables))
        return dx, *(None,) * (4 + len(tables))


def _turn(
    x: torch.Tensor,
    options: tuple[Any, ...],
    inplace: bool,
    conjugate: bool,
    seqlen_offsets: Offsets,
    cu_seqlens: torch.Tensor | None,
    tables: Tables,
) -> torch.Tensor:
    layout, interleaved, max_seqlen, num_heads_q = options

    def angles(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
        return angles_of_tokens(part, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)

    if layout == "x" and not inplace:
        return rotated(x, angles(x, *tables), interleaved, conjugate)
    out = x if inplace else x.clone(memory_format=torch.contiguous_format)
    for part, cos, sin in _parts(layout, out, tables, cu_seqlens is not None, num_heads_q):
        rotate(part, part, angles(part, cos, sin), interleaved, conjugate)
    return out


def _parts(
    layout: str, x: torch.Tensor, tables: Tables, is_packed: bool, num_heads_q: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The views of x to rotate, and the tables of each."""
    heads_at = 1 if is_packed else 2
    if layout == "x":
        yield x, *tables
    elif layout == "kv":
        _check_stack("kv", x, heads_at, 2)
        yield x.select(heads_at, 0), *tables
    else:
        cos, sin, cos_k, sin_k = tables
        if x.dim() == heads_at + 2:
            num_heads_q, num_heads_k = _split_of_heads(x, heads_at, num_heads_q)
        else:
            _check_stack("qkv", x, heads_at, 3)
            num_heads_q = num_heads_k = 1
        if cos_k is None and sin_k is None:
            yield x.narrow(heads_at, 0, num_heads_q + num_heads_k), cos, sin
        else:
            yield x.narrow(heads_at, 0, num_heads_q), cos, sin
            cos_k = cos if cos_k is None else cos_k
            sin_k = sin if sin_k is None else sin_k
            yield x.narrow(heads_at, num_heads_q, num_heads_k), cos_k, sin_k


def _check_stack(name: str, x: torch.Tensor, heads_at: int, count: int) -> None:
    if x.dim() != heads_at + 3 or x.shape[heads_at] != count:
        tokens = "batch, seqlen" if heads_at == 2 else "total"
        raise ValueError(
            f"{name}: must have shape [{tokens}, {count}, heads, head_dim], has {list(x.shape)}"
        )


def _split_of_heads(x: torch.Tensor, heads_at: int, num_heads_q: int | None) -> tuple[int, int]:
    if num_heads_q is None:
        raise ValueError("num_heads_q: must be given when the heads of q, k and v are in one row")
    both = x.shape[heads_at] - num_heads_q
    if num_heads_q < 0 or both < 0 or both % 2:
        raise ValueError(
            f"num_heads_q: is {num_heads_q}, which leaves {both} heads of {x.shape[heads_at]} for"
            " k and v"
        )
    return num_heads_q, both // 2


class RotaryEmbedding(torch.nn.Module):
    """Tables of angles, kept and grown as needed, and their application.

    Position p and pair i have the angle p * base^(-2i / dim). With scale_base, xPos: q is
    multiplied and k divided by scale_i^((p - middle) / scale_base), where scale_i =
    (2i + 0.4 dim) / (1.4 dim).

    Arguments:
        dim: rotary_dim, even.
        base: of the angles' geometric progression.
        interleaved: whether a pair is (2i, 2i + 1), else (i, i + dim / 2).
        scale_base: None, or xPos' base; 512 is usual.
        device: of the buffers.
        pos_idx_in_fp32: True or None. FlashAttention 2.7 had this parameter, and clients pass it;
            positions are always fp32.

    Raises:
        NotImplementedError: pos_idx_in_fp32 is False.
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None
    _maybe_inference = False  # whether the tables may be inference tensors

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        pos_idx_in_fp32: bool | None = None,
    ) -> None:
        super().__init__()
        if pos_idx_in_fp32 is False:
            raise NotImplementedError(
                "pos_idx_in_fp32: is False, must be True: 16-bit positions are off by whole turns"
            )
        self.dim = dim
        self.base = float(base)
        self.pos_idx_in_fp32 = True
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> torch.Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (steps / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> torch.Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (steps + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tables hold `seqlen` positions; by default on the buffers' device, in fp32."""
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = torch.float32 if dtype is None else dtype
        table = self._cos_cached
        if (
            table is not None
            and seqlen <= self._seq_len_cached
            and table.device == device
            and table.dtype == dtype
            and not (self._maybe_inference and torch.is_grad_enabled())
        ):
            return
        self._seq_len_cached = seqlen
        # Inference tensors cannot be saved for a backward pass. A compiled call in inference mode
        # makes them all the same, and cannot ask for the mode.
        self._maybe_inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        with torch.inference_mode(False):
            self._make_tables(seqlen, device, dtype)

    def _make_tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> None:
        # The angles are large: a model cast to 16 bits must not have them from 16-bit buffers.
        inv_freq, scale = self.inv_freq, self.scale
        if inv_freq.dtype != torch.float32:
            inv_freq = self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        if scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        if scale.dtype != torch.float32:
            scale = self._compute_scale(device)
        power = (positions - seqlen // 2) / self.scale_base
        factor = scale.to(positions.device) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotates q and k, in place.

        Arguments:
            qkv: [batch, seqlen, 3, heads, head_dim], or [batch, seqlen, num_heads_q + 2 *
                num_heads_k, head_dim] with num_heads_q; with kv it is q [batch, seqlen, heads,
                head_dim].
            kv: [batch, seqlen, 2, heads, head_dim].
            seqlen_offset: the position of each sequence's first token: an int, or [batch].
            max_seqlen: the number of positions that the tables must have; a tensor of offsets does
                not tell.
            cu_seqlens: [batch + 1], int32, for tensors with [total] in place of [batch, seqlen];
                with it max_seqlen, the longest sequence's length.

        Returns:
            qkv; with kv (q, kv).

        Raises:
            ValueError: shapes do not fit, or max_seqlen is needed and not given.
        """
        self._grow(qkv, seqlen_offset, max_seqlen, cu_seqlens)
        tables = (self._cos_cached, self._sin_cached)
        tables_k = (self._cos_k_cached, self._sin_k_cached)
        longest = None if cu_seqlens is None else max_seqlen
        options = (self.interleaved, True, seqlen_offset, cu_seqlens, longest)
        if kv is None:
            tables_k = (None, None) if self.scale is None else tables_k
            return _rotation("qkv", qkv, tables + tables_k, *options, num_heads_q)
        check_rank("qkv", qkv, 4 if cu_seqlens is None else 3)
        q = _rotation("x", qkv, tables, *options)
        return q, _rotation("kv", kv, tables if self.scale is None else tables_k, *options)

    def _grow(
        self,
        x: torch.Tensor,
        seqlen_offset: Offsets,
        max_seqlen: int | None,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        in_tensor = isinstance(seqlen_offset, torch.Tensor)
        if max_seqlen is not None:
            extra = 0 if cu_seqlens is None or in_tensor else seqlen_offset
            length = max_seqlen + extra
        elif cu_seqlens is not None:
            raise ValueError("max_seqlen: must be given with cu_seqlens, is None")
        elif not in_tensor:
            length = x.shape[1] + seqlen_offset
        elif self._cos_cached is not None:
            return
        else:
            raise ValueError("max_seqlen: must be given with a tensor seqlen_offset, is None")
        self._update_cos_sin_cache(length, device=x.device, dtype=x.dtype)
