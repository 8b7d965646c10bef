"""The KV cache: new keys and values written behind the cached ones, rotary embedding on the way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_kernel(
    FROM,
    TO,
    CACHED,
    ROW,
    TABLE,
    COS,
    SIN,
    stride_from_batch,
    stride_from,
    stride_from_head,
    stride_to_block,
    stride_to,
    stride_to_head,
    stride_table,
    stride_cos,
    stride_sin,
    num_heads,
    num_new,
    capacity,
    num_rows,
    num_angles,
    TO_CACHE: tl.constexpr,
    MOVES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program: (batch, token t, head). FROM [B, Snew, H, D] goes to row CACHED[b] + t of the cache
    or, without TO_CACHE, to the same place of TO. COS, SIN [positions, HALF] turn it (Su et al.,
    "RoFormer", 2021) to position CACHED[b] + t, or without MOVES to CACHED[b].

    Nothing is written outside TO, whatever lengths, rows and pages say."""
    program = tl.program_id(0)
    head = program % num_heads
    program = program // num_heads
    t = program % num_new
    batch = program // num_new
    cached = tl.load(CACHED + batch)
    wide_batch = tl.cast(batch, tl.int64)
    d = tl.arange(0, BLOCK_D)
    source = FROM + wide_batch * stride_from_batch + tl.cast(t, tl.int64) * stride_from
    source += head * stride_from_head
    x = tl.load(source + d, mask=d < D, other=0.0)

    if COS is not None:
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
    target = TO + block * stride_to_block + row * stride_to + head * stride_to_head
    tl.store(target + d, x, mask=(d < D) & inside)
