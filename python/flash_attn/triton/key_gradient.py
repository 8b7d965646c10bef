"""dK and dV of the backward, by blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_tile
from .vocabulary import (
    LOG2E,
    VARIABLE,
    keep_mask,
    load_rows,
    product,
    sequence_of_keys,
    sequence_of_queries,
)


@triton.jit
def add_queries(
    dk,
    dv,
    k,
    v,
    j,
    first_j,
    first,
    end,
    Q,
    DOUT,
    LSE,
    DELTA,
    BIAS,
    slope,
    len_q,
    len_k,
    batch_head,
    stride_q,
    stride_dout,
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
    """Adds what queries first to end of one head contribute to dK / scale and dV of a block of
    keys. Tiles have keys along their first axis."""
    for start in tl.range(first, end, BLOCK_M):
        q = load_rows(Q, start, len_q, stride_q, BLOCK_M, D, BLOCK_D, MASKED)
        row = start + tl.arange(0, BLOCK_M)
        lse = tl.load(LSE + row, mask=row < len_q, other=float("inf")) * LOG2E
        qk = product(k, tl.trans(q), None, PRECISION)  # [N, M]
        dout = load_rows(DOUT, start, len_q, stride_dout, BLOCK_M, DV, BLOCK_DV, MASKED)
        delta = tl.load(DELTA + row, mask=row < len_q, other=0.0)
        dp = product(v, tl.trans(dout), None, PRECISION)  # [N, M]
        kept = MASKED
        if DROPOUT:
            heads = tl.zeros((BLOCK_M,), tl.int32) + batch_head
            kept = tl.trans(
                keep_mask(heads, row, first_j, key0, key1, counter3, threshold, BLOCK_N)
            )
        weights, _, ds = gradient_tile(
            qk, dp, row[None, :], j, lse[None, :], delta[None, :], kept, len_q, len_k,
            slope, BIAS, stride_bias_i, stride_bias_j, scale, softcap, left, right, keep_scale,
            MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, BOOLEAN, DROPOUT,
        )  # fmt: skip
        dv = product(weights.to(dout.dtype), dout, dv, PRECISION)
        dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def query_ranges(
    first_j,
    last_j,
    len_q,
    len_k,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(begin, full_begin, full_end, end): the queries that see some of the keys, and between them
    those that see all of them. All but `end` are multiples of BLOCK_M."""
    offset = len_k - len_q
    begin = 0
    end = len_q
    full_begin = 0
    full_end = len_q // BLOCK_M * BLOCK_M
    if HAS_RIGHT:
        begin = tl.maximum(first_j - offset - right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last_j - offset - right, 0), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(len_q, tl.maximum(last_j - offset + left + 1, 0))
        full = tl.maximum(first_j - offset + left + 1, 0) // BLOCK_M * BLOCK_M
        full_end = tl.minimum(full_end, full)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(end, BLOCK_M) * BLOCK_M)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_begin, tl.minimum(full_end, end // BLOCK_M * BLOCK_M))
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=VARIABLE)
def key_gradient_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DK,
    DV_OUT,
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
    stride_dk_batch,
    stride_dk,
    stride_dk_head,
    stride_dv_batch,
    stride_dv,
    stride_dv_head,
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
    """dK and dV. Program: (batch, head of k and v, block of keys); the heads of the group are added
    up in order."""
    ALIBI: tl.constexpr = SLOPES is not None
    program = tl.program_id(0)
    block = program % num_blocks
    program = program // num_blocks
    heads_kv = num_heads // heads_per_kv
    kv_head = program % heads_kv
    batch = program // heads_kv
    q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
    _, k_begin, len_k = sequence_of_keys(batch, CU_K, USED_K, None, None, None, seqlen_k, 0)
    first_j = block * BLOCK_N
    if first_j >= len_k:
        return
    batch64 = tl.cast(batch, tl.int64)
    q_begin = tl.cast(q_begin, tl.int64)
    k_begin = tl.cast(k_begin, tl.int64)
    K += batch64 * stride_k_batch + k_begin * stride_k + kv_head * stride_k_head
    V += batch64 * stride_v_batch + k_begin * stride_v + kv_head * stride_v_head
    k = load_rows(K, first_j, len_k, stride_k, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(V, first_j, len_k, stride_v, BLOCK_N, DV, BLOCK_DV, True)
    j = first_j + tl.arange(0, BLOCK_N)
    begin, full_begin, full_end, end = query_ranges(
        first_j, tl.minimum(first_j + BLOCK_N, len_k) - 1, len_q, len_k, left, right,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for member in tl.range(0, heads_per_kv):
        head = kv_head * heads_per_kv + member
        wide_head = tl.cast(head, tl.int64)
        q_of = Q + batch64 * stride_q_batch + q_begin * stride_q + wide_head * stride_q_head
        dout_of = DOUT + batch64 * stride_dout_batch + q_begin * stride_dout
        dout_of += wide_head * stride_dout_head
        row = batch64 * stride_lse_batch + wide_head * stride_lse_head + q_begin
        slope = 0.0
        if ALIBI:
            slope = tl.load(SLOPES + batch * stride_slopes + head)
        bias = BIAS
        if BIAS is not None:
            bias = BIAS + batch64 * stride_bias_batch + wide_head * stride_bias_head
        for phase in tl.static_range(3):
            if phase == 1 or phase == 2 or HAS_RIGHT:
                dk, dv = add_queries(
                    dk, dv, k, v, j[:, None], first_j,
                    begin if phase == 0 else (full_begin if phase == 1 else full_end),
                    full_begin if phase == 0 else (full_end if phase == 1 else end),
                    q_of, dout_of, LSE + row, DELTA + row, bias, slope, len_q, len_k,
                    batch * num_heads + head, stride_q, stride_dout, stride_bias_i, stride_bias_j,
                    scale, softcap, left, right, key0, key1, counter3, threshold, keep_scale,
                    phase != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, BOOLEAN, DROPOUT,
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dd = tl.arange(0, BLOCK_DV)
    j = j.to(tl.int64)[:, None]
    DK += batch64 * stride_dk_batch + k_begin * stride_dk + kv_head * stride_dk_head
    DV_OUT += batch64 * stride_dv_batch + k_begin * stride_dv + kv_head * stride_dv_head
    dk = (dk * scale).to(DK.dtype.element_ty)
    tl.store(DK + j * stride_dk + d[None, :], dk, mask=(j < len_k) & (d < D)[None, :])
    dv = dv.to(DV_OUT.dtype.element_ty)
    tl.store(DV_OUT + j * stride_dv + dd[None, :], dv, mask=(j < len_k) & (dd < DV)[None, :])
