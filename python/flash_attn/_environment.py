"""The environment variables that Python code reads; src/core/environment.cc reads the others."""

from __future__ import annotations

import os


def wants_flaggems() -> bool:
    """Whether FLASH_ATTENTION_USE_FLAGGEMS asks for the Triton family, FlagGems first."""
    return os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS", "").upper() in ("1", "TRUE", "ON", "YES")
