#!/usr/bin/env python3
"""Times the forward on an NVIDIA GPU beside PyTorch's cuDNN and FlashAttention-2.

All take turns within one run, since clocks throttle. 16384 tokens in all, 2048 / head_dim heads, as
published tables have it. Prints TFLOP/s (4 B H Sq Sk D, half when causal) and ours over the peers'.

    scripts/gpu_bench.sh [--dtype bfloat16] [--backends cuda:sm90 cuda:sm80] [--quick]
                         [--varlen | --grouped | --calls]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    implementations,
)

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
    # Calls queue up meanwhile: a batch that starts as soon as the first call does has some of the
    # host's time in it, which took up to a sixth of 160 us.
    torch.cuda._sleep(1_000_000)
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


def summary(ratios: list[float]) -> str:
    return f"geometric mean {statistics.geometric_mean(ratios):.3f}, least {min(ratios):.3f}"


@dataclasses.dataclass
class Packed:
    """Sequences end to end, and where they start."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor
    longest: int


def pack(lengths: list[int], *tensors: torch.Tensor) -> Packed:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Packed(*(x[: sum(lengths)] for x in tensors), offsets.cuda(), max(lengths))


def ours_varlen(it: Packed, causal: bool, backend: str) -> None:
    os.environ["FLASH_ATTENTION_BACKEND"] = backend
    flash_attn_varlen_func(
        it.q, it.k, it.v, it.offsets, it.offsets, it.longest, it.longest, causal=causal
    )


def ours_each(lengths: list[int], tensors: list[torch.Tensor], causal: bool, backend: str) -> None:
    """A dense call for each length, of as many sequences as there are lengths."""
    count = len(lengths)
    for length in lengths:
        dense = (x[: count * length].view(count, length, *x.shape[1:]) for x in tensors)
        ours(*dense, causal, backend)


