"""The forward: one mainloop for dense, varlen and paged keys, whole or in splits.

A program computes BLOCK_M rows. A row is a query of one head, or, with GROUP > 1, of one of the
GROUP heads that share a head of k and v: then decoding reads each key once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import combine_by_the_last
from .vocabulary import (
    LN2,
    LOG2E,
    VARIABLE,
    add_bias,
    clear_rows_behind,
    is_visible,
    keep_mask,
    key_ranges,
    load_box,
    load_paged_rows,
    load_rows,
    lse_of_none,
    product,
    row_of,
    scores_of,
    sequence_of_keys,
    sequence_of_queries,
    softcap_tanh,
    wait_for_launch_before,
)


@triton.jit
def load_block(
    tensor, start, length, pages, DESCRIBED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start to start + BLOCK_N of k or v. `tensor` is (address, stride of pages, stride of
    rows), DESCRIBED (descriptor, entry, head); `pages` the address of the page numbers and the
    first token in them."""
    if DESCRIBED:
        x = load_box(tensor, start, BLOCK_N, DIM)
    elif PAGE_SIZE > 0:
        x = load_paged_rows(
            tensor[0], start, length, tensor[1], tensor[2], pages[0], pages[1],
            PAGE_SIZE, BLOCK_N, DIM, BLOCK_DIM,
        )  # fmt: skip
    else:
        x = load_rows(tensor[0], start, length, tensor[2], BLOCK_N, DIM, BLOCK_DIM, MASKED)
    return x


