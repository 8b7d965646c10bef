"""dQ of the backward, by blocks of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_of_scores, load_term, probabilities
from .vocabulary import (
    VARIABLE,
    keep_mask,
    key_ranges,
    load_rows,
    product,
    row_of,
    scores_of,
    sequence_of_keys,
    sequence_of_queries,
)


@triton.jit
def add_keys(
    dq, q, dout, lse, delta, i, first, end, K, V, stride_k, stride_v,
    scores, batch_head, dropout, keep_scale, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what keys first to end contribute to dQ / scale of a block of queries."""
    len_k = scores[5]
    for start in tl.range(first, end, BLOCK_N):
        k = load_rows(K, start, len_k, stride_k, BLOCK_N, DIMS.qk, DIMS.padded_qk, MASKED)
        v = load_rows(V, start, len_k, stride_v, BLOCK_N, DIMS.v, DIMS.padded_v, MASKED)
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        qk = product(q, tl.trans(k), None)  # [M, N]
        p, slope_of_cap = probabilities(qk, i[:, None], j, lse[:, None], scores, MASKED, OPTIONS)
        dp = product(dout, tl.trans(v), None)  # [M, N]
        if OPTIONS.dropout:
            heads = tl.zeros((BLOCK_M,), tl.int32) + batch_head
            kept = keep_mask(heads, i, start, dropout, BLOCK_N)
            dp = dp * tl.where(kept, keep_scale, 0.0)
        ds = gradient_of_scores(p, dp, delta[:, None], MASKED, OPTIONS) * slope_of_cap
        dq = product(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=VARIABLE)
def query_gradient_kernel(
    Q,
    K,
    V,
    DOUT,
    TERMS,
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
    stride_terms_batch,
    stride_terms_head,
    stride_term,
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
    """dQ. Program: (batch, head, block of queries)."""
    program = tl.program_id(0)
    # The last queries see the most keys under a causal mask: they begin first.
    block = num_blocks - 1 - program % num_blocks
    program = program // num_blocks
    head = program % num_heads
    batch = program // num_heads
    q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
    _, k_begin, len_k = sequence_of_keys(batch, CU_K, USED_K, None, None, None, seqlen_k, 0)
    first_i = block * BLOCK_M
    if first_i >= len_q:
        return
    kv_head = head // heads_per_kv
    Q = row_of(Q, batch, q_begin, head, stride_q_batch, stride_q, stride_q_head)
    K = row_of(K, batch, k_begin, kv_head, stride_k_batch, stride_k, stride_k_head)
    V = row_of(V, batch, k_begin, kv_head, stride_v_batch, stride_v, stride_v_head)
    DOUT = row_of(DOUT, batch, q_begin, head, stride_dout_batch, stride_dout, stride_dout_head)
    TERMS = row_of(TERMS, batch, q_begin, head, stride_terms_batch, 1, stride_terms_head)
    q = load_rows(Q, first_i, len_q, stride_q, BLOCK_M, DIMS.qk, DIMS.padded_qk, True)
    dout = load_rows(DOUT, first_i, len_q, stride_dout, BLOCK_M, DIMS.v, DIMS.padded_v, True)
    i = first_i + tl.arange(0, BLOCK_M)
    PADDED: tl.constexpr = CU_Q is None
    lse = load_term((TERMS, stride_term), 0, first_i, len_q, BLOCK_M, PADDED, False)
    delta = load_term((TERMS, stride_term), 1, first_i, len_q, BLOCK_M, PADDED, False)
    scores = scores_of(
        SLOPES, BIAS, batch, head,
        (stride_slopes, stride_bias_batch, stride_bias_head, stride_bias_i, stride_bias_j),
        (len_q, len_k), (scale, softcap, left, right), OPTIONS,
    )  # fmt: skip
    last_i = tl.minimum(first_i + BLOCK_M, len_q) - 1
    edges = key_ranges(first_i, last_i, scores, 0, 1, False, OPTIONS, BLOCK_N)
    BLOCK_D: tl.constexpr = DIMS.padded_qk
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or OPTIONS.has_left:
            dq = add_keys(
                dq, q, dout, lse, delta, i, edges[phase], edges[phase + 1],
                K, V, stride_k, stride_v, scores, batch * num_heads + head,
                (key0, key1, counter3, threshold), keep_scale, phase != 1,
                OPTIONS, DIMS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    d = tl.arange(0, DIMS.padded_qk)
    wide_i = i.to(tl.int64)[:, None]
    DQ = row_of(DQ, batch, q_begin, head, stride_dq_batch, stride_dq, stride_dq_head)
    dq = (dq * scale).to(DQ.dtype.element_ty)
    inside = (wide_i < len_q) & (d < DIMS.qk)[None, :]
    tl.store(DQ + wide_i * stride_dq + d[None, :], dq, mask=inside)