def peer_varlen(it: Packed, causal: bool) -> None:
    """FlashAttention-2 through PyTorch, from 2.11 on."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0 if causal else -1)
    varlen_attn(
        it.q, it.k, it.v, it.offsets, it.offsets, it.longest, it.longest, window_size=window
    )


def random_lengths(mean: int, seed: int) -> list[int]:
    """As many as make about TOKENS, from half to one and a half times the mean."""
    generator = random.Random(seed)
    return [generator.randint(mean // 2, mean * 3 // 2) for _ in range(TOKENS // mean)]


def varlen_speeds(
    head_dim: int, mean: int, causal: bool, backend: str, dtype: torch.dtype
) -> dict[str, float]:
    """TFLOP/s of dense sequences, of varlen ones as long as those, of three draws of random lengths
    with that mean, and of dense calls for each length drawn, whose work is the same. Of the first
    and the third FlashAttention-2's as well."""
    heads = 2048 // head_dim
    tensors = [torch.randn(2 * TOKENS, heads, head_dim, device="cuda").to(dtype) for _ in range(3)]
    equal = [mean] * (TOKENS // mean)
    dense = [x[:TOKENS].view(-1, mean, heads, head_dim) for x in tensors]
    heads_first = [x.transpose(1, 2).contiguous() for x in dense]
    kinds: dict[str, list[tuple[list[int], Callable[[], None]]]] = {
        "dense": [(equal, functools.partial(ours, *dense, causal, backend))],
        "equal": [(equal, functools.partial(ours_varlen, pack(equal, *tensors), causal, backend))],
        "random": [],
        "each": [],
        "fa2 dense": [(equal, functools.partial(peer, *heads_first, causal, PEERS["fa2"]))],
        "fa2 random": [],
    }
    for lengths in (random_lengths(mean, seed) for seed in range(3)):
        packed = pack(lengths, *tensors)
        kinds["random"].append((lengths, functools.partial(ours_varlen, packed, causal, backend)))
        calls_each = functools.partial(ours_each, lengths, tensors, causal, backend)
        kinds["each"].append((lengths * len(lengths), calls_each))
        kinds["fa2 random"].append((lengths, functools.partial(peer_varlen, packed, causal)))
    calls = {f"{kind} {i}": it for kind, draws in kinds.items() for i, it in enumerate(draws)}
    times = medians({name: function for name, (_, function) in calls.items()}, 7)
    flops = 2048 * (2 if causal else 4)  # per pair of tokens
    speeds = {
        name: flops * sum(n * n for n in lengths) / times[name] / 1e9
        for name, (lengths, _) in calls.items()
    }
    return {
        kind: statistics.mean(speeds[f"{kind} {i}"] for i in range(len(draws)))
        for kind, draws in kinds.items()
    }


def varlen_table(backend: str, dtype: torch.dtype) -> None:
    """varlen_speeds, and the ratios of random lengths to dense ones: of their mean, of each, and of
    their mean for FlashAttention-2."""
    print(f"{backend}, varlen")
    columns = ("dense", "equal", "random", "each", "fa2 dense", "fa2 random")
    print("   D  mean causal " + "".join(f"{name:>12}" for name in columns) + "   ratios")
    ratios: dict[str, list[float]] = {}
    for head_dim in (64, 128, 256):
        for mean in (512, 1024, 4096):
            for causal in (False, True):
                speeds = varlen_speeds(head_dim, mean, causal, backend, dtype)
                found = {
                    f"{backend}, random over dense": speeds["random"] / speeds["dense"],
                    f"{backend}, random over each": speeds["random"] / speeds["each"],
                    "fa2, random over dense": speeds["fa2 random"] / speeds["fa2 dense"],
                }
                line = f"{head_dim:>4} {mean:>5} {causal!s:>6} "
                line += "".join(f"{speeds[name]:>12.0f}" for name in columns)
                print(line + "".join(f"  {it:.3f}" for it in found.values()), flush=True)
                for name, ratio in found.items():
                    if not math.isnan(ratio):
                        ratios.setdefault(name, []).append(ratio)
    for name, values in ratios.items():
        print(f"{name}: {summary(values)}")


def grouped_table(backend: str, dtype: torch.dtype, quick: bool) -> None:
    """TFLOP/s of a head of keys for each head of queries, for eight and for all of them, and the
    ratios to the first, whose products they share."""
    print(f"{backend}, heads of keys")
    print("   D     S causal         all      eighth         one   ratios")
    ratios = []
    for head_dim in (64, 128, 256):
        for seqlen in (4096,) if quick else (1024, 4096, 16384):
            for causal in (False, True):
                heads = 2048 // head_dim
                shape = (TOKENS // seqlen, seqlen, heads, head_dim)
                q, k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
                functions = {}
                for count, name in {heads: "all", heads // 8: "eighth", 1: "one"}.items():
                    keys, values = (x[:, :, :count].contiguous() for x in (k, v))
                    functions[name] = functools.partial(ours, q, keys, values, causal, backend)
                times = medians(functions, 3 if quick else 7)
                flops = 4.0 * TOKENS * seqlen * 2048 / (2 if causal else 1)
                line = f"{head_dim:>4} {seqlen:>5} {causal!s:>6} "
                speeds = {name: f"{flops / times[name] / 1e9:.0f}" for name in functions}
                line += "".join(f"{speeds.get(name, ''):>12}" for name in ("all", "eighth", "one"))
                found = [times["all"] / times[name] for name in functions if name != "all"]
                print(line + "".join(f"  {ratio:.3f}" for ratio in found), flush=True)
                ratios += found
    print(summary(ratios))


# A process's first call: after PyTorch's own start, until its result is there.
FIRST_CALL = """
import sys
import time
import torch
q = torch.randn(1, 128, 2, 64, device="cuda", dtype=getattr(torch, sys.argv[1]))
torch.cuda.synchronize()
start = time.perf_counter()
from flash_attn import flash_attn_func
imported = time.perf_counter()
flash_attn_func(q, q, q)
torch.cuda.synchronize()
called = time.perf_counter()
print(f"{1e3 * (called - imported):.0f} ms after {1e3 * (imported - start):.0f} of import")
"""


def calls_table(dtype: torch.dtype) -> None:
    """What the first call of a process takes, without and with the kernel on disk; then the host's
    microseconds per call, least and median of batches that never fill the GPU's queue."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FLASH_ATTENTION_CACHE_DIR": folder}
        for what in ("first call ever", *["first call of a later process"] * 5):
            command = [sys.executable, "-c", FIRST_CALL, str(dtype).removeprefix("torch.")]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(f"{what}: {run.stdout.strip() or run.stderr[-300:]}", flush=True)

    os.environ.pop("FLASH_ATTENTION_BACKEND", None)
    q, k, v = (torch.randn(1, 128, 2, 64, device="cuda").to(dtype) for _ in range(3))
    packed = [x[0] for x in (q, k, v)]
    cu = torch.tensor([0, 128], dtype=torch.int32, device="cuda")
    cache = [torch.randn(4, 1024, 2, 64, device="cuda").to(dtype) for _ in range(2)]
    filled = torch.full((4,), 900, dtype=torch.int32, device="cuda")
    one = torch.randn(4, 1, 2, 64, device="cuda").to(dtype)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out = torch.empty_like(q)
    functions: dict[str, Callable[[], object]] = {
        "flash_attn_func": lambda: flash_attn_func(q, k, v),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(*packed, cu, cu, 128, 128),
        "flash_attn_with_kvcache": lambda: flash_attn_with_kvcache(
            one, *cache, cache_seqlens=filled
        ),
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(*heads_first),
        "torch.mul with out": lambda: torch.mul(q, k, out=out),
        "torch.mul": lambda: torch.mul(q, k),
        "torch.empty_like": lambda: torch.empty_like(q),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(41):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                function()
            times[name].append((time.perf_counter() - start) / 200 * 1e6)
    for name, batches in times.items():
        print(f"{name:>30} {min(batches):6.1f} {statistics.median(batches):6.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16"])
    available = [it.name for it in implementations("cuda") if it.available]
    parser.add_argument("--backends", nargs="*", default=available)
    parser.add_argument("--quick", action="store_true", help="three lengths, fewer rounds")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--varlen", action="store_true", help="random lengths instead")
    tables.add_argument("--grouped", action="store_true", help="fewer heads of keys instead")
    tables.add_argument("--calls", action="store_true", help="first calls and host time instead")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    if arguments.varlen:
        for backend in arguments.backends:
            varlen_table(backend, dtype)
    elif arguments.grouped:
        for backend in arguments.backends:
            grouped_table(backend, dtype, arguments.quick)
    elif arguments.calls:
        calls_table(dtype)
    else:
        dense_table(arguments.backends, dtype, arguments.quick)


def dense_table(backends: list[str], dtype: torch.dtype, quick: bool) -> None:
    """TFLOP/s of dense sequences, and the ratios to the peers."""
    names = [*backends, *PEERS]
    print("   D     S causal " + "".join(f"{name:>12}" for name in names) + "   ratios")
    ratios: dict[tuple[str, str], list[float]] = {}
    lengths = (1024, 4096, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    for head_dim in (64, 128, 256):
        for seqlen in lengths:
            for causal in (False, True):
                shape = (TOKENS // seqlen, seqlen, 2048 // head_dim, head_dim)
                q, k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
                peers = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
                functions = {
                    name: functools.partial(ours, q, k, v, causal, name) for name in backends
                }
                functions |= {
                    name: functools.partial(peer, *peers, causal, backend)
                    for name, backend in PEERS.items()
                }
                times = medians(functions, 3 if quick else 7)
                flops = 4.0 * TOKENS * seqlen * 2048 / (2 if causal else 1)
                line = f"{head_dim:>4} {seqlen:>5} {causal!s:>6} "
                line += "".join(f"{flops / times[name] / 1e9:>12.0f}" for name in names)
                for backend in backends:
                    for name in PEERS:
                        ratio = times[name] / times[backend]
                        if not math.isnan(ratio):
                            ratios.setdefault((backend, name), []).append(ratio)
                        line += f"  {ratio:.2f}"
                print(line, flush=True)
    for (backend, name), values in ratios.items():
        print(f"{backend} over {name}: {summary(values)}")


if __name__ == "__main__":
    main()
