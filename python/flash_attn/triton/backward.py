"""What the kernels of the backward share: delta, and dS of a tile.

dK and dV come by blocks of keys, dQ by blocks of queries, the gradient of attn_bias by tiles of its
own; nothing is added up by atomics, so results are bitwise equal from run to run.

After Dao, "FlashAttention-2" (2023), section 3.1.2: with P from the forward's lse and
delta_i = sum_d dout_id out_id,

    dP = M * (dout V^T)    dS = P * (dP - delta)
    dQ = scale dS K        dK = scale dS^T Q        dV = (P M)^T dout
"""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import (
    LOG2E,
    add_bias,
    is_visible,
    load_rows,
    row_of,
    sequence_of_queries,
    softcap_tanh,
)


@triton.jit
def delta_kernel(
    OUT,
    DOUT,
    DELTA,
    CU_Q,
    stride_out_batch,
    stride_out,
    stride_out_head,
    stride_dout_batch,
    stride_dout,
    stride_dout_head,
    stride_lse_batch,
    stride_lse_head,
    seqlen_q,
    num_heads,
    num_blocks,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta_i = sum_d dout_id out_id, laid out as lse. Program: (batch, head, block of queries)."""
    program = tl.program_id(0)
    block = program % num_blocks
    head = program // num_blocks % num_heads
    batch = program // num_blocks // num_heads
    begin, length = sequence_of_queries(batch, CU_Q, seqlen_q)
    if block * BLOCK_M >= length:
        return
    OUT = row_of(OUT, batch, begin, head, stride_out_batch, stride_out, stride_out_head)
    DOUT = row_of(DOUT, batch, begin, head, stride_dout_batch, stride_dout, stride_dout_head)
    out = load_rows(OUT, block * BLOCK_M, length, stride_out, BLOCK_M, DV, BLOCK_DV, True)
    dout = load_rows(DOUT, block * BLOCK_M, length, stride_dout, BLOCK_M, DV, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    DELTA = row_of(DELTA, batch, begin, head, stride_lse_batch, 1, stride_lse_head)
    tl.store(DELTA + i, delta, mask=i < length)


@triton.jit
def row_terms(LSE, DELTA, i, len_q):
    """lse, in log2, and delta of queries i; of those past the last, +inf and 0, so that P is 0."""
    lse = tl.load(LSE + i, mask=i < len_q, other=float("inf")) * LOG2E
    return lse, tl.load(DELTA + i, mask=i < len_q, other=0.0)


@triton.jit
def gradient_tile(
    qk, dp, i, j, lse, delta, kept, scores, keep_scale,
    MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """(P M, dS, dS times softcap's slope) of a tile in either orientation, from qk = Q K^T
    and dp = dout V^T. lse, in log2, is +inf where there is no query."""
    _, _, _, _, _, _, scale, softcap, _, _ = scores
    slope_of_cap = 1.0
    if OPTIONS.softcap:
        capped = softcap_tanh(qk, scale, softcap)
        slope_of_cap = 1.0 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s = qk * (scale * LOG2E)
    s = add_bias(s, i, j, scores, OPTIONS)
    if MASKED:
        s = tl.where(is_visible(i, j, scores, OPTIONS), s, float("-inf"))
    p = tl.exp2(s - lse)
    weights = p
    if OPTIONS.dropout:
        factor = tl.where(kept, keep_scale, 0.0)
        weights = p * factor
        dp = dp * factor
    ds = p * (dp - delta)
    if MASKED or OPTIONS.bias:
        # What is hidden may be infinite, and 0 times that is no 0.
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return weights, ds, ds * slope_of_cap