@triton.jit
def attend(
    acc, greatest, total, q, i, first, end, k_of, v_of, pages, scores, batch_head, dropout,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, OPTIONS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK_N: tl.constexpr, SUMS_LATE: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys first to end; with MASKED some rows may not see some of them.
    With SUMS_LATE, `total` is a tile, whose rows are summed after the last key."""
    _, _, _, _, _, len_k, scale, softcap, _, _ = scores
    PLAIN: tl.constexpr = not OPTIONS.softcap and not OPTIONS.alibi and not OPTIONS.bias
    for start in tl.range(first, end, BLOCK_N):
        k = load_block(
            k_of, start, len_k, pages, DESCRIBED, PAGE_SIZE,
            BLOCK_N, DIMS.qk, DIMS.padded_qk, MASKED,
        )  # fmt: skip
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        s = product(q, tl.trans(k), None)  # [M, N] fp32
        if PLAIN:
            if MASKED:
                s = tl.where(is_visible(i, j, scores, OPTIONS), s, float("-inf"))
            higher = tl.maximum(greatest, tl.max(s, 1) * (scale * LOG2E))
            # A row that has seen no key yet keeps -inf, and p = 0.
            shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
            p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
        else:
            if OPTIONS.softcap:
                s = softcap_tanh(s, scale, softcap) * (softcap * LOG2E)
            else:
                s = s * (scale * LOG2E)
            s = add_bias(s, i, j, scores, OPTIONS)
            if MASKED:
                s = tl.where(is_visible(i, j, scores, OPTIONS), s, float("-inf"))
            higher = tl.maximum(greatest, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(greatest - shift)
        total = total * shrink[:, None] + p if SUMS_LATE else total * shrink + tl.sum(p, 1)
        if OPTIONS.dropout:
            rows = tl.reshape(i, (i.shape[0],))
            p = tl.where(keep_mask(batch_head, rows, start, dropout, BLOCK_N), p, 0.0)
        acc = acc * shrink[:, None]
        v = load_block(
            v_of, start, len_k, pages, DESCRIBED, PAGE_SIZE,
            BLOCK_N, DIMS.v, DIMS.padded_v, MASKED,
        )  # fmt: skip
        acc = product(p.to(v.dtype), v, acc)  # [M, DV] fp32
        greatest = higher
    return acc, greatest, total


@triton.jit(do_not_specialize=VARIABLE)
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    PARTIAL,
    PARTIAL_LSE,
    ENDED,
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
    stride_out_batch,
    stride_out,
    stride_out_head,
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
    batch_size,
    num_tokens,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OPTIONS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMBINED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program: (batch, head or group of heads, block of rows), the last one fastest; split. With
    SPLIT, results go to PARTIAL and PARTIAL_LSE (see combine). With ENDED, which counts the splits
    of a block that have ended and is 0 before and after, the last of them combines all, COMBINED
    rows and AT_ONCE splits at a time. DESCRIBED: Q, K and V are tensor
    descriptors, of boxes [1, BLOCK, 1, head_dim]."""
    wait_for_launch_before(OVERLAPS)
    program = tl.program_id(0)
    # The last queries see the most keys under a causal mask: they begin first.
    block = num_blocks - 1 - program % num_blocks
    program = program // num_blocks
    split = tl.program_id(1)
    groups = num_heads // GROUP
    first_head = program % groups * GROUP
    batch = program // groups
    q_begin, len_q = sequence_of_queries(batch, CU_Q, seqlen_q)
    if CU_Q is not None:  # by itself: known when it is compiled  # noqa: SIM102
        if batch == batch_size - 1 and split == 0:
            clear_rows_behind(
                OUT, LSE, q_begin + len_q, num_tokens, block, num_blocks, first_head,
                (stride_out, stride_out_head, stride_lse_head),
                GROUP, BLOCK_M, DIMS.v, DIMS.padded_v,
            )  # fmt: skip
    if block * BLOCK_M >= len_q * GROUP:
        return
    k_row, k_begin, len_k = sequence_of_keys(
        batch, CU_K, USED_K, CACHED, LEFTPAD, ROW, seqlen_k, PAGE_SIZE
    )

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // GROUP
    head = first_head + row % GROUP
    real = i < len_q
    kv_head = first_head // heads_per_kv
    if DESCRIBED:
        q = load_box((Q, batch, first_head), block * BLOCK_M, BLOCK_M, DIMS.qk)
        k_of = (K, k_row, kv_head)
        v_of = (V, k_row, kv_head)
    else:
        k_first = k_begin
        if PAGE_SIZE > 0:
            TABLE += tl.cast(batch, tl.int64) * stride_table
            k_row = 0
            k_first = 0
        K = row_of(K, k_row, k_first, kv_head, stride_k_batch, stride_k, stride_k_head)
        V = row_of(V, k_row, k_first, kv_head, stride_v_batch, stride_v, stride_v_head)
        k_of = (K, stride_k_batch, stride_k)
        v_of = (V, stride_v_batch, stride_v)
        d = tl.arange(0, DIMS.padded_qk)
        Q = row_of(Q, batch, q_begin, 0, stride_q_batch, stride_q, stride_q_head)
        Q += i.to(tl.int64)[:, None] * stride_q + head[:, None] * stride_q_head
        q = tl.load(Q + d[None, :], mask=real[:, None] & (d < DIMS.qk)[None, :], other=0.0)
    scores = scores_of(
        SLOPES, BIAS, batch, head[:, None],
        (stride_slopes, stride_bias_batch, stride_bias_head, stride_bias_i, stride_bias_j),
        (len_q, len_k), (scale, softcap, left, right), OPTIONS,
    )  # fmt: skip
    first_i = block * BLOCK_M // GROUP
    last_i = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, len_q - 1)
    edges = key_ranges(first_i, last_i, scores, split, num_splits, SPLIT, OPTIONS, BLOCK_N)
    BLOCK_DV: tl.constexpr = DIMS.padded_v
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    greatest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # A tile of few rows lies across all warps: a sum for each block of keys would have them wait.
    SUMS_LATE: tl.constexpr = BLOCK_M <= 16
    total = tl.zeros((BLOCK_M, BLOCK_N) if SUMS_LATE else (BLOCK_M,), tl.float32)
    for phase in tl.static_range(3):
        # Blocks at the left edge of the window, blocks that all rows see, blocks at the right edge.
        # Few splits have an edge: what a loop does before its first block, it does for them alone.
        exists = phase > 0 or OPTIONS.has_left
        if exists and (phase == 1 or not SPLIT or edges[phase] < edges[phase + 1]):
            acc, greatest, total = attend(
                acc, greatest, total, q, i[:, None], edges[phase], edges[phase + 1],
                k_of, v_of, (TABLE, k_begin), scores, batch * num_heads + head,
                (key0, key1, counter3, threshold), phase != 1, DESCRIBED,
                OPTIONS, PAGE_SIZE, DIMS, BLOCK_N, SUMS_LATE,
            )  # fmt: skip
    if SUMS_LATE:
        total = tl.sum(total, 1)

    # It joins the softmax once: that of splits when they are combined.
    if SINK is not None and not SPLIT:
        sink = tl.load(SINK + head).to(tl.float32) * LOG2E
        higher = tl.maximum(greatest, sink)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(greatest - shift)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - shift)
        greatest = higher
    empty = total == 0.0
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if OPTIONS.dropout:
        factor = factor * keep_scale
    acc = acc * factor[:, None]
    log_sum = greatest + tl.log2(tl.where(empty, 1.0, total))
    d = tl.arange(0, DIMS.padded_v)
    mask = real[:, None] & (d < DIMS.v)[None, :]
    first_token = tl.cast(q_begin, tl.int64)
    if SPLIT:
        first_partial_token = first_token
        if CU_Q is None:
            first_partial_token += tl.cast(batch, tl.int64) * seqlen_q
        row = ((first_partial_token + i) * num_heads + head) * num_splits + split
        tl.store(PARTIAL + row[:, None] * DIMS.v + d[None, :], acc, mask=mask)
        tl.store(PARTIAL_LSE + row, tl.where(empty, float("-inf"), log_sum), mask=real)
        if ENDED is not None:
            combine_by_the_last(
                OUT, LSE, PARTIAL, PARTIAL_LSE,
                ENDED + (batch * groups + first_head // GROUP) * num_blocks + block, SINK,
                batch, first_head, first_token, first_partial_token,
                block * BLOCK_M, tl.minimum(len_q * GROUP - block * BLOCK_M, BLOCK_M),
                (stride_out_batch, stride_out, stride_out_head, stride_lse_batch, stride_lse_head),
                num_heads, num_splits, GROUP, COMBINED, AT_ONCE, DIMS.v, DIMS.padded_v,
            )  # fmt: skip
    else:
        token = first_token + i
        OUT += tl.cast(batch, tl.int64) * stride_out_batch
        out = OUT + token[:, None] * stride_out + head[:, None] * stride_out_head + d[None, :]
        tl.store(out, acc.to(OUT.dtype.element_ty), mask=mask)
        if LSE is not None:
            LSE += tl.cast(batch, tl.int64) * stride_lse_batch
            log_sum = tl.where(empty, lse_of_none(SINK is not None), log_sum * LN2)
            tl.store(LSE + head.to(tl.int64) * stride_lse_head + token, log_sum, mask=real)
