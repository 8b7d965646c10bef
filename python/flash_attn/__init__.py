"""FlashAttention-Plus: exact attention behind the interface of `flash_attn`, on every machine.

The functions on PyTorch tensors have the names and signatures of FlashAttention 2.8::

    from flash_attn import flash_attn_func

`attention`, `explain` and `implementations` need no framework: they take NumPy arrays, or anything
else that speaks DLPack. Importing the package loads neither PyTorch nor the native library; the
first use of a name does.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from ._version import version as plus_version

if TYPE_CHECKING:
    from .dlpack import attention, explain, implementations
    from .flash_attn_interface import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )

# Other distributions put packages of their own beside these modules.
__path__ = pkgutil.extend_path(__path__, __name__)

# The release of the original whose interface this is. Clients compare it, so it has no suffix; this
# library's own version is plus_version.
__version__ = "2.8.3"

__all__ = [
    "attention",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "implementations",
    "plus_version",
]

_FRAMEWORK_FREE = ("attention", "explain", "implementations")
_ON_TORCH = tuple(name for name in __all__ if name.startswith("flash_attn_"))


def __getattr__(name: str) -> Any:
    if name in _FRAMEWORK_FREE:
        value = getattr(importlib.import_module(".dlpack", __name__), name)
    elif name == "flash_attn_interface" or name in _ON_TORCH:
        value = _import_interface(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _import_interface(name: str) -> Any:
    try:
        interface = importlib.import_module(".flash_attn_interface", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"flash_attn.{name} works on PyTorch tensors, and PyTorch is not installed. Install it"
            " (pip install torch), or call flash_attn.attention on NumPy arrays."
        ) from error
    return interface if name == "flash_attn_interface" else getattr(interface, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
