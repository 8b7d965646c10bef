"""The kernels for NVIDIA GPUs on one, against the fp64 oracle; skipped where there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    assert_close,
    chosen,
    offsets,
    options_of_every_kind,
    out_bound,
    same_bits,
    tensors,
    varlen_tensors,
)

import flash_attn
from flash_attn import (
    dlpack,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._attention import draw_seed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]


def implementations() -> list[str]:
    """Those of this library's that serve CUDA tensors on this machine."""
    if not torch.cuda.is_available():
        return []
    return [it.name for it in flash_attn.implementations("cuda") if it.available]


NAMES = implementations()
pytestmark = pytest.mark.skipif(not NAMES, reason="no NVIDIA GPU, driver or NVRTC")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation, forced."""
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", request.param)
    return request.param


def to_cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def serve(function: Any, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Any:
    """What a function returns on the GPU; what the implementation refuses is skipped."""
    try:
        return function(*map(to_cuda, inputs), **{key: to_cuda(x) for key, x in options.items()})
    except NotImplementedError as error:
        if "cuda:" not in str(error):
            raise
        pytest.skip(f"refused: {str(error).splitlines()[-1]:.100}")


def run(function: Any, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Any:
    """(out, lse) of a function on the GPU, on the CPU."""
    out, lse, _ = serve(function, inputs, options | {"return_attn_probs": True})
    torch.cuda.synchronize()
    return out.cpu(), lse.cpu()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """A dense problem meets the oracle."""
    out, lse = run(flash_attn_func, (q, k, v), options)
    bound = out_bound(q, max(q.shape[1], k.shape[1]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)


def check_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    out, lse = run(flash_attn_varlen_func, (q, k, v), options)
    bound = out_bound(q, max(options["max_seqlen_q"], options["max_seqlen_k"]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)
    return out, lse


def check_varlen_equals_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: dict[str, Any],
    options: dict[str, Any],
) -> torch.Tensor:
    """Sequences meet the oracle, and are to the bit what each is alone; their out."""
    out, lse = check_varlen(q, k, v, **lengths, **options)
    cu_q, cu_k = lengths["cu_seqlens_q"], lengths["cu_seqlens_k"]
    for b in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        alone = (q[None, rows], k[None, keys], v[None, keys])
        dense, dense_lse = run(flash_attn_func, alone, options)
        assert same_bits(out[rows], dense[0])
        assert same_bits(lse[:, rows], dense_lse[0])
    return out


OPTIONS = options_of_every_kind(150, 197)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_meet_the_oracle(name, options, dtype):
    check(*tensors(seqlen_q=150, seqlen_k=197, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim,head_dim_v",
    [(d, d) for d in (1, 8, 16, 31, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)]
    + [(192, 128), (3, 5), (64, 256), (128, 1), (72, 40), (256, 64)],
)
def test_any_head_dim(name, head_dim, head_dim_v, dtype):
    q, k, v = tensors(
        1, 140, 170, num_heads=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype
    )
    check(q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "seqlen_q,seqlen_k",
    [(1, 1), (1, 300), (300, 1), (2, 3), (64, 64), (128, 128), (200, 113), (257, 511), (129, 640)],
)
def test_any_lengths(name, seqlen_q, seqlen_k, causal, dtype):
    for head_dim in (64, 128):
        q, k, v = tensors(1, seqlen_q, seqlen_k, num_heads=2, head_dim=head_dim, dtype=dtype)
        check(q, k, v, causal=causal)


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("seqlen_q,group", [(1, 1), (1, 8), (5, 3), (16, 4)])
@pytest.mark.parametrize("options", ["plain", "causal", "window_left_causal", "softcap", "sink"])
def test_few_queries_over_many_keys(name, options, seqlen_q, group, head_dim):
    q, k, v = tensors(
        2, seqlen_q, 1501, 2 * group, 2, head_dim=head_dim, dtype=HALVES[seqlen_q % 2]
    )
    options = OPTIONS[options]
    if "learnable_sink" in options:
        options = {"learnable_sink": torch.randn(2 * group)}
    check(q, k, v, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("page_size", [0, 16])
def test_few_queries_of_many_sequences(name, page_size, dtype):
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


@pytest.mark.parametrize("window", [(0, 0), (5, -1), (-1, 5), (64, 64), (100, 3), (1000, 1000)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows(name, window, head_dim):
    for seqlen_q, seqlen_k in [(300, 300), (70, 420), (420, 70)]:
        q, k, v = tensors(
            1, seqlen_q, seqlen_k, num_heads=2, head_dim=head_dim, dtype=torch.bfloat16
        )
        check(q, k, v, window_size=window)


@pytest.mark.parametrize("num_heads,num_heads_kv", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads(name, num_heads, num_heads_kv, head_dim):
    q, k, v = tensors(
        3,
        150,
        150,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        dtype=torch.float16,
    )
    check(q, k, v, causal=True)


def test_peaky_softmax(name):
    q, k, v = tensors(1, 200, 333, num_heads=2, head_dim=128, dtype=torch.bfloat16)
    check(q * 8, k, v, causal=True)


def test_empty_problems(name):
    for batch, seqlen_q, seqlen_k in [(0, 5, 5), (2, 0, 5), (2, 5, 0)]:
        inputs = tensors(batch, seqlen_q, seqlen_k, dtype=torch.bfloat16)
        out, lse = run(flash_attn_func, inputs, {})
        assert not out.any() and (lse == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options", ["plain", "causal", "window_left_causal", "softcap", "sink", "alibi"]
)
def test_varlen_equals_dense_bitwise(name, options, head_dim, dtype):
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
def test_tiles_that_exist_in_part(name, causal, head_dim, heads):
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
def test_varlen_of_unlike_head_dims(name, options, page_size, head_dim, head_dim_v):
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
def test_varlen_options(name, dtype):
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
def test_varlen_dropout(name, page_size, dtype):
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


def bias_of_layout(layout: str, kind: torch.dtype) -> torch.Tensor:
    """A bias of 2 x 4 x 150 x 320 as it may lie in memory."""
    shape = {
        "whole": (2, 4, 150, 320),
        "of_heads": (4, 1, 320),
        "of_rows": (2, 1, 150, 1),
        "of_keys": (320,),
        "rows_outermost": (150, 2, 4, 320),
        "gaps": (2, 4, 150, 328),
        "odd_gaps": (2, 4, 150, 321),
        "odd_start": (2, 4, 150, 322),
    }[layout]
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = (bias > -0.5).to(kind) if kind in (torch.bool, torch.uint8) else bias.to(kind)
    bias = bias.cuda()
    if layout == "rows_outermost":
        return bias.permute(1, 2, 0, 3)
    first = 1 if layout == "odd_start" else 0
    return bias[..., first : first + 320]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "layout",
    ["whole", "of_heads", "of_rows", "of_keys", "rows_outermost", "gaps", "odd_gaps", "odd_start"],
)
def test_a_bias_may_lie_anyhow(name, layout, kind):
    q, k, v = tensors(seqlen_q=150, seqlen_k=320, head_dim=128, dtype=torch.bfloat16)
    bias = bias_of_layout(layout, kind)
    out, lse = run(flash_attn_func, (q, k, v), {"attn_bias": bias})
    exact = dlpack.oracle(q, k, v, attn_bias=bias.cpu())
    assert_close(out, lse, exact, out_bound(q, 320, {}))


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(100, 60), (2, 0), (3, 1400)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_under_a_sink_of_minus_infinity(name, seqlen_q, seqlen_k, dtype):
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=2, dtype=dtype)
    hidden = torch.zeros(seqlen_q, 1, dtype=torch.bool)
    check(q, k, v, causal=True, learnable_sink=torch.tensor([-math.inf, 0.5]))
    check(q, k, v, attn_bias=hidden, learnable_sink=torch.tensor([-math.inf, 0.5]))


@pytest.mark.parametrize("kind", [None, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("seqlen_k", [60, 1400])
def test_longer_sequences_than_was_said_stay_in_their_memory(name, seqlen_k, kind):
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
def test_rows_behind_the_last_sequence_are_empty(name, dtype):
    q, k, v = varlen_tensors([400], [60], dtype=dtype)
    cu = offsets([20, 40])
    out, lse = run(
        flash_attn_varlen_func,
        (q, k, v),
        {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 40, "max_seqlen_k": 40},
    )
    assert not out[60:].any() and (lse[:, 60:] == math.inf).all()
    assert out[:60].any() and lse[:, :60].isfinite().all()


def paged(
    k: torch.Tensor, v: torch.Tensor, cu_k: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v of sequences laid end to end in pages, which NaN fills up, and their block_table,
    whose unused entries are no pages."""
    lengths = cu_k.diff().tolist()
    width = (max(lengths) + page_size - 1) // page_size
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(len(lengths) * width, generator=generator).int().view(-1, width)
    paged_k, paged_v = (
        x.new_full((table.numel(), page_size, *x.shape[1:]), math.nan) for x in (k, v)
    )
    for b, length in enumerate(lengths):
        for j in range(length):
            page = table[b, j // page_size]
            paged_k[page, j % page_size] = k[cu_k[b] + j]
            paged_v[page, j % page_size] = v[cu_k[b] + j]
        table[b, (length + page_size - 1) // page_size :] = 2**30
    return paged_k, paged_v, table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 8, 16, 17, 24, 256])
