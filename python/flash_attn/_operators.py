"""Attention as operators of torch.library: what torch.compile and torch.export record.

Eager calls do not come here; they cost less without PyTorch's dispatcher. Each operator has a fake
kernel, which says shapes and dtypes without computing, and `forward` has an autograd formula.

The operators are pure, `with_kvcache` but for the cache that it appends to: the state of dropout's
generator is an argument, drawn outside, so that a recomputation replays the mask.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _attention, _native
from ._attention import KV_PACKED, QKV_PACKED, SEPARATE, Options, Packing

_NAMESPACE = "flash_attention_plus"

# How every operator takes attn_bias, learnable_sink and Options; a maximum length that is a tensor
# comes apart from its integer. `rng_state`, int64 [2] on the CPU, is (seed, offset).
_OPTIONS = (
    "Tensor? attn_bias, Tensor? learnable_sink, Tensor? rng_state, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, Tensor? alibi_slopes,"
    " Tensor? max_seqlen_q_tensor, Tensor? max_seqlen_k_tensor, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float dropout_p, float? softmax_scale, bool causal,"
    " SymInt window_size_left, SymInt window_size_right, float softcap, bool deterministic,"
    " bool return_attn_probs"
)
# Tensors that hold several of q, k and v come first, and what they hold is None: (qkv, None, None),
# (q, kv, None). `backward` returns the gradients of those that are given, then those asked for of
# attn_bias and learnable_sink.
_SCHEMAS = {
    "forward": f"(Tensor q, Tensor? k, Tensor? v, {_OPTIONS})"
    " -> (Tensor out, Tensor softmax_lse, Tensor S_dmask)",
    "backward": "(Tensor dout, Tensor out, Tensor softmax_lse, Tensor q, Tensor? k, Tensor? v,"
    f" {_OPTIONS}, bool wants_d_attn_bias, bool wants_d_learnable_sink) -> Tensor[]",
    "with_kvcache": "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens,"
    " Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? k, Tensor? v, Tensor? rotary_cos,"
    f" Tensor? rotary_sin, bool rotary_interleaved, SymInt num_splits, {_OPTIONS})"
    " -> (Tensor out, Tensor softmax_lse)",
}
# Where attn_bias and learnable_sink stand among forward's arguments.
_ATTN_BIAS, _LEARNABLE_SINK = 3, 4


# ---- What the public functions call ----


def attention(
    tensors: tuple[torch.Tensor, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask) of q, k and v as `tensors` hold them."""
    rng_state = _rng_state(_attention.draw_seed_tensor(), 0) if options.dropout_p else None
    q, k, v = (*tensors, None, None)[:3]
    return torch.ops.flash_attention_plus.forward(
        q, k, v, *_flatten(options, attn_bias, learnable_sink, rng_state)
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask) with a dropout mask that the caller chooses."""
    rng_state = _rng_state(seed, offset) if options.dropout_p else None
    return torch.ops.flash_attention_plus.forward(
        q, k, v, *_flatten(options, attn_bias, learnable_sink, rng_state)
    )


def backward(
    gradients: tuple[torch.Tensor | None, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor,
) -> None:
    """Writes the gradients, as _attention.backward."""
    dout, *written = gradients
    rng_state = _rng_state(seed, offset) if options.dropout_p else None
    flat = _flatten(options, attn_bias, learnable_sink, rng_state)
    wanted = [x is not None for x in written[3:]]
    computed = torch.ops.flash_attention_plus.backward(dout, out, lse, q, k, v, *flat, *wanted)
    for to, gradient in zip([x for x in written if x is not None], computed):
        to.copy_(gradient)


def with_kvcache(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    kvcache_arguments: tuple[Any, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, softmax_lse); the arguments are those of _attention.with_kvcache."""
    with torch.no_grad():
        return torch.ops.flash_attention_plus.with_kvcache(
            q, *cache, *kvcache_arguments, *_flatten(options, attn_bias, learnable_sink, None)
        )


def _rng_state(seed: int | torch.Tensor, offset: int | torch.Tensor) -> torch.Tensor:
    # The private functions read them from a tensor, which makes them symbols while traced.
    return torch.stack(
        [
            x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.int64, device="cpu")
            for x in (seed, offset)
        ]
    )


def _flatten(
    options: Options,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    rng_state: torch.Tensor | None,
) -> tuple[Any, ...]:
    """The arguments that _OPTIONS names."""
    window_left, window_right = _attention.window(options)
    longest = options.max_seqlen_q, options.max_seqlen_k
    as_tensors = [x if isinstance(x, torch.Tensor) else None for x in longest]
    as_integers = [0 if isinstance(x, torch.Tensor) else x for x in longest]
    return (
        attn_bias,
        learnable_sink,
        rng_state,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        options.seqused_k,
        options.block_table,
        options.alibi_slopes,
        *as_tensors,
        *as_integers,
        options.dropout_p,
        options.softmax_scale,
        options.causal,
        window_left,
        window_right,
        options.softcap,
        options.deterministic,
        options.return_attn_probs,
    )


def _unflatten(
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    max_seqlen_q_tensor: torch.Tensor | None,
    max_seqlen_k_tensor: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Options]:
    """(attn_bias, learnable_sink, rng_state, options)."""
    options = Options(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q if max_seqlen_q_tensor is None else max_seqlen_q_tensor,
        max_seqlen_k if max_seqlen_k_tensor is None else max_seqlen_k_tensor,
        seqused_k,
        block_table,
    )
    return attn_bias, learnable_sink, rng_state, options


