"""One attention call as the implementations in Python get it: the native functions' arguments by
name, checked, with outputs allocated."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch


class Call(NamedTuple):
    """The arguments of _native.forward(), in their order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    s_dmask: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    attn_bias: torch.Tensor | None
    learnable_sink: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    seed: int
    offset: int
    backend: str | None

    @property
    def varlen(self) -> bool:
        """Whether sequences are laid end to end."""
        return self.cu_seqlens_q is not None

    @property
    def scale(self) -> float:
        """The softmax scale in force."""
        return self.q.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def band(self) -> tuple[int, int]:
        """How far a query sees to its left and right; -1 is no bound."""
        return self.window_left, 0 if self.causal else self.window_right

    @property
    def longest_q(self) -> int:
        """The number of queries of the longest sequence."""
        return self.max_seqlen_q if self.varlen else self.q.size(1)

    @property
    def longest_k(self) -> int:
        """The most keys that a sequence can have."""
        if self.varlen:
            return self.max_seqlen_k
        if self.block_table is not None:
            return self.block_table.size(1) * self.k.size(1)
        return self.k.size(1)

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.q.size(0) if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def dropout_key(self) -> tuple[int, int, int]:
        """Two words of Philox' key and the last of its counter."""
        words = self.seed ^ (self.offset >> 32 << 32)
        return words & 0xFFFFFFFF, words >> 32 & 0xFFFFFFFF, self.offset & 0xFFFFFFFF

    @property
    def dropout_threshold(self) -> int:
        """A probability is kept where its 16 bits are below this."""
        return max(1, int((1.0 - self.dropout_p) * 65536.0 + 0.5))

    def bias_over_scores(self) -> torch.Tensor | None:
        """attn_bias with its four dimensions [B, H, Sq, Sk], each of the full size or 1."""
        bias = self.attn_bias
        return None if bias is None else bias[(None,) * (4 - bias.dim())]


class Cache(NamedTuple):
    """The arguments of _native.forward_with_kvcache() before those of Call, in their order."""

    seqlens: torch.Tensor
    batch_idx: torch.Tensor | None
    leftpad: torch.Tensor | None
    k_new: torch.Tensor | None
    v_new: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_interleaved: bool
    num_splits: int

    @property
    def seqlen_new(self) -> int:
        """How many tokens are appended to each row."""
        return 0 if self.k_new is None else self.k_new.size(1)


class Gradients(NamedTuple):
    """The arguments of _native.backward() before those of Call, in their order."""

    dout: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    d_attn_bias: torch.Tensor | None
    d_learnable_sink: torch.Tensor | None
    deterministic: bool


class Request(NamedTuple):
    """A forward call, one over a cache, or, with gradients, a backward call.

    `key` is equal for calls that differ in nothing but where tensors lie, what they hold, and the
    seed; None where nothing may be kept by it."""

    call: Call
    cache: Cache | None = None
    gradients: Gradients | None = None
    key: Hashable = None
