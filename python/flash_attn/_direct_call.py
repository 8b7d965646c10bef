"""The native library's function for known calls, put together as a function of Python.

tvm-ffi's way of handing on tensors takes longer than the rest of such a call. The library knows no
version of Python, so it is told the addresses of the few functions of the stable ABI that it needs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from . import _native

_METH_FASTCALL = 0x80
# The functions and objects of direct_call.cc's PythonInterface, in its order.
_FUNCTIONS = (
    "PyObject_Type",
    "Py_IncRef",
    "Py_DecRef",
    "PyLong_AsLongLong",
    "PyFloat_AsDouble",
    "PyErr_Occurred",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
_OBJECTS = (None, True, False, int, float)


class _MethodDefinition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_kept: list[object] = []  # what the function refers to


def make(backward: bool = False) -> Callable[..., bool]:
    """The function, whose arguments are those of _native.ARGUMENTS, then of KVCACHE_ARGUMENTS, or,
    of the backward, of _native.GRADIENT_ARGUMENTS, then of ARGUMENTS; ones at the end may be
    missing. It returns whether the call was of a kind that is known, and has run. Where PyTorch
    cannot lend tensors to C, one that knows none."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return _know_none
    api = ctypes.pythonapi
    if not isinstance(exchange, int):
        pointer_of = api["PyCapsule_GetPointer"]
        pointer_of.restype, pointer_of.argtypes = (
            ctypes.c_void_p,
            (ctypes.py_object, ctypes.c_char_p),
        )
        exchange = pointer_of(exchange, b"dlpack_exchange_api")
    addresses = (
        *(ctypes.cast(api[name], ctypes.c_void_p).value for name in _FUNCTIONS),
        *map(id, _OBJECTS),
        exchange,
    )
    table = (ctypes.c_void_p * len(addresses))(*addresses)
    function = _native.direct_call(ctypes.c_void_p(ctypes.addressof(table)), backward)
    if not function:
        return _know_none
    name = b"backward_known" if backward else b"forward_known"
    definition = _MethodDefinition(name, function, _METH_FASTCALL, None)
    _kept.extend((table, definition))
    new = api["PyCFunction_NewEx"]
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p,) * 3
    return new(ctypes.addressof(definition), None, None)


def _know_none(*_: Any) -> bool:
    return False
