"""The functions of FlashAttention 2.8 on PyTorch tensors.

All of them compute, for each batch and head,

    S = softmax_scale * Q K^T,   P = softmax(S, masked),   out = dropout(P) V

exactly and without storing S (Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023).
Names, order and defaults of the parameters are the original's; those after `*` are this library's.

Shapes: B batch, Sq and Sk sequence lengths, H heads of q, Hk heads of k and v with H % Hk == 0
(query head h reads key head h // (H / Hk)), D head_dim of q and k, Dv head_dim of v and out.

Options that all functions share:

- `dropout_p` in [0, 1): the probability of dropping an element of P. The seed comes from PyTorch's
  default CPU generator, so torch.manual_seed() repeats a call.
- `softmax_scale`: a number, at least 0; None is D**-0.5.
- `causal`: query i sees keys j <= i + Sk - Sq. The mask is aligned to the bottom right corner.
- `window_size` (left, right): query i sees keys [i + Sk - Sq - left, i + Sk - Sq + right]; -1 is no
  bound on that side.
- `softcap` > 0: S becomes softcap * tanh(S / softcap).
- `alibi_slopes`, fp32 [H] or [B, H]: adds -slope * |i + Sk - Sq - j| to S (Press et al., 2022).
- `deterministic`: accepted; the CPU's results are bitwise reproducible with any number of threads.
- `return_attn_probs=True`: returns (out, softmax_lse, S_dmask). softmax_lse is the natural
  logarithm of the sum of exp(S) along a row, fp32; +inf where a row sees no key. S_dmask, as in the
  original, is filled only where dropout_p > 0, and is an empty tensor else: [B, H, Sq up to 128, Sk
  up to 128] (multiples of 128) in q's dtype, exp(S - row maximum), negative where an element is
  dropped.
- `attn_bias`: added to S; fp32 or q's dtype, broadcastable to [B, H, Sq, Sk] (varlen: [B, H,
  max_seqlen_q, max_seqlen_k]). A boolean one keeps the elements where it is true.
- `learnable_sink` [H], fp32 or q's dtype: exp(sink) joins the denominator of the softmax; `s_aux`
  is another name for it.

q, k and v are fp32, fp16 or bf16, all of one dtype. A last dimension that is not contiguous is
copied; any other strides are used as they are. A query that sees no key gives zeros.

Errors: ValueError names the argument, its value and what it must be. NotImplementedError where no
implementation serves a right request: no backend for the tensors' device, or a gradient through
pages is needed.

Gradients flow to q, k, v, attn_bias and learnable_sink (Dao, 2023); ALiBi slopes are constants.
Memory grows linearly with the sequence length.
"""

from __future__ import annotations

import torch

