"""The end of a forward in splits: their results, weighed by their shares of the softmax.

PARTIAL [splits, tokens, H, Dv] and PARTIAL_LSE [splits, H, tokens], in log2, -inf where a split has
no visible key, are fp32 workspaces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import LN2, LOG2E


@triton.jit
def combine(
    PARTIAL, PARTIAL_LSE, SINK, out, lse, token, head, real, num_tokens, num_heads, num_splits,
    AT_ONCE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Rows of all splits, in their order: `token`, `head` and `real`, whether there is such a row,
    are [rows]; so are the addresses `out` of a result's first element, and `lse`, or None.

    Loads pass by the first level of cache, which does not see what other programs write."""
    d = tl.arange(0, BLOCK_DV)
    ROWS: tl.constexpr = token.shape[0]
    wide = tl.cast(token, tl.int64)
    part_of = (wide * num_heads + head) * DV
    lse_of = tl.cast(head, tl.int64) * num_tokens + wide
    stride = tl.cast(num_tokens, tl.int64) * num_heads
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINK is not None:
        greatest = tl.load(SINK + head).to(tl.float32) * LOG2E
        total = tl.where(greatest == float("-inf"), 0.0, 1.0)
    # Loads of several splits, and of their lse, are under way at once: one after the other, each
    # waits for memory.
    for first in tl.range(0, num_splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        there = (split < num_splits)[:, None] & real[None, :]
        split = split.to(tl.int64)[:, None] * stride
        part_lse = tl.load(
            PARTIAL_LSE + split + lse_of[None, :],
            mask=there,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        part = tl.load(
            PARTIAL + (split * DV + part_of[None, :])[:, :, None] + d[None, None, :],
            mask=there[:, :, None] & (d < DV)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [splits, rows, Dv]
        higher = tl.maximum(greatest, tl.max(part_lse, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - shift)
        weights = tl.exp2(part_lse - shift[None, :])
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(part * weights[:, :, None], 0)
        greatest = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    mask = real[:, None] & (d < DV)[None, :]
    tl.store(out[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        log_sum = greatest + tl.log2(tl.where(empty, 1.0, total))
        tl.store(lse, tl.where(empty, float("inf"), log_sum * LN2), mask=real)


@triton.jit
def combine_by_the_last(
    OUT, LSE, PARTIAL, PARTIAL_LSE, ENDED, SINK,
    batch, first_head, first_token, first_partial_token, first_row, num_rows,
    strides, num_tokens, num_heads, num_splits,
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
                within < num_rows, num_tokens, num_heads, num_splits, AT_ONCE, DV, BLOCK_DV,
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
    num_tokens,
    seqlen_q,
    num_heads,
    batch_size,
    num_splits,
    AT_ONCE: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program: a token and a head."""
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
        num_tokens, num_heads, num_splits, AT_ONCE, DV, BLOCK_DV,
    )  # fmt: skip
