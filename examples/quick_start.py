"""Attention in one call, beside PyTorch's own: its error, its time, and what computed it.

Batch 2, 1024 tokens, 16 heads, head_dim 64, fp16, causal. Runs on a CUDA device where an
implementation serves one, else on the CPU.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

import flash_attn
from flash_attn import dlpack, flash_attn_func

BATCH, SEQLEN, NUM_HEADS, HEAD_DIM = 2, 1024, 16, 64
REPEATS = 9


def choose_device() -> str:
    """cuda where PyTorch has it, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_implementation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """The name of the implementation that runs the call."""
    for line in flash_attn.explain(q, k, v, causal=True).splitlines():
        name, outcome, *_ = line.split()
        if outcome == "chosen":
            return name
    return "none"


def median_times(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """The median seconds of each call; they take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    device = choose_device()
    torch.manual_seed(0)
    q, k, v = torch.randn(
        3, BATCH, SEQLEN, NUM_HEADS, HEAD_DIM, dtype=torch.float16, device=device
    ).unbind(0)

    if os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS", "").upper() == "TRUE":
        warnings.filterwarnings("ignore", message="FLASH_ATTENTION_USE_FLAGGEMS")
        print("FLASH_ATTENTION_USE_FLAGGEMS asks for the Triton family, FlagGems first. Here:")
        print(flash_attn.explain(q, k, v, causal=True))

    calls = {
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "PyTorch's attention": lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2),
    }
    with torch.no_grad():
        times = median_times(calls, device)
        outs = {name: call() for name, call in calls.items()}

    # The fp64 oracle is slow: one batch entry of it is enough.
    exact = dlpack.oracle(q[:1].cpu(), k[:1].cpu(), v[:1].cpu(), causal=True)
    print(f"fp16, batch {BATCH}, {SEQLEN} tokens, {NUM_HEADS} heads, head_dim {HEAD_DIM}, causal")
    print(f"on {device}, {torch.get_num_threads()} threads; implementation: ", end="")
    print(chosen_implementation(q, k, v))
    print(f"{'':20}  {'time':>10}  {'max error against fp64':>22}")
    for name, out in outs.items():
        error = abs(out[:1].cpu().double().numpy() - exact.out).max()
        print(f"{name:20}  {times[name] * 1e3:7.2f} ms  {error:22.2e}")
    ours, theirs = times.values()
    print(f"flash_attn_func takes {ours / theirs:.2f} of the time of PyTorch's attention.")


if __name__ == "__main__":
    main()
