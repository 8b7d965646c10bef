"""The native library, loaded by the first call of one of its functions.

Loading also makes the library share the threads of PyTorch's OpenMP runtime, where the process has
one, so that one process keeps one set of threads and torch.set_num_threads() holds for both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_FUNCTIONS = (
    "forward",
    "forward_with_kvcache",
    "backward",
    "forward_oracle",
    "backward_oracle",
    "explain",
    "explain_with_kvcache",
    "explain_backward",
    "validate",
    "validate_with_kvcache",
    "validate_backward",
    "validate_stand_ins",
    "validate_stand_ins_with_kvcache",
    "validate_stand_ins_backward",
    "implementations",
    "num_threads",
    "use_openmp_runtime",
    "use_thread_count",
    "measure_ceiling",
    "add_nvrtc_folder",
    "version",
    "direct_call",
)
# Arithmetic happens in these, and other Python threads run meanwhile.
_WITHOUT_GIL = (
    "forward",
    "forward_with_kvcache",
    "backward",
    "forward_oracle",
    "backward_oracle",
    "measure_ceiling",
)

# The kinds of devices that the library may have implementations for, as DLPack numbers them.
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_INT64 = range(-(2**63), 2**63)

# The arguments of forward(), in order, and what each must be.
ARGUMENTS = {
    "q": "tensor",
    "k": "tensor",
    "v": "tensor",
    "out": "tensor",
    "softmax_lse": "tensor",
    "S_dmask": "tensor",
    "cu_seqlens_q": "tensor",
    "cu_seqlens_k": "tensor",
    "seqused_k": "tensor",
    "block_table": "tensor",
    "alibi_slopes": "tensor",
    "attn_bias": "tensor",
    "learnable_sink": "tensor",
    "max_seqlen_q": "int",
    "max_seqlen_k": "int",
    "softmax_scale": "float",
    "causal": "bool",
    "window_size[0]": "int",
    "window_size[1]": "int",
    "softcap": "float",
    "dropout_p": "float",
    "seed": "int",
    "offset": "int",
    "backend": "str",
}

# Those that come before them in forward_with_kvcache() and in backward().
KVCACHE_ARGUMENTS = {
    "cache_seqlens": "tensor",
    "cache_batch_idx": "tensor",
    "cache_leftpad": "tensor",
    "k_new": "tensor",
    "v_new": "tensor",
    "rotary_cos": "tensor",
    "rotary_sin": "tensor",
    "rotary_interleaved": "bool",
    "num_splits": "int",
}
GRADIENT_ARGUMENTS = {
    "dout": "tensor",
    "dq": "tensor",
    "dk": "tensor",
    "dv": "tensor",
    "d_attn_bias": "tensor",
    "d_learnable_sink": "tensor",
    "deterministic": "bool",
}

_load_lock = threading.Lock()
_module: Any = None  # keeps the functions below alive
_shares_threads = False


def _on_first_call(name: str) -> Callable[..., Any]:
    def load_and_call(*arguments: Any) -> Any:
        load()
        return globals()[name](*arguments)

    return load_and_call


forward = _on_first_call("forward")
forward_with_kvcache = _on_first_call("forward_with_kvcache")
backward = _on_first_call("backward")
forward_oracle = _on_first_call("forward_oracle")
backward_oracle = _on_first_call("backward_oracle")
explain = _on_first_call("explain")
explain_with_kvcache = _on_first_call("explain_with_kvcache")
explain_backward = _on_first_call("explain_backward")
validate = _on_first_call("validate")
validate_with_kvcache = _on_first_call("validate_with_kvcache")
validate_backward = _on_first_call("validate_backward")
validate_stand_ins = _on_first_call("validate_stand_ins")
validate_stand_ins_with_kvcache = _on_first_call("validate_stand_ins_with_kvcache")
validate_stand_ins_backward = _on_first_call("validate_stand_ins_backward")
implementations = _on_first_call("implementations")
num_threads = _on_first_call("num_threads")
use_openmp_runtime = _on_first_call("use_openmp_runtime")
use_thread_count = _on_first_call("use_thread_count")
measure_ceiling = _on_first_call("measure_ceiling")
add_nvrtc_folder = _on_first_call("add_nvrtc_folder")
version = _on_first_call("version")
direct_call = _on_first_call("direct_call")


def load() -> None:
    """Loads the native library and rebinds this module's functions to it."""
    global _module
    with _load_lock:
        if _module is not None:
            return
        tvm_ffi = _import_tvm_ffi()
        # tvm-ffi knows the other built-in exceptions by itself.
        tvm_ffi.error.register_error("NotImplementedError", NotImplementedError)
        suffix = _SUFFIXES.get(sys.platform, ".so")
        path = Path(__file__).parent / "lib" / f"flash_attn_plus_ffi{suffix}"
        module = tvm_ffi.load_module(str(path))
        functions = {name: module.get_function(name) for name in _FUNCTIONS}
        for name in _WITHOUT_GIL:
            functions[name].release_gil = True
        globals().update(functions)
        _module = module
        share_threads_with_torch()
        for folder in _nvrtc_folders():
            add_nvrtc_folder(folder)


