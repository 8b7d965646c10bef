"""What the Triton kernels are made of: where a sequence lies, tiles of it, scores, dropout's mask.

A kernel's tile of scores has its queries along one axis and its keys along the other. `i` and `j`
are positions within the sequence, shaped to broadcast to the tile, so that one function serves both
orientations. Scores are in units of log2, so that a probability is one exp2. Options that a call
does not use are None, or False, at compile time, and leave no trace.

What always goes together goes as a tuple, `dropout = (key0, key1, counter3, threshold)` and

    scores = (ALiBi's slope, address of the head's attn_bias, stride_bias_i, stride_bias_j,
              len_q, len_k, scale, softcap, left, right)

which `scores_of` makes of a kernel's arguments.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before release 3.4
    gdc_launch_dependents = gdc_wait = None

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEYS_PER_DRAW = tl.constexpr(8)
# Arguments whose values make no better code: a kernel is not compiled anew for each kind of them.
VARIABLE = (
    *("seqlen_q", "seqlen_k", "num_heads", "num_splits", "num_blocks", "blocks_i", "blocks_j"),
    *("batch_size", "num_tokens", "left", "right", "key0", "key1", "counter3", "threshold"),
)


class Options(NamedTuple):
    """What the scores of a call have; a kernel is compiled for it."""

    has_left: bool
    has_right: bool
    softcap: bool
    alibi: bool
    bias: bool
    boolean: bool  # attn_bias says what to keep
    dropout: bool


class Dims(NamedTuple):
    """head_dim of q and k, and of v; what they are padded to."""

    qk: int
    v: int
    padded_qk: int
    padded_v: int


# ---- Launches one after the other. ----


@triton.jit
def wait_for_launch_before(OVERLAPS: tl.constexpr):
    """What a kernel does first whose launch overlaps the one before it (CUDA's programming guide,
    "Programmatic Dependent Launch"): waits for its results, and lets the next launch begin."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


# ---- Where a sequence lies. ----


@triton.jit
def row_of(base, batch, token, head, stride_batch, stride, stride_head):
    """The address of a token's row of one head."""
    base += tl.cast(batch, tl.int64) * stride_batch + tl.cast(token, tl.int64) * stride
    return base + tl.cast(head, tl.int64) * stride_head


@triton.jit
def sequence_of_queries(batch, CU_Q, seqlen_q):
    """(first token, number of queries) of sequence `batch`; dense: from 0 within its entry."""
    begin = 0
    length = seqlen_q
    if CU_Q is not None:
        begin = tl.load(CU_Q + batch)
        length = tl.load(CU_Q + batch + 1) - begin
    return begin, length


@triton.jit
def sequence_of_keys(batch, CU_K, USED_K, CACHED, LEFTPAD, ROW, seqlen_k, PAGE_SIZE: tl.constexpr):
    """(entry of k, first token in it, number of keys) of sequence `batch`. With a cache, seqlen_k
    tokens have been appended to those that it held."""
    row = batch
    begin = 0
    length = seqlen_k
    if CU_K is not None:
        begin = tl.load(CU_K + batch)
        length = tl.load(CU_K + batch + 1) - begin
        if USED_K is not None:
            length = tl.load(USED_K + batch)
        if PAGE_SIZE > 0:
            begin = 0
    if CACHED is not None:
        length = tl.load(CACHED + batch) + seqlen_k
        if LEFTPAD is not None:
            begin = tl.load(LEFTPAD + batch)
            length -= begin
        if ROW is not None:
            row = tl.load(ROW + batch)
    return row, begin, length


