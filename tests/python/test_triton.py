"""The Triton kernels: compiled for GPUs that are not there, and interpreted on the CPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is in requirements-dev.txt")

import test_backward
import triton
from support import assert_close, out_bound, tensors
from triton_targets import TARGETS, call, launches_compile

from flash_attn import (
    _backends,
    dlpack,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._call import Cache, Gradients, Request
from flash_attn.triton import counters, launch, tiles

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
describes = pytest.mark.skipif(
    not (ON_HOPPER or INTERPRETED), reason="tensor descriptors are used on Hopper"
)

triton_runs = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)

HERE = Path(__file__).parent


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def launch_all_kernels() -> None:
    """Every kernel once; the forward also over pages in splits, of few queries and of many."""
    plain = call(64, torch.bfloat16, attn_bias=torch.zeros(1, 1, 256, 256))
    bias = plain.attn_bias
    gradients = Gradients(plain.out, plain.q, plain.k, plain.v, bias, None, False)
    launch.run(Request(plain))
    launch.run(Request(plain, gradients=gradients))

    pages = plain.k.view(16, 16, 2, 64)
    new, angles = pages[:1, :1], torch.zeros(256, 8)
    cache = Cache(int32(200), None, int32(3), new, new, angles, angles, True, 40)
    table = torch.arange(16, dtype=torch.int32)[None]
    for q in (plain.q[:, :1], plain.q[:, :16]):
        paged = plain._replace(q=q, k=pages, v=pages, out=q, lse=None, block_table=table)
        launch.run(Request(paged._replace(attn_bias=None), cache))


def launch_with_every_option() -> None:
    """The forward and the backward with all options at once."""
    full = call(
        24,
        torch.float16,
        window_left=100,
        softcap=10.0,
        dropout_p=0.1,
        alibi_slopes=torch.zeros(4),
        attn_bias=torch.zeros(256, 256, dtype=torch.bool),
        learnable_sink=torch.zeros(4),
    )
    gradients = Gradients(full.out, full.q, full.k, full.v, None, None, False)
    launch.run(Request(full))
    launch.run(Request(full, gradients=gradients))


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles(name):
    # In full for the GPU that its tiles were measured on.
    with launches_compile(TARGETS[name], 128 if name == "sm_90" else 32) as compiled:
        launch_all_kernels()
    names = {kernel.name for kernel in compiled}
    assert names == {
        "forward_kernel",
        "combine_kernel",
        "append_kernel",
        "terms_kernel",
        "key_gradient_kernel",
        "query_gradient_kernel",
        "bias_gradient_kernel",
    }
    assert all(kernel.binary for kernel in compiled)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_every_option_compiles(name):
    with launches_compile(TARGETS[name], 32) as compiled:
        launch_with_every_option()
    assert all(kernel.binary for kernel in compiled)


@pytest.fixture
def all_are_described(monkeypatch):
    """Tensor descriptors for large problems, which the suites have none of, serve all."""
    monkeypatch.setattr(launch, "_DESCRIBED_FROM", 0)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(tiles, "_chosen", {})
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "triton")


@pytest.fixture
def only_triton(monkeypatch):
    """Plans of this test's own."""
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(_backends, "_taken", {})
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "triton")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_products_of_the_backward_overlap(head_dim, causal, all_are_described, tmp_path):
    """ptxas tells of kernels whose matrix products it has to run one by one."""
    problem = call(head_dim, torch.bfloat16, causal=causal)
    gradients = Gradients(problem.out, problem.q, problem.k, problem.v, None, None, False)
    with launches_compile(TARGETS["sm_90"], 128) as compiled:
        launch.run(Request(problem, gradients=gradients))
    products = [kernel for kernel in compiled if "wgmma" in kernel.assembly]
    assert {kernel.name for kernel in products} == {"key_gradient_kernel", "query_gradient_kernel"}
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for kernel in products:
        (tmp_path / "kernel.ptx").write_text(kernel.assembly)
        command = [ptxas, "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "registers" in told.stderr
        assert "serialized" not in told.stderr, told.stderr


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_launches_that_overlap_wait_before_they_load(name):
    with launches_compile(TARGETS[name], 32) as compiled:
        launch_all_kernels()
    overlap = {kernel.name for kernel in compiled if kernel.overlaps}
    decoding = {"append_kernel", "forward_kernel", "combine_kernel"}
    assert overlap == (decoding if name == "sm_90" else set())
    for kernel in compiled:
        before, wait, _ = kernel.assembly.partition("griddepcontrol.wait")
        assert bool(wait) == kernel.overlaps
        assert not wait or not any(x in before for x in ("ld.global", "cp.async", "st.global"))


@pytest.mark.parametrize(
    "programs,keys,splits",
    [(8, 4096, 16), (32, 4096, 4), (64, 16384, 2), (512, 4096, 1), (1, 64, 1)],
)
def test_splits_are_no_more_than_fill_the_processors(programs, keys, splits, monkeypatch):
    monkeypatch.setattr(tiles, "num_processors", lambda device: 132)
    k = torch.empty(1, keys, 1, 64)
    problem = call(64, torch.bfloat16, k=k, v=k)
    assert launch._num_splits(problem, None, programs, 64) == splits


def on_device(x: torch.Tensor) -> torch.Tensor:
    """x where Triton runs, between NaN, which must not be read."""
    space = torch.full((3, *x.shape), float("nan"), dtype=x.dtype, device=DEVICE)
    space[1] = x
    return space[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (30, 5)}, {"softcap": 5.0, "attn_bias": torch.ones(1)}],
    ids=["plain", "causal", "window", "options"],
)
@describes
def test_problems_of_any_size_may_be_described(options, head_dim, dtype, all_are_described):
    q, k, v = tensors(2, 150, 210, head_dim=head_dim, dtype=dtype)
    there = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out, lse, _ = flash_attn_func(*map(on_device, (q, k, v)), return_attn_probs=True, **there)
    assert any(choice.kind == tiles.DESCRIBED for choice in tiles._chosen)
    bound = out_bound(q, 210, options)
    assert_close(out.cpu(), lse.cpu(), dlpack.oracle(q, k, v, **options), bound)