def _import_tvm_ffi() -> Any:
    """tvm-ffi, without the CUDA bindings for Python where nobody has loaded those.

    It imports them only to ask of an argument whether it is one of their streams, which nothing is
    before somebody else loads them; that takes 15 ms of the 40 that a first call waits for it.
    """
    # Without PyTorch, tvm-ffi imports that first, which may want the bindings itself.
    if "tvm_ffi" in sys.modules or "torch" not in sys.modules or "cuda.bindings" in sys.modules:
        import tvm_ffi

        return tvm_ffi
    without = _WithoutCudaBindings()
    sys.meta_path.insert(0, without)
    try:
        import tvm_ffi
    finally:
        sys.meta_path.remove(without)
    if getattr(tvm_ffi.core, "cuda_driver", without) is None:
        tvm_ffi.core.cuda_driver = _CudaDriver()
    return tvm_ffi


class _WithoutCudaBindings:
    """Finds no CUDA bindings for one thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "cuda.bindings" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class _CudaDriver:
    """cuda.bindings.driver for tvm-ffi, which knows its streams once somebody has loaded it."""

    @property
    def CUstream(self) -> Any:
        driver = sys.modules.get("cuda.bindings.driver")
        return getattr(driver, "CUstream", ())  # nothing is an instance of ()


def _nvrtc_folders() -> list[str]:
    """Where NVIDIA's wheels, on which PyTorch's depend, have put libnvrtc."""
    homes = dict.fromkeys(os.path.join(entry, "nvidia") for entry in sys.path)
    folders = (os.path.join(home, part, "lib") for home in homes for part in _names_in(home))
    return [
        folder
        for folder in folders
        if any(name.startswith("libnvrtc.so.") for name in _names_in(folder))
    ]


def _names_in(folder: str) -> list[str]:
    """Without patterns, whose compilation a process's first call would wait milliseconds for."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def share_threads_with_torch() -> None:
    """Takes PyTorch's threads, and its number of them, once it and the library are loaded."""
    global _shares_threads
    if _shares_threads or _module is None or sys.modules.get("torch") is None:
        return
    _shares_threads = True
    count = _thread_count_of_torch()
    if count is not None:
        use_thread_count(count)
    path = _openmp_runtime_of_torch()
    if path is None:
        return
    # Where it cannot be shared, the library's own threads serve as well.
    with contextlib.suppress(NotImplementedError, RuntimeError):
        use_openmp_runtime(path)


def _thread_count_of_torch() -> ctypes.c_void_p | None:
    """The address of at::get_num_threads(), what torch.get_num_threads() asks.

    OpenMP keeps a number for each thread; for a thread that has run nothing of PyTorch yet it is
    not the one of torch.set_num_threads(), which this function sets there before it answers.
    """
    home = Path(sys.modules["torch"].__file__ or "").parent
    library = home / "lib" / f"libtorch_cpu{_SUFFIXES.get(sys.platform, '.so')}"
    try:
        function = ctypes.CDLL(str(library))["_ZN2at15get_num_threadsEv"]
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p)


