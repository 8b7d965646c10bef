"""The kernels for NVIDIA GPUs on sequences end to end, pages, caches, and many tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_calls import (
    DTYPES,
    HALVES,
    NAMES,
    OPTIONS,
    check_varlen,
    check_varlen_equals_dense,
    paged,
    run,
    serve,
)
from support import (
    assert_close,
    offsets,
    out_bound,
    same_bits,
    tensors,
    varlen_tensors,
)

from flash_attn import (
    dlpack,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._attention import draw_seed

pytestmark = pytest.mark.skipif(not NAMES, reason="no NVIDIA GPU, driver or NVRTC")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("page_size", [0, 16])
def test_few_queries_of_many_sequences(cuda_backend, page_size, dtype):
    """Some of them empty, and rows behind the last."""
    lengths_q, lengths_k = [3, 0, 1, 4], [700, 30, 0, 1333]
    q, k, v = varlen_tensors([*lengths_q, 5], lengths_k, dtype=dtype)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    options = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 4,
        "max_seqlen_k": 1400,
        "causal": True,
        "alibi_slopes": torch.rand(4, 4),
    }
    if page_size > 0:
        k, v, options["block_table"] = paged(k, v, cu_k, page_size)
    out, lse = check_varlen(q, k, v, **options)
    assert not out[8:].any() and (lse[:, 8:] == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options", ["plain", "causal", "window_left_causal", "softcap", "sink", "alibi"]
)
def test_varlen_equals_dense_bitwise(cuda_backend, options, head_dim, dtype):
    options = OPTIONS[options]
    lengths_q, lengths_k = [65, 1, 0, 230], [97, 200, 5, 230]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=dtype, head_dim=head_dim)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    lengths = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 230,
        "max_seqlen_k": 230,
    }
    check_varlen_equals_dense(q, k, v, lengths, options)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_that_exist_in_part(cuda_backend, causal, head_dim, heads):
    """Of rows and of keys; some sequences have no keys, or fewer than rows. In any order."""
    lengths_q, lengths_k = [65, 190, 64, 0, 70, 257], [33, 0, 100, 9, 130, 257]
    num_heads, num_heads_kv = heads
    options = {"num_heads": num_heads, "num_heads_kv": num_heads_kv, "head_dim": head_dim}
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=torch.bfloat16, **options)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    lengths = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 257,
        "max_seqlen_k": 257,
    }
    check_varlen_equals_dense(q, k, v, lengths, {"causal": causal})


@pytest.mark.parametrize(
    "head_dim,head_dim_v", [(128, 64), (64, 128), (192, 128), (40, 192), (256, 64)]
)
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("options", ["causal", "softcap", "alibi"])
def test_varlen_of_unlike_head_dims(cuda_backend, options, page_size, head_dim, head_dim_v):
    """Of which whole boxes of columns are padding; as dense calls, to the bit."""
    options = OPTIONS[options]
    lengths_q, lengths_k = [65, 230], [97, 230]
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=torch.bfloat16, **dims)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 230, "max_seqlen_k": 230}
    out = check_varlen_equals_dense(q, k, v, lengths, options)
    if page_size > 0:
        *pages, lengths["block_table"] = paged(k, v, cu_k, page_size)
        assert same_bits(run(flash_attn_varlen_func, (q, *pages), lengths | options)[0], out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_options(cuda_backend, dtype):
    q, k, v = varlen_tensors([30, 0, 170], [64, 5, 199], dtype=dtype)
    check_varlen(
        q,
        k,
        v,
        cu_seqlens_q=offsets([30, 0, 170]),
        cu_seqlens_k=offsets([64, 5, 199]),
        max_seqlen_q=180,
        max_seqlen_k=200,
        seqused_k=torch.tensor([50, 0, 199], dtype=torch.int32),
        causal=True,
        softcap=10.0,
        alibi_slopes=torch.rand(3, 4),
        attn_bias=torch.randn(3, 1, 180, 200),
        learnable_sink=torch.randn(4),
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("page_size", [0, 16])
def test_varlen_dropout(cuda_backend, page_size, dtype):
    q, k, v = varlen_tensors([30, 0, 170], [64, 5, 199], dtype=dtype)
    cu_k = offsets([64, 5, 199])
    options: dict[str, Any] = {
        "cu_seqlens_q": offsets([30, 0, 170]),
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 180,
        "max_seqlen_k": 200,
        "dropout_p": 0.3,
        "causal": True,
    }
    torch.manual_seed(7)
    exact = dlpack.oracle(q, k, v, dropout_seed=draw_seed(), **options)
    if page_size > 0:
        k, v, options["block_table"] = paged(k, v, cu_k, page_size)
    torch.manual_seed(7)
    out, lse = run(flash_attn_varlen_func, (q, k, v), options)
    assert_close(out, lse, exact, out_bound(q, 200, {}))


@pytest.mark.parametrize("kind", [None, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("seqlen_k", [60, 1400])
def test_longer_sequences_than_was_said_stay_in_their_memory(cuda_backend, seqlen_k, kind):
    """Nobody knows of them before the kernels do. Results of the queries that were told of are
    right; a bias behind its end would be NaN."""
    q, k, v = varlen_tensors([40], [seqlen_k], num_heads=4, dtype=torch.bfloat16)
    told = {"max_seqlen_q": 2, "max_seqlen_k": seqlen_k - 8}
    cu_q, cu_k = offsets([40]), offsets([seqlen_k])
    options: dict[str, Any] = {}
    keys = seqlen_k
    if kind is not None:
        keys = told["max_seqlen_k"]
        memory = torch.full((4, 6, seqlen_k), math.nan, device="cuda").to(kind)
        options["attn_bias"] = memory[:, :2, :keys] = torch.randn(4, 2, keys).cuda().to(kind)
    out, lse = run(
        flash_attn_varlen_func,
        (q, k, v),
        {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **told, **options},
    )
    bias = {name: x.cpu() for name, x in options.items()}
    exact = dlpack.oracle(q[None, :2], k[None, :keys], v[None, :keys], **bias)
    assert_close(out[None, :2], lse[None, :, :2], exact, out_bound(q, keys, {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_behind_the_last_sequence_are_empty(cuda_backend, dtype):
    q, k, v = varlen_tensors([400], [60], dtype=dtype)
    cu = offsets([20, 40])
    out, lse = run(
        flash_attn_varlen_func,
        (q, k, v),
        {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 40, "max_seqlen_k": 40},
    )
    assert not out[60:].any() and (lse[:, 60:] == math.inf).all()
    assert out[:60].any() and lse[:, :60].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 8, 16, 17, 24, 256])
@pytest.mark.parametrize("options", ["causal", "softcap", "sink", "alibi"])
def test_pages_equal_one_piece_bitwise(cuda_backend, options, page_size, dtype):
    check_pages(64, page_size, dtype, OPTIONS[options])


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
@pytest.mark.parametrize("head_dim", [128, 192, 256])
def test_pages_of_any_head_dim_equal_one_piece_bitwise(cuda_backend, head_dim, page_size):
    check_pages(head_dim, page_size, torch.bfloat16, OPTIONS["causal"])


def check_pages(head_dim: int, page_size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    lengths_q, lengths_k = [20, 5, 140], [45, 133, 290]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=dtype, head_dim=head_dim)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    pages_k, pages_v, table = paged(k, v, cu_k, page_size)
    lengths = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 140,
        "max_seqlen_k": 290,
        **options,
    }
    expected = run(flash_attn_varlen_func, (q, k, v), lengths)
    actual = run(flash_attn_varlen_func, (q, pages_k, pages_v), {**lengths, "block_table": table})
    assert same_bits(actual[0], expected[0]) and same_bits(actual[1], expected[1])


@pytest.mark.parametrize("copies", [2, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_many_sequences_equal_few(cuda_backend, causal, copies):
    """Whatever the order in which the kernel takes them: up to 128, those with most keys first."""
    lengths = [300, 1, 0, 333, 64, 500]
    q, k, v = (x.cuda() for x in varlen_tensors(lengths, lengths, dtype=torch.bfloat16))
    cu = offsets(lengths).cuda()
    few = flash_attn_varlen_func(q, k, v, cu, cu, 500, 500, causal=causal)
    many = [x.repeat(copies, 1, 1) for x in (q, k, v)]
    cu = offsets(lengths * copies).cuda()
    out = flash_attn_varlen_func(*many, cu, cu, 500, 500, causal=causal)
    assert same_bits(out, few.repeat(copies, 1, 1))


@pytest.mark.parametrize("copies", [1, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_causal_tiles_equal_few(cuda_backend, head_dim, copies):
    """Dense ones: all at once, in pairs, or one after another, as there are more and more."""
    options = {"num_heads": 8, "head_dim": head_dim, "dtype": torch.bfloat16}
    q, k, v = (x.cuda() for x in tensors(2, 1100, 1100, **options))
    few = [flash_attn_func(q[[b]], k[[b]], v[[b]], causal=True) for b in range(2)]
    many = [x.repeat(copies, 1, 1, 1) for x in (q, k, v)]
    assert same_bits(flash_attn_func(*many, causal=True), torch.cat(few * copies))


def test_varlen_launches_at_once_share_nothing(cuda_backend):
    """Whatever their workspaces hold; and those that a graph replays, again and again."""
    lengths = [500, 1, 0, 333, 64, 700] * 8
    q, k, v = (x.cuda() for x in varlen_tensors(lengths, lengths, dtype=torch.bfloat16))
    cu = offsets(lengths).cuda()

    def call() -> torch.Tensor:
        torch.full((64,), 2**60 + 12345, device="cuda")  # freed, as it is, at once
        return flash_attn_varlen_func(q, k, v, cu, cu, 700, 700, causal=True)

    expected = call()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            outs.append(call())
    torch.cuda.synchronize()
    assert all(same_bits(out, expected) for out in outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [call() for _ in range(3)]
    for _ in range(3):
        for out in outs:
            out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(out, expected) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_decoding(cuda_backend, dtype):
    """Ten tokens through one graph equal the whole sequence; lengths advance on the device."""
    q, k, v = (x.cuda() for x in tensors(2, 600, 600, dtype=dtype))
    expected = serve(flash_attn_func, (q, k, v), {"causal": True})
    k_cache, v_cache = torch.full((2, 2, 700, 2, 64), math.nan, dtype=dtype, device="cuda")
    k_cache[:, :590], v_cache[:, :590] = k[:, :590], v[:, :590]
    lengths = torch.full((2,), 590, dtype=torch.int32, device="cuda")
    static = [x[:, 590:591].clone() for x in (q, k, v)]
    ones = torch.ones(600, 16, device="cuda")  # a rotation by 0, for which there is a workspace
    options: dict[str, Any] = dict(rotary_cos=ones, rotary_sin=ones * 0, causal=True, num_splits=3)
    graph = torch.cuda.CUDAGraph()
    options["cache_seqlens"] = lengths
    flash_attn_with_kvcache(*step(static, k_cache, v_cache), **options)
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(*step(static, k_cache, v_cache), **options)
        lengths += 1
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for t in range(590, 600):
        for to, x in zip(static, (q, k, v)):
            to.copy_(x[:, t : t + 1])
        graph.replay()
        assert (out - expected[:, t : t + 1]).abs().max() <= tolerance, t
    assert same_bits(k_cache[:, :600].cpu(), k.cpu()) and k_cache[:, 600:].isnan().all()


def step(new: list[torch.Tensor], k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
    """The first arguments of flash_attn_with_kvcache()."""
    q, k, v = new
    return q, k_cache, v_cache, k, v


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("page_size", [0, 8, 17, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", ["causal", "window", "softcap", "alibi"])
@pytest.mark.parametrize("rotates", [False, True])
def test_prompts_over_caches_equal_dense_bitwise(
    cuda_backend, rotates, options, head_dim, page_size, dtype
):
    """Chunks of 300 tokens behind cached ones, in caches whose unused part is NaN. Shared
    keys, which may be chosen, agree within rounding."""
    options = dict(OPTIONS[options])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(8, generator=torch.Generator().manual_seed(3))
    cached, new = [0, 100, 333], 300
    q, k, v = tensors(3, new, 633, 8, 2, head_dim, dtype=dtype)
    layout: dict[str, Any] = {"cache_seqlens": torch.tensor(cached, dtype=torch.int32)}
    padding = [0, 0, 0]
    if page_size > 0:
        ends = offsets([633] * 3)
        k_cache, v_cache, table = paged(k.flatten(0, 1), v.flatten(0, 1), ends, page_size)
        for b, count in enumerate(cached):  # the rest is to be appended
            for j in range(count, 633):
                page = table[b, j // page_size], j % page_size
                k_cache[page] = v_cache[page] = math.nan
        layout["block_table"] = table
    else:
        rows, padding = [4, 0, 2], [0, 5, 17]
        k_cache, v_cache = torch.full((2, 5, 700, 2, head_dim), math.nan, dtype=dtype)
        for b, (row, gap, count) in enumerate(zip(rows, padding, cached)):
            k_cache[row, gap : gap + count] = k[b, :count]
            v_cache[row, gap : gap + count] = v[b, :count]
        layout["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32)
        layout["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
        layout["cache_seqlens"] += layout["cache_leftpad"]
    if rotates:  # by 0
        ones = torch.ones(700, 16)
        layout |= {"rotary_cos": ones, "rotary_sin": ones * 0}
    k_new, v_new = (torch.stack([x[b, n : n + new] for b, n in enumerate(cached)]) for x in (k, v))
    inputs = (q, k_cache, v_cache, k_new, v_new)
    whole, chosen = (
        serve(flash_attn_with_kvcache, inputs, {**layout, **options, "num_splits": n}).cpu()
        for n in (1, 0)
    )
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for b, n in enumerate(cached):
        keys = k[b : b + 1, : n + new], v[b : b + 1, : n + new]
        expected, _ = run(flash_attn_func, (q[b : b + 1], *keys), options)
        assert same_bits(whole[b : b + 1], expected), b
        assert (chosen[b : b + 1] - expected).abs().max() <= tolerance, b


def test_prompts_behind_padding_in_pages(cuda_backend):
    """Where no box of the copy engine's lies within a page."""
    q, k, v = tensors(2, 300, 400, 16, 2, dtype=torch.bfloat16)
    padding = torch.tensor([3, 70], dtype=torch.int32)
    wide = [torch.cat([torch.zeros(2, 80, 2, 64).to(x.dtype), x], 1) for x in (k, v)]
    for b in range(2):
        for w, x in zip(wide, (k, v)):
            w[b] = math.nan
            w[b, padding[b] : padding[b] + 400] = x[b]
    k_cache, v_cache, table = paged(*(w.flatten(0, 1) for w in wide), offsets([480, 480]), 16)
    layout = {
        "block_table": table,
        "cache_leftpad": padding,
        "cache_seqlens": padding + 400,
        "causal": True,
    }
    out = serve(flash_attn_with_kvcache, (q, k_cache, v_cache), layout).cpu()
    lse = run(flash_attn_func, (q, k, v), {"causal": True})[1]
    assert_close(out, lse, dlpack.oracle(q, k, v, causal=True), out_bound(q, 400, {}))


