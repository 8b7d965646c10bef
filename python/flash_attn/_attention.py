"""Attention on PyTorch tensors behind the public functions: one forward, one backward, one
autograd.Function for all of them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad as _forward_ad
from torch.autograd.function import FunctionCtx

from . import _environment, _known, _native
from ._first_order import NotDifferentiable

# The library may have been loaded before PyTorch, by a call on arrays.
_native.share_threads_with_torch()

# S_dmask's sequence dimensions are rounded up to multiples of this.
_S_DMASK_MULTIPLE = 128

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Looked up once; a call on a tiny problem is mostly such look-ups.
_empty = torch.empty
_empty_like = torch.empty_like
_contiguous = torch.contiguous_format
_float32 = torch.float32
_is_grad_enabled = torch.is_grad_enabled
# Read once: a call on the CPU may take 8 us in all.
_native_on_cpu = _environment.native_serves_cpu()
_Tensor = torch.Tensor
_is_tracing = torch._C._is_tracing  # by torch.jit.trace
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by a transform
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_CLARIFIED = (TypeError, OverflowError, RuntimeError, BufferError)

_NO_GRADIENT_THROUGH_PAGES = (
    "block_table: no implementation differentiates through pages; call under torch.no_grad(), or"
    " with contiguous k and v"
)
_NO_FORWARD_MODE = (
    "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) of attention is not"
    " implemented; use reverse mode, or torch.nn.functional.scaled_dot_product_attention"
)
_UNSUPPORTED_TRANSFORMS = {
    "Vmap": "torch.func.vmap: attention and its gradient have no batching rule; fold the mapped"
    " dimension into the batch, which is the first dimension of q, k and v, or call in a loop",
    "Grad": "torch.func.grad, vjp and jacrev of attention are not implemented; use"
    " torch.autograd.grad, whose gradients are the same",
    "Jvp": _NO_FORWARD_MODE,
}
NO_SECOND_ORDER = (
    "second-order gradients of attention are not implemented: its backward cannot be differentiated"
    " again; use torch.nn.functional.scaled_dot_product_attention where they are needed"
)


def _is_recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records the operators of a call."""
    return torch.compiler.is_compiling() or _is_tracing()


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
KVCACHE_NAMES = ("q", "k_cache", "v_cache")


