"""Timing of calls that take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], object]

# Fewer samples have no quartiles; a case of seconds a call gets no more than these.
MIN_SAMPLES = 5


def seconds_of(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def alternate(calls: Mapping[str, Call], seconds: float) -> dict[str, dict[str, Any]]:
    """Runs the calls by turns, in an order that turns round, until `seconds` have passed.

    Of each: the summary of its samples, see `summary`. The first two rounds warm up.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names * 2:
            calls[name]()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(samples[names[0]]) < MIN_SAMPLES:
            for name in names:
                samples[name].append(seconds_of(calls[name]))
            names.reverse()
    finally:
        if was_enabled:
            gc.enable()
    return {name: summary(samples[name]) for name in calls}


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, least and spread of durations in seconds.

    The spread is the distance between the quartiles, as a share of the median.
    """
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median": median,
        "least": min(samples),
        "spread": (third - first) / median,
        "samples": len(samples),
    }