# ---- The operators ----


def _packed(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[Packing, tuple[torch.Tensor, ...]]:
    if v is not None:
        return SEPARATE, (q, k, v)
    return (QKV_PACKED, (q,)) if k is None else (KV_PACKED, (q, k))


def _with_lengths(options: Options) -> Options:
    """`options` with the maximum lengths as integers, which only real tensors can tell."""
    return options._replace(
        max_seqlen_q=_attention.length("max_seqlen_q", options.max_seqlen_q),
        max_seqlen_k=_attention.length("max_seqlen_k", options.max_seqlen_k),
    )


def _seed_and_offset(rng_state: torch.Tensor | None) -> tuple[int, int]:
    if rng_state is None:
        return 0, 0
    seed, offset = rng_state.tolist()
    return seed, offset


def _forward_results(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised out, softmax_lse and S_dmask, contiguous whatever the strides of q: a compiler
    may pass other strides than those that it traced."""
    s_dmask = None
    if options.return_attn_probs and options.dropout_p:
        s_dmask = _attention.new_s_dmask(q, k, options)
    return (
        q.new_empty((*q.shape[:-1], *v.shape[-1:])),
        _attention.new_lse(q, options.cu_seqlens_q),
        q.new_empty((0,)) if s_dmask is None else s_dmask,
    )


def _forward(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attn_bias, learnable_sink, rng_state, options = _unflatten(*flat)
    options = _with_lengths(options)
    packing, tensors = _packed(q, k, v)
    _attention.check_packed(packing, tensors, options)
    q, k, v = packing.unpack(tensors)
    results = _forward_results(q, k, v, options)
    out, lse, s_dmask = results
    _attention.run_forward(
        _attention.compact(q),
        _attention.compact(k),
        _attention.compact(v),
        out,
        lse,
        s_dmask if s_dmask.numel() > 0 else None,
        attn_bias,
        learnable_sink,
        options,
        *_seed_and_offset(rng_state),
    )
    return results


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, options = _unflatten(*flat)
    packing, tensors = _packed(q, k, v)
    _attention.check_packed(packing, tensors, options)
    return _forward_results(*packing.unpack(tensors), options)


def _backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    *flat_and_wanted: Any,
) -> list[torch.Tensor]:
    *flat, wants_d_attn_bias, wants_d_learnable_sink = flat_and_wanted
    attn_bias, learnable_sink, rng_state, options = _unflatten(*flat)
    packing, tensors = _packed(q, k, v)
    results = _backward_fake(dout, out, softmax_lse, q, k, v, *flat_and_wanted)
    extras = iter(results[len(tensors) :])
    _attention.backward(
        (
            _attention.compact(dout),
            *packing.unpack(tuple(results[: len(tensors)])),
            next(extras) if wants_d_attn_bias else None,
            next(extras) if wants_d_learnable_sink else None,
        ),
        *packing.unpack(tensors),
        out,
        softmax_lse,
        attn_bias,
        learnable_sink,
        _with_lengths(options),
        *_seed_and_offset(rng_state),
    )
    return results


def _backward_fake(
    dout: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor]:
    wanted = (True, k is not None, v is not None, *rest[-2:])
    tensors = (q, k, v, attn_bias, learnable_sink)
    return [x.new_empty(x.shape) for x, is_wanted in zip(tensors, wanted) if is_wanted]


def _with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_own = len(_native.KVCACHE_ARGUMENTS)
    attn_bias, learnable_sink, _, options = _unflatten(*rest[num_own:])
    results = _with_kvcache_fake(q, k_cache, v_cache)
    _attention.run_with_kvcache(
        _attention.compact(q),
        (k_cache, v_cache),
        *results,
        rest[:num_own],
        attn_bias,
        learnable_sink,
        options,
    )
    return results


def _with_kvcache_fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:-1], *v_cache.shape[-1:])), _attention.new_lse(q, None)


# ---- The gradient ----


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    out, lse, s_dmask = output
    tensors = [x if isinstance(x, torch.Tensor) else None for x in inputs]
    ctx.save_for_backward(out, lse, *tensors)
    ctx.scalars = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.mark_non_differentiable(lse, s_dmask)


def _differentiate(ctx: Any, dout: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = [scalar if tensor is None else tensor for tensor, scalar in zip(tensors, ctx.scalars)]
    wanted = [ctx.needs_input_grad[at] for at in (_ATTN_BIAS, _LEARNABLE_SINK)]
    gradients = iter(torch.ops.flash_attention_plus.backward(dout, out, lse, *inputs, *wanted))
    has_gradient = [*(x is not None for x in inputs[:_ATTN_BIAS]), *wanted]
    computed = [next(gradients) if given else None for given in has_gradient]
    return (*computed, *([None] * (len(inputs) - len(computed))))


def _refuse_second_order(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(_attention.NO_SECOND_ORDER)


def _register() -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    kernels = {
        "forward": (_forward, _forward_fake),
        "backward": (_backward, _backward_fake),
        "with_kvcache": (_with_kvcache, _with_kvcache_fake),
    }
    for name, (kernel, fake) in kernels.items():
        library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{_NAMESPACE}::forward", _differentiate, setup_context=_save_for_backward, lib=library
    )
    torch.library.register_autograd(f"{_NAMESPACE}::backward", _refuse_second_order, lib=library)
    return library


_library = _register()  # the operators live as long as it does
