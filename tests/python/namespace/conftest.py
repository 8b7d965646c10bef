"""What the tests of the names around attention start from: gradients, and one seed for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def gradients_and_seed() -> Iterator[None]:
    """The other tests run without gradients, process-wide."""
    torch.manual_seed(0)
    with torch.enable_grad():
        yield
