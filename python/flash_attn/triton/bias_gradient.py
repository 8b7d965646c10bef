"""The gradient of attn_bias: dS, summed over the dimensions that the bias was broadcast along."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_of_scores, load_term, probabilities
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


@triton.jit(do_not_specialize=VARIABLE)
def bias_gradient_kernel(
    Q,
    K,
    V,
    DOUT,
    TERMS,
    D_BIAS,
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
    stride_out_batch,
    stride_out_head,
    stride_out_i,
    stride_out_j,
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
    batch_size,
    num_heads,
    heads_per_kv,
    blocks_i,
    blocks_j,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    OVER_BATCH: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    OVER_I: tl.constexpr,
    OVER_J: tl.constexpr,
    OPTIONS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program: (batch, head, block of queries, block of keys) of D_BIAS; it walks through those of
    the scores that OVER_ says the bias has one entry for. seqlen_q and seqlen_k are the longest."""
    program = tl.program_id(0)
    mine_j = 0 if OVER_J else program % blocks_j
    program = program if OVER_J else program // blocks_j
    mine_i = 0 if OVER_I else program % blocks_i
    program = program if OVER_I else program // blocks_i
    mine_head = 0 if OVER_HEADS else program % num_heads
    mine_batch = 0 if OVER_BATCH else (program if OVER_HEADS else program // num_heads)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    heads = num_heads if OVER_HEADS else 1
    rows = blocks_i if OVER_I else 1
    columns = blocks_j if OVER_J else 1
    batches = batch_size if OVER_BATCH else 1
    for step in tl.range(0, batches * heads * rows * columns):
        block_j = mine_j + step % columns
        block_i = mine_i + step // columns % rows
        head = mine_head + step // columns // rows % heads
        batch = mine_batch + step // columns // rows // heads
        q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
        _, k_begin, len_k = sequence_of_keys(batch, CU_K, USED_K, None, None, None, seqlen_k, 0)
        kv_head = head // heads_per_kv
        q_of = row_of(Q, batch, q_begin, head, stride_q_batch, stride_q, stride_q_head)
        k_of = row_of(K, batch, k_begin, kv_head, stride_k_batch, stride_k, stride_k_head)
        v_of = row_of(V, batch, k_begin, kv_head, stride_v_batch, stride_v, stride_v_head)
        dout_of = row_of(
            DOUT, batch, q_begin, head, stride_dout_batch, stride_dout, stride_dout_head
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
        first_i = block_i * BLOCK_M
        first_j = block_j * BLOCK_N
        q = load_rows(q_of, first_i, len_q, stride_q, BLOCK_M, DIMS.qk, DIMS.padded_qk, True)
        dout = load_rows(dout_of, first_i, len_q, stride_dout, BLOCK_M, DIMS.v, DIMS.padded_v, True)
        k = load_rows(k_of, first_j, len_k, stride_k, BLOCK_N, DIMS.qk, DIMS.padded_qk, True)
        v = load_rows(v_of, first_j, len_k, stride_v, BLOCK_N, DIMS.v, DIMS.padded_v, True)
        i = first_i + tl.arange(0, BLOCK_M)
        j = first_j + tl.arange(0, BLOCK_N)
        PADDED: tl.constexpr = CU_Q is None
        lse = load_term(terms_of, 0, first_i, len_q, BLOCK_M, PADDED, False)
        delta = load_term(terms_of, 1, first_i, len_q, BLOCK_M, PADDED, False)
        qk = product(q, tl.trans(k), None)
        p, _ = probabilities(qk, i[:, None], j[None, :], lse[:, None], scores, True, OPTIONS)
        dp = product(dout, tl.trans(v), None)
        if OPTIONS.dropout:
            heads_of_rows = tl.zeros((BLOCK_M,), tl.int32) + (batch * num_heads + head)
            dropout = (key0, key1, counter3, threshold)
            kept = keep_mask(heads_of_rows, i, first_j, dropout, BLOCK_N)
            dp = dp * tl.where(kept, keep_scale, 0.0)
        total += gradient_of_scores(p, dp, delta[:, None], True, OPTIONS)
    if OVER_I:
        total = tl.sum(total, 0, keep_dims=True)
    if OVER_J:
        total = tl.sum(total, 1, keep_dims=True)
    i = (tl.arange(0, 1) if OVER_I else mine_i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    j = (tl.arange(0, 1) if OVER_J else mine_j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (i < (1 if OVER_I else seqlen_q)) & (j < (1 if OVER_J else seqlen_k))
    to = D_BIAS + tl.cast(mine_batch, tl.int64) * stride_out_batch + mine_head * stride_out_head
    to = to + i.to(tl.int64) * stride_out_i + j.to(tl.int64) * stride_out_j
    tl.store(to, total.to(D_BIAS.dtype.element_ty), mask=inside)
