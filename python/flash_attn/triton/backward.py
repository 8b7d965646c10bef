"""What the kernels of the backward share: terms of the rows, P and dS of a tile.

dK and dV come by blocks of keys, dQ by blocks of queries, the gradient of attn_bias by tiles of its
own; nothing is added up by atomics, so results are bitwise equal from run to run.

After Dao, "FlashAttention-2" (2023), section 3.1.2: with P from the forward's lse and
delta_i = sum_d dout_id out_id,

    dP = M * (dout V^T)    dS = P * (dP - delta)
    dQ = scale dS K        dK = scale dS^T Q        dV = (P M)^T dout

The terms of a row are its lse, in log2, and its delta: TERMS [B, H, 2, rows], varlen [H, 2, rows].
Dense rows go on beyond the last query, with lse = inf and delta = 0, so that P is 0 there.
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
def terms_kernel(
    OUT,
    DOUT,
    LSE,
    TERMS,
    CU_Q,
    stride_out_batch,
    stride_out,
    stride_out_head,
    stride_dout_batch,
    stride_dout,
    stride_dout_head,
    stride_lse_batch,
    stride_lse_head,
    stride_terms_batch,
    stride_terms_head,
    stride_term,
    seqlen_q,
    num_heads,
    num_blocks,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """lse_i, in log2, and delta_i = sum_d dout_id out_id. Program: (batch, head, block of rows)."""
    program = tl.program_id(0)
    block = program % num_blocks
    head = program // num_blocks % num_heads
    batch = program // num_blocks // num_heads
    begin, length = sequence_of_queries(batch, CU_Q, seqlen_q)
    if CU_Q is not None and block * BLOCK_M >= length:
        return
    OUT = row_of(OUT, batch, begin, head, stride_out_batch, stride_out, stride_out_head)
    DOUT = row_of(DOUT, batch, begin, head, stride_dout_batch, stride_dout, stride_dout_head)
    out = load_rows(OUT, block * BLOCK_M, length, stride_out, BLOCK_M, DV, BLOCK_DV, True)
    dout = load_rows(DOUT, block * BLOCK_M, length, stride_dout, BLOCK_M, DV, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    LSE = row_of(LSE, batch, begin, head, stride_lse_batch, 1, stride_lse_head)
    lse = tl.load(LSE + i, mask=i < length, other=float("inf")) * LOG2E
    # -inf where there is no term but a sink of -inf: P = 0 there, too.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    TERMS = row_of(TERMS, batch, begin, head, stride_terms_batch, 1, stride_terms_head)
    written = i < length if CU_Q is not None else i < stride_term
    tl.store(TERMS + i, lse, mask=written)
    tl.store(TERMS + stride_term + i, delta, mask=written)


@triton.jit
def load_term(
    terms, term: tl.constexpr, start, len_q,
    ROWS: tl.constexpr, PADDED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Term 0, lse in log2, or 1, delta, of queries start to start + ROWS. `terms` is (address,
    stride of terms), DESCRIBED (descriptor of boxes [1, 1, 1, ROWS], entry, head); PADDED: they go
    on beyond the last query."""
    if DESCRIBED:
        x = terms[0].load([terms[1], terms[2], term, start]).reshape(ROWS)
    else:
        i = start + tl.arange(0, ROWS)
        if PADDED:
            x = tl.load(terms[0] + term * terms[1] + i)
        else:
            beyond = 0.0 if term == 1 else float("inf")
            x = tl.load(terms[0] + term * terms[1] + i, mask=i < len_q, other=beyond)
    return x


@triton.jit
def probabilities(qk, i, j, lse, scores, masked, OPTIONS: tl.constexpr):
    """(P, softcap's slope) of a tile in either orientation, from qk = Q K^T; lse is in log2. Only
    what is `masked` is asked whether it is visible."""
    _, _, _, _, _, _, scale, softcap, _, _ = scores
    slope_of_cap = 1.0
    if OPTIONS.softcap:
        capped = softcap_tanh(qk, scale, softcap)
        slope_of_cap = 1.0 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s = qk * (scale * LOG2E)
    s = add_bias(s, i, j, scores, OPTIONS)
    if masked:
        s = tl.where(is_visible(i, j, scores, OPTIONS), s, float("-inf"))
    return tl.exp2(s - lse), slope_of_cap


@triton.jit
def gradient_of_scores(p, dp, delta, masked, OPTIONS: tl.constexpr):
    """dS, from P and dP = M * (dout V^T)."""
    ds = p * (dp - delta)
    # What is hidden may be infinite in dP, and 0 times that is no 0.
    if OPTIONS.bias or masked:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds
