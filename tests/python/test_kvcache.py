"""flash_attn_with_kvcache: decoding equals attention over the whole sequence."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import DTYPES

from flash_attn import flash_attn_func, flash_attn_with_kvcache

# Of max |decoded - whole| for normal inputs: both are within the forward's bound of the truth.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x [B, S, H, D] at positions 0 to S, rounded to its dtype."""
    dim = 2 * cos.size(-1)
    cos, sin = (t[: x.size(1), None, :].float() for t in (cos, sin))
    a, b = (x[..., 0:dim:2], x[..., 1:dim:2]) if interleaved else x[..., :dim].chunk(2, -1)
    a, b = a.float(), b.float()
    pairs = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([rotated.to(x.dtype), x[..., dim:]], -1)


def empty_cache(
    batch: int, room: int, heads: int, dim: int, dtype: torch.dtype, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """k_cache and v_cache full of NaN, and the arguments that say how they are laid out."""
    if page_size == 0:
        shape = (batch, room, heads, dim)
        return *(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"), {}
    pages = room // page_size
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1))
    table = order.to(torch.int32).view(batch, pages)
    shape = (batch * pages, page_size, heads, dim)
    return *(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"), {"block_table": table}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
def test_decoding_token_by_token_equals_the_whole_sequence(dtype, page_size, rotary):
    batch, length, heads, heads_kv, dim = 2, 48, 4, 2, 32
    q = normal(batch, length, heads, dim, dtype=dtype, seed=1)
    k = normal(batch, length, heads_kv, dim, dtype=dtype, seed=2)
    v = normal(batch, length, heads_kv, dim, dtype=dtype, seed=3)
    k_cache, v_cache, layout = empty_cache(batch, 64, heads_kv, dim, dtype, page_size)
    whole_q, whole_k = q, k
    if rotary is not None:
        angles = torch.arange(64)[:, None] * 0.5 ** torch.arange(8)[None, :]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        whole_q, whole_k = (rotate(x, cos, sin, rotary == "interleaved") for x in (q, k))
        layout |= {
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_interleaved": rotary == "interleaved",
        }
    expected = flash_attn_func(whole_q, whole_k, v, causal=True)
    # A prompt, then token by token, then a few tokens at once.
    steps = [(0, 17), *((t, t + 1) for t in range(17, 40)), (40, 48)]
    for first, last in steps:
        out = flash_attn_with_kvcache(
            q[:, first:last],
            k_cache,
            v_cache,
            k[:, first:last],
            v[:, first:last],
            cache_seqlens=first if first % 2 else torch.full((batch,), first, dtype=torch.int32),
            causal=True,
            num_splits=first % 4,
            **layout,
        )
        assert (out - expected[:, first:last]).abs().max() <= TOLERANCE[dtype], (first, last)


def test_many_splits_equal_one():
    """More than are combined at once, whose greatest scores grow and fall from split to split."""
    q = normal(1, 1, 2, 16, seed=1)
    k, v = normal(1, 4000, 1, 16, seed=2), normal(1, 4000, 1, 16, seed=3)
    k *= 1 + 4 * torch.linspace(0, 9, 4000).sin()[:, None, None]
    one, many = (
        flash_attn_with_kvcache(q, k, v, cache_seqlens=3950, num_splits=n) for n in (1, 70)
    )
    assert (one - many).abs().max() <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("sink", [-torch.inf, 0.5, 9.0])
def test_a_sink_counts_once_however_many_splits(sink):
    """Behind 30 keys, splits from the fifth on see none."""
    q, k, v = normal(2, 3, 4, 16, seed=1), normal(2, 90, 2, 16, seed=2), normal(2, 90, 2, 16)
    sinks = torch.tensor([sink, 0.0, 1.0, sink])
    one, many = (
        flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=lengths(30, 90),
            learnable_sink=sinks,
            num_splits=n,
            return_softmax_lse=True,
        )
        for n in (1, 7)
    )
    for a, b in zip(one, many):
        assert (a - b).abs().max() <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("seed", range(12))
