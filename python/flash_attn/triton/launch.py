"""From a validated call to the launches of its kernels.

What is found out about a call, its tiles, grids and strides, makes a plan. It depends on the call's
metadata alone and is kept by it, so that the next call of its kind only launches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before release 3.3
    TensorDescriptor = None

from .._call import Cache, Call, Gradients, Request
from .._composition import write_s_dmask, write_sink_gradient
from . import counters, tiles
from .arguments import (
    dims,
    features,
    lse_strides,
    padded,
    scores,
    strides,
    words,
)
from .backward import terms_kernel
from .bias_gradient import bias_gradient_kernel
from .cache import append_kernel
from .combine import combine_kernel
from .forward import forward_kernel
from .key_gradient import key_gradient_kernel
from .query_gradient import query_gradient_kernel
from .tiles import Tile

# Up to so many queries a tile holds all heads that share a head of k and v.
_MAX_GROUPED_QUERIES = 16
_MAX_SPLITS = 128
_ENOUGH_OF_THE_FASTEST = 0.9
# More rows of a block are more than one processor loads as soon as another launch would.
_COMBINED_BY_THE_LAST = 4
_COMBINED_AT_ONCE = 16
_COMBINED_BY_A_WARP = 4096  # fp32: 128 registers a thread
_COMBINE_WARPS = 1
_TERMS_ROWS = 64
# Terms of the rows are padded to what every tile of queries divides.
_LARGEST_TILE = 128
_SMALLEST_SCALE = 2.0**-126
_DESCRIBED_DIMS = (64, 128, 256)
# Describing q, k and v takes the host some 70 us, which fewer operations do not pay back.
_DESCRIBED_FROM = 2**36
# From this release on a compiled kernel that is called by itself takes constants too.
_CALLS_COMPILED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# Bounded, so that a program that meets a new shape at every call does not grow.
_MAX_PLANS = 1024

Plan = Callable[[Request], None]
_plans: dict[Hashable, Plan] = {}


def run(request: Request) -> None:
    """Computes a request: by the plan of its key, where there is one."""
    with _on_device(request.call.q):
        plan = _plans.get(request.key)
        if plan is None:
            plan = _backward_plan(request) if request.gradients else _forward_plan(request)
            plan(request)
            if request.key is not None:
                if len(_plans) >= _MAX_PLANS:
                    _plans.clear()
                _plans[request.key] = plan
        else:
            plan(request)


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    device = tensor.device
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device.type)
    if module.current_device() == device.index:
        return contextlib.nullcontext()
    return module.device(device)


class _Launch:
    """One kernel with all arguments but the first, those that differ from call to call."""

    def __init__(
        self, kernel: Any, programs: int, values: dict[str, Any], tile: Tile, splits: int = 1
    ) -> None:
        names = kernel.arg_names
        self.num_first = sum(name not in values for name in names)
        assert all(name not in values for name in names[: self.num_first])
        self.rest = tuple(values[name] for name in names[self.num_first :])
        self.kernel, self.grid = kernel, (programs, splits, 1)
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if tile.registers:
            self.options["maxnreg"] = tile.registers
        if values.get("OVERLAPS"):
            self.options["launch_pdl"] = True
        self.compiled: Any = None

    def __call__(self, *first: Any) -> None:
        assert len(first) == self.num_first
        if self.grid[0] == 0:
            return
        if self.compiled is not None:
            self.compiled[self.grid](*first, *self.rest)
            return
        compiled = self.kernel[self.grid](*first, *self.rest, **self.options)
        if _CALLS_COMPILED and hasattr(compiled, "__getitem__"):
            self.compiled = compiled


def _rows(warps: int) -> Tile:
    """The "tile" of a kernel that works by rows, not by products."""
    return Tile(1, 1, warps, 1)


def _blocks(length: int, size: int) -> int:
    return (length + size - 1) // size


# ---- Forward. ----


def _forward_plan(request: Request) -> Plan:
    """Launches: the cache's new rows, the forward, and what combines its splits."""
    call, cache, _, _ = request
    append = None
    if cache is not None and cache.k_new is not None:
        append = _append_plan(call, cache)
        if _turns(cache):
            call = call._replace(q=_rotated(call.q))
    has_rows = call.batch and call.longest_q and call.q.numel()
    attend = _attend_plan(call, cache) if has_rows else None

    def plan(request: Request) -> None:
        call, cache, _, _ = request
        if append is not None:
            call = append(call, cache)
        if attend is not None:
            attend(call, cache)
        else:  # no sequence, or no queries
            call.out.zero_()
            if call.lse is not None:
                call.lse.fill_(math.inf)
        if call.s_dmask is not None:
            write_s_dmask(call)

    return plan


