"""The sizes of the kernels' tiles: a small table by vendor and head_dim, or what was measured.

With FLASH_ATTENTION_AUTOTUNE=1 the first call of its kind tries the candidates, and the choice is
kept on disk, in FLASH_ATTENTION_CACHE_DIR or the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import triton

from .. import _environment
from .._call import Call
from .arguments import padded
from .vocabulary import INTERPRETED, gdc_wait

FORWARD = "forward"
DESCRIBED = "described forward"  # where tensor descriptors can describe q, k and v
DECODE = "decode"
KEY_GRADIENT = "key_gradient"
DESCRIBED_KEY_GRADIENT = "described key_gradient"  # where they can describe q and dout
QUERY_GRADIENT = "query_gradient"
BIAS_GRADIENT = "bias_gradient"

# What stands in where a device has no tensor descriptors.
_UNDESCRIBED = {DESCRIBED: FORWARD, DESCRIBED_KEY_GRADIENT: KEY_GRADIENT}
_SMALLEST = 16  # what a matrix product of Triton takes


class Tile(NamedTuple):
    """Queries and keys of a tile, and how many warps and pipeline stages work on it; the registers
    that a thread may have, 0 for what the compiler gives it; whether tensor descriptors load it."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0
    described: bool = False


# For 16-bit types, by the padded head_dim that they hold up to. Those of "hopper" were measured on
# an H100 (docs/notes/triton.md); the others are what fits the registers and shared memory of each.
_TABLES: dict[str, dict[str, dict[int, Tile]]] = {
    "hopper": {
        FORWARD: {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 32, 8, 3)},
        DESCRIBED: {
            64: Tile(64, 64, 4, 3, 128, True),
            128: Tile(64, 64, 4, 3, 0, True),
            256: Tile(128, 32, 8, 3, 0, True),
        },
        DECODE: {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 64, 4, 2)},
        KEY_GRADIENT: {
            64: Tile(64, 64, 4, 3, 168),
            128: Tile(64, 128, 8, 3),
            256: Tile(64, 64, 8, 2),
        },
        DESCRIBED_KEY_GRADIENT: {
            64: Tile(64, 64, 4, 3, 168, True),
            128: Tile(64, 64, 4, 2, 0, True),
            256: Tile(64, 64, 8, 2, 0, True),
        },
        QUERY_GRADIENT: {
            64: Tile(64, 64, 4, 3),
            128: Tile(128, 64, 8, 3),
            256: Tile(128, 32, 8, 2),
        },
    },
    "nvidia": {
        FORWARD: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        DECODE: {64: Tile(16, 128, 4, 2), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)},
        KEY_GRADIENT: {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 8, 1)},
        QUERY_GRADIENT: {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 8, 1)},
    },
    "amd": {
        FORWARD: {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        DECODE: {64: Tile(16, 128, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
        KEY_GRADIENT: {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
        QUERY_GRADIENT: {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    },
    "other": {
        FORWARD: {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
        DECODE: {64: Tile(16, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
        KEY_GRADIENT: {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
        QUERY_GRADIENT: {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    },
}
# AMD's barrier waits for shared memory alone: stores of other waves may be under way still.
_COMBINES_IN_ONE_LAUNCH = ("hopper", "nvidia", "interpreter")
# Exact products of fp32 run without matrix units, from registers.
_FP32 = {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)}
_BIAS_GRADIENT = {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)}
_LARGEST = Tile(16, 16, 4, 1)  # above the tables
_INTERPRETED = Tile(64, 64, 4, 1)  # few steps, and still several tiles in a small problem

_CANDIDATES = tuple(
    Tile(m, n, warps, stages)
    for m in (64, 128)
    for n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3)
)
_DESCRIBED_CANDIDATES = tuple(
    Tile(64, n, 4, stages, registers, True)
    for n in (64, 128)
    for stages in (2, 3)
    for registers in (128, 168, 0)
)
_DECODE_CANDIDATES = tuple(
    Tile(16, n, warps, stages) for n in (32, 64, 128) for warps in (2, 4, 8) for stages in (1, 2, 4)
)


@functools.cache
def vendor(device: torch.device) -> str:
    """Whose table holds for a device."""
    if device.type == "cpu" or INTERPRETED.value:
        return "interpreter"
    if device.type == "cuda" and torch.version.hip is not None:
        return "amd"
    if device.type == "cuda":
        return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "nvidia"
    return "other"


def combines_in_one_launch(device: torch.device) -> bool:
    """Whether a program may read what programs beside it in the launch have written and counted:
    whether the vendor's Triton orders the stores of a whole program before its atomic."""
    return vendor(device) in _COMBINES_IN_ONE_LAUNCH


def overlaps_launches(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended (wait_for_launch_before)."""
    return vendor(device) == "hopper" and gdc_wait is not None


@functools.cache
def num_processors(device: torch.device) -> int:
    """The multiprocessors of a device, or 1 where that cannot be told."""
    with contextlib.suppress(Exception):
        properties = torch.get_device_module(device.type).get_device_properties(device)
        for name in ("multi_processor_count", "gpu_subslice_count", "max_compute_units"):
            if getattr(properties, name, 0):
                return int(getattr(properties, name))
    return 1


def from_table(kind: str, vendor_name: str, itemsize: int, block_dim: int) -> Tile:
    """The tile to begin with, of rows of block_dim elements."""
    if kind == BIAS_GRADIENT:
        table = _BIAS_GRADIENT
    elif itemsize == 4:
        table = _FP32
    else:
        tables = _TABLES[vendor_name]
        table = tables.get(kind) or tables[_UNDESCRIBED[kind]]
    for dim, tile in table.items():
        if block_dim <= dim:
            return tile
    return _LARGEST


def smaller(tile: Tile) -> Iterator[Tile]:
    """A tile and what needs less and less of a device's memory."""
    while True:
        yield tile
        if tile.stages > 1:
            tile = tile._replace(stages=1)
        elif max(tile.m, tile.n) > _SMALLEST:
            m = tile.m // 2 if tile.m >= tile.n else tile.m
            n = tile.n // 2 if tile.n > tile.m else tile.n
            tile = tile._replace(m=max(m, _SMALLEST), n=max(n, _SMALLEST))
        else:
            return


class _Choice(NamedTuple):
    """What a tile is chosen for."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    dims: tuple[int, int]
    features: tuple[bool, ...]


_chosen: dict[_Choice, Tile] = {}


Prepared = TypeVar("Prepared")


def first_that_fits(
    kind: str,
    call: Call,
    features: tuple[bool, ...],
    prepare: Callable[[Tile], Prepared],
    run: Callable[[Prepared], None],
) -> Prepared:
    """prepare(tile) with the best tile for a call that run() finds the device to have room for.

    Raises:
        NotImplementedError: the device has too little memory for the smallest tile.
    """
    dims = (padded(call.q.size(-1)), padded(call.v.size(-1)))
    choice = _Choice(kind, call.q.device, call.q.dtype, dims, features)
    tile = _chosen.get(choice)
    if tile is None and _environment.autotunes():
        tile = _tuned(choice, lambda tile: run(prepare(tile)))
    if vendor(choice.device) == "interpreter":
        _chosen[choice] = _INTERPRETED._replace(described=kind in _UNDESCRIBED)
        return prepare(_chosen[choice])
    if tile is None:
        tile = from_table(kind, vendor(choice.device), choice.dtype.itemsize, max(dims))
    for smaller_tile in smaller(tile):
        prepared = prepare(smaller_tile)
        try:
            run(prepared)
        except triton.runtime.errors.OutOfResources as error:
            reason = error
            continue
        _chosen[choice] = smaller_tile
        return prepared
    raise NotImplementedError(
        f"head_dim {dims[0]} and {dims[1]} (padded) need more of the device's memory: {reason}"
    )


# ---- Measured tiles. ----


def _tuned(choice: _Choice, start: Callable[[Tile], None]) -> Tile | None:
    """The fastest candidate, from disk where it was measured before."""
    path = _environment.cache_folder() / "triton-tiles.json"
    known: dict[str, list[int]] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    name = _name(choice)
    if name in known:
        return Tile(*known[name])
    times = {}
    candidates = _DECODE_CANDIDATES if choice.kind == DECODE else _CANDIDATES
    if choice.kind in _UNDESCRIBED:
        candidates += _DESCRIBED_CANDIDATES
    for tile in candidates:
        with contextlib.suppress(Exception):  # too large, or what a compiler does not take
            times[tile] = triton.testing.do_bench(lambda tile=tile: start(tile), warmup=5, rep=20)
    if not times:
        return None
    best = min(times, key=times.get)
    with contextlib.suppress(OSError):
        _write(path, {**known, name: list(best)})
    return best


def _name(choice: _Choice) -> str:
    module = torch.get_device_module(choice.device.type)
    device = module.get_device_name(choice.device)
    features = "".join("01"[f] for f in choice.features)
    return f"{device}|{triton.__version__}|{choice.kind}|{choice.dtype}|{choice.dims}|{features}"


def _write(path: os.PathLike[str], content: dict[str, list[int]]) -> None:
    """Whole or not at all, whoever else writes."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, path)