def test_random_decoding_equals_the_whole_sequence(seed):
    """Rows of several lengths, anywhere in the cache, behind padding, in steps of random lengths
    with random splits."""
    draw = random.Random(seed)
    batch, heads_kv, dim = 3, draw.choice([1, 2]), draw.choice([16, 40, 64])
    heads = heads_kv * draw.choice([1, 3, 8])
    prompts = [draw.randint(0, 60) for _ in range(batch)]
    padding = [draw.choice([0, draw.randint(1, 30)]) for _ in range(batch)]
    steps = [draw.choice([1, 1, 1, draw.randint(2, 9)]) for _ in range(8)]
    page_size = draw.choice([0, 0, 1, 7, 16, 64])
    options: dict[str, Any] = dict(
        causal=draw.choice([True, True, False]), window_size=(draw.choice([-1, 20]), 0)
    )
    length = max(prompts) + sum(steps)
    q = normal(batch, length, heads, dim, seed=3 * seed)
    k = normal(batch, length, heads_kv, dim, seed=3 * seed + 1)
    v = normal(batch, length, heads_kv, dim, seed=3 * seed + 2)
    room = (max(padding) + length + 63) // 64 * 64 if page_size != 7 else 140
    k_cache, v_cache, layout = empty_cache(batch + 2, room, heads_kv, dim, k.dtype, page_size)
    rows = draw.sample(range(batch + 2), batch)
    if page_size:
        layout["block_table"] = layout["block_table"][rows].contiguous()
    else:
        layout["cache_batch_idx"] = lengths(*rows)
    layout["cache_leftpad"] = lengths(*padding)
    angles = torch.arange(room)[:, None] * 0.5 ** torch.arange(dim // 4)[None, :]
    cos, sin, interleaved = angles.cos(), angles.sin(), draw.choice([True, False])
    has_rotary = draw.choice([True, False])
    if has_rotary:
        layout |= dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)

    # The prompts, each alone; then all rows together.
    held = [first + n for first, n in zip(padding, prompts)]
    for b in range(batch):
        table = "block_table" if page_size else "cache_batch_idx"
        of_row = {key: layout[key][b : b + 1] for key in (table, "cache_leftpad")}
        flash_attn_with_kvcache(
            q[b : b + 1, : prompts[b]],
            k_cache,
            v_cache,
            k[b : b + 1, : prompts[b]],
            v[b : b + 1, : prompts[b]],
            cache_seqlens=padding[b],
            **{**layout, **of_row, **options},
        )
    outs = []
    for step in steps:
        new = [slice(n - first, n - first + step) for n, first in zip(held, padding)]
        new_q, new_k, new_v = (
            torch.stack([x[b, tokens] for b, tokens in enumerate(new)]) for x in (q, k, v)
        )
        outs.append(
            flash_attn_with_kvcache(
                new_q,
                k_cache,
                v_cache,
                new_k,
                new_v,
                cache_seqlens=lengths(*held),
                num_splits=draw.choice([0, 1, draw.randint(2, 12)]),
                **layout,
                **options,
            )
        )
        held = [n + step for n in held]
    decoded = torch.cat(outs, 1)

    for b in range(batch):
        end = prompts[b] + sum(steps)
        whole = [x[b : b + 1, :end] for x in (q, k, v)]
        if has_rotary:
            turns = cos[padding[b] :], sin[padding[b] :], interleaved
            whole[:2] = [rotate(x, *turns) for x in whole[:2]]
        expected = flash_attn_func(*whole, **options)[0, prompts[b] :]
        assert (decoded[b] - expected).abs().max() <= TOLERANCE[q.dtype]