@pytest.mark.parametrize("options", ["causal", "softcap", "sink", "alibi"])
def test_pages_equal_one_piece_bitwise(name, options, page_size, dtype):
    check_pages(64, page_size, dtype, OPTIONS[options])


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
@pytest.mark.parametrize("head_dim", [128, 192, 256])
def test_pages_of_any_head_dim_equal_one_piece_bitwise(name, head_dim, page_size):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["causal", "window", "alibi"])
def test_masked_keys_do_not_leak(name, options, dtype):
    options = {**OPTIONS[options], "causal": True}
    q, k, v = tensors(1, 200, 200, head_dim=128, dtype=dtype)
    expected = run(flash_attn_func, (q[:, :100], k[:, :100], v[:, :100]), options)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, 100:] = 6e4
    poisoned_v[:, 100:] = -6e4
    out, lse = run(flash_attn_func, (q, k, v), options)
    poisoned, poisoned_lse = run(flash_attn_func, (q, poisoned_k, poisoned_v), options)
    assert same_bits(out[:, :100], poisoned[:, :100])
    assert same_bits(lse[:, :, :100], poisoned_lse[:, :, :100])
    del expected


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_under_minus_infinity_do_not_leak(name, head_dim, kind):
    q, k, v = tensors(1, 200, 260, head_dim=head_dim, dtype=torch.bfloat16)
    hidden = torch.rand(200, 260, generator=torch.Generator().manual_seed(2)) < 0.3
    hidden[:, 130:] = hidden[7] = True
    bias = (
        torch.zeros(200, 260).masked_fill(hidden, -math.inf) if kind.is_floating_point else ~hidden
    )
    out, lse = run(flash_attn_func, (q, k, v), {"attn_bias": bias})
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, 130:] = 6e4
    poisoned_v[:, 130:] = -6e4
    poisoned, poisoned_lse = run(flash_attn_func, (q, poisoned_k, poisoned_v), {"attn_bias": bias})
    assert same_bits(out, poisoned) and same_bits(lse, poisoned_lse)
    assert not out[:, 7].any() and (lse[:, :, 7] == math.inf).all()
    exact = dlpack.oracle(q, k, v, attn_bias=bias)
    assert_close(out, lse, exact, out_bound(q, 260, {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_padding_of_nan_does_not_leak(name, head_dim, dtype):
    lengths = [33, 100]
    q, k, v = varlen_tensors([33, 100], [33, 100], dtype=dtype, head_dim=head_dim)
    cu = offsets(lengths)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 100, "max_seqlen_k": 100}
    expected = run(flash_attn_varlen_func, (q, k, v), options)
    padded = [torch.full((300, *x.shape[1:]), math.nan, dtype=dtype) for x in (q, k, v)]
    for wide, x in zip(padded, (q, k, v)):
        wide[:133] = x
    out, lse = run(flash_attn_varlen_func, tuple(padded), options)
    assert same_bits(out[:133], expected[0]) and same_bits(lse[:, :133], expected[1])


@pytest.mark.parametrize("kind", ["heads_major", "gaps", "odd_gaps", "offset"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strides_meet_the_oracle(name, kind, dtype):
    def other(x: torch.Tensor) -> torch.Tensor:
        if kind == "heads_major":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        gap = {"gaps": 24, "odd_gaps": 23, "offset": 8}[kind]
        start = 3 if kind == "offset" else 8
        wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), math.nan, dtype=x.dtype)
        wide[..., start : start + x.shape[-1]] = x
        return wide.cuda()[..., start : start + x.shape[-1]]

    q, k, v = tensors(1, 150, 170, dtype=dtype)
    out, lse = run(flash_attn_func, tuple(map(other, (q, k, v))), {})
    assert_close(out, lse, dlpack.oracle(q, k, v), out_bound(q, 170, {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 100, 128, 192, 256])
@pytest.mark.parametrize("dropout_p", [0.17, 0.5, 1e-30])
def test_dropout_is_the_cpus_bit_for_bit(name, dropout_p, head_dim, dtype):
    q, k, v = tensors(2, 150, 200, head_dim=head_dim, dtype=dtype)
    torch.manual_seed(7)
    expected, _, expected_mask = flash_attn_func_on_cpu(
        q, k, v, dropout_p=dropout_p, causal=True, return_attn_probs=True
    )
    torch.manual_seed(7)
    options = {"dropout_p": dropout_p, "causal": True, "return_attn_probs": True}
    out, lse, mask = serve(flash_attn_func, (q, k, v), options)
    assert torch.equal(mask.cpu() < 0, expected_mask < 0)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    difference = (mask.cpu().float() - expected_mask.float()).abs()
    assert (difference <= tolerance * expected_mask.float().abs() + 1e-6).all()
    torch.manual_seed(7)
    seed = draw_seed()
    oracle = dlpack.oracle(q, k, v, dropout_p=dropout_p, dropout_seed=seed, causal=True)
    assert_close(out.cpu(), lse.cpu(), oracle, out_bound(q, 200, {}))
    assert torch.allclose(out.cpu().float(), expected.float(), atol=0.1, rtol=0.1)


def flash_attn_func_on_cpu(*args: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLASH_ATTENTION_BACKEND", raising=False)
        return flash_attn_func(*args, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_equal_fp64_on_the_gpu(name, head_dim, causal):
    generator = torch.Generator("cuda").manual_seed(head_dim)
    q, k, v = (
        torch.randn(1, n, 3, head_dim, generator=generator, device="cuda").to(torch.bfloat16)
        for n in (2000, 3001, 3001)
    )
    out = flash_attn_func(q, k, v, causal=causal).double()
    qd, kd, vd = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = qd @ kd.mT * head_dim**-0.5
    if causal:
        mask = torch.ones(2000, 3001, dtype=torch.bool, device="cuda").tril(3001 - 2000)
        scores.masked_fill_(~mask, -math.inf)
    p = scores.softmax(-1)
    expected, bound = (p @ vd).transpose(1, 2), (p @ vd.abs()).transpose(1, 2)
    assert ((out - expected).abs() / bound).max() <= 2 * 2.0**-8


def test_runs_are_bitwise_equal(name):
    q, k, v = (x.cuda() for x in tensors(4, 500, 700, num_heads=8, dtype=torch.bfloat16))
    first = flash_attn_func(q, k, v, causal=True)
    for _ in range(5):
        assert same_bits(flash_attn_func(q, k, v, causal=True), first)


def test_a_graph_replays_a_call(name):
    q, k, v = (x.cuda() for x in tensors(dtype=torch.bfloat16))
    expected = flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    static = [torch.zeros_like(x) for x in (q, k, v)]
    with torch.cuda.graph(graph):
        out = flash_attn_func(*static, causal=True)
    for to, x in zip(static, (q, k, v)):
        to.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected)


@pytest.mark.parametrize("copies", [2, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_many_sequences_equal_few(name, causal, copies):
    """Whatever the order in which the kernel takes them: up to 128, those with most keys first."""
    lengths = [300, 1, 0, 333, 64, 500]
    q, k, v = (x.cuda() for x in varlen_tensors(lengths, lengths, dtype=torch.bfloat16))
    cu = offsets(lengths).cuda()
    few = flash_attn_varlen_func(q, k, v, cu, cu, 500, 500, causal=causal)
    many = [x.repeat(copies, 1, 1) for x in (q, k, v)]
    cu = offsets(lengths * copies).cuda()
    out = flash_attn_varlen_func(*many, cu, cu, 500, 500, causal=causal)
    assert same_bits(out, few.repeat(copies, 1, 1))


def test_varlen_launches_at_once_share_nothing(name):
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
def test_a_graph_replays_decoding(name, dtype):
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
    name, rotates, options, head_dim, page_size, dtype
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


def test_prompts_behind_padding_in_pages(name):
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
def test_wrong_lengths_rows_and_pages_write_nothing(name, page_size, monkeypatch):
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


def test_calls_run_on_the_current_stream(name):
    q, k, v = (x.cuda() for x in tensors(8, 1000, 1000, dtype=torch.bfloat16))
    expected = flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flash_attn_func(late, k, v)
    stream.synchronize()
    assert same_bits(out, expected)


def test_explain_names_the_kernel(name):
    q, k, v = (x.cuda() for x in tensors(dtype=torch.bfloat16))
    assert chosen(q, k, v) == name
    text = flash_attn.explain(q, k, v)
    assert "registers" in text and "shared memory" in text


@pytest.mark.parametrize("options", ["alibi", "bias", "everything", "dropout", "pages"])
def test_hoppers_kernel_serves_every_option(options):
    if "cuda:sm90" not in NAMES:
        pytest.skip("the GPU is no Hopper")
    q, k, v = (x.cuda() for x in tensors(2, 150, 197, dtype=torch.bfloat16))
    if options == "pages":
        cu_q, cu_k = offsets([150, 150]), offsets([197, 197])
        k, v, table = paged(k.cpu().flatten(0, 1), v.cpu().flatten(0, 1), cu_k, 16)
        given: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "block_table": table}
        q, given["max_seqlen_q"], given["max_seqlen_k"] = q.flatten(0, 1), 150, 197
    else:
        given = {"dropout_p": 0.2} if options == "dropout" else OPTIONS[options]
    given = {key: to_cuda(x) for key, x in given.items()}
    text = flash_attn.explain(q, k.cuda(), v.cuda(), **given)
    assert "forward_sm90" in text.splitlines()[0], text


def test_what_no_kernel_takes_is_refused(name):
    q, k, v = (x.cuda() for x in tensors(head_dim=512, dtype=torch.bfloat16))
    with pytest.raises(NotImplementedError, match="head_dim"):
        flash_attn_func(q, k, v)


def test_random_problems_meet_the_oracle(name):
    rng = np.random.default_rng(0)
    for case in range(40):
        dtype = DTYPES[rng.integers(3)]
        kv = int(rng.integers(1, 3))
        heads = kv * int(rng.integers(1, 4))
        dim = int(rng.integers(1, 257)) if rng.random() < 0.5 else int(rng.choice([64, 128]))
        sq, sk = (int(x) for x in rng.integers(1, 400, 2))
        q, k, v = tensors(2, sq, sk, heads, kv, dim, dtype=dtype, seed=case)
        options: dict[str, Any] = {"causal": bool(rng.random() < 0.5)}
        if rng.random() < 0.4:
            options["window_size"] = tuple(int(x) for x in rng.integers(-1, 200, 2))
        if rng.random() < 0.3:
            options["softcap"] = 10.0
        if rng.random() < 0.3:
            options["alibi_slopes"] = torch.rand(heads) * 0.3
        if rng.random() < 0.3:
            options["learnable_sink"] = torch.randn(heads)
        if rng.random() < 0.3:
            options["attn_bias"] = torch.randn(heads, sq, sk)
        check(q, k, v, **options)
