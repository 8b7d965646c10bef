"""The KV cache: new keys and values written behind the cached ones, rotary embedding on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from .vocabulary import wait_for_launch_before


@triton.jit
def place(
    FROM, TO, CACHED, ROW, TABLE, COS, SIN, batch, t, head, from_strides, to_strides,
    stride_table, stride_cos, stride_sin, capacity, num_rows, num_angles,
    TO_CACHE: tl.constexpr, TURNS: tl.constexpr, MOVES: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Token t of FROM [B, Snew, H, D] goes to row CACHED[b] + t of the cache or, without TO_CACHE,
    to the same place of TO. With TURNS, COS and SIN [positions, HALF] turn it (Su et al.,
    "RoFormer", 2021) to position CACHED[b] + t, or without MOVES to CACHED[b].

    Nothing is written outside TO, whatever lengths, rows and pages say."""
    cached = tl.load(CACHED + batch)
    wide_batch = tl.cast(batch, tl.int64)
    d = tl.arange(0, BLOCK_D)
    source = FROM + wide_batch * from_strides[0] + tl.cast(t, tl.int64) * from_strides[1]
    source += head * from_strides[2]
    x = tl.load(source + d, mask=d < D, other=0.0)

    if TURNS:
        angle = cached
        if MOVES:
            angle += t
        angle = tl.minimum(tl.maximum(angle, 0), num_angles - 1)
        if INTERLEAVED:
            pair = d // 2
            first = d % 2 == 0
            partner = tl.where(first, d + 1, d - 1)
        else:
            pair = d % HALF
            first = d < HALF
            partner = tl.where(first, d + HALF, d - HALF)
        turns = d < 2 * HALF
        cos = tl.load(COS + angle * stride_cos + pair, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(SIN + angle * stride_sin + pair, mask=turns, other=0.0).to(tl.float32)
        other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos + tl.where(first, -other, other) * sin
        x = tl.where(turns, turned.to(x.dtype), x)

    inside = True
    block = wide_batch
    row = tl.cast(t, tl.int64)
    if TO_CACHE:
        position = cached + t
        inside = (position >= 0) & (position < capacity)
        row = tl.cast(position, tl.int64)
        if PAGE_SIZE > 0:
            page = tl.load(
                TABLE + wide_batch * stride_table + position // PAGE_SIZE, mask=inside, other=-1
            )
            block = tl.cast(page, tl.int64)
            row = tl.cast(position % PAGE_SIZE, tl.int64)
        if ROW is not None:
            block = tl.cast(tl.load(ROW + batch), tl.int64)
        inside = inside & (block >= 0) & (block < num_rows)
    target = TO + block * to_strides[0] + row * to_strides[1] + head * to_strides[2]
    tl.store(target + d, x, mask=(d < D) & inside)


@triton.jit
def append_kernel(
    K_NEW,
    V_NEW,
    Q,
    K,
    V,
    ROTATED,
    CACHED,
    ROW,
    TABLE,
    COS,
    SIN,
    stride_k_new_batch,
    stride_k_new,
    stride_k_new_head,
    stride_v_new_batch,
    stride_v_new,
    stride_v_new_head,
    stride_q_batch,
    stride_q,
    stride_q_head,
    stride_k_batch,
    stride_k,
    stride_k_head,
    stride_v_batch,
    stride_v,
    stride_v_head,
    stride_rotated_batch,
    stride_rotated,
    stride_rotated_head,
    stride_table,
    stride_cos,
    stride_sin,
    num_heads,
    num_heads_kv,
    num_new,
    seqlen_q,
    capacity,
    num_rows,
    num_angles,
    MOVES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program: (batch, row), a head of a new key, of a new value or, where COS and SIN turn them,
    of a query, which goes to ROTATED."""
    wait_for_launch_before(OVERLAPS)
    program = tl.program_id(0)
    TURNS: tl.constexpr = COS is not None
    new_rows = 2 * num_heads_kv * num_new
    rows = new_rows
    if TURNS:
        rows += num_heads * seqlen_q
    batch = program // rows
    row = program % rows
    is_new = row < new_rows
    t = row // (2 * num_heads_kv)
    head = row % (2 * num_heads_kv)
    if is_new and head < num_heads_kv:
        place(
            K_NEW, K, CACHED, ROW, TABLE, COS, SIN, batch, t, head,
            (stride_k_new_batch, stride_k_new, stride_k_new_head),
            (stride_k_batch, stride_k, stride_k_head),
            stride_table, stride_cos, stride_sin, capacity, num_rows, num_angles,
            True, TURNS, True, INTERLEAVED, HALF, PAGE_SIZE, DIMS.qk, DIMS.padded_qk,
        )  # fmt: skip
    elif is_new:
        place(
            V_NEW, V, CACHED, ROW, TABLE, COS, SIN, batch, t, head - num_heads_kv,
            (stride_v_new_batch, stride_v_new, stride_v_new_head),
            (stride_v_batch, stride_v, stride_v_head),
            stride_table, stride_cos, stride_sin, capacity, num_rows, num_angles,
            True, False, True, INTERLEAVED, HALF, PAGE_SIZE, DIMS.v, DIMS.padded_v,
        )  # fmt: skip
    elif TURNS:
        row -= new_rows
        place(
            Q, ROTATED, CACHED, ROW, TABLE, COS, SIN, batch, row // num_heads, row % num_heads,
            (stride_q_batch, stride_q, stride_q_head),
            (stride_rotated_batch, stride_rotated, stride_rotated_head),
            stride_table, stride_cos, stride_sin, capacity, num_rows, num_angles,
            False, True, MOVES, INTERLEAVED, HALF, PAGE_SIZE, DIMS.qk, DIMS.padded_qk,
        )  # fmt: skip
