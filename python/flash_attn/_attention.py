"""Attention on PyTorch tensors behind the public functions: one forward, one backward, one
autograd.Function for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from . import _native

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


class Options(NamedTuple):
    """What an attention call takes beside q, k, v, attn_bias and learnable_sink."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: torch.Tensor | None
    deterministic: bool
    return_attn_probs: bool
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None


class Packing(NamedTuple):
    """How q, k and v come: `names` of the tensors that hold them, and how many each holds."""

    names: tuple[str, ...]
    counts: tuple[int, ...]

    def unpack(self, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """q, k and v, as views."""
        views: list[torch.Tensor] = []
        for tensor, count in zip(tensors, self.counts):
            views += [tensor] if count == 1 else tensor.unbind(-3)
        return views


SEPARATE = Packing(("q", "k", "v"), (1, 1, 1))
KV_PACKED = Packing(("q", "kv"), (1, 2))
QKV_PACKED = Packing(("qkv",), (3,))


def attention(
    packing: Packing,
    tensors: tuple[torch.Tensor, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> Result:
    """What the public functions return, for q, k and v packed as `packing` says."""
    for tensor in tensors:
        if not isinstance(tensor, _Tensor):
            raise _not_a_tensor(packing, tensors)
    if packing is not SEPARATE:
        _check_packed(packing, tensors, 4 if options.cu_seqlens_q is not None else 5)
    if _is_grad_enabled() and _needs_gradient(*tensors, attn_bias, learnable_sink):
        if options.block_table is not None:
            raise NotImplementedError(
                "block_table: no implementation differentiates through pages; call under"
                " torch.no_grad(), or with contiguous k and v"
            )
        out, lse, s_dmask = AttentionFunction.apply(
            packing, options, attn_bias, learnable_sink, *tensors
        )
    else:
        q, k, v = tensors if packing is SEPARATE else packing.unpack(tensors)
        out, lse, s_dmask, _ = forward(q, k, v, attn_bias, learnable_sink, options, False)
    if not options.return_attn_probs:
        return out
    if s_dmask is None:
        s_dmask = _empty((0,), dtype=out.dtype, device=out.device)
    return out, lse, s_dmask


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    wants_lse: bool,
    seed: int | None = None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    """(out, softmax_lse, S_dmask, seed of the dropout mask); what is not wanted is None."""
    q, k, v = usable(q), usable(k), usable(v)
    dropout_p = options.dropout_p
    lse = s_dmask = None
    try:
        out = _new_out(q, v)
        if wants_lse or options.return_attn_probs:
            lse = _new_lse(q, options.cu_seqlens_q)
        if options.return_attn_probs and dropout_p:
            s_dmask = _new_s_dmask(q, k, options)
    except RuntimeError as error:
        raise _no_memory(q, v, error) from None
    if seed is None:
        seed = draw_seed() if dropout_p else 0
    arguments = _arguments(
        q, k, v, out, lse, s_dmask, attn_bias, learnable_sink, options, seed, offset
    )
    try:
        _native.forward(*arguments)
    except _CLARIFIED as error:
        clear = _native.clarify(error, arguments)
        raise clear from (None if clear is error else error)
    return out, lse, s_dmask, seed


def backward(
    gradients: tuple[torch.Tensor | bool | None, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    seed: int,
    offset: int = 0,
) -> None:
    """Writes the gradients: (dout, dq, dk, dv, d_attn_bias, d_learnable_sink)."""
    arguments = (
        *gradients,
        options.deterministic,
        *_arguments(
            usable(q),
            usable(k),
            usable(v),
            out,
            lse,
            None,
            attn_bias,
            learnable_sink,
            options,
            seed,
            offset,
        ),
    )
    try:
        _native.backward(*arguments)
    except _CLARIFIED as error:
        clear = _native.clarify(error, arguments, _native.GRADIENT_ARGUMENTS)
        raise clear from (None if clear is error else error)


class AttentionFunction(torch.autograd.Function):
    """One autograd function for every packing; a packed tensor gets one packed gradient, whose
    parts are written in place."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        packing: Packing,
        options: Options,
        attn_bias: torch.Tensor | None,
        learnable_sink: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        out, lse, s_dmask, seed = forward(
            *packing.unpack(tensors), attn_bias, learnable_sink, options, True
        )
        ctx.save_for_backward(attn_bias, learnable_sink, out, lse, *tensors)
        ctx.packing, ctx.options, ctx.seed = packing, options, seed
        ctx.mark_non_differentiable(*(x for x in (lse, s_dmask) if x is not None))
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        attn_bias, learnable_sink, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            return (None,) * (4 + len(tensors))
        # Compact, whatever the strides of what they belong to.
        gradients = [_empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
        # A boolean mask has no gradient, and so requires none.
        d_attn_bias = _gradient_of(attn_bias, ctx.needs_input_grad[2])
        d_learnable_sink = _gradient_of(learnable_sink, ctx.needs_input_grad[3])
        backward(
            (
                dout if dout.stride(-1) == 1 else dout.contiguous(),
                *ctx.packing.unpack(tuple(gradients)),
                d_attn_bias,
                d_learnable_sink,
            ),
            *ctx.packing.unpack(tuple(tensors)),
            out,
            lse,
            attn_bias,
            learnable_sink,
            ctx.options,
            ctx.seed,
        )
        return None, None, d_attn_bias, d_learnable_sink, *gradients


def _gradient_of(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
    if tensor is None or not needed:
        return None
    return _empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    s_dmask: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    seed: int,
    offset: int = 0,
) -> tuple[Any, ...]:
    """The native functions' arguments, in the order of _native.ARGUMENTS."""
    try:
        window_left, window_right = options.window_size
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size: must be a pair (left, right), is {options.window_size!r}"
        ) from None
    if isinstance(attn_bias, _Tensor):
        attn_bias = usable(attn_bias)
    return (
        q,
        k,
        v,
        out,
        lse,
        s_dmask,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        options.seqused_k,
        options.block_table,
        options.alibi_slopes,
        attn_bias,
        learnable_sink,
        options.max_seqlen_q,
        options.max_seqlen_k,
        options.softmax_scale,
        options.causal,
        window_left,
        window_right,
        options.softcap,
        options.dropout_p,
        seed,
        offset,
        None,
    )


def with_kvcache(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    kvcache_arguments: tuple[Any, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    wants_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, softmax_lse). kvcache_arguments in the order of _native.KVCACHE_ARGUMENTS."""
    q = usable(q)
    out = _new_out(q, cache[1])
    lse = _new_lse(q, None) if wants_lse else None
    arguments = (
        *kvcache_arguments,
        *_arguments(q, *cache, out, lse, None, attn_bias, learnable_sink, options, 0),
    )
    try:
        _native.forward_with_kvcache(*arguments)
    except _CLARIFIED as error:
        clear = _native.clarify(error, arguments, _native.KVCACHE_ARGUMENTS)
        raise clear from (None if clear is error else error)
    return out, lse


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed for the dropout mask, from `generator` or PyTorch's default CPU generator."""
    device = "cpu" if generator is None else generator.device
    return int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))


def usable(x: torch.Tensor) -> torch.Tensor:
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


def _new_s_dmask(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor | None:
    if options.cu_seqlens_q is not None:
        batch = options.cu_seqlens_q.numel() - 1
        seqlen_q, seqlen_k = options.max_seqlen_q, options.max_seqlen_k
    elif q.dim() == 4 and k.dim() == 4:
        batch, seqlen_q, seqlen_k = q.size(0), q.size(1), k.size(1)
    else:
        return None
    if batch < 0 or not 0 <= min(seqlen_q, seqlen_k) <= max(seqlen_q, seqlen_k) < 2**31:
        return None
    rows = round_multiple(seqlen_q, _S_DMASK_MULTIPLE)
    columns = round_multiple(seqlen_k, _S_DMASK_MULTIPLE)
    return q.new_empty((batch, q.size(-2), rows, columns))


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    # A generator for any() would cost a microsecond.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and getattr(tensor, "requires_grad", False):
            return True
    return False


def _not_a_tensor(packing: Packing, tensors: tuple[object, ...]) -> TypeError:
    for name, tensor in zip(packing.names, tensors):
        if not isinstance(tensor, _Tensor):
            return TypeError(f"{name}: must be a torch.Tensor, is {type(tensor).__name__}")
    raise AssertionError("all are tensors")


def _check_packed(packing: Packing, tensors: tuple[torch.Tensor, ...], rank: int) -> None:
    for name, packed, count in zip(packing.names, tensors, packing.counts):
        if count == 1 or (packed.dim() == rank and packed.size(-3) == count):
            continue
        layout = f"[batch, seqlen, {count}, num_heads, head_dim]"
        if rank == 4:
            layout = f"[total, {count}, num_heads, head_dim]"
        raise ValueError(f"{name}: must have shape {layout}, has {list(packed.shape)}")


def length(name: str, value: object) -> int:
    """A maximum length, which clients pass as an int or as a tensor of one element."""
    if type(value) is int:
        return value
    try:
        return int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: must be an integer, is {value!r:.60}") from None
