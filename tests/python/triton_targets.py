"""Compiles what calls would launch, for GPUs that are not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from support import tensors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn._call import Call
from flash_attn.triton import tiles

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Target(NamedTuple):
    """A GPU, whose tile table holds for it, and the shared memory that a program may have."""

    gpu: GPUTarget
    vendor: str
    shared: int


# Shared memory: CUDA's programming guide, "Compute Capabilities"; AMD's LDS per workgroup.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "nvidia", 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "hopper", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "nvidia", 227 * 1024),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), "amd", 64 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "amd", 64 * 1024),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), "amd", 160 * 1024),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), "amd", 64 * 1024),
    "gfx1201": Target(GPUTarget("hip", "gfx1201", 32), "amd", 64 * 1024),
}


def call(head_dim: int, dtype: torch.dtype, **options: Any) -> Call:
    """A causal call of one kind; `options` are fields of Call."""
    q, k, v = tensors(1, 256, 256, 4, 2, head_dim, dtype=dtype)
    fields = dict.fromkeys(Call._fields) | {
        "q": q,
        "k": k,
        "v": v,
        "out": torch.empty_like(q),
        "lse": torch.empty(1, 4, 256),
        "max_seqlen_q": 0,
        "max_seqlen_k": 0,
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "seed": 0,
        "offset": 0,
    }
    return Call(**(fields | options))


class Compiled(NamedTuple):
    """One kernel, compiled for a target instead of launched."""

    name: str
    shared: int  # bytes
    binary: bytes
    assembly: str  # PTX, or AMD's
    overlaps: bool  # begins before the launch before it has ended


@contextlib.contextmanager
def launches_compile(target: Target, largest: int) -> Iterator[list[Compiled]]:
    """Makes every launch a compilation for `target`; yields the list that they are added to.
    Tiles are those of its table, cut to `largest` queries and keys: more takes compilers long."""
    compiled: list[Compiled] = []

    def run(kernel: JITFunction, *values: Any, grid: Any, warmup: bool, **options: int) -> None:
        result = triton.compile(
            _source(kernel, dict(zip(kernel.arg_names, values))),
            target=target.gpu,
            options=options,
        )
        if result.metadata.shared > target.shared:
            raise OutOfResources(result.metadata.shared, target.shared, "shared memory")
        nvidia = target.gpu.backend == "cuda"
        binary, assembly = (
            result.asm[n] for n in (("cubin", "ptx") if nvidia else ("hsaco", "amdgcn"))
        )
        overlaps = options.get("launch_pdl", False)
        compiled.append(
            Compiled(kernel.fn.__name__, result.metadata.shared, binary, assembly, overlaps)
        )

    def from_table(*arguments: Any) -> tiles.Tile:
        tile = table(*arguments)
        return tile._replace(m=min(tile.m, largest), n=min(tile.n, largest))

    before, vendor, table = JITFunction.run, tiles.vendor, tiles.from_table
    JITFunction.run, tiles.vendor = run, lambda device: target.vendor
    tiles.from_table = from_table
    tiles._chosen.clear()
    try:
        yield compiled
    finally:
        JITFunction.run, tiles.vendor, tiles.from_table = before, vendor, table
        tiles._chosen.clear()


def _source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialised for its arguments as a launch would specialise it."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize and type(value) is int
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, TensorDescriptor):
            element, box = POINTERS[value.base.dtype][1:], list(value.block_shape)
            signature[parameter.name] = f"tensordesc<{element}{box}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)
