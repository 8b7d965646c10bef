"""The end of a forward in splits: their results, weighed by their shares of the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import LN2, LOG2E


@triton.jit
def combine_kernel(
    PARTIAL,
    PARTIAL_LSE,
    OUT,
    LSE,
    CU_Q,
    SINK,
    stride_partial_split,
    stride_lse_split,
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
    """Program: a token and a head. PARTIAL [splits, tokens, H, Dv], PARTIAL_LSE [splits, H, tokens]
    in log2, -inf where a split has no visible key."""
    program = tl.program_id(0)
    head = program % num_heads
    token = tl.cast(program // num_heads, tl.int64)
    batch = token // seqlen_q
    if CU_Q is not None:
        batch = token * 0
        if token >= tl.load(CU_Q + batch_size):
            return
    d = tl.arange(0, BLOCK_DV)
    of_lse = PARTIAL_LSE + head * num_tokens + token
    rows = PARTIAL + (token * num_heads + head) * DV
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    greatest = float("-inf")
    total = 0.0
    if SINK is not None:
        greatest = tl.load(SINK + head).to(tl.float32) * LOG2E
        total = tl.where(greatest == float("-inf"), 0.0, 1.0)
    # Loads of several splits, and of their lse, are under way at once: one after the other, each
    # waits for memory.
    for first in tl.range(0, num_splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        real = split < num_splits
        lse = tl.load(of_lse + split * stride_lse_split, mask=real, other=float("-inf"))
        part = tl.load(
            rows + split[:, None] * stride_partial_split + d[None, :],
            mask=real[:, None] & (d < DV)[None, :],
            other=0.0,
        )
        higher = tl.maximum(greatest, tl.max(lse, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - shift)
        weights = tl.exp2(lse - shift)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        greatest = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    within = token - batch * seqlen_q
    if CU_Q is not None:
        within = token
    out = OUT + batch * stride_out_batch + within * stride_out + head * stride_out_head
    tl.store(out + d, acc.to(OUT.dtype.element_ty), mask=d < DV)
    if LSE is not None:
        log_sum = greatest + tl.log2(tl.where(empty, 1.0, total))
        log_sum = tl.where(empty, float("inf"), log_sum * LN2)
        tl.store(LSE + batch * stride_lse_batch + head * stride_lse_head + within, log_sum)
