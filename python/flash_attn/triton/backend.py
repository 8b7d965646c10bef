"""The candidate "triton": which requests the project's Triton kernels take. Triton itself is
imported when a request on a device that it may serve is looked at."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .._call import Request

DESCRIPTION = "Triton kernels of this project"

_MAX_HEAD_DIM = 512
# Positions and lengths are int32 in the kernels, with room for a window beside them.
_MAX_SEQLEN = 2**30


def refusal(request: Request) -> str:
    """Why the kernels do not take a request that has been validated; "" where they do."""
    call, _, gradients, _ = request
    reason = why_no_driver(call.q.device.type) or _why_fake(call.q)
    if reason:
        return reason
    if gradients is not None and call.block_table is not None:
        return "block_table: there is no backward through pages"
    if max(call.q.size(-1), call.v.size(-1)) > _MAX_HEAD_DIM:
        return f"head_dim is above {_MAX_HEAD_DIM}"
    if max(call.longest_q, call.longest_k) >= _MAX_SEQLEN:
        return f"a sequence may have {_MAX_SEQLEN} tokens or more"
    return ""


def run(request: Request) -> None:
    """Computes a request that refusal() lets pass."""
    from . import launch

    launch.run(request)


def _why_fake(tensor: torch.Tensor) -> str:
    name = type(tensor).__name__
    return "fake tensors hold no data" if name == "FakeTensor" else ""


@functools.cache
def why_no_driver(device: str) -> str:
    """Why Triton does not run on a kind of device; "" where it does."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interprets:
        return "Triton has no driver for the CPU"
    if device == "meta":
        return "tensors on meta hold no data"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton

        if interprets:
            return ""
        active = triton.runtime.driver.active.get_active_torch_device().type
    except Exception as error:  # whatever a vendor's driver raises where it finds no device
        return f"Triton finds no driver: {error}"
    return "" if active == device else f"Triton's driver is for {active!r}"
