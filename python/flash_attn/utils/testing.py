"""Random padding, packed inputs and plain attention, for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..bert_padding import pad_input, unpad_input

__all__ = [
    "attention_ref",
    "construct_local_mask",
    "generate_qkv",
    "generate_random_padding_mask",
]

Window = tuple[int | None, int | None]


def generate_random_padding_mask(
    max_seqlen: int,
    batch_size: int,
    device: Any,
    mode: str = "random",
    zero_lengths: bool = False,
) -> torch.Tensor:
    """[batch_size, max_seqlen], bool: true at the first tokens of each row.

    mode: "full"; "random", at most 20 tokens short; or "third", at least a third. zero_lengths:
    whether every fifth row and the last one are empty.
    """
    if mode == "full":
        lengths = torch.full((batch_size, 1), max_seqlen, device=device)
    elif mode in ("random", "third"):
        least = max(0 if zero_lengths else 1, max_seqlen - 20)
        least = max_seqlen // 3 if mode == "third" else least
        lengths = torch.randint(least, max_seqlen + 1, (batch_size, 1), device=device)
    else:
        raise ValueError(f"mode: must be 'full', 'random' or 'third', is {mode!r}")
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1:] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def _unpadded(
    x: torch.Tensor, padding_mask: torch.Tensor | None, unused_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None, Callable[..., torch.Tensor]]:
    """(tokens, cu_seqlens, longest, seqused, the function that pads again)."""
    batch, seqlen = x.shape[:2]
    if padding_mask is not None:
        tokens, indices, cu_seqlens, longest, used = unpad_input(x, padding_mask, unused_mask)
        pad = partial(pad_input, indices=indices, batch=batch, seqlen=seqlen)
        return tokens, cu_seqlens, longest, used, pad
    cu_seqlens = seqlen * torch.arange(batch + 1, dtype=torch.int32, device=x.device)
    return x.flatten(0, 1), cu_seqlens, seqlen, None, lambda y: y.unflatten(0, (batch, seqlen))


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def generate_qkv(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    qv=None,
    kvpacked=False,
    qkvpacked=False,
    query_unused_mask=None,
    key_unused_mask=None,
) -> tuple[Any, ...]:
    """Padded tensors and masks as arguments of the varlen functions.

    Arguments:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv]. qv: [B, Sq, H, Dv] or None.
        The masks: None, or [B, Sq] and [B, Sk], bool, true at tokens, or at unused places.
        kvpacked, qkvpacked: whether the results are packed.

    Returns:
        Leaves that require gradients, lengths, and functions that pad again. Not packed: (q, k, v,
        qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, the padded
        q, k, v, qv, pad of out, of dq, of dk); kvpacked: (q, kv, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, the padded q, kv, pad of out, of dq, of dkv); qkvpacked: (qkv,
        cu_seqlens, max_seqlen, the padded qkv, pad of out, of dqkv).
    """
    if kvpacked and qkvpacked:
        raise ValueError("kvpacked, qkvpacked: must not both be true")
    if (kvpacked or qkvpacked) and not (query_unused_mask is None and key_unused_mask is None):
        raise ValueError("query_unused_mask, key_unused_mask: need tensors that are not packed")
    q_tokens, cu_q, longest_q, used_q, pad_q = _unpadded(q, query_padding_mask, query_unused_mask)
    k_tokens, cu_k, longest_k, used_k, pad_k = _unpadded(k, key_padding_mask, key_unused_mask)
    v_tokens = _unpadded(v, key_padding_mask, key_unused_mask)[0]
    if qkvpacked:
        packed = torch.stack((q_tokens, k_tokens, v_tokens), 1)
        padded = torch.stack((q, k, v), 2)
        return _leaf(packed), cu_q, longest_q, _leaf(padded), pad_q, pad_q
    if kvpacked:
        packed = torch.stack((k_tokens, v_tokens), 1)
        lengths = (cu_q, cu_k, longest_q, longest_k)
        padded = (_leaf(q), _leaf(torch.stack((k, v), 2)))
        return _leaf(q_tokens), _leaf(packed), *lengths, *padded, pad_q, pad_q, pad_k
    qv_tokens = None
    if qv is not None:
        qv_tokens = _unpadded(qv, query_padding_mask, query_unused_mask)[0].detach()
    leaves = (_leaf(q_tokens), _leaf(k_tokens), _leaf(v_tokens), qv_tokens)
    lengths = (cu_q, cu_k, used_q, used_k, longest_q, longest_k)
    padded = (_leaf(q), _leaf(k), _leaf(v), None if qv is None else qv.detach())
    return *leaves, *lengths, *padded, pad_q, pad_q, pad_k


def construct_local_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: Window = (-1, -1),
    sink_token_length: int = 0,
    query_padding_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    key_leftpad: torch.Tensor | None = None,
    device: Any = None,
) -> torch.Tensor:
    """Which keys a window hides: bool, broadcastable to [B, 1, Sq, Sk], true where hidden.

    Query i sees keys [i + Sk - Sq - left, i + Sk - Sq + right], Sq and Sk counting what the padding
    masks [B, Sq] and [B, Sk] keep; None and -1 are no bound. The first sink_token_length keys are
    not hidden by the left bound. key_leftpad [B] is where each row's keys begin.
    """

    def used(mask: torch.Tensor | None, length: int) -> int | torch.Tensor:
        return length if mask is None else mask.sum(-1)[:, None, None, None]

    left, right = (None if bound == -1 else bound for bound in window_size)
    columns = torch.arange(seqlen_k, device=device)
    hidden = torch.zeros(1, dtype=torch.bool, device=device)
    if key_leftpad is not None:
        columns = columns - key_leftpad[:, None, None, None]
        hidden = columns < 0
    middle = torch.arange(seqlen_q, device=device)[:, None] + (
        used(key_padding_mask, seqlen_k) - used(query_padding_mask, seqlen_q)
    )
    if right is not None:
        hidden = hidden | (columns > middle + right)
    if left is not None:
        hidden = hidden | ((columns < middle - left) & (columns >= sink_token_length))
    return hidden.expand(*hidden.shape[:-2], seqlen_q, seqlen_k)


def attention_ref(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    attn_bias=None,
    dropout_p=0.0,
    dropout_mask=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    sink_token_length=0,
    learnable_sink=None,
    softcap=0.0,
    upcast=True,
    reorder_ops=False,
    intermediate_dtype=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as one would write it, with all of P in memory; differentiable.

    Arguments:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv].
        query_padding_mask: [B, Sq]. key_padding_mask: [B, Sk]; bool, true at tokens.
        attn_bias: added to the scores; broadcastable to [B, H, Sq, Sk].
        dropout_p, dropout_mask: what is kept, bool [B, H, Sq, Sk], and the probability it was drawn
            with.
        key_leftpad, sink_token_length, window_size: as in construct_local_mask.
        learnable_sink: [H]; exp(sink) joins the softmax's denominator.
        upcast: whether to compute in fp32, else in q's dtype.
        reorder_ops: whether to scale k rather than q: the same, rounded otherwise.
        intermediate_dtype: to round P to.

    Returns:
        (out [B, Sq, H, Dv], P before dropout [B, H, Sq, Sk]), in q's dtype. Rows of padding, and
        those that see no key, are zero.

    Raises:
        NotImplementedError: qv, a descale or attention_chunk is given; FlashAttention 2 has none of
            them.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(attention_chunk=attention_chunk or None)
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    scores = _scores(q, k, softcap, reorder_ops)
    hidden = construct_local_mask(
        q.shape[1],
        k.shape[1],
        (window_size[0], 0) if causal else window_size,
        sink_token_length,
        query_padding_mask,
        key_padding_mask,
        key_leftpad,
        q.device,
    )
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    if attn_bias is not None:
        scores = scores + attn_bias
    probabilities = _softmax(scores, learnable_sink).to(v.dtype)
    unseen = hidden.all(-1, keepdim=True)
    if query_padding_mask is not None:
        unseen = unseen | ~query_padding_mask[:, None, :, None]
    probabilities = probabilities.masked_fill(unseen, 0.0)
    kept = probabilities
    if dropout_mask is not None:
        kept = kept.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(v.dtype)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    out = torch.einsum("bhts,bshd->bthd", kept, v / (1.0 - dropout_p))
    return out.to(dtype), probabilities.to(dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, softcap: float, scale_k: bool) -> torch.Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scale = q.shape[-1] ** -0.5
    q, k = (q, k * scale) if scale_k else (q * scale, k)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    return softcap * torch.tanh(scores / softcap) if softcap > 0.0 else scores


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: is not supported by this version's attention_ref")


def _softmax(scores: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    if sink is None:
        return scores.softmax(-1)
    column = sink.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores.float(), column), -1).softmax(-1)[..., :-1]
