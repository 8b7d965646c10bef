"""The attention inside MHA: what maps q, k and v to a result, without projections and caches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

Window = tuple[int, int]


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi, one per head (Press et al., "Train Short, Test Long", 2022).

    For a power of two they are 2^(-8 (i + 1) / nheads); else those of the power below, and every
    other one of the power above.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 2 ** int(math.log2(nheads))
    return geometric(below) + geometric(2 * below)[::2][: nheads - below]


class FlashSelfAttention(nn.Module):
    """Flash attention of a packed qkv, dense or varlen.

    Arguments:
        causal, softmax_scale, window_size, alibi_slopes, deterministic: as in
            flash_attn_qkvpacked_func.
        attention_dropout: the probability of dropping an element of P, in training.
    """

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        qkv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """[B, S, H, D] of qkv [B, S, 3, H, D]; with cu_seqlens [B + 1] and max_seqlen,
        [total, H, D] of [total, 3, H, D]. `causal` overrides the module's."""
        options = _options(self, causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        _check_given(max_seqlen=max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(nn.Module):
    """Flash attention of q and a packed kv, dense or varlen.

    Arguments:
        causal, softmax_scale, alibi_slopes, window_size, deterministic: as in
            flash_attn_kvpacked_func.
        attention_dropout: the probability of dropping an element of P, in training.
    """

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> torch.Tensor:
        """[B, Sq, H, D] of q [B, Sq, H, D] and kv [B, Sk, 2, Hk, D]; with cu_seqlens and
        max_seqlen of q, and those of k, [total_q, H, D] of [total_q, H, D] and [total_k, 2, Hk, D].
        `causal` overrides the module's."""
        options = _options(self, causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        _check_given(max_seqlen=max_seqlen, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options
        )


def _options(module: Any, causal: bool | None) -> dict[str, Any]:
    return {
        "dropout_p": module.drop.p if module.training else 0.0,
        "softmax_scale": module.softmax_scale,
        "causal": module.causal if causal is None else causal,
        "window_size": module.window_size,
        "alibi_slopes": slopes_of(module),
        "deterministic": module.deterministic,
    }


def slopes_of(module: Any) -> torch.Tensor | None:
    """The module's slopes in fp32: a model cast to 16 bits has cast them too."""
    slopes = module.alibi_slopes
    return None if slopes is None else slopes.to(torch.float32)


def _check_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise ValueError(f"{name}: must be given with cu_seqlens, is None")


class _PlainAttention(nn.Module):
    """What SelfAttention and CrossAttention are made with."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)


class SelfAttention(_PlainAttention):
    """Attention of a packed qkv through PyTorch's own function, with a mask of padding.

    Arguments:
        causal: whether query i sees keys j <= i.
        softmax_scale: None is D**-0.5.
        attention_dropout: the probability of dropping an element of P, in training.
    """

    def forward(
        self,
        qkv: torch.Tensor,
        causal: bool | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, S, H, D] of qkv [B, S, 3, H, D]; key_padding_mask [B, S] is true where a key is kept,
        `causal` overrides the module's. A query that sees no key gives zeros."""
        q, k, v = qkv.unbind(2)
        causal = self.causal if causal is None else causal
        if key_padding_mask is None:
            return _sdpa(self, q, k, v, None, causal)
        visible = key_padding_mask[:, None, None, :]
        if causal:
            visible = visible & _not_after(q.shape[1], k.shape[1], 0, q.device)
        return _sdpa(self, q, k, v, visible, False)


class CrossAttention(_PlainAttention):
    """Attention of q and a packed kv through PyTorch's own function, with a mask of padding.

    Arguments:
        causal: whether query i sees keys j <= i + Sk - Sq; Sk counts the keys that are not padding.
        softmax_scale: None is D**-0.5.
        attention_dropout: the probability of dropping an element of P, in training.
    """

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, Sq, H, D] of q [B, Sq, H, D] and kv [B, Sk, 2, Hk, D]; key_padding_mask [B, Sk] is
        true where a key is kept, `causal` overrides the module's. A query that sees no key gives
        zeros."""
        seqlen_q, seqlen_k = q.shape[1], kv.shape[1]
        if kv.shape[3] != q.shape[2]:
            kv = kv.repeat_interleave(q.shape[2] // kv.shape[3], dim=3)
        k, v = kv.unbind(2)
        causal = self.causal if causal is None else causal
        if key_padding_mask is None and (not causal or seqlen_q == seqlen_k):
            return _sdpa(self, q, k, v, None, causal)
        visible = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        if causal:
            used = seqlen_k
            if key_padding_mask is not None:
                used = key_padding_mask.sum(-1)[:, None, None, None]
            past = _not_after(seqlen_q, seqlen_k, used - seqlen_q, q.device)
            visible = past if visible is None else visible & past
        return _sdpa(self, q, k, v, visible, False)


def _not_after(
    seqlen_q: int, seqlen_k: int, shift: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Whether j <= i + shift, [..., Sq, Sk]."""
    rows = torch.arange(seqlen_q, device=device)[:, None]
    return torch.arange(seqlen_k, device=device) <= rows + shift


def _sdpa(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """q [B, Sq, H, D], k, v [B, Sk, H, D] -> [B, Sq, H, D].

    visible: bool, broadcastable to [B, H, Sq, Sk]. causal is aligned to the top left.
    """
    mask = empty = None
    if visible is not None:
        # PyTorch before 2.5 gives NaN for a row without keys: such a row sees all, for nothing.
        empty = ~visible.any(-1, keepdim=True)
        mask = visible | empty
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=module.drop.p if module.training else 0.0,
        is_causal=causal,
        scale=module.softmax_scale,
    )
    return (out if empty is None else out.masked_fill(empty, 0.0)).transpose(1, 2)
