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
- `softmax_scale`: a positive number; None is D**-0.5.
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
- `learnable_sink` [H], fp32 or q's dtype: exp(sink) joins the denominator of the softmax.

q, k and v are fp32, fp16 or bf16, all of one dtype. A last dimension that is not contiguous is
copied; any other strides are used as they are. A query that sees no key gives zeros.

Errors: ValueError names the argument, its value and what it must be. NotImplementedError where no
implementation serves a right request: no backend for the tensors' device, or a gradient is needed.
"""

from __future__ import annotations

import torch

from . import _native

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# S_dmask's sequence dimensions are rounded up to multiples of this.
_S_DMASK_MULTIPLE = 128

# Looked up once; a call on a tiny problem is mostly such look-ups.
_empty = torch.empty
_empty_like = torch.empty_like
_float32 = torch.float32
_is_grad_enabled = torch.is_grad_enabled
_Tensor = torch.Tensor
_CLARIFIED = (TypeError, OverflowError, RuntimeError, BufferError)


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x, copied if its last dimension is not contiguous."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: object, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """The number of keys that share one maximum in S_dmask: all of them, whatever the arguments."""
    return 2**30


def _draw_seed() -> int:
    """A seed for the dropout mask, from PyTorch's default CPU generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_attn_probs: bool,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> Result:
    if not (isinstance(q, _Tensor) and isinstance(k, _Tensor) and isinstance(v, _Tensor)):
        raise _not_a_tensor(q=q, k=k, v=v)
    if _is_grad_enabled():
        _refuse_gradient(q, k, v, attn_bias, learnable_sink)
    q, k, v = _usable(q), _usable(k), _usable(v)
    if isinstance(attn_bias, _Tensor):
        attn_bias = _usable(attn_bias)
    try:
        window_left, window_right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size: must be a pair (left, right), is {window_size!r}") from None
    lse = s_dmask = None
    try:
        out = _new_out(q, v)
        if return_attn_probs:
            lse = _new_lse(q, cu_seqlens_q)
            if dropout_p:
                s_dmask = _new_s_dmask(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    except RuntimeError as error:
        raise _no_memory(q, v, error) from None
    arguments = (
        q,
        k,
        v,
        out,
        lse,
        s_dmask,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        alibi_slopes,
        attn_bias,
        learnable_sink,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        dropout_p,
        _draw_seed() if dropout_p else 0,
        0,
        None,
    )
    try:
        _native.forward(*arguments)
    except _CLARIFIED as error:
        clear = _native.clarify(error, arguments)
        raise clear from (None if clear is error else error)
    if not return_attn_probs:
        return out
    return out, lse, _empty((0,), dtype=q.dtype, device=q.device) if s_dmask is None else s_dmask


def _usable(x: torch.Tensor) -> torch.Tensor:
    # A view with the negative bit set holds its values negated, which DLPack cannot say.
    if x.is_neg():
        x = x.resolve_neg()
    # A last dimension of stride 0 is a broadcast one: right for attn_bias, refused elsewhere.
    return x if x.dim() == 0 or x.stride(-1) in (0, 1) else x.contiguous()


# The shapes below follow from arguments that nobody has checked yet. Where those are wrong any
# tensor does: the native library checks q, k and v first, and says what is wrong.


def _new_out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if q.dim() == 0 or v.dim() == 0 or q.size(-1) == v.size(-1):
        return _empty_like(q)
    return q.new_empty((*q.shape[:-1], v.size(-1)))


def _new_lse(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> torch.Tensor:
    shape = tuple(q.shape)
    if cu_seqlens_q is not None and len(shape) == 3:
        shape = (shape[1], shape[0])
    elif len(shape) == 4:
        shape = (shape[0], shape[2], shape[1])
    return _empty(shape, dtype=_float32, device=q.device)


def _no_memory(q: torch.Tensor, v: torch.Tensor, error: RuntimeError) -> Exception:
    """What to raise where PyTorch cannot allocate the outputs."""
    if max(q.numel(), v.numel()) > 2**60:  # no memory is that large: a view of too many elements
        return ValueError(f"q, v: shapes {list(q.shape)} and {list(v.shape)} are too large")
    return MemoryError(f"out, softmax_lse or S_dmask cannot be allocated: {error}")


def _new_s_dmask(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> torch.Tensor | None:
    if cu_seqlens_q is not None:
        batch, seqlen_q, seqlen_k = cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k
    elif q.dim() == 4 and k.dim() == 4:
        batch, seqlen_q, seqlen_k = q.size(0), q.size(1), k.size(1)
    else:
        return None
    if batch < 0 or not 0 <= min(seqlen_q, seqlen_k) <= max(seqlen_q, seqlen_k) < 2**31:
        return None
    rows = round_multiple(seqlen_q, _S_DMASK_MULTIPLE)
    columns = round_multiple(seqlen_k, _S_DMASK_MULTIPLE)
    return q.new_empty((batch, q.size(-2), rows, columns))


def _refuse_gradient(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and getattr(tensor, "requires_grad", False):
            raise NotImplementedError(
                "q, k, v, attn_bias and learnable_sink must not require a gradient: the backward"
                " pass is not in this version of FlashAttention-Plus; call under torch.no_grad()"
            )


def _not_a_tensor(**values: object) -> TypeError:
    for name, value in values.items():
        if not isinstance(value, _Tensor):
            return TypeError(f"{name}: must be a torch.Tensor, is {type(value).__name__}")
    raise AssertionError("all are tensors")


def _unpack(packed: torch.Tensor, name: str, count: int, rank: int) -> tuple[torch.Tensor, ...]:
    """The tensors stacked along the third dimension from the end of `packed`, as views."""
    if not isinstance(packed, _Tensor):
        raise _not_a_tensor(**{name: packed})
    if packed.dim() != rank or packed.size(-3) != count:
        layout = f"[batch, seqlen, {count}, num_heads, head_dim]"
        if rank == 4:
            layout = f"[total, {count}, num_heads, head_dim]"
        raise ValueError(f"{name}: must have shape {layout}, has {list(packed.shape)}")
    return packed.unbind(-3)


def _length(name: str, value: object) -> int:
    """A maximum length, which clients pass as an int or as a tensor of one element."""
    if type(value) is int:
        return value
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: must be an integer, is {value!r:.60}") from None


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
) -> Result:
    """Attention of a tensor that holds q, k and v.

    Arguments:
        qkv: [B, S, 3, H, D].
        The options are those of flash_attn_func.

    Returns:
        out [B, S, H, D]; with return_attn_probs=True (out, softmax_lse [B, H, S], S_dmask).
    """
    q, k, v = _unpack(qkv, "qkv", 3, 5)
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
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
) -> Result:
    """Attention of q and a tensor that holds k and v.

    Arguments:
        q: [B, Sq, H, D].
        kv: [B, Sk, 2, Hk, D].
        The options are those of flash_attn_func.

    Returns:
        out [B, Sq, H, D]; with return_attn_probs=True (out, softmax_lse [B, H, Sq], S_dmask).
    """
    k, v = _unpack(kv, "kv", 2, 5)
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
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
        NotImplementedError: nothing serves the tensors' device, or a gradient is required.
    """
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
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
    q, k, v = _unpack(qkv, "qkv", 3, 4)
    max_seqlen = _length("max_seqlen", max_seqlen)
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
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
    k, v = _unpack(kv, "kv", 2, 4)
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
        cu_seqlens_q,
        cu_seqlens_k,
        _length("max_seqlen_q", max_seqlen_q),
        _length("max_seqlen_k", max_seqlen_k),
        seqused_k,
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
    return _attention(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        attn_bias,
        learnable_sink,
        cu_seqlens_q,
        cu_seqlens_k,
        _length("max_seqlen_q", max_seqlen_q),
        _length("max_seqlen_k", max_seqlen_k),
        seqused_k,
        block_table,
    )
