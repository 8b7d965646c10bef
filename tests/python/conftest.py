"""What every test starts from."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --backend and --device."""
    parser.addoption("--backend", default="", help="the implementation that the suites run on")
    parser.addoption("--device", default="", help="where the tensors of the suites are moved to")


def pytest_configure(config: pytest.Config) -> None:
    """Forces the implementation that --backend names, before flash_attn is imported."""
    config.addinivalue_line("markers", "native: what only the native library promises")
    if config.getoption("--backend"):
        os.environ["FLASH_ATTENTION_BACKEND"] = config.getoption("--backend")
    if config.getoption("--device"):
        os.environ["FLASH_ATTENTION_CHECK"] = "1"  # wrong lengths and pages are tested too
        move_calls_to(config.getoption("--device"))


def move_calls_to(device: str) -> None:
    """Makes the public functions move their tensors to a device and their results back."""
    import flash_attn
    from flash_attn import dlpack

    def there(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        if x.requires_grad or x.layout != torch.strided or x.is_neg() or x.is_conj():
            return x.to(device)
        # to() lays some strides out anew.
        storage = x.untyped_storage()
        whole = x.new_empty(0).set_(storage, 0, (storage.nbytes() // x.element_size(),))
        return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    def back(x: Any) -> Any:
        return type(x)(map(back, x)) if isinstance(x, (tuple, list)) else x.cpu()

    def moved(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            bound = inspect.signature(function).bind(*arguments, **options)
            given = dict(bound.arguments)
            bound.arguments.update({name: there(x) for name, x in given.items()})
            results = function(*bound.args, **bound.kwargs)
            appends = given.get("k") is not None
            # What is written in place; a cache that is only read may be broadcast.
            for name in ("k_cache", "v_cache", "out") if appends else ("out",):
                if isinstance(given.get(name), torch.Tensor):
                    given[name].copy_(bound.arguments[name])
            return results if isinstance(results, str) else back(results)

        return call

    for name in flash_attn.__all__:
        if name.startswith("flash_attn_"):
            setattr(flash_attn, name, moved(getattr(flash_attn, name)))
    for name in ("attention", "explain"):
        setattr(dlpack, name, moved(getattr(dlpack, name)))
        setattr(flash_attn, name, getattr(dlpack, name))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --backend, leaves out what the suites test of the native library alone."""
    if config.getoption("--backend"):
        left_out = [item for item in items if item.get_closest_marker("native")]
        items[:] = [item for item in items if not item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=left_out)


# Tests of gradients turn it on.
torch.set_grad_enabled(False)
# Drawn arguments are part of tests' names, which the processes that share a run must agree on.
torch.manual_seed(0)
for name in ("FLASH_ATTENTION_BACKEND", "FLASH_ATTENTION_USE_FLAGGEMS"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test may change PyTorch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def load_module(path: Path) -> ModuleType:
    """A Python file as a module: examples and scripts are in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for it runs on each implementation for NVIDIA GPUs."""
    if "cuda_backend" in metafunc.fixturenames:
        from cuda_calls import NAMES  # after pytest_configure()

        metafunc.parametrize("cuda_backend", NAMES, indirect=True)


@pytest.fixture
def cuda_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation for NVIDIA GPUs, forced."""
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", request.param)
    return request.param