from . import _binding as flash_attn_gpu  # clients call its functions through this name
from . import _known
from ._attention import (
    KV_PACKED,
    KVCACHE_NAMES,
    QKV_PACKED,
    SEPARATE,
    Options,
    Result,
    attention,
    check_tensors,
    length,
    with_kvcache,
)
from ._attention import round_multiple as round_multiple  # clients import it from here
from ._private import (  # and these
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# The original's operators of PyTorch, which are these functions here.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x, copied if its last dimension is not contiguous."""
    is_strided = isinstance(x, torch.Tensor) and x.dim() > 0 and x.stride(-1) != 1
    return x.contiguous() if is_strided else x


def _only_sink(learnable_sink: torch.Tensor | None, s_aux: torch.Tensor) -> torch.Tensor:
    if learnable_sink is not None:
        raise ValueError(
            "s_aux: is given together with learnable_sink, of which it is another name"
        )
    return s_aux


def _get_block_size_n(device: object, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """The number of keys that share one maximum in S_dmask: all of them, whatever the arguments."""
    return 2**30


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Result:
    """Attention of a tensor that holds q, k and v.

    Arguments:
        qkv: [B, S, 3, H, D].
        The options are those of flash_attn_func.

    Returns:
        out [B, S, H, D]; with return_attn_probs=True (out, softmax_lse [B, H, S], S_dmask).
    """
    return attention(
        QKV_PACKED,
        (qkv,),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        ),
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Result:
    """Attention of q and a tensor that holds k and v.

    Arguments:
        q: [B, Sq, H, D].
        kv: [B, Sk, 2, Hk, D].
        The options are those of flash_attn_func.

    Returns:
        out [B, Sq, H, D]; with return_attn_probs=True (out, softmax_lse [B, H, Sq], S_dmask).
    """
    return attention(
        KV_PACKED,
        (q, kv),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        ),
    )


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Result:
    """Attention of q over k and v: softmax(softmax_scale * Q K^T) V (Dao et al., 2022 and 2023).

    Fewer heads in k and v than in q are multi-query and grouped-query attention. With Sq = 2 and
    Sk = 5 the causal mask (1: keep) is::

        1 1 1 1 0
        1 1 1 1 1

    and with Sq = 5 and Sk = 2 the first three queries see nothing and give zeros::

        0 0
        0 0
        0 0
        1 0
        1 1

    Arguments:
        q: [B, Sq, H, D], fp32, fp16 or bf16.
        k: [B, Sk, Hk, D], q's dtype.
        v: [B, Sk, Hk, Dv], q's dtype.
        dropout_p: probability in [0, 1); 0.0 in evaluation.
        softmax_scale: factor of Q K^T; None is D**-0.5.
        causal: whether query i sees only keys j <= i + Sk - Sq.
        window_size: (left, right) in tokens; query i sees keys
            [i + Sk - Sq - left, i + Sk - Sq + right]; -1 is no bound on that side.
        softcap: a cap of the scores' magnitude, as softcap * tanh(S / softcap); 0.0 is none.
        alibi_slopes: [H] or [B, H], fp32; adds -slope * |i + Sk - Sq - j| to the scores.
        deterministic: accepted; on the CPU results always are.
        return_attn_probs: whether to return softmax_lse and S_dmask too.
        attn_bias: broadcastable to [B, H, Sq, Sk]; fp32 or q's dtype, added to the scores; or bool,
            true where an element is kept.
        learnable_sink: [H], fp32 or q's dtype; exp(sink) joins the softmax's denominator.

    Returns:
        out [B, Sq, H, Dv] in q's dtype; with return_attn_probs=True (out, softmax_lse, S_dmask):
        softmax_lse [B, H, Sq], fp32, natural logarithm; S_dmask empty unless dropout_p > 0.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what it must be.
        TypeError: an argument is of a wrong Python type.
        NotImplementedError: nothing serves the tensors' device, or a gradient through pages is
            required.
    """
    if not (
        dropout_p != 0.0
        or return_attn_probs
        or alibi_slopes is not None
        or attn_bias is not None
        or learnable_sink is not None
        or s_aux is not None
    ):
        out = _known.attention(q, k, v, softmax_scale, causal, window_size, softcap)
        if out is not None:
            return out
    return attention(
        SEPARATE,
        (q, k, v),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        ),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Result:
    """Attention within sequences laid end to end, of a tensor that holds q, k and v.

    Arguments:
        qkv: [total, 3, H, D].
        cu_seqlens: [B + 1], int32; sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the longest sequence's length, an int or a tensor of one element.
        The options are those of flash_attn_varlen_func.

    Returns:
        out [total, H, D]; with return_attn_probs=True (out, softmax_lse [H, total], S_dmask).
    """
    return attention(
        QKV_PACKED,
        (qkv,),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            cu_seqlens,
            cu_seqlens,
            length("max_seqlen", max_seqlen),
            length("max_seqlen", max_seqlen),
        ),
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> Result:
    """Attention between sequences laid end to end, of q and a tensor that holds k and v.

    Arguments:
        q: [total_q, H, D].
        kv: [total_k, 2, Hk, D].
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k and the options are those
        of flash_attn_varlen_func.

    Returns:
        out [total_q, H, D]; with return_attn_probs=True (out, softmax_lse [H, total_q], S_dmask).
    """
    return attention(
        KV_PACKED,
        (q, kv),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            cu_seqlens_q,
            cu_seqlens_k,
            length("max_seqlen_q", max_seqlen_q),
            length("max_seqlen_k", max_seqlen_k),
            seqused_k,
        ),
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> Result:
    """Attention between sequences laid end to end, without padding (Dao et al., 2022 and 2023).

    Sequence b of q is the tokens from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and so for k and v.
    Sequences may be empty on either side. Masks, windows and ALiBi use each sequence's own lengths.

    Arguments:
        q: [total_q, H, D], fp32, fp16 or bf16.
        k: [total_k, Hk, D], q's dtype; with block_table [num_blocks, page_block_size, Hk, D].
        v: [total_k, Hk, Dv], q's dtype; with block_table [num_blocks, page_block_size, Hk, Dv].
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32, from 0, never decreasing.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length, each an int or a tensor
            of one element.
        block_table: [B, max_blocks], int32; the pages of each sequence of k and v, in order.
        attn_bias: broadcastable to [B, H, max_seqlen_q, max_seqlen_k], indexed by positions within
            the sequences; fp32 or q's dtype; or bool.
        seqused_k: [B], int32; only so many first keys of each sequence are used.
        The other options are those of flash_attn_func.

    Returns:
        out [total_q, H, Dv] in q's dtype; with return_attn_probs=True (out, softmax_lse, S_dmask):
        softmax_lse [H, total_q], fp32, natural logarithm; S_dmask empty unless dropout_p > 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as flash_attn_func.
    """
    if not (
        dropout_p != 0.0
        or return_attn_probs
        or alibi_slopes is not None
        or attn_bias is not None
        or learnable_sink is not None
        or s_aux is not None
    ):
        out = _known.attention(
            q, k, v, softmax_scale, causal, window_size, softcap, False, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, seqused_k, block_table,
        )  # fmt: skip
        if out is not None:
            return out
    return attention(
        SEPARATE,
        (q, k, v),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            cu_seqlens_q,
            cu_seqlens_k,
            length("max_seqlen_q", max_seqlen_q),
            length("max_seqlen_k", max_seqlen_k),
            seqused_k,
            block_table,
        ),
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over a cache of keys and values, to which k and v are appended in place.

    In this order: k is rotated to positions cache_seqlens + t and written, with v, behind the
    cached tokens; q is rotated, with `causal` or a window to positions cache_seqlens + t, else all
    to cache_seqlens; q attends to cache_seqlens + Snew - cache_leftpad keys, aligned to the bottom
    right corner. Inference only: the result has no gradient.

    Arguments:
        q: [B, Sq, H, D], fp32, fp16 or bf16.
        k_cache: [B_cache, S_cache, Hk, D], or with block_table [num_blocks, page_block_size, Hk, D]
            with pages of any size; q's dtype, the last dimension contiguous.
        v_cache: as k_cache, with Dv.
        k, v: [B, Snew, Hk, D] and [B, Snew, Hk, Dv], appended; None appends nothing.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], fp32 or q's dtype; only with k and v
            (Su et al., "RoFormer", 2021).
        cache_seqlens: tokens in each row of the cache before the call; [B], int32, or an int for
            all; None: all that the cache has room for.
        cache_batch_idx: [B], int32; the row of the cache of each batch, no row twice with k and v.
        cache_leftpad: [B], int32; tokens to skip at the start of each row.
        block_table: [B, max_blocks], int32; the pages of each row, in order.
        rotary_interleaved: pairs dimensions (0, 1), (2, 3)...; else (d, d + rotary_dim / 2).
        num_splits: in how many parts the keys are cut; 0 leaves the choice to the implementation.
        return_softmax_lse: whether to return softmax_lse too.
        The other options are those of flash_attn_func.

    Returns:
        out [B, Sq, H, Dv] in q's dtype; with return_softmax_lse=True (out, softmax_lse [B, H, Sq],
        fp32, natural logarithm).

    Raises:
        ValueError, TypeError, NotImplementedError: as flash_attn_func. A length, page or row out of
        range, and a row or page that two sequences would append to, is an error before anything is
        written.
    """
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor or None, is {type(tensor).__name__}")
    if not isinstance(cache_seqlens, torch.Tensor):
        check_tensors(KVCACHE_NAMES, (q, k_cache, v_cache))
        if cache_seqlens is None:
            if k is not None:
                raise ValueError("cache_seqlens: is None, must be given where k and v are appended")
            room = k_cache.size(1) if k_cache.dim() > 1 else 0
            cache_seqlens = room if block_table is None else room * block_table.size(-1)
        cache_seqlens = torch.full(
            (q.size(0),), length("cache_seqlens", cache_seqlens), dtype=torch.int32, device=q.device
        )
    if alibi_slopes is None and attn_bias is None and learnable_sink is None and s_aux is None:
        known = _known.with_kvcache(
            q, k_cache, v_cache, softmax_scale, causal, window_size, softcap, return_softmax_lse,
            block_table, cache_seqlens, cache_batch_idx, cache_leftpad, k, v,
            rotary_cos, rotary_sin, rotary_interleaved, num_splits,
        )  # fmt: skip
        if known is not None:
            return known
    out, lse = with_kvcache(
        q,
        (k_cache, v_cache),
        (
            cache_seqlens,
            maybe_contiguous(cache_batch_idx),
            cache_leftpad,
            maybe_contiguous(k),
            maybe_contiguous(v),
            rotary_cos,
            rotary_sin,
            rotary_interleaved,
            num_splits,
        ),
        attn_bias,
        learnable_sink if s_aux is None else _only_sink(learnable_sink, s_aux),
        Options(
            0.0,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            False,
            False,
            block_table=maybe_contiguous(block_table),
        ),
        return_softmax_lse,
    )
    return (out, lse) if return_softmax_lse else out
