"""Calls of a kind that the thread has made before, on a way that is little but the native library.

attention() and with_kvcache() return what the public functions do, gradients() those of q, k and v,
or None; then nothing has happened, and the call is of another kind, needs a gradient or PyTorch's
dispatcher, or is wrong.
The native library tells whether it knows a call; what it cannot see is asked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad as _forward_ad

# Looked up once; these calls are mostly such look-ups.
_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
# Where is_compiling() says more than this, tensors are fake or a mode is active.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing  # by torch.jit.trace
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
# Without the dispatcher; on the current device.
_empty_strided = {
    device: function
    for device in ("cpu", "cuda")
    if (function := getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None))
}
_empty_cpu: Any = _empty_strided.get("cpu")

# After these a call is made again on the way that says what is wrong.
_REPEATED = (TypeError, OverflowError, RuntimeError, ValueError, MemoryError)

# By the elements of q, how to make tensors like out and softmax_lse of the last such call, which
# takes half as long as torch.empty_like(). The native library notices a wrong guess.
Guesses = dict[int, tuple[Callable[..., torch.Tensor], tuple[Any, ...], tuple[Any, ...]]]
DENSE: Guesses = {}
VARLEN: Guesses = {}
KVCACHE: Guesses = {}
# By the elements of q and k, what dq, dk and dv on the CPU were like.
_GRADIENTS: dict[tuple[int, int], tuple[tuple[Any, ...], ...]] = {}
# So that a program that meets a new shape at every call does not grow.
_MAX_GUESSES = 256


def remember(guesses: Guesses, q: torch.Tensor, out: torch.Tensor) -> None:
    """Makes `out` the example for calls with as many elements of q."""
    allocate = _empty_strided.get(out.device.type)
    if allocate is None or (out.is_cuda and out.get_device() != torch.cuda.current_device()):
        guesses.pop(q.numel(), None)
        return
    *batch, seqlen, num_heads, _ = shape = tuple(out.shape)
    lse_shape = *batch, num_heads, seqlen
    lse_strides = *(num_heads * seqlen for _ in batch), seqlen, 1
    if len(guesses) >= _MAX_GUESSES:
        guesses.clear()
    guesses[q.numel()] = (
        allocate,
        (shape, out.stride(), out.dtype),
        (lse_shape, lse_strides, torch.float32),
    )


def remember_gradients(gradients: list[torch.Tensor]) -> None:
    """The same of dq, dk and dv, for gradients()."""
    if _empty_cpu is None:
        return
    if len(_GRADIENTS) >= _MAX_GUESSES:
        _GRADIENTS.clear()
    key = gradients[0].numel(), gradients[1].numel()
    _GRADIENTS[key] = tuple((tuple(x.shape), x.stride(), x.dtype) for x in gradients)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    wants_lse: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> Any:
    """out, or (out, softmax_lse), of a dense call, or of a varlen one, which on the CPU is never
    known: its lengths are checked each time."""
    if not _is_plain(q, k, v) or (
        _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        return None
    guess = (DENSE if cu_seqlens_q is None else VARLEN).get(q.numel())
    if guess is None:
        return None
    allocate, like_out, like_lse = guess
    try:
        left, right = window_size
        out = allocate(*like_out)
        lse = allocate(*like_lse) if wants_lse else None
        if not run(
            q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, None, None,
            None, max_seqlen_q, max_seqlen_k, softmax_scale, causal, left, right, softcap,
        ):  # fmt: skip
            return None
    except _REPEATED:
        return None
    return (out, lse) if wants_lse else out


def gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    seed: int,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """dq, dk and dv of a dense call on the CPU; the arguments are those of the call."""
    if not q.is_cpu or type(dout) is not _Tensor or not _is_plain(q, k, v):
        return None
    guess = _GRADIENTS.get((q.numel(), k.numel()))
    if guess is None:
        return None
    like_dq, like_dk, like_dv = guess
    try:
        left, right = window_size
        dq, dk, dv = _empty_cpu(*like_dq), _empty_cpu(*like_dk), _empty_cpu(*like_dv)
        if not run_backward(
            dout, dq, dk, dv, None, None, deterministic, q, k, v, out, lse, None, None, None, None,
            None, None, None, None, 0, 0, softmax_scale, causal, left, right, softcap, dropout_p,
            seed,
        ):  # fmt: skip
            return None
    except _REPEATED:
        return None
    return dq, dk, dv


def with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    wants_lse: bool,
    block_table: torch.Tensor | None,
    *kvcache_arguments: Any,
) -> Any:
    """out, or (out, softmax_lse), which have no gradient; kvcache_arguments in the order of
    _native.KVCACHE_ARGUMENTS. On the CPU no call is known."""
    if not _is_plain(q, k_cache, v_cache):
        return None
    guess = KVCACHE.get(q.numel())
    if guess is None:
        return None
    allocate, like_out, like_lse = guess
    try:
        left, right = window_size
        out = allocate(*like_out)
        lse = allocate(*like_lse) if wants_lse else None
        if not run(
            q, k_cache, v_cache, out, lse, None, None, None, None, block_table, None, None, None,
            0, 0, softmax_scale, causal, left, right, softcap, 0.0, 0, 0, None, *kvcache_arguments,
        ):  # fmt: skip
            return None
    except _REPEATED:
        return None
    return (out, lse) if wants_lse else out


def _is_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether PyTorch's dispatcher has no interest in a call. What a transform has wrapped lends no
    memory, which the native function notices; a view of negated values, which DLPack cannot tell
    from others, is the imaginary part of a complex tensor, whose steps of two no known call has."""
    return (
        type(q) is type(k) is type(v) is _Tensor
        and not _is_dynamo_compiling()
        and not _is_tracing()
        and not _num_dispatch_modes()
        and _forward_ad._current_level < 0
    )


def _make_and_run(*arguments: Any) -> bool:
    """run(), at first: guesses come from other calls, and so the library is loaded by then."""
    global run
    from . import _direct_call

    run = _direct_call.make()
    return run(*arguments)


def _make_and_run_backward(*arguments: Any) -> bool:
    """The same of run_backward()."""
    global run_backward
    from . import _direct_call

    run_backward = _direct_call.make(backward=True)
    return run_backward(*arguments)


# The native functions, see _direct_call.make().
run: Callable[..., bool] = _make_and_run
run_backward: Callable[..., bool] = _make_and_run_backward
