"""dK and dV of the backward, by blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_tile, row_terms
from .vocabulary import (
    VARIABLE,
    keep_mask,
    load_rows,
    product,
    row_of,
    scores_of,
    sequence_of_keys,
    sequence_of_queries,
)


@triton.jit
def add_queries(
    dk, dv, k, v, j, first_j, first, end, Q, DOUT, LSE, DELTA, stride_q, stride_dout,
    scores, batch_head, dropout, keep_scale, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what queries first to end of one head contribute to dK / scale and dV of a block of
    keys. Tiles have keys along their first axis."""
    len_q = scores[4]
    for start in tl.range(first, end, BLOCK_M):
        q = load_rows(Q, start, len_q, stride_q, BLOCK_M, DIMS.qk, DIMS.padded_qk, MASKED)
        i = start + tl.arange(0, BLOCK_M)
        lse, delta = row_terms(LSE, DELTA, i, len_q)
        qk = product(k, tl.trans(q), None)  # [N, M]
        dout = load_rows(DOUT, start, len_q, stride_dout, BLOCK_M, DIMS.v, DIMS.padded_v, MASKED)
        dp = product(v, tl.trans(dout), None)  # [N, M]
        kept = MASKED
        if OPTIONS.dropout:
            heads = tl.zeros((BLOCK_M,), tl.int32) + batch_head
            kept = tl.trans(keep_mask(heads, i, first_j, dropout, BLOCK_N))
        weights, _, ds = gradient_tile(
            qk, dp, i[None, :], j, lse[None, :], delta[None, :], kept, scores, keep_scale,
            MASKED, OPTIONS,
        )  # fmt: skip
        dv = product(weights.to(dout.dtype), dout, dv)
        dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def query_ranges(first_j, last_j, scores, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(begin, full_begin, full_end, end): the queries that see some of the keys, and between them
    those that see all of them. All but `end` are multiples of BLOCK_M."""
    _, _, _, _, len_q, len_k, _, _, left, right = scores
    offset = len_k - len_q
    begin = 0
    end = len_q
    full_begin = 0
    full_end = len_q // BLOCK_M * BLOCK_M
    if OPTIONS.has_right:
        begin = tl.maximum(first_j - offset - right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last_j - offset - right, 0), BLOCK_M) * BLOCK_M
    if OPTIONS.has_left:
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
    DV,
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
    OPTIONS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV. Program: (batch, head of k and v, block of keys); the heads of the group are added
    up in order."""
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
    K = row_of(K, batch, k_begin, kv_head, stride_k_batch, stride_k, stride_k_head)
    V = row_of(V, batch, k_begin, kv_head, stride_v_batch, stride_v, stride_v_head)
    k = load_rows(K, first_j, len_k, stride_k, BLOCK_N, DIMS.qk, DIMS.padded_qk, True)
    v = load_rows(V, first_j, len_k, stride_v, BLOCK_N, DIMS.v, DIMS.padded_v, True)
    j = first_j + tl.arange(0, BLOCK_N)
    BLOCK_D: tl.constexpr = DIMS.padded_qk
    BLOCK_DV: tl.constexpr = DIMS.padded_v
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for member in tl.range(0, heads_per_kv):
        head = kv_head * heads_per_kv + member
        q_of = row_of(Q, batch, q_begin, head, stride_q_batch, stride_q, stride_q_head)
        dout_of = row_of(
            DOUT, batch, q_begin, head, stride_dout_batch, stride_dout, stride_dout_head
        )
        lse_of = row_of(LSE, batch, q_begin, head, stride_lse_batch, 1, stride_lse_head)
        delta_of = row_of(DELTA, batch, q_begin, head, stride_lse_batch, 1, stride_lse_head)
        scores = scores_of(
            SLOPES, BIAS, batch, head,
            (stride_slopes, stride_bias_batch, stride_bias_head, stride_bias_i, stride_bias_j),
            (len_q, len_k), (scale, softcap, left, right), OPTIONS,
        )  # fmt: skip
        last_j = tl.minimum(first_j + BLOCK_N, len_k) - 1
        edges = query_ranges(first_j, last_j, scores, OPTIONS, BLOCK_M)
        for phase in tl.static_range(3):
            if phase > 0 or OPTIONS.has_right:
                dk, dv = add_queries(
                    dk, dv, k, v, j[:, None], first_j, edges[phase], edges[phase + 1],
                    q_of, dout_of, lse_of, delta_of, stride_q, stride_dout,
                    scores, batch * num_heads + head, (key0, key1, counter3, threshold),
                    keep_scale, phase != 1, OPTIONS, DIMS, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    d = tl.arange(0, DIMS.padded_qk)
    dd = tl.arange(0, DIMS.padded_v)
    j = j.to(tl.int64)[:, None]
    DK = row_of(DK, batch, k_begin, kv_head, stride_dk_batch, stride_dk, stride_dk_head)
    DV = row_of(DV, batch, k_begin, kv_head, stride_dv_batch, stride_dv, stride_dv_head)
    dk = (dk * scale).to(DK.dtype.element_ty)
    tl.store(DK + j * stride_dk + d[None, :], dk, mask=(j < len_k) & (d < DIMS.qk)[None, :])
    dv = dv.to(DV.dtype.element_ty)
    tl.store(DV + j * stride_dv + dd[None, :], dv, mask=(j < len_k) & (dd < DIMS.v)[None, :])