def check_gradients(case: str, head_dim: int, dtype: torch.dtype) -> None:
    """Gradients of lengths that tiles do not divide."""

    def function(q, k, v, **options):
        there = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        return flash_attn_func(*map(on_device, (q, k, v)), **there).cpu()

    inputs = dict(zip("qkv", tensors(2, 150, 210, head_dim=head_dim, dtype=dtype)))
    with torch.enable_grad():
        test_backward.check(function, inputs, **test_backward.CASES[case])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("case", test_backward.CASES)
@describes
def test_gradients_of_any_size_may_be_described(case, head_dim, dtype, all_are_described):
    check_gradients(case, head_dim, dtype)
    assert any(choice.kind == tiles.DESCRIBED_KEY_GRADIENT for choice in tiles._chosen)


@pytest.mark.parametrize("case", test_backward.CASES)
@triton_runs
def test_gradients_of_head_dim_256(case, only_triton):
    check_gradients(case, 256, torch.float16)


@pytest.fixture
def counted(monkeypatch):
    """The counters that launches have had."""
    taken, zeros = [], counters.zeros

    def spy(*arguments):
        taken.append(zeros(*arguments))
        return taken[-1]

    monkeypatch.setattr(counters, "zeros", spy)
    return taken


def decoding(heads: int = 4, queries: int = 2, keys: int = 150, head_dim: int = 40):
    """A function of (q, num_splits) that attends to a cache where Triton runs, and the shape of q.
    The second sequence has so few keys that most splits see none."""
    k, v = (x.to(DEVICE) for x in tensors(2, 1, keys, 2, 2, head_dim)[1:])
    lengths = int32(keys - 7, 20).to(DEVICE)

    def attend(q, num_splits):
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, num_splits=num_splits, causal=True
        )

    return attend, (2, queries, heads, head_dim)


@triton_runs
@pytest.mark.parametrize("one_launch", [True, False], ids=["one_launch", "two_launches"])
def test_every_call_counts_its_splits_anew(one_launch, only_triton, counted, monkeypatch):
    monkeypatch.setattr(tiles, "combines_in_one_launch", lambda device: one_launch)
    attend, shape = decoding()
    for splits in (5, 3, 17, 5):
        q = torch.randn(shape, device=DEVICE)
        whole, out = attend(q, 1), attend(q, splits)
        assert (out - whole).abs().max() <= 1e-5, splits
        assert torch.equal(out, attend(q, splits)), splits
    assert bool(counted) == one_launch


