"""dQ of the backward, by blocks of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_tile
from .vocabulary import (
    LOG2E,
    VARIABLE,
    keep_mask,
    key_ranges,
    load_rows,
    product,
    sequence_of_keys,
    sequence_of_queries,
)


@triton.jit
def add_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    i,
    first,
    end,
    K,
    V,
    BIAS,
    slope,
    len_q,
    len_k,
    batch_head,
    stride_k,
    stride_v,
    stride_bias_i,
    stride_bias_j,
    scale,
    softcap,
    left,
    right,
    key0,
    key1,
    counter3,
    threshold,
    keep_scale,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what keys first to end contribute to dQ / scale of a block of queries."""
    for start in tl.range(first, end, BLOCK_N):
        k = load_rows(K, start, len_k, stride_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(V, start, len_k, stride_v, BLOCK_N, DV, BLOCK_DV, MASKED)
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        qk = product(q, tl.trans(k), None, PRECISION)  # [M, N]
        dp = product(dout, tl.trans(v), None, PRECISION)  # [M, N]
        kept = MASKED
        if DROPOUT:
            heads = tl.zeros((BLOCK_M,), tl.int32) + batch_head
            kept = keep_mask(heads, i, start, key0, key1, counter3, threshold, BLOCK_N)
        _, _, ds = gradient_tile(
            qk, dp, i[:, None], j, lse[:, None], delta[:, None], kept, len_q, len_k,
            slope, BIAS, stride_bias_i, stride_bias_j, scale, softcap, left, right, keep_scale,
            MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, BOOLEAN, DROPOUT,
        )  # fmt: skip
        dq = product(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=VARIABLE)
def query_gradient_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DQ,
    CU_Q,
    CU_K,
    USED_K,
    SLOPES,
    BIAS,
    key0,
    key1,
    counter3,
    stride_q_batch,
    stride_q,
    stride_q_head,
    stride_k_batch,
    stride_k,
    stride_k_head,
    stride_v_batch,
    stride_v,
    stride_v_head,
    stride_dout_batch,
    stride_dout,
    stride_dout_head,
    stride_dq_batch,
    stride_dq,
    stride_dq_head,
    stride_lse_batch,
    stride_lse_head,
    stride_slopes,
    stride_bias_batch,
    stride_bias_head,
    stride_bias_i,
    stride_bias_j,
    seqlen_q,
    seqlen_k,
    num_heads,
    heads_per_kv,
    num_blocks,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ. Program: (batch, head, block of queries)."""
    ALIBI: tl.constexpr = SLOPES is not None
    program = tl.program_id(0)
    # The last queries see the most keys under a causal mask: they begin first.
    block = num_blocks - 1 - program % num_blocks
    program = program // num_blocks
    head = tl.cast(program % num_heads, tl.int64)
    batch = program // num_heads
    q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
    _, k_begin, len_k = sequence_of_keys(batch, CU_K, USED_K, None, None, None, seqlen_k, 0)
    first_i = block * BLOCK_M
    if first_i >= len_q:
        return
    batch64 = tl.cast(batch, tl.int64)
    q_begin = tl.cast(q_begin, tl.int64)
    k_begin = tl.cast(k_begin, tl.int64)
    kv_head = head // heads_per_kv
    Q += batch64 * stride_q_batch + q_begin * stride_q + head * stride_q_head
    DOUT += batch64 * stride_dout_batch + q_begin * stride_dout + head * stride_dout_head
    K += batch64 * stride_k_batch + k_begin * stride_k + kv_head * stride_k_head
    V += batch64 * stride_v_batch + k_begin * stride_v + kv_head * stride_v_head
    q = load_rows(Q, first_i, len_q, stride_q, BLOCK_M, D, BLOCK_D, True)
    dout = load_rows(DOUT, first_i, len_q, stride_dout, BLOCK_M, DV, BLOCK_DV, True)
    i = first_i + tl.arange(0, BLOCK_M)
    row = batch64 * stride_lse_batch + head * stride_lse_head + q_begin
    lse = tl.load(LSE + row + i, mask=i < len_q, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + row + i, mask=i < len_q, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + batch * stride_slopes + head)
    bias = BIAS
    if BIAS is not None:
        bias = BIAS + batch64 * stride_bias_batch + head * stride_bias_head
    begin, full_begin, full_end, end = key_ranges(
        first_i, tl.minimum(first_i + BLOCK_M, len_q) - 1, len_q, len_k, left, right, 0, 1,
        HAS_LEFT, HAS_RIGHT, False, BLOCK_N,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        if phase == 1 or phase == 2 or HAS_LEFT:
            dq = add_keys(
                dq, q, dout, lse, delta, i,
                begin if phase == 0 else (full_begin if phase == 1 else full_end),
                full_begin if phase == 0 else (full_end if phase == 1 else end),
                K, V, bias, slope, len_q, len_k, batch * num_heads + program % num_heads,
                stride_k, stride_v, stride_bias_i, stride_bias_j,
                scale, softcap, left, right, key0, key1, counter3, threshold, keep_scale,
                phase != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, BOOLEAN, DROPOUT,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    wide_i = i.to(tl.int64)[:, None]
    DQ += batch64 * stride_dq_batch + q_begin * stride_dq + head * stride_dq_head
    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + wide_i * stride_dq + d[None, :], dq, mask=(wide_i < len_q) & (d < D)[None, :])