@pytest.mark.parametrize("page_size", [0, 16])
def test_wrong_lengths_rows_and_pages_write_nothing(cuda_backend, page_size, monkeypatch):
    """Without FLASH_ATTENTION_CHECK nobody knows of them before the kernels do."""
    monkeypatch.delenv("FLASH_ATTENTION_CHECK", raising=False)
    memory = torch.zeros(2, 12, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    k_cache, v_cache = memory[:, 3:9].unbind()  # 6 rows, or pages, amid others' memory
    new = [torch.ones(4, 3, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in "qkv"]
    int32 = dict(dtype=torch.int32, device="cuda")
    layouts: list[dict[str, Any]]
    if page_size > 0:
        pages = [[6, 0], [-1, 1], [2**30, 2], [2, -(2**31)]]
        layouts = [
            {"block_table": torch.tensor(pages, **int32), "cache_seqlens": torch.zeros(4, **int32)},
            {
                "block_table": torch.zeros(4, 2, **int32),
                "cache_seqlens": torch.tensor([32, -3, 2**31 - 3, -(2**31)], **int32),
            },
        ]
        layouts[0]["cache_seqlens"][3] = 16
    else:
        layouts = [
            {"cache_seqlens": torch.zeros(4, **int32), "cache_batch_idx": rows}
            for rows in (torch.tensor([6, -1, 2**30, -(2**31)], **int32),)
        ]
        layouts.append(
            {
                "cache_seqlens": torch.tensor([16, -3, 2**31 - 3, -(2**31)], **int32),
                "cache_batch_idx": torch.arange(4, **int32),
            }
        )
    for layout in layouts:
        flash_attn_with_kvcache(*step(new, k_cache, v_cache), causal=True, **layout)
        torch.cuda.synchronize()
        assert not memory.any()
