"""What importing costs and needs, and what a call costs beyond its arithmetic."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import timeit
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn import _native, flash_attn_func, flash_attn_varlen_func

# The bar is 50 ms beyond PyTorch's own import.
IMPORT_BAR_MS = 50.0
# The bar is 15 us on an idle machine; this leaves room for a busy one.
OVERHEAD_BAR_US = 40.0

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, blocked: tuple[str, ...] = ()) -> str:
    """The output of a program in a process of its own, with some packages as if not installed."""
    program = BLOCKER.format(blocked=blocked) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_torch():
    output = run_python(
        """
        import numpy as np
        import flash_attn

        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 1, 50, 2, 32)).astype(np.float32)
        out = flash_attn.attention(q, k, v)
        scores = np.einsum("bihd,bjhd->bhij", q, k) * 32**-0.5
        weights = np.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bhij,bjhd->bihd", weights, v)
        assert np.abs(out - expected).max() < 1e-5
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            print(error)
        assert "torch" not in sys.modules
        """,
        blocked=("torch", "triton", "einops"),
    )
    assert "PyTorch is not installed" in output


def test_without_triton_and_einops():
    output = run_python(
        """
        import torch
        from flash_attn import flash_attn_func
        x = torch.randn(1, 5, 2, 8)
        print(flash_attn_func(x, x, x).shape)
        """,
        blocked=("triton", "einops"),
    )
    assert "[1, 5, 2, 8]" in output


def test_importing_loads_neither_torch_nor_the_native_library():
    output = run_python(
        "import flash_attn; print({'torch', 'tvm_ffi', 'numpy'} & set(sys.modules))"
    )
    assert output.strip() == "set()"


def test_import_time():
    code = """
    import time
    import torch
    start = time.perf_counter()
    from flash_attn import flash_attn_func
    print((time.perf_counter() - start) * 1e3)
    """
    assert min(float(run_python(code)) for _ in range(3)) < IMPORT_BAR_MS


def test_the_cuda_bindings_are_loaded_by_others_alone(tmp_path):
    package = tmp_path / "cuda" / "bindings"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "driver.py").write_text("class CUstream(int): pass\n")
    output = run_python(
        f"""
        import torch
        from flash_attn import flash_attn_func
        for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
            del sys.modules[name]  # PyTorch's own
        sys.path.insert(0, {str(tmp_path)!r})
        x = torch.randn(1, 5, 2, 8)
        flash_attn_func(x, x, x)
        assert "cuda.bindings.driver" not in sys.modules
        import cuda.bindings.driver
        import tvm_ffi
        echo = tvm_ffi.get_global_func("testing.echo")
        print(echo("text"), echo(cuda.bindings.driver.CUstream(5)))
        """
    )
    assert output.strip() == "text c_void_p(5)"


def test_other_threads_find_the_cuda_bindings_meanwhile():
    finder = _native._WithoutCudaBindings()
    with pytest.raises(ModuleNotFoundError):
        finder.find_spec("cuda.bindings")
    assert finder.find_spec("cuda") is None
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finder.find_spec, "cuda.bindings").result() is None


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_flaggems_is_not_ignored_in_silence(library):
    output = run_python(
        f"""
        import os
        import warnings
        os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "TRUE"
        import {library}
        import flash_attn
        x = {library}.zeros((1, 4, 1, 8), dtype={library}.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                flash_attn.attention(x, x, x)
        print([str(it.message) for it in caught])
        """
    )
    assert output.count("FLASH_ATTENTION_USE_FLAGGEMS") == 1 and "native implementation" in output


def test_triton_is_not_imported_until_it_is_needed():
    output = run_python(
        """
        import torch
        import flash_attn
        from flash_attn import flash_attn_func
        x = torch.randn(1, 5, 2, 8)
        flash_attn_func(x, x, x)
        flash_attn.explain(x, x, x)
        flash_attn_func(*(x.to("meta"),) * 3)
        # PyTorch may have imported Triton; what imports it here is this module.
        print({"flash_attn.triton.launch", "flag_gems"} & set(sys.modules))
        """
    )
    assert output.strip() == "set()"


def microseconds(call) -> float:
    call()
    return min(timeit.repeat(call, number=200, repeat=25)) / 200 * 1e6


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad_enabled"])
def test_overhead_of_a_tiny_call(grad):
    x = torch.randn(1, 1, 1, 8)
    flat, lengths = x[0], torch.tensor([0, 1], dtype=torch.int32)
    with torch.set_grad_enabled(grad):
        dense = microseconds(lambda: flash_attn_func(x, x, x))
        varlen = microseconds(
            lambda: flash_attn_varlen_func(flat, flat, flat, lengths, lengths, 1, 1)
        )
    assert dense < OVERHEAD_BAR_US and varlen < OVERHEAD_BAR_US