def _attend_plan(call: Call, cache: Cache | None) -> Callable[[Call, Cache | None], None]:
    heads, heads_kv = call.q.size(-2), call.k.size(-2)
    group = heads // heads_kv
    decodes = call.longest_q <= _MAX_GROUPED_QUERIES
    packed = group if decodes else 1
    rows = call.longest_q * packed
    values = scores(call) | strides("q", call.q) | strides("k", call.k)
    values |= strides("v", call.v) | strides("out", call.out) | lse_strides(call.lse)
    values |= {
        # Where it is 0, -inf times it were no number.
        "scale": max(float(call.scale), _SMALLEST_SCALE),
        "stride_table": 0 if call.block_table is None else call.block_table.stride(0),
        "seqlen_q": call.longest_q,
        "seqlen_k": call.longest_k if cache is None else cache.seqlen_new,
        "batch_size": call.batch,
        "num_tokens": call.q.size(0) if call.varlen else 0,
        "num_heads": heads,
        "heads_per_kv": group,
        "GROUP": packed,
        "PAGE_SIZE": 0 if call.block_table is None else call.k.size(1),
    }

    def prepare(tile: Tile) -> Callable[[Call, Cache | None], None]:
        block_m = min(64, max(tile.m, padded(rows))) if decodes else tile.m
        blocks = _blocks(rows, block_m)
        programs = call.batch * heads // packed * blocks
        splits = _num_splits(call, cache, programs, tile.n) if decodes or cache else 1
        at_once = (
            splits > 1
            and min(rows, block_m) <= _COMBINED_BY_THE_LAST
            and tiles.combines_in_one_launch(call.q.device)
        )
        launch = _Launch(
            forward_kernel,
            programs,
            values
            | {"num_splits": splits, "num_blocks": blocks, "SPLIT": splits > 1}
            | {"OVERLAPS": (decodes or splits > 1) and tiles.overlaps_launches(call.q.device)}
            | {"BLOCK_M": block_m, "BLOCK_N": tile.n, "DESCRIBED": tile.described}
            | _combined(call, rows, tile),
            tile,
            splits,
        )
        combine = _combine_launch(call, splits) if splits > 1 and not at_once else None

        def attend(call: Call, cache: Cache | None) -> None:
            partial, partial_lse = (None, None) if splits == 1 else _workspaces(call, splits)
            ended = counters.zeros(call.q.device, programs) if at_once else None
            bias = call.attn_bias
            q, k, v = call.q, call.k, call.v
            if tile.described:
                q, k, v = _box(q, block_m), _box(k, tile.n), _box(v, tile.n)
            launch(
                *(q, k, v, call.out, call.lse, partial, partial_lse, ended),
                *(call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k),
                *(
                    (None,) * 3
                    if cache is None
                    else (cache.seqlens, cache.leftpad, cache.batch_idx)
                ),
                *(call.block_table, call.alibi_slopes, _bytes(bias), call.learnable_sink),
                *words(call),
            )
            if combine is not None:
                combine(
                    *(partial, partial_lse, call.out, call.lse),
                    *(call.cu_seqlens_q, call.learnable_sink),
                )

        return attend

    kind = tiles.DECODE if decodes else tiles.FORWARD
    if not decodes and cache is None and _may_describe(call, call.q, call.k, call.v):
        kind = tiles.DESCRIBED
    return tiles.first_that_fits(
        kind, call, features(call), prepare, lambda attend: attend(call, cache)
    )


