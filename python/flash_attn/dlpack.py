"""Attention without a framework: NumPy arrays, or any arrays that speak DLPack."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from . import _environment, _native

__all__ = ["Implementation", "Oracle", "attention", "explain", "implementations", "oracle"]

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_CLARIFIED = (TypeError, OverflowError, RuntimeError, BufferError)


class Implementation(NamedTuple):
    """One implementation of attention, and whether this machine can run it."""

    name: str
    available: bool
    reason: str  # why not; empty where available


class Oracle(NamedTuple):
    """Results in fp64, NumPy arrays."""

    out: Any  # in the shape of out
    lse: Any  # in the shape of lse
    bound: Any  # sum_j P_ij |v_jd|, in the shape of out: what the error of out is normalised by


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    out: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    learnable_sink: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(softmax_scale * Q K^T) V on any arrays (Dao et al., "FlashAttention", 2022 and 2023).

    Arguments:
        q: [B, Sq, H, D]; with cu_seqlens_q [total_q, H, D]. fp32, fp16 or bf16.
        k: [B, Sk, Hk, D]; with cu_seqlens_k [total_k, Hk, D]; with block_table
            [num_blocks, page_size, Hk, D]. q's dtype; H % Hk == 0.
        v: as k, with Dv in place of D.
        out: where to write, [B, Sq, H, Dv] or [total_q, H, Dv] in q's dtype, apart from the other
            arrays. None allocates an array of q's library; where that has no writable arrays,
            `out` is required.
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32; given together, for sequences laid end to end.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; None reads it from
            cu_seqlens.
        seqused_k: [B], int32; only so many first keys of each sequence are used.
        block_table: [B, max_blocks], int32; the pages of each sequence of k and v, in order.
        softmax_scale: None is D**-0.5.
        causal: whether query i sees only keys j <= i + Sk - Sq.
        window_size: (left, right) in tokens around i + Sk - Sq; -1 is no bound on that side.
        softcap: softcap * tanh(S / softcap) bounds the scores; 0.0 is none.
        alibi_slopes: [H] or [B, H], fp32; adds -slope * |i + Sk - Sq - j| to the scores.
        attn_bias: broadcastable to [B, H, Sq, Sk]; fp32 or q's dtype, added; or bool, true: keep.
        learnable_sink: [H], fp32 or q's dtype; exp(sink) joins the softmax's denominator.
        dropout_p: in [0, 1).
        dropout_seed, dropout_offset: integers of 64 bits that determine the dropout mask.
        return_lse: whether to return the log-sum-exp too.
        backend: "cpu", "cpu:avx2", "reference", ..., and for PyTorch's tensors "triton",
            "flaggems" and "torch": this implementation or family, or an error; None is
            FLASH_ATTENTION_BACKEND, or the best that accepts the problem.

    Returns:
        out; with return_lse=True (out, lse): lse [B, H, Sq] or [H, total_q], fp32, natural
        logarithm, +inf where a query sees no key.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what it must be.
        TypeError: an argument is of a wrong Python type.
        NotImplementedError: no implementation serves the request, or a gradient is required.
    """
    _refuse_gradient(q, k, v, attn_bias, learnable_sink)
    q, k, v, attn_bias = (_usable(array) for array in (q, k, v, attn_bias))
    result = _empty_like(q, _out_shape(q, v), "out") if out is None else out
    lse = _empty_like(q, _lse_shape(q, cu_seqlens_q), "lse", lse=True) if return_lse else None
    _call(
        _forward,
        q,
        k,
        v,
        result,
        lse,
        _usable(cu_seqlens_q),
        _usable(cu_seqlens_k),
        _usable(seqused_k),
        _usable(block_table),
        _usable(alibi_slopes),
        attn_bias,
        _usable(learnable_sink),
        _longest(max_seqlen_q, cu_seqlens_q),
        _longest(max_seqlen_k, cu_seqlens_k),
        softmax_scale,
        causal,
        window_size,
        softcap,
        dropout_p,
        dropout_seed,
        dropout_offset,
        backend,
    )
    return (result, lse) if return_lse else result


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    learnable_sink: Any = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> str:
    """Which implementation runs a call, and why each other one does not.

    Arguments and errors are those of `attention`; nothing is computed.

    Returns:
        A line for each implementation, best first: its name; chosen, accepts, refused or excluded;
        and the reason.
    """
    q, k, v, attn_bias = (_usable(array) for array in (q, k, v, attn_bias))
    return _call(
        _explain,
        q,
        k,
        v,
        _empty_like(q, _out_shape(q, v), "out"),
        _empty_like(q, _lse_shape(q, cu_seqlens_q), "lse", lse=True) if return_lse else None,
        _usable(cu_seqlens_q),
        _usable(cu_seqlens_k),
        _usable(seqused_k),
        _usable(block_table),
        _usable(alibi_slopes),
        attn_bias,
        _usable(learnable_sink),
        _longest(max_seqlen_q, cu_seqlens_q),
        _longest(max_seqlen_k, cu_seqlens_k),
        softmax_scale,
        causal,
        window_size,
        softcap,
        dropout_p,
        0,
        0,
        backend,
    )


