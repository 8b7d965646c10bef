"""Counters that a kernel finds at 0 and leaves at 0.

Launches on one stream run one after another, and share theirs. What is captured into a graph may
run beside anything later, so each such launch has counters of its own, for good. Capturing runs
nothing, so both come from memory that was set to 0 before; where that is used up, a captured launch
gets counters that its graph sets to 0.
"""

from __future__ import annotations

import functools
import threading

import torch
import triton

_PIECE = 2**16  # of a device's counters are set to 0 at once
_LEAST = 256  # that a stream gets, so that few calls need more than there are
_MOST_CAPTURED = 2**20  # that graphs may keep


def zeros(device: torch.device, count: int) -> torch.Tensor:
    """`count` counters or more, int32, for a launch on the device's current stream."""
    counters = _of_device(device)
    if device.type == "cpu":
        return counters.of_stream(0, count)
    if torch.cuda.is_current_stream_capturing():
        return counters.captured(count)
    return counters.of_stream(triton.runtime.driver.active.get_current_stream(device.index), count)


@functools.cache
def _of_device(device: torch.device) -> _Counters:
    return _Counters(device)


class _Counters:
    """Those of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.Tensor] = {}
        self._pieces: list[torch.Tensor] = []  # kept: graphs know no more than addresses
        self._spare = self._zeros(0)
        self._num_captured = 0
        self._is_short = False
        self._lock = threading.Lock()

    def of_stream(self, stream: int, count: int) -> torch.Tensor:
        """Those that launches on a stream share."""
        counters = self._streams.get(stream)
        if counters is None or counters.numel() < count:
            with self._lock:
                counters = self._take(max(2 * count, _LEAST))
            self._streams[stream] = counters
        if self._is_short:  # the next capture finds some again
            with self._lock:
                self._refill(_PIECE)
        return counters

    def captured(self, count: int) -> torch.Tensor:
        """Those of one captured launch."""
        with self._lock:
            if self._num_captured + count > _MOST_CAPTURED:
                return self._zeros(count)
            if self._spare.numel() < count:
                self._is_short = True
                return self._zeros(count)
            self._num_captured += count
            return self._take(count)

    def _take(self, count: int) -> torch.Tensor:
        if self._spare.numel() < count:
            self._refill(max(count, _PIECE))
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken

    def _refill(self, count: int) -> None:
        self._spare = self._zeros(count)
        self._pieces.append(self._spare)
        if self._device.type != "cpu":  # whatever stream uses them, they are 0
            torch.cuda.current_stream(self._device).synchronize()
        self._is_short = False

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)