def _known_of(
    tensors: tuple[torch.Tensor, ...], options: Options
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out and softmax_lse of a known call, where `options` ask for nothing else."""
    dropout_p, softmax_scale, causal, window_size, softcap, slopes, _, probs, *layout = options
    if dropout_p != 0.0 or probs or slopes is not None:
        return None
    return _known.attention(*tensors, softmax_scale, causal, window_size, softcap, True, *layout)


def _known_gradients(
    tensors: tuple[torch.Tensor, ...], options: Options, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """dq, dk and dv of a known call, where nothing else is asked for; `tensors` are dout, q, k, v,
    out and softmax_lse."""
    dropout_p, scale, causal, window_size, softcap, slopes, deterministic, _, *layout = options
    if slopes is not None or layout[0] is not None or _is_grad_enabled():
        return None
    rest = scale, causal, window_size, softcap, dropout_p, seed, deterministic
    return _known.gradients(*tensors, *rest)


def _remember(packing: Packing, q: torch.Tensor, out: torch.Tensor, options: Options) -> None:
    """That there was such a call, for the next."""
    if packing is not SEPARATE:
        return
    if options.cu_seqlens_q is None:
        _known.remember(_known.DENSE, q, out)
    elif q.is_cuda:
        _known.remember(_known.VARLEN, q, out)


def attention(
    packing: Packing,
    tensors: tuple[torch.Tensor, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> Result:
    """What the public functions return, for q, k and v packed as `packing` says."""
    if _is_dispatched(packing.names, tensors, attn_bias, learnable_sink):
        return _through_operator(packing, tensors, attn_bias, learnable_sink, options)
    if packing is not SEPARATE:
        check_packed(packing, tensors, options)
    if _is_grad_enabled() and _needs_gradient(*tensors, attn_bias, learnable_sink):
        if options.block_table is not None:
            raise NotImplementedError(_NO_GRADIENT_THROUGH_PAGES)
        results = _apply(packing, options, attn_bias, learnable_sink, *tensors)
        if not options.return_attn_probs:
            return results
        out, lse, s_dmask = results
    else:
        q, k, v = tensors if packing is SEPARATE else packing.unpack(tensors)
        out, lse, s_dmask, _ = forward(q, k, v, attn_bias, learnable_sink, options, False)
        _remember(packing, q, out, options)
    if not options.return_attn_probs:
        return out
    if s_dmask is None:
        s_dmask = _empty((0,), dtype=out.dtype, device=out.device)
    return out, lse, s_dmask


def _through_operator(
    packing: Packing,
    tensors: tuple[torch.Tensor, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> Result:
    from . import _operators

    if packing is not SEPARATE:
        check_packed(packing, tensors, options)
    wants_gradient = _is_grad_enabled() and _needs_gradient(*tensors, attn_bias, learnable_sink)
    if options.block_table is not None and wants_gradient:
        raise NotImplementedError(_NO_GRADIENT_THROUGH_PAGES)
    results = _operators.attention(tensors, attn_bias, learnable_sink, options)
    return results if options.return_attn_probs else results[0]


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
    if seed is not None and _is_recorded():
        from . import _operators

        return *_operators.forward(q, k, v, attn_bias, learnable_sink, options, seed, offset), seed
    q, k, v = compact(q), compact(k), compact(v)
    dropout_p = options.dropout_p
    lse = s_dmask = None
    try:
        out = _new_out(q, v)
        if wants_lse or options.return_attn_probs:
            lse = new_lse(q, options.cu_seqlens_q)
        if options.return_attn_probs and dropout_p:
            s_dmask = new_s_dmask(q, k, options)
    except RuntimeError as error:
        raise _no_memory(q, v, error) from None
    if seed is None:
        seed = draw_seed() if dropout_p else 0
    run_forward(q, k, v, out, lse, s_dmask, attn_bias, learnable_sink, options, seed, offset)
    return out, lse, s_dmask, seed


def run_forward(*tensors_and_options: Any) -> None:
    """Writes out, lse and S_dmask; the arguments are those of _arguments."""
    arguments = _arguments(*tensors_and_options)
    q = arguments[0]
    try:
        # The CPU's calls go straight to the native library, unless another backend is asked for.
        if q.is_cpu and _native_on_cpu:
            _native.forward(*arguments)
        elif not (q.is_cuda and _known.run(*arguments)):
            _backends().forward(*arguments)
    except _CLARIFIED as error:
        _run_with_numbers(error, _serving(q).forward, arguments)


def _run_with_numbers(
    error: Exception,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    first: dict[str, str] | None = None,
) -> None:
    """What to do where `function`, a native one, has raised `error`: the original's options pass
    through operators of PyTorch, for which a tensor of one element is a number and None is False.
    With such among `arguments` it is called again; else what is wrong is raised."""
    if any(isinstance(x, _Tensor) and _is_batched(x) for x in arguments):
        raise NotImplementedError(_UNSUPPORTED_TRANSFORMS["Vmap"]) from None
    kinds = [*(first or {}).values(), *_native.ARGUMENTS.values()]
    numbers = tuple(_as_number(kind, value) for kind, value in zip(kinds, arguments))
    try:
        if all(new is old for new, old in zip(numbers, arguments)):
            raise error
        function(*numbers)
    except _CLARIFIED as again:
        clear = _native.clarify(again, numbers, first)
        raise clear from (None if clear is again else again)


def _is_batched(x: torch.Tensor) -> bool:
    """By vmap, or by is_grads_batched of torch.autograd.grad()."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _as_number(kind: str, value: Any) -> Any:
    if kind == "bool" and value is None:
        return False
    # A gradient would be lost without a word.
    is_number = isinstance(value, _Tensor) and value.numel() == 1 and not value.requires_grad
    return value.item() if is_number and kind in ("int", "float", "bool") else value


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
    if _is_recorded():
        from . import _operators

        forward_arguments = (q, k, v, attn_bias, learnable_sink, options, seed, offset)
        return _operators.backward(gradients, out, lse, *forward_arguments)
    arguments = (
        *gradients,
        options.deterministic,
        *_arguments(
            compact(q),
            compact(k),
            compact(v),
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
    serve = _serving(q)
    try:
        serve.backward(*arguments)
    except _CLARIFIED as error:
        _run_with_numbers(error, serve.backward, arguments, _native.GRADIENT_ARGUMENTS)


class AttentionFunction(torch.autograd.Function):
    """One autograd function for every packing; a packed tensor gets one packed gradient, whose
    parts are written in place. Called through _apply()."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        packing: Packing,
        options: Options,
        attn_bias: torch.Tensor | None,
        learnable_sink: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        known = None
        if packing is SEPARATE and attn_bias is None and learnable_sink is None:
            known = _known_of(tensors, options)
        if known is not None:
            (out, lse), s_dmask, seed = known, None, 0
        else:
            q, k, v = tensors if packing is SEPARATE else packing.unpack(tensors)
            out, lse, s_dmask, seed = forward(q, k, v, attn_bias, learnable_sink, options, True)
            _remember(packing, q, out, options)
        ctx.save_for_backward(*tensors, out, lse, attn_bias, learnable_sink)
        ctx.call = packing, options, seed
        if not options.return_attn_probs:  # every further output costs a microsecond
            return out
        ctx.mark_non_differentiable(*(x for x in (lse, s_dmask) if x is not None))
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    def backward(ctx: FunctionCtx, dout: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        *tensors, out, lse, attn_bias, learnable_sink = ctx.saved_tensors
        if dout is None:
            return (None,) * (4 + len(tensors))
        packing, options, seed = ctx.call
        is_plain = packing is SEPARATE and attn_bias is None and learnable_sink is None
        if is_plain and (known := _known_gradients((dout, *tensors, out, lse), options, seed)):
            return None, None, None, None, *known
        # Compact, whatever the strides of what they belong to.
        gradients = [_empty_like(x, memory_format=_contiguous) for x in tensors]
        # A boolean mask has no gradient, and so requires none.
        d_attn_bias = _gradient_of(attn_bias, ctx.needs_input_grad[2])
        d_learnable_sink = _gradient_of(learnable_sink, ctx.needs_input_grad[3])
        q, k, v = tensors if packing is SEPARATE else packing.unpack(tensors)
        dq, dk, dv = gradients if packing is SEPARATE else packing.unpack(gradients)
        backward(
            (
                compact(dout),
                dq,
                dk,
                dv,
                d_attn_bias,
                d_learnable_sink,
            ),
            q,
            k,
            v,
            out,
            lse,
            attn_bias,
            learnable_sink,
            options,
            seed,
        )
        if is_plain and q.is_cpu:
            _known.remember_gradients(gradients)
        if _is_grad_enabled():  # create_graph=True
            tied = (d_attn_bias, d_learnable_sink, *gradients)
            gradients = NotDifferentiable.apply(NO_SECOND_ORDER, tied, dout, *ctx.saved_tensors)
            return None, None, *gradients
        return None, None, d_attn_bias, d_learnable_sink, *gradients


# Function.apply() without its Python part, which is for functorch's transforms.
_apply = super(torch.autograd.Function, AttentionFunction).apply


def _backends() -> Any:
    """The implementations in Python, which calls on the CPU need not import."""
    from . import _backends

    return _backends


def _serving(q: torch.Tensor) -> Any:
    """What has the functions that serve a call on q's device."""
    return _native if q.is_cpu and _native_on_cpu else _backends()


def _gradient_of(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
    if tensor is None or not needed:
        return None
    return _empty_like(tensor, memory_format=_contiguous)


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
    dropout_p, softmax_scale, causal, _, softcap, alibi_slopes, _, _, *layout = options
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table = layout
    window_left, window_right = window(options)
    if isinstance(attn_bias, _Tensor):
        attn_bias = usable(attn_bias)
    learnable_sink, alibi_slopes = _resolved(learnable_sink), _resolved(alibi_slopes)
    return (
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
        seed,
        offset,
        None,
    )


def window(options: Options) -> tuple[int, int]:
    """The window's extent to the left and to the right."""
    try:
        left, right = options.window_size
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size: must be a pair (left, right), is {options.window_size!r}"
        ) from None
    return left, right


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
    if _is_dispatched(KVCACHE_NAMES, (q, *cache), attn_bias, learnable_sink):
        from . import _operators

        return _operators.with_kvcache(
            q, cache, kvcache_arguments, attn_bias, learnable_sink, options
        )
    q = compact(q)
    out = _new_out(q, cache[1])
    lse = new_lse(q, None) if wants_lse else None
    run_with_kvcache(q, cache, out, lse, kvcache_arguments, attn_bias, learnable_sink, options)
    if q.is_cuda:
        _known.remember(_known.KVCACHE, q, out)
    return out, lse


def run_with_kvcache(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    kvcache_arguments: tuple[Any, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
    options: Options,
) -> None:
    """Appends to the cache; writes out and lse."""
    if any(x.is_neg() for x in cache):
        raise ValueError("k_cache, v_cache: must not be views of negated values")
    call = _arguments(q, *cache, out, lse, None, attn_bias, learnable_sink, options, 0)
    kvcache_arguments = tuple(map(_resolved, kvcache_arguments))
    arguments = (*kvcache_arguments, *call)
    try:
        if q.is_cpu and _native_on_cpu:
            _native.forward_with_kvcache(*arguments)
        elif not (q.is_cuda and _known.run(*call, *kvcache_arguments)):
            _backends().forward_with_kvcache(*arguments)
    except ValueError as error:
        raise ValueError(_in_words_of_the_cache(str(error))) from None
    except _CLARIFIED as error:
        try:
            function = _serving(q).forward_with_kvcache
            _run_with_numbers(error, function, arguments, _native.KVCACHE_ARGUMENTS)
        except (ValueError, TypeError) as clear:
            raise type(clear)(_in_words_of_the_cache(str(clear))) from None


def _in_words_of_the_cache(message: str) -> str:
    """The native library's k and v are k_cache and v_cache here, its k_new and v_new k and v."""
    return re.sub(r"\b([kv])(_new)?\b", lambda it: it[1] + ("" if it[2] else "_cache"), message)


def draw_seed(generator: torch.Generator | None = None) -> int | torch.Tensor:
    """A seed for the dropout mask, from `generator` or PyTorch's default CPU generator. A tensor
    while the call is recorded, for another each time."""
    if _is_recorded():
        return draw_seed_tensor(generator)
    return int(_place_of_seed(generator).random_(generator=generator))


def draw_seed_tensor(generator: torch.Generator | None = None) -> torch.Tensor:
    """What draw_seed() draws, as an operator that compilers and checkpoints know as random."""
    return torch.ops.aten.random(_place_of_seed(generator), generator=generator)


def _place_of_seed(generator: torch.Generator | None) -> torch.Tensor:
    return _empty((), dtype=torch.int64, device="cpu" if generator is None else generator.device)


def _resolved(x: Any) -> Any:
    """x, or a copy where it is a view of negated values, which DLPack cannot say."""
    return x.resolve_neg() if isinstance(x, _Tensor) and x.is_neg() else x


def compact(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return _of_strides(x, (1,))


def usable(x: torch.Tensor) -> torch.Tensor:
    """The same, but for a last dimension that is broadcast, as attn_bias may be."""
    return _of_strides(x, (0, 1))


def _of_strides(x: torch.Tensor, last: tuple[int, ...]) -> torch.Tensor:
    x = _resolved(x)
    if x.is_contiguous():  # one question, for nearly all
        return x
    is_one = x.dim() == 0 or x.stride(-1) in last or x.layout != torch.strided
    return x if is_one else x.contiguous()


# The shapes below follow from arguments that nobody has checked yet. Where those are wrong any
# tensor does: the native library checks q, k and v first, and says what is wrong.


def _new_out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if q.dim() == 0 or v.dim() == 0 or q.size(-1) == v.size(-1):
        return _empty_like(q)
    return q.new_empty((*q.shape[:-1], v.size(-1)))


def new_lse(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> torch.Tensor:
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


def new_s_dmask(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor | None:
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


def _is_dispatched(
    names: tuple[str, ...],
    tensors: tuple[torch.Tensor, ...],
    attn_bias: torch.Tensor | None,
    learnable_sink: torch.Tensor | None,
) -> bool:
    """Whether the call must go through PyTorch's dispatcher: a compiler, mode or transform watches,
    or a tensor is of a class that holds no data itself, such as a FakeTensor."""
    if _is_recorded():
        check_tensors(names, tensors)
        return True
    for tensor in tensors:
        if type(tensor) is not _Tensor:
            break
    else:
        if not (
            _are_transforms_active() or _num_dispatch_modes() > 0 or _forward_ad._current_level >= 0
        ):
            return False
    check_tensors(names, tensors)
    _refuse_transforms((*tensors, attn_bias, learnable_sink))
    overridden = [type(x).__torch_dispatch__ is not _Tensor.__torch_dispatch__ for x in tensors]
    return any(overridden) or _are_transforms_active() or _num_dispatch_modes() > 0


def check_tensors(names: tuple[str, ...], tensors: tuple[object, ...]) -> None:
    """Raises TypeError where one is not a tensor."""
    for name, tensor in zip(names, tensors):
        if not isinstance(tensor, _Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, is {type(tensor).__name__}")
        if tensor.is_nested:
            raise TypeError(
                f"{name}: must be a dense tensor, is a nested one; flash_attn_varlen_func takes"
                " sequences of several lengths, end to end"
            )


def _refuse_transforms(tensors: tuple[torch.Tensor | None, ...]) -> None:
    given = [x for x in tensors if isinstance(x, _Tensor)]
    if _are_transforms_active() and any(map(_is_wrapped, given)):
        transform = torch._C._functorch.peek_interpreter_stack().key().name
        if transform in _UNSUPPORTED_TRANSFORMS:
            raise NotImplementedError(_UNSUPPORTED_TRANSFORMS[transform])
    if _forward_ad._current_level >= 0 and any(
        _forward_ad.unpack_dual(x).tangent is not None for x in given
    ):
        raise NotImplementedError(_NO_FORWARD_MODE)


def check_packed(packing: Packing, tensors: tuple[torch.Tensor, ...], options: Options) -> None:
    """Raises ValueError where a packed tensor does not hold what `packing` says."""
    rank = 5 if options.cu_seqlens_q is None else 4
    for name, packed, count in zip(packing.names, tensors, packing.counts):
        if count == 1 or (packed.dim() == rank and packed.size(-3) == count):
            continue
        layout = f"[batch, seqlen, {count}, num_heads, head_dim]"
        if rank == 4:
            layout = f"[total, {count}, num_heads, head_dim]"
        raise ValueError(f"{name}: must have shape {layout}, has {list(packed.shape)}")


def length(name: str, value: object) -> int:
    """A maximum length, which clients pass as an int or as a tensor of one element."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if _is_recorded() and isinstance(value, _Tensor):
        return value  # known when the operator runs
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: must be an integer, is {value!r:.60}") from None
