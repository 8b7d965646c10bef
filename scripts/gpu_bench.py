#!/usr/bin/env python3
"""Times the forward on an NVIDIA GPU beside PyTorch's cuDNN and FlashAttention-2.

All take turns within one run, since clocks throttle. 16384 tokens in all, 2048 / head_dim heads, as
published tables have it. Prints TFLOP/s (4 B H Sq Sk D, half when causal) and ours over the peers'.

    scripts/gpu_bench.sh [--dtype bfloat16] [--backends cuda:sm90 cuda:sm80] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_attn import flash_attn_func, implementations

TOKENS = 16384
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, backend: str) -> None:
    os.environ["FLASH_ATTENTION_BACKEND"] = backend
    flash_attn_func(q, k, v, causal=causal)


def peer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, backend: SDPBackend
) -> None:
    with sdpa_kernel(backend):
        scaled_dot_product_attention(q, k, v, is_causal=causal)


def milliseconds(function: Callable[[], None], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def medians(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds per call of each, taking turns; NaN for one that fails."""
    times: dict[str, list[float]] = {}
    for name, function in functions.items():
        try:
            milliseconds(function, 2)
        except Exception as error:
            print(f"# {name}: {str(error).splitlines()[0]:.150}")
            continue
        times[name] = []
    for _ in range(rounds):
        for name in times:
            calls = max(1, int(3.0 / max(milliseconds(functions[name], 1), 0.01)))
            times[name].append(milliseconds(functions[name], calls))
    return {
        name: statistics.median(times[name]) if name in times else math.nan for name in functions
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16"])
    available = [it.name for it in implementations("cuda") if it.available]
    parser.add_argument("--backends", nargs="*", default=available)
    parser.add_argument("--quick", action="store_true", help="three lengths, fewer rounds")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    names = [*arguments.backends, *PEERS]
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    print("   D     S causal " + "".join(f"{name:>12}" for name in names) + "   ratios")
    ratios: dict[tuple[str, str], list[float]] = {}
    lengths = (1024, 4096, 16384) if arguments.quick else (512, 1024, 2048, 4096, 8192, 16384)
    for head_dim in (64, 128, 256):
        for seqlen in lengths:
            for causal in (False, True):
                shape = (TOKENS // seqlen, seqlen, 2048 // head_dim, head_dim)
                q, k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
                peers = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
                functions = {
                    name: functools.partial(ours, q, k, v, causal, name)
                    for name in arguments.backends
                }
                functions |= {
                    name: functools.partial(peer, *peers, causal, backend)
                    for name, backend in PEERS.items()
                }
                times = medians(functions, 3 if arguments.quick else 7)
                flops = 4.0 * TOKENS * seqlen * 2048 / (2 if causal else 1)
                line = f"{head_dim:>4} {seqlen:>5} {causal!s:>6} "
                line += "".join(f"{flops / times[name] / 1e9:>12.0f}" for name in names)
                for backend in arguments.backends:
                    for name in PEERS:
                        ratio = times[name] / times[backend]
                        if not math.isnan(ratio):
                            ratios.setdefault((backend, name), []).append(ratio)
                        line += f"  {ratio:.2f}"
                print(line, flush=True)
    for (backend, name), values in ratios.items():
        print(
            f"{backend} over {name}: geometric mean {statistics.geometric_mean(values):.3f},"
            f" least {min(values):.2f}"
        )


if __name__ == "__main__":
    main()
