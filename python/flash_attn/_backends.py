"""Which implementation serves a call on PyTorch tensors, beyond the native library's own choice.

Calls on the CPU go straight to the native library. The others come here: they are validated by the
native library, so that a wrong argument meets the same error everywhere, and go to the first of the
device's candidates that takes them. The candidates in Python are

    triton    the project's own Triton kernels, on every device with a Triton driver
    flaggems  FlagGems' operators, where they can do exactly what a call asks
    torch     a blockwise composition of PyTorch's operators, on every device

The functions have the signatures of those of the same names in _native.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import _environment, _native
from ._call import Cache, Call, Gradients, Request

_MODULES = {
    "triton": ".triton.backend",
    "flaggems": ".triton.flaggems",
    "torch": "._composition",
}
NAMES = _environment.PYTHON_BACKENDS
_NATIVE = "native"  # all implementations of the native library for the device

# Of what DLPack cannot lend, and of fake tensors, the native library validates stand-ins.
_LENDABLE = ("cpu", "cuda")


class Kind(NamedTuple):
    """What is asked of the native library for one kind of call."""

    run: str
    explain: str
    validate: str
    validate_stand_ins: str
    first: dict[str, str]  # the names and kinds of the arguments before _native.ARGUMENTS


_FORWARD = Kind("forward", "explain", "validate", "validate_stand_ins", {})
_KVCACHE = Kind(
    "forward_with_kvcache",
    "explain_with_kvcache",
    "validate_with_kvcache",
    "validate_stand_ins_with_kvcache",
    _native.KVCACHE_ARGUMENTS,
)
_BACKWARD = Kind(
    "backward",
    "explain_backward",
    "validate_backward",
    "validate_stand_ins_backward",
    _native.GRADIENT_ARGUMENTS,
)


def forward(*arguments: Any) -> None:
    """_native.forward() on any device."""
    _serve(_FORWARD, arguments)


def forward_with_kvcache(*arguments: Any) -> None:
    """_native.forward_with_kvcache() on any device."""
    _serve(_KVCACHE, arguments)


def backward(*arguments: Any) -> None:
    """_native.backward() on any device."""
    _serve(_BACKWARD, arguments)


def explain(*arguments: Any) -> str:
    """_native.explain() with a line for each candidate in Python too."""
    _validate(_FORWARD, arguments)
    return _explain(_FORWARD, arguments)


def _request(kind: Kind, arguments: tuple[Any, ...], key: Hashable = None) -> Request:
    first, call = arguments[: len(kind.first)], Call(*arguments[len(kind.first) :])
    if kind is _KVCACHE:
        return Request(call, cache=Cache(*first), key=key)
    if kind is _BACKWARD:
        return Request(call, gradients=Gradients(*first), key=key)
    return Request(call, key=key)


# Which candidate took the calls of a key, so that the next is neither validated nor offered around.
# Bounded, so that a program that meets a new shape at every call does not grow.
_taken: dict[Hashable, str] = {}
_MAX_TAKEN = 1024


def _serve(kind: Kind, arguments: tuple[Any, ...]) -> None:
    key = _key(kind, arguments)
    candidate = None if key is None else _taken.get(key)
    if candidate is not None:
        return _run(candidate, kind, arguments, _request(kind, arguments, key))
    _validate(kind, arguments)
    request = _request(kind, arguments, key)
    if _environment.verbose_dispatch() and not _only_native(request):
        print(f"flash_attn dispatch: {kind.run} on {request.call.q.device}", file=sys.stderr)
        print(_explain(kind, arguments), end="", file=sys.stderr)
    refusals = []
    for candidate in _candidates(request.call):
        reason = _refusal(candidate, request)
        try:
            if not reason:
                _run(candidate, kind, arguments, request)
        except NotImplementedError as refusal:
            reason = str(refusal)
        if reason:
            refusals.append(f"\n  {candidate}: {reason}")
            continue
        if candidate == _NATIVE:
            _environment.tell_that_native_runs(str(request.call.q.device), "".join(refusals))
        if key is not None:
            if len(_taken) >= _MAX_TAKEN:
                _taken.clear()
            _taken[key] = candidate
        return None
    raise NotImplementedError(
        f"no implementation on {request.call.q.device} takes this call:{''.join(refusals)}"
    )


def _key(kind: Kind, arguments: tuple[Any, ...]) -> Hashable:
    """Equal for calls that differ in nothing but addresses, contents, the seed and its offset; None
    for calls on the CPU, whose contents are checked, for those that are to be told about, and for
    wrong arguments that have no metadata."""
    q = arguments[len(kind.first)]
    if not isinstance(q, torch.Tensor) or q.device.type in ("cpu", "meta") or _is_fake(q):
        return None
    if _environment.checks_values() or _environment.verbose_dispatch():
        return None
    forced = _environment.backend(), _environment.wants_flaggems()
    try:
        metadata = tuple([_metadata(x) for x in (*arguments[:-3], arguments[-1])])
        hash(metadata)
    except (TypeError, RuntimeError):
        return None
    return kind.run, forced, metadata


def _metadata(x: Any) -> Hashable:
    if not isinstance(x, torch.Tensor):
        return type(x), x
    # Kernels are compiled for addresses that are multiples of 16, or that are not.
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0


def _refusal(candidate: str, request: Request) -> str:
    """Why a candidate does not take a request, as far as it is known before it runs."""
    if candidate == _NATIVE:
        serves = _native_serves(request.call)
        return "" if serves else "the native library has no implementation for the device"
    return _module(candidate).refusal(request)


def _run(candidate: str, kind: Kind, arguments: tuple[Any, ...], request: Request) -> None:
    """Runs a request; the native library, and a device with too little room, may refuse it yet."""
    if candidate == _NATIVE:
        getattr(_native, kind.run)(*arguments)
        return
    # Autograd's function, where a gradient is wanted, is around this already.
    with torch.no_grad():
        _module(candidate).run(request)


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(_MODULES[name], __package__)


def _only_native(request: Request) -> bool:
    """Whether the native library, which tells it by itself, is all that is asked."""
    return (
        request.call.q.is_cpu
        and _environment.native_serves_cpu()
        and _forced(request.call) not in NAMES
    )


def _forced(call: Call) -> str:
    return _environment.backend() if call.backend is None else call.backend


def _candidates(call: Call) -> tuple[str, ...]:
    """The candidates that may run a call, best first."""
    forced = _forced(call)
    if forced in NAMES:
        return (forced,)
    if forced:
        return (_NATIVE,)
    return _order()


def _order() -> tuple[str, ...]:
    if _environment.wants_flaggems():
        return ("flaggems", "triton", _NATIVE, "torch")
    return (_NATIVE, "triton", "flaggems", "torch")


def _native_serves(call: Call) -> bool:
    """Whether the native library may be asked: it raises where it has nothing that takes a call."""
    return not _is_fake(call.q) and call.q.device.type in _native.DEVICE_TYPES


# ---- Explaining. ----


def _explain(kind: Kind, arguments: tuple[Any, ...]) -> str:
    """A line per candidate, best first, of a call that has been validated."""
    request = _request(kind, arguments)
    lines: list[str] = []
    chosen = False
    for candidate in _order():
        lines_of = _native_lines if candidate == _NATIVE else _python_line
        for name, outcome, reason in lines_of(candidate, kind, arguments, request):
            if outcome in ("chosen", "accepts"):
                outcome = "accepts" if chosen else "chosen"
                reason = "a better one comes first" if chosen else reason
                chosen = True
            lines.append(f"  {name:<15} {outcome:<8} {reason}\n")
    return "".join(lines)


Line = tuple[str, str, str]  # name, outcome, reason


def _native_lines(
    _: str, kind: Kind, arguments: tuple[Any, ...], request: Request
) -> Iterator[Line]:
    if not _native_serves(request.call):
        return
    forced = _forced(request.call)
    in_python = forced in NAMES
    text = getattr(_native, kind.explain)(*arguments[:-1], "" if in_python else forced)
    for line in str(text).splitlines():
        name, outcome, reason = line.split(maxsplit=2)
        yield (name, "excluded", _forced_reason(forced)) if in_python else (name, outcome, reason)


def _python_line(
    name: str, kind: Kind, arguments: tuple[Any, ...], request: Request
) -> Iterator[Line]:
    forced = _forced(request.call)
    if forced and forced != name:
        yield name, "excluded", _forced_reason(forced)
        return
    if not isinstance(request.call.q, torch.Tensor):
        yield name, "refused", "takes PyTorch tensors only"
        return
    module = _module(name)
    reason = module.refusal(request)
    yield name, "refused" if reason else "chosen", reason or module.DESCRIPTION


def _forced_reason(forced: str) -> str:
    return f"backend '{forced}' is forced"


# ---- Validating. ----


def _validate(kind: Kind, arguments: tuple[Any, ...]) -> None:
    """Raises what the native library raises for wrong arguments, wherever their tensors lie."""
    q = arguments[len(kind.first)]
    if not isinstance(q, torch.Tensor) or (q.is_cpu and not _is_fake(q)):
        return _checked(getattr(_native, kind.validate), kind, arguments)
    checks_values = _environment.checks_values() and q.device.type != "meta" and not _is_fake(q)
    # The native library reads values where NVIDIA's driver is.
    reads_values = q.device.type == "cuda" and torch.version.hip is None
    if q.device.type in _LENDABLE and not _is_fake(q) and (reads_values or not checks_values):
        return _checked(getattr(_native, kind.validate), kind, arguments)
    _check_one_device(kind, arguments)
    function = kind.validate if checks_values else kind.validate_stand_ins
    with _disable_current_modes():  # in which stand-ins would be fake too
        stand_ins = tuple(
            _stand_in(x, checks_values) if isinstance(x, torch.Tensor) else x for x in arguments
        )
        return _checked(getattr(_native, function), kind, stand_ins)


def _checked(function: Callable[..., None], kind: Kind, arguments: tuple[Any, ...]) -> None:
    try:
        function(*arguments)
    except (TypeError, OverflowError, RuntimeError, BufferError) as error:
        clear = _native.clarify(error, arguments, kind.first)
        raise clear from (None if clear is error else error)


def _check_one_device(kind: Kind, arguments: tuple[Any, ...]) -> None:
    device = arguments[len(kind.first)].device
    for name, value in zip((*kind.first, *_native.ARGUMENTS), arguments):
        if isinstance(value, torch.Tensor) and value.device != device:
            raise ValueError(f"{name}: is on {value.device}, must be on q's device, {device}")


def _is_fake(tensor: Any) -> bool:
    """Whether a tensor only pretends to hold data, as those of FakeTensorMode do."""
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


def _stand_in(tensor: torch.Tensor, keep_values: bool) -> torch.Tensor:
    """A tensor on the CPU of the same shape, strides and dtype, over next to no memory; or, with
    keep_values, a copy where it holds lengths, rows or pages."""
    if keep_values and tensor.dtype == torch.int32:
        return tensor.cpu()
    import numpy

    item = numpy.zeros(1, dtype=f"i{tensor.element_size()}")
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    view = numpy.lib.stride_tricks.as_strided(item, tensor.shape, strides)
    return torch.from_numpy(view).view(tensor.dtype)
