#!/usr/bin/env python3
"""Times flash_attn_func beside PyTorch's scaled_dot_product_attention on the CPU.

The two alternate within one run; medians are printed, with the ratio and the share of the forward's
or the backward's arithmetic per second. Each gets the layout that it likes: [B, S, H, D] ours,
[B, H, S, D] PyTorch's.

    .venv/bin/python scripts/compare_sdpa.py [--backward] [--dtype float32] [--threads 2]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_attn import flash_attn_func

HEADS = 8
MIN_SECONDS = 0.6  # per case


def medians(functions: list[Callable[[], object]]) -> list[float]:
    """Seconds per call of each, taking turns."""
    for function in functions * 2:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while time.perf_counter() - start < MIN_SECONDS or len(times[0]) < 7:
        for function, record in zip(functions, times):
            begin = time.perf_counter()
            function()
            record.append(time.perf_counter() - begin)
    return [sorted(record)[len(record) // 2] for record in times]


def calls(
    seqlen: int, head_dim: int, causal: bool, dtype: torch.dtype, backward: bool
) -> list[Callable[[], object]]:
    """Ours and PyTorch's."""
    ours = [torch.randn(1, seqlen, HEADS, head_dim).to(dtype) for _ in "qkv"]
    peers = [x.transpose(1, 2).contiguous() for x in ours]
    if not backward:
        return [
            lambda: flash_attn_func(*ours, causal=causal),
            lambda: scaled_dot_product_attention(*peers, is_causal=causal),
        ]
    for x in (*ours, *peers):
        x.requires_grad_()
    out = flash_attn_func(*ours, causal=causal)
    peer_out = scaled_dot_product_attention(*peers, is_causal=causal)
    dout = torch.randn_like(out)
    peer_dout = dout.transpose(1, 2).contiguous()
    return [
        lambda: torch.autograd.grad(out, ours, dout, retain_graph=True),
        lambda: torch.autograd.grad(peer_out, peers, peer_dout, retain_graph=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("   D     S causal       ours       peer  ratio   GFLOP/s")
    ratios = []
    for head_dim in (64, 128):
        for seqlen in (128, 512, 2048):
            for causal in (False, True):
                dtype = getattr(torch, arguments.dtype)
                functions = calls(seqlen, head_dim, causal, dtype, arguments.backward)
                with torch.set_grad_enabled(arguments.backward):
                    ours, peer = medians(functions)
                products = 10 if arguments.backward else 4
                flops = products * HEADS * seqlen * seqlen * head_dim / (2 if causal else 1)
                ratios.append(peer / ours)
                print(
                    f"{head_dim:4} {seqlen:5} {'yes' if causal else 'no':>6}"
                    f" {ours * 1e6:8.0f}us {peer * 1e6:8.0f}us {peer / ours:6.2f}"
                    f" {flops / ours / 1e9:9.0f}"
                )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean {mean:.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