def oracle(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    learnable_sink: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
) -> Oracle:
    """The fp64 oracle that every implementation is tested against: `attention`, from the formula.

    Arguments and errors are those of `attention`. Arrays on the CPU only; slow.
    """
    import numpy

    q, k, v, attn_bias = (_usable(array) for array in (q, k, v, attn_bias))
    out = numpy.empty(_out_shape(q, v), dtype=numpy.float64)
    result = Oracle(out, numpy.empty(_lse_shape(q, cu_seqlens_q)), numpy.empty_like(out))

    def function(*arguments: Any) -> None:
        _native.forward_oracle(*result, *arguments)

    _call(
        function,
        q,
        k,
        v,
        None,
        None,
        _usable(cu_seqlens_q),
        _usable(cu_seqlens_k),
        _usable(seqused_k),
        _usable(block_table),
        _usable(alibi_slopes),
        attn_bias,
        _usable(learnable_sink),
        _longest(max_seqlen_q, cu_seqlens_q),
        _longest(max_seqlen_k, cu_seqlens_k),
        softmax_scale,
        causal,
        window_size,
        softcap,
        dropout_p,
        dropout_seed,
        dropout_offset,
        None,
    )
    return result


def implementations(device: str = "cpu") -> list[Implementation]:
    """The implementations for a kind of device, "cpu" or "cuda", best first."""
    if device not in _DEVICE_TYPES:
        raise ValueError(f"device: must be one of {sorted(_DEVICE_TYPES)}, is {device!r}")
    return [
        Implementation(str(name), bool(available), str(reason))
        for name, available, reason in _native.implementations(_DEVICE_TYPES[device])
    ]


def _forward(*arguments: Any) -> None:
    q, backend = arguments[0], arguments[-1]
    if _is_torch(q):
        native = q.is_cpu and _environment.native_serves_cpu()
        if not native or backend in _environment.PYTHON_BACKENDS:
            from . import _backends

            return _backends.forward(*arguments)
    elif _environment.wants_flaggems():
        _environment.tell_that_native_runs("arrays", "\n  triton: takes PyTorch tensors only")
    return _native.forward(*arguments)


def _explain(*arguments: Any) -> str:
    if not _is_torch(arguments[0]):
        return _native.explain(*arguments)
    from . import _backends

    return _backends.explain(*arguments)


def _call(
    function: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    block_table: Any,
    alibi_slopes: Any,
    attn_bias: Any,
    learnable_sink: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    dropout_seed: int,
    dropout_offset: int,
    backend: str | None,
) -> Any:
    try:
        window_left, window_right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size: must be a pair (left, right), is {window_size!r}") from None
    arguments = (
        q,
        k,
        v,
        out,
        lse,
        None,
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
        _as_int64("dropout_seed", dropout_seed),
        _as_int64("dropout_offset", dropout_offset),
        backend,
    )
    try:
        return function(*arguments)
    except _CLARIFIED as error:
        clear = _native.clarify(error, arguments)
        raise clear from (None if clear is error else error)


