"""Timing of functions, on the device of their arguments.

benchmark_* print (with verbose) and return (torch.utils.benchmark.Timer, Measurement).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import benchmark

__all__ = [
    "benchmark_all",
    "benchmark_backward",
    "benchmark_combined",
    "benchmark_forward",
    "benchmark_fwd_bwd",
    "benchmark_memory",
    "pytorch_profiler",
]

Timing = tuple[benchmark.Timer, benchmark.Measurement]


def _device_type(inputs: tuple[Any, ...], kwinputs: dict[str, Any]) -> str:
    for value in (*inputs, *kwinputs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"


def _under_amp(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwinputs: dict[str, Any],
    amp: bool,
    amp_dtype: torch.dtype,
) -> Callable[[], Any]:
    device_type = _device_type(inputs, kwinputs)

    def call() -> Any:
        with torch.autocast(device_type, dtype=amp_dtype, enabled=amp):
            out = fn(*inputs, **kwinputs)
        return out[0] if isinstance(out, tuple) else out

    return call


def _gradient(y: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise ValueError(f"grad: must have shape {list(y.shape)}, has {list(grad.shape)}")
    return grad


def _forget_gradients(inputs: tuple[Any, ...]) -> None:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            value.grad = None


def _time(call: Callable[[], Any], repeats: int, title: str, verbose: bool) -> Timing:
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    measurement = timer.timeit(repeats)
    if verbose:
        print(title)
        print(measurement)
    return timer, measurement


def benchmark_forward(
    fn, *inputs, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
) -> Timing:
    """Times fn(*inputs, **kwinputs), under autocast if amp."""
    call = _under_amp(fn, inputs, kwinputs, amp, amp_dtype)
    return _time(call, repeats, f"{desc} - Forward pass", verbose)


def benchmark_backward(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
) -> Timing:
    """Times the backward pass of fn's result, or of the first of its results."""
    y = _under_amp(fn, inputs, kwinputs, amp, amp_dtype)()
    grad = _gradient(y, grad)

    def call() -> None:
        _forget_gradients(inputs)
        y.backward(grad, retain_graph=True)

    return _time(call, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
) -> Timing:
    """Times the forward and the backward pass together."""
    forward = _under_amp(fn, inputs, kwinputs, amp, amp_dtype)
    grad = _gradient(forward(), grad)

    def call() -> None:
        _forget_gradients(inputs)
        forward().backward(grad)

    return _time(call, repeats, f"{desc} - Forward + Backward pass", verbose)


def benchmark_fwd_bwd(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
) -> tuple[Timing, Timing]:
    """benchmark_forward and benchmark_backward."""
    options = {
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
        **kwinputs,
    }
    return (
        benchmark_forward(fn, *inputs, **options),
        benchmark_backward(fn, *inputs, grad=grad, **options),
    )


def benchmark_all(
    fn,
    *inputs,
    grad=None,
    repeats=10,
    desc="",
    verbose=True,
    amp=False,
    amp_dtype=torch.float16,
    **kwinputs,
) -> tuple[Timing, Timing, Timing]:
    """benchmark_forward, benchmark_backward and benchmark_combined."""
    options = {
        "grad": grad,
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
        **kwinputs,
    }
    return (
        *benchmark_fwd_bwd(fn, *inputs, **options),
        benchmark_combined(fn, *inputs, **options),
    )


def pytorch_profiler(
    fn,
    *inputs,
    trace_filename=None,
    backward=False,
    amp=False,
    amp_dtype=torch.float16,
    cpu=False,
    verbose=True,
    **kwinputs,
) -> None:
    """Profiles one call after 30 others, and prints a table; cpu: whether to record the CPU too,
    which always is where the arguments lie there. trace_filename: a Chrome trace is written."""
    device_type = _device_type(inputs, kwinputs)
    forward = _under_amp(fn, inputs, kwinputs, amp, amp_dtype)
    grad = torch.randn_like(forward()) if backward else None

    def call() -> None:
        _forget_gradients(inputs if backward else ())
        out = forward()
        if backward:
            out.backward(grad)

    for _ in range(30):
        call()
    activities = []
    if cpu or device_type == "cpu":
        activities.append(torch.profiler.ProfilerActivity.CPU)
    if device_type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities, record_shapes=True, with_stack=trace_filename is not None
    ) as profile:
        call()
    if verbose:
        print(profile.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def benchmark_memory(fn, *inputs, desc="", verbose=True, **kwinputs) -> float:
    """The peak of CUDA memory during a call, in GB; NotImplementedError on other devices."""
    device_type = _device_type(inputs, kwinputs)
    if device_type != "cuda":
        raise NotImplementedError(f"benchmark_memory measures CUDA memory, not {device_type!r}")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    gigabytes = torch.cuda.max_memory_allocated() / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {gigabytes} GB")
    torch.cuda.empty_cache()
    return gigabytes
