"""Checks that training memory grows linearly with the sequence length, on the CPU.

Forward and backward of one long sequence, 2 heads, head_dim 64, fp32, every token attending to
every other. What resident memory grows by at its peak, less the inputs (q, k, v, dout) and the
outputs (out, dq, dk, dv), must stay under 600 MB at 65,536 tokens, and in proportion below; the
matrix of scores alone would be 34 GB. At 65,536 tokens it takes a minute or two on two processors:

    python scripts/check_memory.py
    python scripts/check_memory.py --seqlen 16384

Reads the peak from Linux's /proc.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from flash_attn import flash_attn_func

SEQLEN, NUM_HEADS, HEAD_DIM = 65536, 2, 64
BOUND_MB = 600.0
MB = 1e6


def reset_peak() -> None:
    """Makes the peak of resident memory what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory since reset_peak()."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def train(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> int:
    """A forward and a backward; the bytes of their results."""
    out = flash_attn_func(q, k, v)
    out.backward(dout)
    return sum(x.numel() * x.element_size() for x in (out, q.grad, k.grad, v.grad))


def normal(seqlen: int) -> list[torch.Tensor]:
    """q, k, v and dout; the first three require gradients."""
    shape = (1, seqlen, NUM_HEADS, HEAD_DIM)
    tensors = [torch.randn(shape) for _ in range(4)]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    return tensors


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the memory of a forward and a backward.")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens (default: %(default)s)")
    seqlen = parser.parse_args().seqlen
    torch.manual_seed(0)
    train(*normal(64))  # loads code, starts threads
    tensors = normal(seqlen)
    reset_peak()
    before = peak_bytes()
    start = time.perf_counter()
    results = train(*tensors)
    seconds = time.perf_counter() - start
    beyond = (peak_bytes() - before - results) / MB
    bound = BOUND_MB * seqlen / SEQLEN
    print(f"{seqlen} tokens, {NUM_HEADS} heads, head_dim {HEAD_DIM}, fp32: {seconds:.1f} s")
    print(f"peak beyond inputs and outputs: {beyond:.1f} MB, the bound is {bound:.1f} MB")
    return 0 if beyond < bound else 1


if __name__ == "__main__":
    sys.exit(main())
