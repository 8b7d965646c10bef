"""What every test starts from."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Tests of gradients turn it on.
torch.set_grad_enabled(False)
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
