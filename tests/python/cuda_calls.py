"""Calls on an NVIDIA GPU, and what they are held against."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import (
    assert_close,
    options_of_every_kind,
    out_bound,
    same_bits,
)

import flash_attn
from flash_attn import (
    dlpack,
    flash_attn_func,
    flash_attn_varlen_func,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]


def implementations() -> list[str]:
    """Those of this library's that serve CUDA tensors on this machine."""
    if not torch.cuda.is_available():
        return []
    return [it.name for it in flash_attn.implementations("cuda") if it.available]


NAMES = implementations()
OPTIONS = options_of_every_kind(150, 197)


def to_cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def serve(function: Any, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Any:
    """What a function returns on the GPU; what the implementation refuses is skipped."""
    try:
        return function(*map(to_cuda, inputs), **{key: to_cuda(x) for key, x in options.items()})
    except NotImplementedError as error:
        if "cuda:" not in str(error):
            raise
        pytest.skip(f"refused: {str(error).splitlines()[-1]:.100}")


def run(function: Any, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Any:
    """(out, lse) of a function on the GPU, on the CPU."""
    out, lse, _ = serve(function, inputs, options | {"return_attn_probs": True})
    torch.cuda.synchronize()
    return out.cpu(), lse.cpu()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """A dense problem meets the oracle."""
    out, lse = run(flash_attn_func, (q, k, v), options)
    bound = out_bound(q, max(q.shape[1], k.shape[1]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)


def check_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    out, lse = run(flash_attn_varlen_func, (q, k, v), options)
    bound = out_bound(q, max(options["max_seqlen_q"], options["max_seqlen_k"]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)
    return out, lse


def check_varlen_equals_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: dict[str, Any],
    options: dict[str, Any],
) -> torch.Tensor:
    """Sequences meet the oracle, and are to the bit what each is alone; their out."""
    out, lse = check_varlen(q, k, v, **lengths, **options)
    cu_q, cu_k = lengths["cu_seqlens_q"], lengths["cu_seqlens_k"]
    for b in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        alone = (q[None, rows], k[None, keys], v[None, keys])
        dense, dense_lse = run(flash_attn_func, alone, options)
        assert same_bits(out[rows], dense[0])
        assert same_bits(lse[:, rows], dense_lse[0])
    return out


def paged(
    k: torch.Tensor, v: torch.Tensor, cu_k: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v of sequences laid end to end in pages, which NaN fills up, and their block_table,
    whose unused entries are no pages."""
    lengths = cu_k.diff().tolist()
    width = (max(lengths) + page_size - 1) // page_size
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(len(lengths) * width, generator=generator).int().view(-1, width)
    paged_k, paged_v = (
        x.new_full((table.numel(), page_size, *x.shape[1:]), math.nan) for x in (k, v)
    )
    for b, length in enumerate(lengths):
        for j in range(length):
            page = table[b, j // page_size]
            paged_k[page, j % page_size] = k[cu_k[b] + j]
            paged_v[page, j % page_size] = v[cu_k[b] + j]
        table[b, (length + page_size - 1) // page_size :] = 2**30
    return paged_k, paged_v, table
