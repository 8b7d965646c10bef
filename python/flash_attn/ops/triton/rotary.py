"""apply_rotary() under the original's name; composed of PyTorch operators, for every device."""

from __future__ import annotations

from .._rotary import apply_rotary

__all__ = ["apply_rotary"]
