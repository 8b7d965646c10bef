"""The kernels for NVIDIA GPUs on one, against the fp64 oracle; skipped where there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cuda_calls import (
    DTYPES,
    HALVES,
    NAMES,
    OPTIONS,
    check,
    paged,
    run,
    serve,
    to_cuda,
)
from support import (
    assert_close,
    chosen,
    offsets,
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
)
from flash_attn._attention import draw_seed

pytestmark = pytest.mark.skipif(not NAMES, reason="no NVIDIA GPU, driver or NVRTC")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_meet_the_oracle(cuda_backend, options, dtype):
    check(*tensors(seqlen_q=150, seqlen_k=197, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim,head_dim_v",
    [(d, d) for d in (1, 8, 16, 31, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)]
    + [(192, 128), (3, 5), (64, 256), (128, 1), (72, 40), (256, 64)],
)
def test_any_head_dim(cuda_backend, head_dim, head_dim_v, dtype):
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
def test_any_lengths(cuda_backend, seqlen_q, seqlen_k, causal, dtype):
    for head_dim in (64, 128):
        q, k, v = tensors(1, seqlen_q, seqlen_k, num_heads=2, head_dim=head_dim, dtype=dtype)
        check(q, k, v, causal=causal)


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("seqlen_q,group", [(1, 1), (1, 8), (5, 3), (16, 4)])
@pytest.mark.parametrize("options", ["plain", "causal", "window_left_causal", "softcap", "sink"])
def test_few_queries_over_many_keys(cuda_backend, options, seqlen_q, group, head_dim):
    q, k, v = tensors(
        2, seqlen_q, 1501, 2 * group, 2, head_dim=head_dim, dtype=HALVES[seqlen_q % 2]
    )
    options = OPTIONS[options]
    if "learnable_sink" in options:
        options = {"learnable_sink": torch.randn(2 * group)}
    check(q, k, v, **options)


@pytest.mark.parametrize("window", [(0, 0), (5, -1), (-1, 5), (64, 64), (100, 3), (1000, 1000)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows(cuda_backend, window, head_dim):
    for seqlen_q, seqlen_k in [(300, 300), (70, 420), (420, 70)]:
        q, k, v = tensors(
            1, seqlen_q, seqlen_k, num_heads=2, head_dim=head_dim, dtype=torch.bfloat16
        )
        check(q, k, v, window_size=window)


@pytest.mark.parametrize("num_heads,num_heads_kv", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads(cuda_backend, num_heads, num_heads_kv, head_dim):
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


def test_peaky_softmax(cuda_backend):
    q, k, v = tensors(1, 200, 333, num_heads=2, head_dim=128, dtype=torch.bfloat16)
    check(q * 8, k, v, causal=True)


def test_empty_problems(cuda_backend):
    for batch, seqlen_q, seqlen_k in [(0, 5, 5), (2, 0, 5), (2, 5, 0)]:
        inputs = tensors(batch, seqlen_q, seqlen_k, dtype=torch.bfloat16)
        out, lse = run(flash_attn_func, inputs, {})
        assert not out.any() and (lse == math.inf).all()


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
def test_a_bias_may_lie_anyhow(cuda_backend, layout, kind):
    q, k, v = tensors(seqlen_q=150, seqlen_k=320, head_dim=128, dtype=torch.bfloat16)
    bias = bias_of_layout(layout, kind)
    out, lse = run(flash_attn_func, (q, k, v), {"attn_bias": bias})
    exact = dlpack.oracle(q, k, v, attn_bias=bias.cpu())
    assert_close(out, lse, exact, out_bound(q, 320, {}))


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(100, 60), (2, 0), (3, 1400)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_under_a_sink_of_minus_infinity(cuda_backend, seqlen_q, seqlen_k, dtype):
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=2, dtype=dtype)
    hidden = torch.zeros(seqlen_q, 1, dtype=torch.bool)
    check(q, k, v, causal=True, learnable_sink=torch.tensor([-math.inf, 0.5]))
    check(q, k, v, attn_bias=hidden, learnable_sink=torch.tensor([-math.inf, 0.5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["causal", "window", "alibi"])
def test_masked_keys_do_not_leak(cuda_backend, options, dtype):
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
def test_keys_under_minus_infinity_do_not_leak(cuda_backend, head_dim, kind):
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
def test_padding_of_nan_does_not_leak(cuda_backend, head_dim, dtype):
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
def test_strides_meet_the_oracle(cuda_backend, kind, dtype):
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
def test_dropout_is_the_cpus_bit_for_bit(cuda_backend, dropout_p, head_dim, dtype):
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
def test_long_sequences_equal_fp64_on_the_gpu(cuda_backend, head_dim, causal):
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


def test_runs_are_bitwise_equal(cuda_backend):
    q, k, v = (x.cuda() for x in tensors(4, 500, 700, num_heads=8, dtype=torch.bfloat16))
    first = flash_attn_func(q, k, v, causal=True)
    for _ in range(5):
        assert same_bits(flash_attn_func(q, k, v, causal=True), first)


def test_a_graph_replays_a_call(cuda_backend):
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


def test_calls_run_on_the_current_stream(cuda_backend):
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


def test_explain_names_the_kernel(cuda_backend):
    q, k, v = (x.cuda() for x in tensors(dtype=torch.bfloat16))
    assert chosen(q, k, v) == cuda_backend
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


def test_what_no_kernel_takes_is_refused(cuda_backend):
    q, k, v = (x.cuda() for x in tensors(head_dim=512, dtype=torch.bfloat16))
    with pytest.raises(NotImplementedError, match="head_dim"):
        flash_attn_func(q, k, v)


def test_random_problems_meet_the_oracle(cuda_backend):
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
