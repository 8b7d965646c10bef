"""What the tests of the names around attention start from: gradients, one seed for each, a device.

FLASH_ATTENTION_TEST_DEVICE runs them on another device than the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get("FLASH_ATTENTION_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def gradients_seed_and_device() -> Iterator[None]:
    """The other tests run without gradients, process-wide."""
    torch.manual_seed(0)
    with torch.enable_grad(), torch.device(DEVICE):
        yield