def _may_describe(call: Call, *tensors: torch.Tensor) -> bool:
    """Whether tensor descriptors can describe some of a call's (CUDA's programming guide, "Tensor
    Map"), and are worth it: their bounds are those of a tensor, not of a sequence within it."""
    if TensorDescriptor is None or call.varlen or call.block_table is not None:
        return False
    operations = 4 * call.q.numel() * call.longest_k
    return operations >= _DESCRIBED_FROM and all(
        x.dtype.itemsize == 2
        and x.size(-1) in _DESCRIBED_DIMS
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def _box(x: torch.Tensor, rows: int) -> Any:
    """A tensor descriptor that loads `rows` rows of one head."""
    return TensorDescriptor(x, x.shape, x.stride(), [1, rows, 1, x.size(-1)])


def _bytes(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A boolean bias as bytes."""
    return bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias


def _num_splits(call: Call, cache: Cache | None, programs: int, block_n: int) -> int:
    """As the call asks; else the fewest that end nearly as early as any number of splits could,
    counted in the blocks of keys that a processor goes through one after the other."""
    if cache is not None and cache.num_splits > 0:
        return cache.num_splits
    processors = tiles.num_processors(call.q.device)
    blocks = _blocks(call.longest_k, block_n)
    most = max(1, min(_blocks(blocks, 2), _MAX_SPLITS))

    def steps(splits: int) -> int:
        return _blocks(programs * splits, processors) * _blocks(blocks, splits)

    enough = min(map(steps, range(1, most + 1))) / _ENOUGH_OF_THE_FASTEST
    return next(splits for splits in range(1, most + 1) if steps(splits) <= enough)


def _workspaces(call: Call, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out [tokens, H, splits, Dv] and lse [tokens, H, splits]."""
    *tokens, heads = call.q.shape[:-1]
    new = {"dtype": torch.float32, "device": call.q.device}
    out = torch.empty((*tokens, heads, splits, call.v.size(-1)), **new)
    return out, torch.empty((*tokens, heads, splits), **new)


def _combined(call: Call, rows: int, tile: Tile) -> dict[str, int]:
    """How many splits, and rows of them, a program combines at once: what its registers hold."""
    at_once = _COMBINED_AT_ONCE
    elements = at_once * padded(call.v.size(-1))
    room = max(1, _COMBINED_BY_A_WARP * tile.warps // elements)
    return {"AT_ONCE": at_once, "COMBINED": min(triton.next_power_of_2(rows), room)}


def _combine_launch(call: Call, splits: int) -> _Launch:
    heads, dv = call.q.size(-2), call.v.size(-1)
    values = {
        **strides("out", call.out),
        **lse_strides(call.lse),
        "seqlen_q": call.longest_q,
        "num_heads": heads,
        "batch_size": call.batch,
        "num_splits": splits,
        "AT_ONCE": _COMBINED_AT_ONCE,
        "DV": dv,
        "BLOCK_DV": padded(dv),
        "OVERLAPS": tiles.overlaps_launches(call.q.device),
    }
    programs = call.q.numel() // call.q.size(-1)
    return _Launch(combine_kernel, programs, values, _rows(_COMBINE_WARPS))


# ---- The KV cache. ----


def _turns(cache: Cache) -> bool:
    return cache.rotary_cos is not None and cache.rotary_cos.numel() > 0


def _rotated(q: torch.Tensor) -> torch.Tensor:
    """Where rotated queries go."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _append_plan(call: Call, cache: Cache) -> Callable[[Call, Cache], Call]:
    """Writes the new keys and values; gives the call with its queries rotated."""
    turns = _turns(cache)
    batch, num_new, heads_kv, _ = cache.k_new.shape
    _, seqlen_q, heads, _ = call.q.shape
    rows = 2 * heads_kv * num_new + turns * heads * seqlen_q
    values = strides("k_new", cache.k_new) | strides("v_new", cache.v_new)
    values |= strides("q", call.q) | strides("k", call.k) | strides("v", call.v)
    values |= strides("rotated", _rotated(call.q)) | {
        "stride_table": 0 if call.block_table is None else call.block_table.stride(0),
        "stride_cos": cache.rotary_cos.stride(0) if turns else 0,
        "stride_sin": cache.rotary_sin.stride(0) if turns else 0,
        "num_heads": heads,
        "num_heads_kv": heads_kv,
        "num_new": num_new,
        "seqlen_q": seqlen_q,
        "capacity": call.longest_k,
        "num_rows": call.k.size(0),
        "num_angles": cache.rotary_cos.size(0) if turns else 0,
        "MOVES": min(call.band) >= 0 or max(call.band) >= 0,
        "INTERLEAVED": bool(cache.rotary_interleaved),
        "HALF": cache.rotary_cos.size(1) if turns else 1,
        "PAGE_SIZE": 0 if call.block_table is None else call.k.size(1),
        "DIMS": dims(call),
        "OVERLAPS": tiles.overlaps_launches(call.q.device),
    }
    launch = _Launch(append_kernel, batch * rows, values, _rows(1))

    def append(call: Call, cache: Cache) -> Call:
        rotated = _rotated(call.q) if turns else None
        launch(
            *(cache.k_new, cache.v_new, call.q, call.k, call.v, rotated),
            *(cache.seqlens, cache.batch_idx, call.block_table),
            *((cache.rotary_cos, cache.rotary_sin) if turns else (None, None)),
        )
        return call._replace(q=rotated) if turns else call

    return append


# ---- Backward. ----


def _backward_plan(request: Request) -> Plan:
    """Launches: terms of the rows, dK and dV, dQ, and the gradient of attn_bias."""
    call, _, gradients, _ = request
    values = scores(call) | strides("q", call.q) | strides("k", call.k)
    values |= strides("v", call.v) | strides("dout", gradients.dout) | _terms_strides(call)
    values |= {
        "seqlen_q": call.longest_q,
        "seqlen_k": call.longest_k,
        "num_heads": call.q.size(-2),
        "heads_per_kv": call.q.size(-2) // call.k.size(-2),
    }
    make_terms = _terms_launch(call, gradients)
    terms = _terms(call)
    make_terms(call.out, gradients.dout, call.lse, terms, call.cu_seqlens_q)
    launches = [
        _key_gradient_plan(call, gradients, values, terms),
        _query_gradient_plan(call, gradients, values, terms),
    ]
    if gradients.d_attn_bias is not None:
        launches.append(_bias_gradient_plan(call, gradients, values, terms))

    def plan(request: Request) -> None:
        call, _, gradients, _ = request
        if call.varlen:  # rows that belong to no sequence, and keys that are not in use
            for gradient in (gradients.dq, gradients.dk, gradients.dv):
                gradient.zero_()
        terms = _terms(call)
        make_terms(call.out, gradients.dout, call.lse, terms, call.cu_seqlens_q)
        for launch in launches:
            launch(call, gradients, terms)
        if gradients.d_learnable_sink is not None:
            delta = terms[..., 1, : call.lse.size(-1)]
            write_sink_gradient(call, gradients, delta.transpose(-1, -2))

    return plan


def _terms(call: Call) -> torch.Tensor:
    """Where the terms of the rows go: [B, H, 2, rows], varlen [H, 2, rows]."""
    *heads, length = call.lse.shape
    return call.lse.new_empty((*heads, 2, _num_terms(call, length)))


def _num_terms(call: Call, length: int) -> int:
    return length if call.varlen else _blocks(length, _LARGEST_TILE) * _LARGEST_TILE


def _terms_strides(call: Call) -> dict[str, int]:
    *batch, heads, length = call.lse.shape
    rows = _num_terms(call, length)
    return {
        "stride_terms_batch": heads * 2 * rows if batch else 0,
        "stride_terms_head": 2 * rows,
        "stride_term": rows,
    }


def _terms_launch(call: Call, gradients: Gradients) -> _Launch:
    blocks, dv = _blocks(_num_terms(call, call.longest_q), _TERMS_ROWS), call.v.size(-1)
    values = {
        **strides("out", call.out),
        **strides("dout", gradients.dout),
        **lse_strides(call.lse),
        **_terms_strides(call),
        "seqlen_q": call.longest_q,
        "num_heads": call.q.size(-2),
        "num_blocks": blocks,
        "DV": dv,
        "BLOCK_DV": padded(dv),
        "BLOCK_M": _TERMS_ROWS,
    }
    return _Launch(terms_kernel, call.batch * call.q.size(-2) * blocks, values, _rows(4))


GradientLaunch = Callable[[Call, Gradients, torch.Tensor], None]


def _gradient_plan(
    kind: str,
    call: Call,
    gradients: Gradients,
    terms: torch.Tensor,
    kernel: Any,
    outputs: Callable[[Gradients], tuple[torch.Tensor, ...]],
    of_tile: Callable[[Tile], tuple[int, dict[str, Any]]],
) -> GradientLaunch:
    """A launch of `kernel`; of_tile gives the number of programs and the arguments."""

    def prepare(tile: Tile) -> GradientLaunch:
        programs, values = of_tile(tile)
        values = values | {"BLOCK_M": tile.m, "BLOCK_N": tile.n}
        launch = _Launch(kernel, programs, values, tile)

        def run(call: Call, gradients: Gradients, terms: torch.Tensor) -> None:
            q, dout = call.q, gradients.dout
            if tile.described:
                q, dout = _box(q, tile.m), _box(dout, tile.m)
                terms = TensorDescriptor(terms, terms.shape, terms.stride(), [1, 1, 1, tile.m])
            launch(
                *(q, call.k, call.v, dout, terms, *outputs(gradients)),
                *(call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k),
                *(call.alibi_slopes, _bytes(call.attn_bias), *words(call)),
            )

        return run

    return tiles.first_that_fits(
        kind, call, features(call), prepare, lambda run: run(call, gradients, terms)
    )


def _key_gradient_plan(
    call: Call, gradients: Gradients, values: dict[str, Any], terms: torch.Tensor
) -> GradientLaunch:
    values = values | strides("dk", gradients.dk) | strides("dv", gradients.dv)

    def of_tile(tile: Tile) -> tuple[int, dict[str, Any]]:
        blocks = _blocks(call.longest_k, tile.n)
        own = {"num_blocks": blocks, "DESCRIBED": tile.described}
        return call.batch * call.k.size(-2) * blocks, values | own

    described = _may_describe(call, call.q, gradients.dout)
    return _gradient_plan(
        tiles.DESCRIBED_KEY_GRADIENT if described else tiles.KEY_GRADIENT,
        call,
        gradients,
        terms,
        key_gradient_kernel,
        lambda gradients: (gradients.dk, gradients.dv),
        of_tile,
    )


def _query_gradient_plan(
    call: Call, gradients: Gradients, values: dict[str, Any], terms: torch.Tensor
) -> GradientLaunch:
    values = values | strides("dq", gradients.dq)

    def of_tile(tile: Tile) -> tuple[int, dict[str, Any]]:
        blocks = _blocks(call.longest_q, tile.m)
        own = {"num_blocks": blocks}
        return call.batch * call.q.size(-2) * blocks, values | own

    return _gradient_plan(
        tiles.QUERY_GRADIENT,
        call,
        gradients,
        terms,
        query_gradient_kernel,
        lambda gradients: (gradients.dq,),
        of_tile,
    )


def _bias_gradient_plan(
    call: Call, gradients: Gradients, values: dict[str, Any], terms: torch.Tensor
) -> GradientLaunch:
    bias = gradients.d_attn_bias[(None,) * (4 - gradients.d_attn_bias.dim())]
    over = [size == 1 for size in bias.shape]
    names = ("batch", "head", "i", "j")
    values = values | {f"stride_out_{name}": s for name, s in zip(names, bias.stride())}
    values |= {f"OVER_{n}": o for n, o in zip(("BATCH", "HEADS", "I", "J"), over)}

    def of_tile(tile: Tile) -> tuple[int, dict[str, Any]]:
        blocks_i = _blocks(call.longest_q, tile.m)
        blocks_j = _blocks(call.longest_k, tile.n)
        programs = 1
        for summed, size in zip(over, (call.batch, call.q.size(-2), blocks_i, blocks_j)):
            programs *= 1 if summed else size
        own = {"blocks_i": blocks_i, "blocks_j": blocks_j, "batch_size": call.batch}
        return programs, values | own

    return _gradient_plan(
        tiles.BIAS_GRADIENT,
        call,
        gradients,
        terms,
        bias_gradient_kernel,
        lambda gradients: (gradients.d_attn_bias,),
        of_tile,
    )
