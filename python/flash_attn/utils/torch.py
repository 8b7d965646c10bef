"""torch.amp's decorators for autograd functions, for CUDA, as the original has them."""

from __future__ import annotations

import functools

import torch

__all__ = ["custom_bwd", "custom_fwd"]

custom_fwd = functools.partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type="cuda")