def _as_int64(name: str, bits: int) -> int:
    """An integer of 64 bits, signed or not, as the int64 of the same bits."""
    if not -(2**63) <= bits < 2**64:
        raise ValueError(f"{name}: is {bits}, must fit 64 bits")
    return bits - 2**64 if bits >= 2**63 else bits


def _refuse_gradient(*arrays: Any) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    if any(getattr(array, "requires_grad", False) for array in arrays):
        raise NotImplementedError(
            "q, k, v, attn_bias and learnable_sink must not require a gradient: attention() is the"
            " forward only; call under torch.no_grad()"
        )


def _is_numpy(array: Any) -> bool:
    return type(array).__module__ == "numpy"


def _is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _usable(array: Any) -> Any:
    """`array`, or a copy where NumPy cannot lend it or its last dimension is not contiguous."""
    if not _is_numpy(array):
        # PyTorch's views with the negative bit hold their values negated, which DLPack cannot say.
        negated = hasattr(array, "is_neg") and array.is_neg()
        return array.resolve_neg() if negated else array
    import numpy

    if not isinstance(array, numpy.ndarray):
        return numpy.asarray(array)
    if not array.flags.writeable or not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    contiguous = array.ndim == 0 or array.strides[-1] in (0, array.itemsize)
    # NumPy's strides count bytes and may be negative; the library's count elements, forwards.
    fit = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return array if contiguous and fit else numpy.ascontiguousarray(array)


def _out_shape(q: Any, v: Any) -> tuple[int, ...]:
    shape = _shape("q", q)
    return (*shape[:-1], *_shape("v", v)[-1:])


def _lse_shape(q: Any, cu_seqlens_q: Any) -> tuple[int, ...]:
    shape = _shape("q", q)
    if cu_seqlens_q is not None:
        return (shape[1], shape[0]) if len(shape) == 3 else shape
    return (shape[0], shape[2], shape[1]) if len(shape) == 4 else shape


def _shape(name: str, array: Any) -> tuple[int, ...]:
    if not hasattr(array, "__dlpack__") or not hasattr(array, "shape"):
        raise TypeError(f"{name}: must be an array that speaks DLPack, is {type(array).__name__}")
    return tuple(array.shape)


def _empty_like(q: Any, shape: tuple[int, ...], name: str, *, lse: bool = False) -> Any:
    """An uninitialised array of q's library and device, in q's dtype or (lse) in fp32."""
    if _is_numpy(q):
        import numpy

        return numpy.empty(shape, dtype=numpy.float32 if lse else q.dtype)
    if hasattr(q, "new_empty"):  # PyTorch's tensors
        empty = q.new_empty(shape)
        return empty.float() if lse else empty
    if hasattr(q, "__array_namespace__"):
        namespace = q.__array_namespace__()
        dtype = namespace.float32 if lse else q.dtype
        return namespace.empty(shape, dtype=dtype, device=q.device)
    if lse:
        import numpy

        return numpy.empty(shape, dtype=numpy.float32)
    raise ValueError(f"{name}: must be given for arrays of type {type(q).__name__}")


def _longest(given: int | None, cu_seqlens: Any) -> int:
    """max_seqlen: as given, or the longest of the sequences on the CPU."""
    if given is not None:
        return int(given)
    if cu_seqlens is None:
        return 0
    import numpy

    if _is_torch(cu_seqlens):
        cu_seqlens = cu_seqlens.cpu()
    offsets = numpy.from_dlpack(cu_seqlens) if not _is_numpy(cu_seqlens) else cu_seqlens
    return max(0, int(numpy.diff(offsets).max(initial=0)))
