"""The forward: one mainloop for dense, varlen and paged keys, whole or in splits.

A program computes BLOCK_M rows. A row is a query of one head, or, with GROUP > 1, of one of the
GROUP heads that share a head of k and v: then decoding reads each key once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import (
    LN2,
    LOG2E,
    VARIABLE,
    add_bias,
    is_visible,
    keep_mask,
    key_ranges,
    load_paged_rows,
    load_rows,
    product,
    sequence_of_keys,
    sequence_of_queries,
    softcap_tanh,
)


@triton.jit
def attend(
    acc,
    greatest,
    total,
    q,
    i,
    head,
    slope,
    first,
    end,
    K,
    V,
    PAGES,
    BIAS,
    k_begin,
    len_q,
    len_k,
    batch_head,
    stride_k_block,
    stride_k,
    stride_v_block,
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
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over keys first to end; with MASKED some rows may not see some of them."""
    PLAIN: tl.constexpr = not SOFTCAP and not ALIBI and BIAS is None
    for start in tl.range(first, end, BLOCK_N):
        if PAGE_SIZE > 0:
            k = load_paged_rows(
                K, start, len_k, stride_k_block, stride_k, PAGES, k_begin,
                PAGE_SIZE, BLOCK_N, D, BLOCK_D,
            )  # fmt: skip
        else:
            k = load_rows(K, start, len_k, stride_k, BLOCK_N, D, BLOCK_D, MASKED)
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        s = product(q, tl.trans(k), None, PRECISION)  # [M, N] fp32
        if PLAIN:
            if MASKED:
                visible = is_visible(i, j, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(visible, s, float("-inf"))
            higher = tl.maximum(greatest, tl.max(s, 1) * (scale * LOG2E))
            # A row that has seen no key yet keeps -inf, and p = 0.
            shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
            p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
        else:
            if SOFTCAP:
                s = softcap_tanh(s, scale, softcap) * (softcap * LOG2E)
            else:
                s = s * (scale * LOG2E)
            s = add_bias(
                s, i, j, len_q, len_k, slope, BIAS, stride_bias_i, stride_bias_j, ALIBI, BOOLEAN
            )
            if MASKED:
                visible = is_visible(i, j, len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(visible, s, float("-inf"))
            higher = tl.maximum(greatest, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(greatest - shift)
        total = total * shrink + tl.sum(p, 1)
        greatest = higher
        if DROPOUT:
            rows = tl.reshape(i, (i.shape[0],))
            kept = keep_mask(
                batch_head + head, rows, start, key0, key1, counter3, threshold, BLOCK_N
            )
            p = tl.where(kept, p, 0.0)
        acc = acc * shrink[:, None]
        if PAGE_SIZE > 0:
            v = load_paged_rows(
                V, start, len_k, stride_v_block, stride_v, PAGES, k_begin,
                PAGE_SIZE, BLOCK_N, DV, BLOCK_DV,
            )  # fmt: skip
        else:
            v = load_rows(V, start, len_k, stride_v, BLOCK_N, DV, BLOCK_DV, MASKED)
        acc = product(p.to(v.dtype), v, acc, PRECISION)  # [M, DV] fp32
    return acc, greatest, total


@triton.jit(do_not_specialize=VARIABLE)
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    CU_Q,
    CU_K,
    USED_K,
    CACHED,
    LEFTPAD,
    ROW,
    TABLE,
    SLOPES,
    BIAS,
    SINK,
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
    stride_out_split,
    stride_out_batch,
    stride_out,
    stride_out_head,
    stride_lse_split,
    stride_lse_batch,
    stride_lse_head,
    stride_table,
    stride_slopes,
    stride_bias_batch,
    stride_bias_head,
    stride_bias_i,
    stride_bias_j,
    seqlen_q,
    seqlen_k,
    num_heads,
    heads_per_kv,
    num_splits,
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
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program: (batch, head or group of heads, split, block of rows), the last one fastest. With
    SPLIT, OUT and LSE are workspaces in fp32, and LSE is in log2."""
    ALIBI: tl.constexpr = SLOPES is not None
    program = tl.program_id(0)
    # The last queries see the most keys under a causal mask: they begin first.
    block = num_blocks - 1 - program % num_blocks
    program = program // num_blocks
    split = 0
    if SPLIT:
        split = program % num_splits
        program = program // num_splits
    groups = num_heads // GROUP
    first_head = program % groups * GROUP
    batch = program // groups
    q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
    if block * BLOCK_M >= len_q * GROUP:
        return
    k_row, k_begin, len_k = sequence_of_keys(
        batch, CU_K, USED_K, CACHED, LEFTPAD, ROW, seqlen_k, PAGE_SIZE
    )

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // GROUP
    head = first_head + row % GROUP
    wide_batch = tl.cast(batch, tl.int64)
    Q += wide_batch * stride_q_batch + tl.cast(q_begin, tl.int64) * stride_q
    d = tl.arange(0, BLOCK_D)
    real = i < len_q
    q = tl.load(
        Q + i.to(tl.int64)[:, None] * stride_q + head[:, None] * stride_q_head + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    kv_head = first_head // heads_per_kv
    K += tl.cast(kv_head, tl.int64) * stride_k_head
    V += tl.cast(kv_head, tl.int64) * stride_v_head
    pages = TABLE
    if PAGE_SIZE > 0:
        pages = TABLE + wide_batch * stride_table
    else:
        k_row = tl.cast(k_row, tl.int64)
        K += k_row * stride_k_batch + tl.cast(k_begin, tl.int64) * stride_k
        V += k_row * stride_v_batch + tl.cast(k_begin, tl.int64) * stride_v
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + batch * stride_slopes + head)[:, None]
    bias = BIAS
    if BIAS is not None:
        bias = BIAS + wide_batch * stride_bias_batch + (head * stride_bias_head)[:, None]

    begin, full_begin, full_end, end = key_ranges(
        block * BLOCK_M // GROUP,
        tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, len_q - 1),
        len_q, len_k, left, right, split, num_splits, HAS_LEFT, HAS_RIGHT, SPLIT, BLOCK_N,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    greatest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for phase in tl.static_range(3):
        # Blocks at the left edge of the window, blocks that all rows see, blocks at the right edge.
        if phase == 1 or phase == 2 or HAS_LEFT:
            acc, greatest, total = attend(
                acc, greatest, total, q, i[:, None], head, slope,
                begin if phase == 0 else (full_begin if phase == 1 else full_end),
                full_begin if phase == 0 else (full_end if phase == 1 else end),
                K, V, pages, bias, k_begin, len_q, len_k, batch * num_heads,
                stride_k_batch, stride_k, stride_v_batch, stride_v, stride_bias_i, stride_bias_j,
                scale, softcap, left, right, key0, key1, counter3, threshold,
                phase != 1, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, BOOLEAN, DROPOUT, PAGE_SIZE,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
            )  # fmt: skip

    if SINK is not None:
        sink = tl.load(SINK + head).to(tl.float32) * LOG2E
        higher = tl.maximum(greatest, sink)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - shift)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - shift)
        greatest = higher
    empty = total == 0.0
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if DROPOUT:
        factor = factor * keep_scale
    acc = acc * factor[:, None]
    log_sum = greatest + tl.log2(tl.where(empty, 1.0, total))
    if SPLIT:
        log_sum = tl.where(empty, float("-inf"), log_sum)
    else:
        log_sum = tl.where(empty, float("inf"), log_sum * LN2)

    token = tl.cast(q_begin, tl.int64) + i
    dv = tl.arange(0, BLOCK_DV)
    OUT += split * stride_out_split + wide_batch * stride_out_batch
    out = OUT + token[:, None] * stride_out + head[:, None] * stride_out_head + dv[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    if LSE is not None:
        LSE += split * stride_lse_split + wide_batch * stride_lse_batch
        tl.store(LSE + head.to(tl.int64) * stride_lse_head + token, log_sum, mask=real)