@triton_runs
@pytest.mark.parametrize("one_launch", [True, False], ids=["one_launch", "two_launches"])
def test_sequences_of_any_length_are_split(one_launch, only_triton, monkeypatch):
    """Also those without queries or without keys, and rows behind the last sequence."""
    q, k, v = (x[0].to(DEVICE) for x in tensors(1, 9, 700, 4, 2, 32))
    sink = torch.randn(4, device=DEVICE)
    ends = [int32(0, 2, 2, 3, 5, 7).to(DEVICE), int32(0, 300, 420, 420, 440, 690).to(DEVICE)]

    def attend(processors):
        monkeypatch.setattr(launch, "_plans", {})
        monkeypatch.setattr(tiles, "num_processors", lambda device: processors)
        monkeypatch.setattr(tiles, "combines_in_one_launch", lambda device: one_launch)
        options = dict(causal=True, learnable_sink=sink, return_attn_probs=True)
        out, lse, _ = flash_attn_varlen_func(q, k, v, *ends, 2, 300, **options)
        return out[:7], lse[:, :7]

    whole, many = attend(1), attend(100)
    for a, b in zip(whole, many):
        assert torch.equal(a.isinf(), b.isinf())
        assert (a - b).nan_to_num().abs().max() <= 1e-5


def test_captured_launches_and_streams_have_counters_of_their_own():
    of = counters._Counters(torch.device("cpu"))
    taken = [of.of_stream(1, 8), of.of_stream(2, 8), of.captured(8), of.captured(8)]
    taken += [of.of_stream(1, 2000), of.captured(counters._PIECE + 1), of.captured(8)]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in taken)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert not any(x.any() for x in taken)
    assert of.of_stream(1, 9).data_ptr() == taken[4].data_ptr()


def test_counters_outlive_the_capture_of_a_graph():
    """Which remembers their address alone."""
    of = counters._Counters(torch.device("cpu"))
    of.of_stream(0, 1)
    memory = []
    for _ in range(3):
        of._refill(counters._PIECE)
        memory.append(weakref.ref(of.captured(8)._base))
    assert all(piece() is not None for piece in memory)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU whose programs combine splits")
def test_graphs_and_calls_combine_their_splits_beside_each_other(only_triton, counted):
    attend, shape = decoding(8, 1, 3000, 128)
    qs = [torch.randn(shape, device=DEVICE) for _ in range(3)]
    expected = [attend(q, 13) for q in qs]
    torch.cuda.synchronize()
    num_eager = len(counted)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in qs[:2]], []
    for graph, q in zip(graphs, qs):
        with torch.cuda.graph(graph):
            outs.append([attend(q, 13) for _ in range(5)])
    captured = {x.data_ptr() for x in counted[num_eager:]}
    assert len(captured) == 10 and counted[0].data_ptr() not in captured
    assert torch.equal(attend(qs[2], 13), expected[2])
    streams = [torch.cuda.Stream() for _ in range(3)]
    called = []
    for _ in range(20):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            called.append(attend(qs[2], 13))
    torch.cuda.synchronize()
    for several, one in zip((*outs, called), expected):
        assert all(torch.equal(out, one) for out in several)


def test_the_suites_hold_in_the_interpreter():
    """A sample of each, in fp32 and fp16; `pytest --backend triton --device cuda` runs them whole.

    Triton's interpreter rounds to bf16 by cutting bits off, which is not within the bounds."""
    sample = (
        "(dense_meets and (window or everything or of_zero) or head_dim and 3-5 or empty_problems"
        " or without_visible or pages_equal or dense_gradients and (dropout or alibi)"
        " or attn_bias_has and shape1 or sink_has or nan_past or dropout_meets and 0.5"
        " or behind_the_last or many_splits or token_by_token and 16 and halves and dtype1"
        " or rows_and_left or counts_its_splits or are_split"
        " or may_be_described and (options-64 or window-64 or alibi-128))"
        " and not bfloat16 and not dtype2"
    )
    files = ["forward", "backward", "exact", "kvcache", "dropout", "triton"]
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "triton", "-k", sample]
    command += ["-W", "ignore::RuntimeWarning", *(str(HERE / f"test_{f}.py") for f in files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