@triton.jit
def key_ranges(
    first_i, last_i, scores, split, num_splits,
    SPLIT: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(begin, full_begin, full_end, end): the keys that some of the queries see, and between them
    those that all of them see. All but `end` are multiples of BLOCK_N."""
    _, _, _, _, len_q, len_k, _, _, left, right = scores
    offset = len_k - len_q
    begin = 0
    end = len_k
    full_begin = 0
    full_end = len_k // BLOCK_N * BLOCK_N
    if OPTIONS.has_left:
        begin = tl.maximum(first_i + offset - left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_i + offset - left, 0), BLOCK_N) * BLOCK_N
    if OPTIONS.has_right:
        end = tl.minimum(len_k, tl.maximum(last_i + offset + right + 1, 0))
        full = tl.maximum(first_i + offset + right + 1, 0) // BLOCK_N * BLOCK_N
        full_end = tl.minimum(full_end, full)
    if SPLIT:
        blocks = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), num_splits)
        begin += split * blocks * BLOCK_N
        end = tl.minimum(end, begin + blocks * BLOCK_N)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.cdiv(end, BLOCK_N) * BLOCK_N)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_begin, tl.minimum(full_end, end // BLOCK_N * BLOCK_N))
    return begin, full_begin, full_end, end


@triton.jit
def load_rows(
    base, start, length, stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start to start + ROWS of a matrix whose rows have DIM elements: [ROWS, BLOCK_DIM]. With
    MASKED rows from `length` on are zeros; padded columns always are."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if MASKED:
        inside = (start + row < length)[:, None]
        if DIM < BLOCK_DIM:
            inside = inside & (column < DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_box(tensor, start, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Rows start to start + ROWS of (descriptor of boxes [1, ROWS, 1, DIM], entry, head)."""
    return tensor[0].load([tensor[1], start, tensor[2], 0]).reshape(ROWS, DIM)


@triton.jit
def load_paged_rows(
    base, start, length, stride_block, stride, PAGES, begin,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """load_rows of a sequence that begins at token `begin` of the pages at PAGES."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_DIM)
    token = begin + start + row
    inside = start + row < length
    page = tl.load(PAGES + token // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    offset = page * stride_block + (token % PAGE_SIZE) * stride
    inside = inside[:, None] & (column < DIM)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b, acc):
    """a b, added to acc where that is not None, in fp32 without rounding of the inputs."""
    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# ---- Scores. ----


@triton.jit
def tanh(x):
    """By the exponential; near 0, where that would cancel, by the series."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0.0, -large, large))


@triton.jit
def lse_of_none(HAS_SINK: tl.constexpr):
    """Of a row that sees no key: +inf by convention; with a sink, which is -inf then, the sum's."""
    return float("-inf") if HAS_SINK else float("inf")


@triton.jit
def clear_rows_behind(
    OUT, LSE, first, num_tokens, block, num_blocks, first_head, strides,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Rows of no sequence, from `first` on, of GROUP heads, shared among num_blocks programs: out
    is 0 and lse +inf. `strides` are those of out's rows and heads, and of lse's heads."""
    d = tl.arange(0, BLOCK_DV)
    for start in tl.range(first + block * ROWS, num_tokens, num_blocks * ROWS):
        token = (start + tl.arange(0, ROWS)).to(tl.int64)
        real = token < num_tokens
        for head in tl.range(first_head, first_head + GROUP):
            out = OUT + head * strides[1] + token[:, None] * strides[0] + d[None, :]
            nothing = tl.zeros((ROWS, BLOCK_DV), OUT.dtype.element_ty)
            tl.store(out, nothing, mask=real[:, None] & (d < DV)[None, :])
            if LSE is not None:
                tl.store(
                    LSE + tl.cast(head, tl.int64) * strides[2] + token, float("inf"), mask=real
                )


@triton.jit
def softcap_tanh(product, scale, softcap):
    """tanh(scale * product / softcap), of which a capped score is softcap times."""
    return tanh(product * (scale / softcap))


@triton.jit
def slope_of(SLOPES, batch, head, stride_slopes):
    """ALiBi's slope of a head of a sequence, or of a column of heads."""
    slope = 0.0
    if SLOPES is not None:
        slope = tl.load(SLOPES + batch * stride_slopes + head)
    return slope


@triton.jit
def scores_of(SLOPES, BIAS, batch, head, strides, lengths, numbers, OPTIONS: tl.constexpr):
    """`scores` of a head, or of a column of heads: strides of SLOPES and of BIAS by batch entry,
    head, query and key, (len_q, len_k), (scale, softcap, left, right)."""
    bias = 0
    if OPTIONS.bias:
        bias = row_of(BIAS, batch, 0, head, strides[1], 0, strides[2])
    slope = slope_of(SLOPES, batch, head, strides[0])
    return (
        slope, bias, strides[3], strides[4], lengths[0], lengths[1],
        numbers[0], numbers[1], numbers[2], numbers[3],
    )  # fmt: skip


@triton.jit
def is_visible(i, j, scores, OPTIONS: tl.constexpr):
    """Which keys j the queries i see, aligned to the bottom right corner. Queries past the last are
    taken to see what their position would."""
    _, _, _, _, len_q, len_k, _, _, left, right = scores
    # Bounds by query come first, so that an element of the tile costs one comparison a side.
    last = len_k - 1
    if OPTIONS.has_right:
        last = tl.minimum(i + (len_k - len_q + right), last)
    visible = j <= last
    if OPTIONS.has_left:
        visible = visible & (j >= i + (len_k - len_q - left))
    return visible


@triton.jit
def add_bias(s, i, j, scores, OPTIONS: tl.constexpr):
    """ALiBi's distance and attn_bias, on scores in log2."""
    slope, BIAS, stride_bias_i, stride_bias_j, len_q, len_k, _, _, _, _ = scores
    if OPTIONS.alibi:
        distance = tl.abs(i + (len_k - len_q) - j).to(tl.float32)
        s -= slope * LOG2E * distance
    if OPTIONS.bias:
        offset = i.to(tl.int64) * stride_bias_i + j.to(tl.int64) * stride_bias_j
        bias = tl.load(BIAS + offset, mask=(i < len_q) & (j < len_k), other=0)
        if OPTIONS.boolean:
            s = tl.where(bias != 0, s, float("-inf"))
        else:
            s += bias.to(tl.float32) * LOG2E
    return s


# ---- Dropout. ----


@triton.jit
def interleave(a, b, c, d, e, f, g, h):
    """The elements of eight [M, N / 8] in turn: [M, N]."""
    low = tl.join(tl.join(a, e), tl.join(c, g))
    high = tl.join(tl.join(b, f), tl.join(d, h))
    both = tl.join(low, high)
    return tl.reshape(both, (a.shape[0], a.shape[1] * 8))


@triton.jit
def keep_mask(batch_head, i, first_j, dropout, KEYS: tl.constexpr):
    """Where dropout keeps the probabilities of queries i [M] and keys first_j to first_j + KEYS,
    [M, KEYS]: Philox-4x32-10 (Salmon et al., SC 2011) as src/core/semantics.h has it. batch_head is
    [M]; first_j is a multiple of 8."""
    key0, key1, counter3, threshold = dropout
    draw = first_j // KEYS_PER_DRAW + tl.arange(0, KEYS // KEYS_PER_DRAW)
    zero = tl.zeros((i.shape[0], KEYS // KEYS_PER_DRAW), tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + draw.to(tl.uint32)[None, :],
        zero + i.to(tl.uint32)[:, None],
        zero + batch_head.to(tl.uint32)[:, None],
        zero + counter3.to(tl.uint32, bitcast=True),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    bits = interleave(
        w0 & 0xFFFF, w0 >> 16, w1 & 0xFFFF, w1 >> 16, w2 & 0xFFFF, w2 >> 16, w3 & 0xFFFF, w3 >> 16
    )
    return bits.to(tl.int32) < threshold
