"""What the tests of the names around attention start from: gradients, one seed for each, a device.

FLASH_ATTENTION_TEST_DEVICE runs them on another device than the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before the test modules are read: they hold tensors.
if "FLASH_ATTENTION_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["FLASH_ATTENTION_TEST_DEVICE"])


@pytest.fixture(autouse=True)
def gradients_and_seed() -> Iterator[None]:
    """The other tests run without gradients, process-wide."""
    torch.manual_seed(0)
    with torch.enable_grad():
        yield
