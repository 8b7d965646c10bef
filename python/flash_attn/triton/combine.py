"""The end of a forward in splits: their results, weighed by their shares of the softmax.

PARTIAL [tokens, H, splits, Dv] and PARTIAL_LSE [tokens, H, splits], in log2, -inf where a split has
no visible key, are fp32 workspaces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import LN2, LOG2E, lse_of_none, wait_for_launch_before


@triton.jit
def combine(
    PARTIAL, PARTIAL_LSE, SINK, out, lse, token, head, real, num_heads, num_splits,
    AT_ONCE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Rows of all splits, in their order: `token`, `head` and `real`, whether there is such a row,
    are [rows]; so are the addresses `out` of a result's first element, and `lse`, or None.

    Loads pass by the first level of cache, which does not see what other programs write."""
    ROWS: tl.constexpr = token.shape[0]
    d = tl.arange(0, BLOCK_DV)
    row = (tl.cast(token, tl.int64) * num_heads + head) * num_splits
    parts_of = PARTIAL + row[:, None] * DV + d[None, :]
    lses_of = PARTIAL_LSE + row
    mask = real[:, None] & (d < DV)[None, :]
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINK is not None:
        greatest = tl.load(SINK + head).to(tl.float32) * LOG2E
        total = tl.where(greatest == float("-inf"), 0.0, 1.0)
    # Loads of several splits, and of their lse, are under way at once: one after the other, each
    # waits for memory. A tensor of each, in place of one of all, leaves sums to single threads.
    for first in tl.range(0, num_splits, AT_ONCE):
        lses = ()
        parts = ()
        for n in tl.static_range(AT_ONCE):
            there = first + n < num_splits
            lse_of, part_of = lses_of + n, parts_of + n * DV
            lses += (tl.load(lse_of, real & there, float("-inf"), cache_modifier=".cg"),)
            parts += (tl.load(part_of, mask & there, 0.0, cache_modifier=".cg"),)
        lses_of += AT_ONCE
        parts_of += AT_ONCE * DV
        higher = greatest
        for n in tl.static_range(AT_ONCE):
            higher = tl.maximum(higher, lses[n])
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - shift)
        total = total * shrink
        acc = acc * shrink[:, None]
        for n in tl.static_range(AT_ONCE):
            weight = tl.exp2(lses[n] - shift)
            total += weight
            acc += parts[n] * weight[:, None]
        greatest = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        log_sum = greatest + tl.log2(tl.where(empty, 1.0, total))
        tl.store(lse, tl.where(empty, lse_of_none(SINK is not None), log_sum * LN2), mask=real)


@triton.jit
def combine_by_the_last(
    OUT, LSE, PARTIAL, PARTIAL_LSE, ENDED, SINK,
    batch, first_head, first_token, first_partial_token, first_row, num_rows,
    strides, num_heads, num_splits,
    GROUP: tl.constexpr, COMBINED: tl.constexpr, AT_ONCE: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Called by the programs of all splits of num_rows rows once they have stored theirs: the last
    combines COMBINED rows at a time. ENDED is the address of their count, 0 before and after. Row r
    is a query r // GROUP and a head r % GROUP beyond the first ones."""
    # What all threads have stored is visible to other programs before it is counted.
    tl.debug_barrier()
    ended = tl.atomic_add(ENDED, 1, sem="acq_rel", scope="gpu")
    if ended == num_splits - 1:
        tl.store(ENDED, 0)
        OUT += tl.cast(batch, tl.int64) * strides[0]
        for first in tl.range(0, num_rows, COMBINED):
            within = first + tl.arange(0, COMBINED)
            i = ((first_row + within) // GROUP).to(tl.int64)
            head = first_head + (first_row + within) % GROUP
            out = OUT + (first_token + i) * strides[1] + head * strides[2]
            lse = None
            if LSE is not None:
                lse = LSE + tl.cast(batch, tl.int64) * strides[3]
                lse += head.to(tl.int64) * strides[4] + first_token + i
            combine(
                PARTIAL, PARTIAL_LSE, SINK, out, lse, first_partial_token + i, head,
                within < num_rows, num_heads, num_splits, AT_ONCE, DV, BLOCK_DV,
            )  # fmt: skip


@triton.jit
def combine_kernel(
    PARTIAL,
    PARTIAL_LSE,
    OUT,
    LSE,
    CU_Q,
    SINK,
    stride_out_batch,
    stride_out,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    seqlen_q,
    num_heads,
    batch_size,
    num_splits,
    AT_ONCE: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program: a token and a head."""
    wait_for_launch_before(OVERLAPS)
    program = tl.program_id(0)
    head = program % num_heads + tl.arange(0, 1)
    token = tl.cast(program // num_heads, tl.int64) + tl.arange(0, 1)
    batch = token // seqlen_q
    within = token - batch * seqlen_q
    if CU_Q is not None:
        batch = token * 0
        within = token
        if program // num_heads >= tl.load(CU_Q + batch_size):
            return
    out = OUT + batch * stride_out_batch + within * stride_out + head * stride_out_head
    lse = None
    if LSE is not None:
        lse = LSE + batch * stride_lse_batch + head * stride_lse_head + within
    combine(
        PARTIAL, PARTIAL_LSE, SINK, out, lse, token, head, token >= 0,
        num_heads, num_splits, AT_ONCE, DV, BLOCK_DV,
    )  # fmt: skip
