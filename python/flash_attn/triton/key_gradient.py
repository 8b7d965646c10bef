"""dK and dV of the backward, by blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_of_scores, load_term, probabilities
from .vocabulary import (
    VARIABLE,
    keep_mask,
    load_box,
    load_rows,
    product,
    row_of,
    scores_of,
    sequence_of_keys,
    sequence_of_queries,
)


@triton.jit
def add_queries(
    dk, dv, k, v, j, first_j, range_of_queries, q_of, dout_of, terms_of, scores, batch_head,
    dropout, keep_scale, DESCRIBED: tl.constexpr, PADDED: tl.constexpr, OPTIONS: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what the queries of one head contribute to dK / scale and dV of a block of keys. Tiles
    have keys along their first axis."""
    begin, full_begin, full_end, end = range_of_queries
    len_q = scores[4]
    # One loop, that asks of each block whether it has a mask: with a loop of its own for each kind
    # of block, the zeros that reach the second one around the first make ptxas run the products of
    # both one by one (its remark C7515).
    for start in tl.range(begin, end, BLOCK_M):
        masked = False
        if OPTIONS.has_left or OPTIONS.has_right:
            masked = (start < full_begin) | (start >= full_end)
        if DESCRIBED:
            q = load_box(q_of, start, BLOCK_M, DIMS.qk)
        else:
            q = load_rows(q_of[0], start, len_q, q_of[1], BLOCK_M, DIMS.qk, DIMS.padded_qk, True)
        lse = load_term(terms_of, 0, start, len_q, BLOCK_M, PADDED, DESCRIBED)
        i = start + tl.arange(0, BLOCK_M)
        qk = product(k, tl.trans(q), None)  # [N, M]
        p, slope_of_cap = probabilities(qk, i[None, :], j, lse[None, :], scores, masked, OPTIONS)
        if DESCRIBED:
            dout = load_box(dout_of, start, BLOCK_M, DIMS.v)
        else:
            dout = load_rows(
                dout_of[0], start, len_q, dout_of[1], BLOCK_M, DIMS.v, DIMS.padded_v, True
            )
        weights = p
        if OPTIONS.dropout:
            heads = tl.zeros((BLOCK_M,), tl.int32) + batch_head
            kept = tl.trans(keep_mask(heads, i, first_j, dropout, BLOCK_N))
            factor = tl.where(kept, keep_scale, 0.0)
            weights = p * factor
        # Before dP, whose tile then needs no registers beside scores and P.
        dv = product(weights.to(dout.dtype), dout, dv)
        delta = load_term(terms_of, 1, start, len_q, BLOCK_M, PADDED, DESCRIBED)
        dp = product(v, tl.trans(dout), None)  # [N, M]
        if OPTIONS.dropout:
            dp = dp * factor
        ds = gradient_of_scores(p, dp, delta[None, :], masked, OPTIONS) * slope_of_cap
        dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def query_range(first_j, last_j, scores, OPTIONS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(begin, full_begin, full_end, end): the queries that see some of the keys; the blocks from
    full_begin to full_end see all of them. Queries past the last count as such: their P is 0."""
    _, _, _, _, len_q, len_k, _, _, left, right = scores
    offset = len_k - len_q
    begin = 0
    end = len_q
    full_begin = 0
    full_end = end
    if OPTIONS.has_right:
        begin = tl.maximum(first_j - offset - right, 0) // BLOCK_M * BLOCK_M
        full_begin = last_j - offset - right
    if OPTIONS.has_left:
        end = tl.minimum(len_q, tl.maximum(last_j - offset + left + 1, 0))
        full_end = first_j - offset + left + 2 - BLOCK_M
    return begin, full_begin, full_end, end


@triton.jit(do_not_specialize=VARIABLE)
def key_gradient_kernel(
    Q,
    K,
    V,
    DOUT,
    TERMS,
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
    DESCRIBED: tl.constexpr,
    OPTIONS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV. Program: (batch, head of k and v, block of keys); the heads of the group are added
    up in order. DESCRIBED: Q, DOUT and TERMS are tensor descriptors of boxes of BLOCK_M rows."""
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
    last_j = tl.minimum(first_j + BLOCK_N, len_k) - 1
    PADDED: tl.constexpr = CU_Q is None
    BLOCK_D: tl.constexpr = DIMS.padded_qk
    BLOCK_DV: tl.constexpr = DIMS.padded_v
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for member in tl.range(0, heads_per_kv):
        head = kv_head * heads_per_kv + member
        if DESCRIBED:
            q_of, dout_of, terms_of = (Q, batch, head), (DOUT, batch, head), (TERMS, batch, head)
        else:
            q_of = (
                row_of(Q, batch, q_begin, head, stride_q_batch, stride_q, stride_q_head),
                stride_q,
            )
            dout_of = (
                row_of(
                    DOUT, batch, q_begin, head, stride_dout_batch, stride_dout, stride_dout_head
                ),
                stride_dout,
            )
            terms_of = (
                row_of(TERMS, batch, q_begin, head, stride_terms_batch, 1, stride_terms_head),
                stride_term,
            )
        scores = scores_of(
            SLOPES, BIAS, batch, head,
            (stride_slopes, stride_bias_batch, stride_bias_head, stride_bias_i, stride_bias_j),
            (len_q, len_k), (scale, softcap, left, right), OPTIONS,
        )  # fmt: skip
        dk, dv = add_queries(
            dk, dv, k, v, j[:, None], first_j,
            query_range(first_j, last_j, scores, OPTIONS, BLOCK_M),
            q_of, dout_of, terms_of, scores, batch * num_heads + head,
            (key0, key1, counter3, threshold), keep_scale,
            DESCRIBED, PADDED, OPTIONS, DIMS, BLOCK_M, BLOCK_N,
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