def _openmp_runtime_of_torch() -> str | None:
    """The OpenMP runtime that PyTorch has loaded; None where it has none or cannot be told."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch, "__file__", None) is None:
        return None
    home = Path(torch.__file__).parent
    bundled = (str(home), str(home.with_name("torch.libs")))
    if not Path("/proc/self/maps").exists():
        found = [str(path) for path in (home / "lib").glob("lib*omp*") if path.is_file()]
        return found[0] if found else None
    maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    paths = dict.fromkeys("/" + line.partition("/")[2] for line in maps if "omp" in line)
    loaded = [path for path in paths if _is_openmp_runtime(path.rpartition("/")[2])]
    for path in loaded:
        if path.startswith(bundled):
            return path
    # A build of PyTorch against the system's runtime. Wheels of other projects bring theirs, which
    # PyTorch does not use.
    for path in loaded:
        if ".libs/" not in path and "site-packages/" not in path:
            return path
    return None


def _is_openmp_runtime(name: str) -> bool:
    """Whether a file has the name of one: libgomp.so.1, libgomp-a34b3233.so.1, libiomp5.so."""
    return name.partition(".")[0].partition("-")[0] in ("libgomp", "libiomp5", "libomp")


def clarify(
    error: Exception, arguments: tuple[Any, ...], first: dict[str, str] | None = None
) -> Exception:
    """The error to raise for `error`, which a function called with `arguments` has raised.

    `first` names those that come before ARGUMENTS.

    Errors of the library name the argument already. Those of the conversion of Python values do
    not, and are replaced by one that does.
    """
    if isinstance(error, (NotImplementedError, ValueError, MemoryError)):
        return error
    devices: dict[str, str] = {}
    first = first or {}
    for (name, kind), value in zip((*first.items(), *ARGUMENTS.items()), arguments):
        if value is None:
            optional = kind in ("tensor", "str") and (first or name not in ("q", "k", "v"))
            if optional or name == "softmax_scale":
                continue
        if kind == "tensor":
            if not hasattr(value, "__dlpack__"):
                return TypeError(f"{name}: must be a tensor, is {_describe(value)}")
            layout = str(getattr(value, "layout", "torch.strided"))
            if layout.startswith("torch.") and layout != "torch.strided":
                return TypeError(f"{name}: must be a dense tensor, has layout {layout}")
            devices[name] = _device(value)
        elif kind in ("int", "bool"):
            if not isinstance(value, Integral):
                wanted = "an integer" if kind == "int" else "True or False"
                if name.startswith("window_size"):
                    wanted = "an integer, -1 where there is no bound"
                return TypeError(f"{name}: must be {wanted}, is {_describe(value)}")
            if int(value) not in _INT64:
                return ValueError(f"{name}: is {value}, outside the range of int64")
        elif kind == "float" and not isinstance(value, Real):
            return TypeError(f"{name}: must be a number, is {_describe(value)}")
        elif kind == "str" and not isinstance(value, str):
            return TypeError(f"{name}: must be a string, is {_describe(value)}")
    for name, device in devices.items():
        if device != devices["q"]:
            return ValueError(f"{name}: is on {device}, must be on q's device, {devices['q']}")
    if not {*devices.values()} <= {*DEVICE_TYPES} and not isinstance(error, RuntimeError):
        return NotImplementedError(f"no native implementation runs on {devices['q']}: {error}")
    return error


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if hasattr(value, "__dlpack__") and getattr(value, "ndim", 0) > 0:
        return f"a {type(value).__name__} of shape {[*value.shape]}"
    return f"{value!r:.60} ({type(value).__name__})"


def _device(tensor: Any) -> str:
    device = getattr(tensor, "device", "cpu")
    return str(getattr(device, "type", device))
