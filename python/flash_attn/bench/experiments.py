"""Two properties that no single case shows: alternation with PyTorch, and scaling with threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case
from .peers import OURS, SDPA, calls_of
from .timing import Call, alternate

# Small ones are where waking threads shows, larger ones where caches do.
ALTERNATION = {"small": (128, 64), "medium": (512, 512)}
ROUNDS = 10


def _seconds_of_many(calls: list[Call], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return time.perf_counter() - begin


def alternation(size: str, repeats: int = 1000) -> dict[str, Any]:
    """One call of ours, one matrix product of PyTorch's, `repeats` times by turns.

    In `ROUNDS` parts, each beside as many of either run apart. `ratio` is the median over the parts
    of the time together by the sum of the times apart; `least` the smallest. `peer_ratio` is that
    of PyTorch's attention in our place: what the caches lose, whoever takes turns.
    """
    seqlen, matrix = ALTERNATION[size]
    case = Case("forward", "float32", 1, seqlen, seqlen, 8, 8, 64)
    calls = calls_of(case, [SDPA])[0]
    a, b = torch.randn(2, matrix, matrix)
    out = torch.empty(matrix, matrix)

    def product() -> torch.Tensor:
        return torch.mm(a, b, out=out)

    part = max(1, repeats // ROUNDS)
    rounds = {name: _rounds([calls[name], product], part) for name in (OURS, SDPA)}
    ratios = {name: [together / sum(apart) for *apart, together in rounds[name]] for name in rounds}
    attention, product_alone, together = (
        statistics.median(column) / part for column in zip(*rounds[OURS])
    )
    return {
        "size": size,
        "name": f"attention {case.name}, product {matrix} x {matrix}",
        "repeats": part * ROUNDS,
        "attention": attention,
        "product": product_alone,
        "together": together,
        "ratio": statistics.median(ratios[OURS]),
        "least": min(ratios[OURS]),
        "peer_ratio": statistics.median(ratios[SDPA]),
    }


def _rounds(calls: list[Call], part: int) -> list[tuple[float, ...]]:
    """Seconds of `part` of each call apart, and then of them all by turns; `ROUNDS` times."""
    _seconds_of_many(calls, part)
    return [
        (*(_seconds_of_many([call], part) for call in calls), _seconds_of_many(calls, part))
        for _ in range(ROUNDS)
    ]


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


def scaling(
    dtype: str, most: int, seconds: float, on_step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Ours and PyTorch's on 1 to `most` threads; sets PyTorch's number of threads.

    `efficiency` of n threads is the time of one by n times the time of n.
    """
    results = []
    for mode in ("forward", "backward"):
        case = Case(mode, dtype, 1, 2048, 2048, 16, 16, 128, causal=True)
        first: dict[str, float] = {}
        for threads in thread_counts(most):
            on_step(f"{mode} on {threads} threads")
            torch.set_num_threads(threads)
            calls, _ = calls_of(case, [SDPA])
            for name, samples in alternate(calls, seconds).items():
                first.setdefault(name, samples["median"])
                results.append(
                    {
                        "mode": mode,
                        "case": case.name,
                        "dtype": dtype,
                        "threads": threads,
                        "implementation": name,
                        "samples": samples,
                        "gflops": case.flops() / samples["median"] / 1e9,
                        "efficiency": first[name] / (threads * samples["median"]),
                    }
                )
    torch.set_num_threads(most)
    return results