def test_results_and_shapes():
    q, k, v = normal(2, 3, 4, 16), normal(2, 20, 2, 16, seed=1), normal(2, 20, 2, 16, seed=2)
    whole = flash_attn_func(q, k, v)
    # Without lengths, all of the cache.
    assert torch.allclose(flash_attn_with_kvcache(q, k, v), whole, atol=1e-6)
    out, lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    _, expected_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 3)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_rows_and_left_padding():
    q, k, v = normal(2, 1, 4, 16), normal(5, 20, 2, 16, seed=1), normal(5, 20, 2, 16, seed=2)
    out = flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=torch.tensor([12, 20], dtype=torch.int32),
        cache_batch_idx=torch.tensor([4, 1], dtype=torch.int32),
        cache_leftpad=torch.tensor([3, 0], dtype=torch.int32),
    )
    assert torch.allclose(out[:1], flash_attn_func(q[:1], k[4:5, 3:12], v[4:5, 3:12]), atol=1e-6)
    assert torch.allclose(out[1:], flash_attn_func(q[1:], k[1:2], v[1:2]), atol=1e-6)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "cache_too_small": ({"cache_seqlens": lengths(20, 3)}, "cache_seqlens: entry 0 is 20"),
    "negative_length": ({"cache_seqlens": lengths(2, -1)}, "cache_seqlens: entry 1 is -1"),
    "lengths_of_int64": ({"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens: dtype is int64"),
    "lengths_of_another_batch": ({"cache_seqlens": lengths(1, 2, 3)}, "cache_seqlens: length is 3"),
    "row_out_of_range": ({"cache_batch_idx": lengths(0, 2)}, "cache_batch_idx: entry 1 is 2"),
    "leftpad_beyond_the_row": ({"cache_leftpad": lengths(9, 0)}, "cache_leftpad: entry 0 is 9"),
    "new_keys_of_another_head_dim": ({"k": normal(2, 1, 2, 8)}, r"^k: shape is \[2, 1, 2, 8\]"),
    "new_keys_without_values": ({"v": None}, "^v: is missing, must be given together with k$"),
    "rotary_too_short": (
        {"rotary_cos": normal(4, 8), "rotary_sin": normal(4, 8)},
        "rotary_cos: has 4 positions",
    ),
    "rotary_dim_too_large": (
        {"rotary_cos": normal(30, 9), "rotary_sin": normal(30, 9)},
        "rotary_cos: rotary_dim is 18",
    ),
    "rotary_sin_missing": ({"rotary_cos": normal(30, 8)}, "rotary_sin: is missing"),
    "an_int_of_lengths_too_large": ({"cache_seqlens": 20}, "cache_seqlens: entry 0 is 20"),
    "an_int_of_lengths_negative": ({"cache_seqlens": -1}, "cache_seqlens: entry 0 is -1"),
    "row_negative": ({"cache_batch_idx": lengths(-1, 0)}, "cache_batch_idx: entry 0 is -1"),
    "rows_of_int64": ({"cache_batch_idx": torch.tensor([0, 1])}, "cache_batch_idx: dtype is int64"),
    "row_appended_to_twice": (
        {"cache_batch_idx": lengths(1, 1)},
        "cache_batch_idx: entries 0 and 1 are both 1, must differ",
    ),
    "leftpad_negative": ({"cache_leftpad": lengths(0, -1)}, "cache_leftpad: entry 1 is -1"),
    "new_keys_of_another_dtype": ({"k": normal(2, 1, 2, 16).half()}, "^k: dtype is float16"),
    "new_keys_of_another_batch": ({"k": normal(1, 1, 2, 16)}, "^k: shape"),
    "queries_of_another_batch": (
        {"q": normal(3, 1, 4, 16), "k": None, "v": None},
        "^k_cache: batch_cache is 2, must equal q's batch 3",
    ),
    "queries_of_another_dtype": (
        {"q": normal(2, 1, 4, 16).half()},
        "^k_cache: dtype is float32, must equal q's float16",
    ),
    "rotary_without_new_keys": (
        {"k": None, "v": None, "rotary_cos": normal(30, 8), "rotary_sin": normal(30, 8)},
        "rotary_cos: is given",
    ),
    "rotary_tables_differ": (
        {"rotary_cos": normal(30, 8), "rotary_sin": normal(30, 4)},
        "rotary_sin: shape",
    ),
    "rotary_of_another_dtype": (
        {"rotary_cos": normal(30, 8).half(), "rotary_sin": normal(30, 8).half()},
        "rotary_cos: dtype is float16",
    ),
    "sink_of_another_length": ({"learnable_sink": normal(3)}, "learnable_sink: shape"),
    "slopes_of_another_length": ({"alibi_slopes": normal(3)}, "alibi_slopes: shape"),
    "window_below_minus_1": ({"window_size": (-2, 0)}, "window_size_left: is -2"),
    "too_many_splits": ({"num_splits": 1000}, "num_splits: is 1000"),
    "negative_splits": ({"num_splits": -1}, "num_splits: is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(name):
    changed, message = BAD[name]
    k_cache, v_cache = normal(2, 20, 2, 16, seed=1), normal(2, 20, 2, 16, seed=2)
    before = k_cache.clone(), v_cache.clone()
    arguments: dict[str, Any] = {
        "q": normal(2, 1, 4, 16),
        "k": normal(2, 1, 2, 16, seed=3),
        "v": normal(2, 1, 2, 16, seed=4),
        "cache_seqlens": lengths(5, 7),
    }
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, **(arguments | changed))
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


BAD_PAGES: dict[str, tuple[dict[str, Any], str]] = {
    "page_too_large": ({"block_table": lengths(0, 1, 6, 3)}, r"block_table: entry \[1, 0\] is 6"),
    "page_negative": ({"block_table": lengths(0, -1, 2, 3)}, r"block_table: entry \[0, 1\] is -1"),
    "page_of_the_new_token": ({"block_table": lengths(0, 6, 2, 3)}, r"block_table: entry \[0, 1\]"),
    "no_room": ({"cache_seqlens": lengths(16, 3)}, "cache_seqlens: entry 0 is 16"),
    "appended_to_twice": (
        {"cache_seqlens": lengths(9, 3), "block_table": lengths(0, 4, 4, 5)},
        "block_table: page 4 is appended to twice, by sequences 0 and 1",
    ),
    "of_int64": ({"block_table": torch.tensor([0, 1, 2, 3])}, "block_table: dtype is int64"),
    "of_another_batch": ({"block_table": lengths(0, 1)}, "block_table: batch is 1"),
    "with_rows": ({"cache_batch_idx": lengths(0, 1)}, "cache_batch_idx: is given"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
def test_a_bad_page_is_named_and_nothing_is_written(name):
    changed, message = BAD_PAGES[name]
    pages = normal(2, 6, 8, 2, 16)
    before = pages.clone()
    new = normal(2, 1, 2, 16, seed=3)
    arguments = {"cache_seqlens": lengths(8, 3), "block_table": lengths(0, 1, 2, 3)} | changed
    arguments["block_table"] = arguments["block_table"].view(-1, 2)
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(normal(2, 1, 4, 16), *pages, new, new, **arguments)
    assert torch.equal(pages, before)


def test_a_row_or_a_shared_prefix_may_be_read_twice():
    q, new = normal(2, 1, 4, 16), normal(2, 2, 1, 2, 16, seed=3)
    cache = normal(2, 3, 16, 2, 16)
    out = flash_attn_with_kvcache(q, *cache, cache_seqlens=9, cache_batch_idx=lengths(2, 2))
    row = cache[:, 2:].expand(-1, 2, -1, -1, -1)
    assert torch.equal(out, flash_attn_with_kvcache(q, *row, cache_seqlens=9))
    # Both sequences begin with page 5, and append to pages of their own.
    pages = normal(2, 6, 8, 2, 16)
    table = lengths(5, 1, 5, 2).view(2, 2)
    out = flash_attn_with_kvcache(q, *pages, *new, cache_seqlens=8, block_table=table)
    keys, values = (torch.cat([x[[5, 5]], n], 1) for x, n in zip(pages, new))
    assert torch.allclose(out, flash_attn_func(q, keys, values), atol=1e-6)


def test_rows_and_pages_may_be_strided():
    """As the original takes them."""
    q, k, v = normal(2, 1, 2, 16), normal(6, 16, 2, 16, seed=1), normal(6, 16, 2, 16, seed=2)
    rows, table = lengths(3, 9, 1, 9), lengths(3, 0, 1, 5).view(2, 2)
    for given, strided in (
        ({"cache_batch_idx": rows[::2].clone()}, {"cache_batch_idx": rows[::2]}),
        ({"block_table": table}, {"block_table": table.t().contiguous().t()}),
    ):
        expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths(16, 9), **given)
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths(16, 9), **strided)
        assert torch.equal(out, expected)


def test_a_page_that_is_not_in_use_may_be_anything():
    pages = normal(2, 6, 8, 2, 16)
    q = normal(1, 1, 4, 16)
    outs = [
        flash_attn_with_kvcache(
            q, *pages, cache_seqlens=8, block_table=torch.tensor([[4, other]], dtype=torch.int32)
        )
        for other in (2, 99, -7)
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    "changed",
    [
        {"q": [1.0]},
        {"k_cache": None},
        {"v_cache": 3},
        {"k": [1.0]},
        {"v": 2.0},
        {"cache_seqlens": [1, 2]},
        {"cache_seqlens": 1.5},
        {"cache_seqlens": "all"},
        {"num_splits": 2.5},
    ],
    ids=lambda changed: f"{next(iter(changed))}_{next(iter(changed.values()))}",
)
def test_a_wrong_type_is_named_and_nothing_is_written(changed):
    cache = normal(2, 20, 2, 16)
    before = cache.clone()
    arguments: dict[str, Any] = {
        "q": normal(2, 1, 4, 16),
        "k_cache": cache,
        "v_cache": cache,
        "k": normal(2, 1, 2, 16),
        "v": normal(2, 1, 2, 16),
        "cache_seqlens": 5,
    }
    with pytest.raises(TypeError, match=rf"\b{next(iter(changed))}: must be"):
        flash_attn_with_kvcache(**(arguments | changed))
    assert torch.equal(cache, before)


def test_appending_needs_lengths():
    q, cache = normal(1, 1, 2, 16), normal(1, 8, 2, 16)
    with pytest.raises(ValueError, match="cache_seqlens: is None"):
        flash_attn_with_kvcache(q, cache, cache, q, q)
