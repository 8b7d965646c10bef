"""What must hold bit for bit."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch
from support import DTYPES, offsets, same_bits, served, tensors, varlen_tensors

from flash_attn import _native, dlpack, flash_attn_func, flash_attn_varlen_func

THREADS = [1, 2, 3, 7]


@pytest.mark.parametrize("name,dtype", served(), ids=str)
def test_masked_keys_do_not_leak(name, dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    q, k, v = tensors(seqlen_q=90, seqlen_k=150, dtype=dtype)
    # With a window of 20 to the left of the last 90 positions, the first 40 keys are seen by none.
    options = {"window_size": (20, 0)}
    expected, expected_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    largest = torch.finfo(dtype).max
    k[:, :40] = largest
    v[:, :40] = -largest
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert same_bits(out, expected) and same_bits(lse, expected_lse)


@pytest.mark.parametrize("name,dtype", served(), ids=str)
def test_later_keys_do_not_leak_into_earlier_rows(name, dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    q, k, v = tensors(seqlen_q=130, seqlen_k=130, dtype=dtype)
    expected = flash_attn_func(q, k, v, causal=True)
    for first in (1, 63, 64, 65, 129):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, first:] = torch.finfo(dtype).max
        poisoned_v[:, first:] = torch.finfo(dtype).max
        out = flash_attn_func(q, poisoned_k, poisoned_v, causal=True)
        assert same_bits(out[:, :first], expected[:, :first])


@pytest.mark.parametrize("name,dtype", served(), ids=str)
def test_nan_past_a_sequence_is_never_read(name, dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    lengths_q, lengths_k, used = [40, 33], [100, 70], [61, 0]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=dtype)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    seqused_k = torch.tensor(used, dtype=torch.int32)

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 40, 100, seqused_k=seqused_k)

    expected = run()
    for b in range(2):
        k[cu_k[b] + used[b] : cu_k[b + 1]] = math.nan
        v[cu_k[b] + used[b] : cu_k[b + 1]] = math.nan
    out = run()
    assert out.isfinite().all()
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths_q,seqlen_k", [([30, 10], 30), ([3, 1], 700), ([0, 0], 30)], ids=str
)
def test_tokens_behind_the_last_sequence_are_not_read_and_give_nothing(lengths_q, seqlen_k, dtype):
    """Their rows of out are 0, and their lse +inf."""
    used = sum(lengths_q)
    q, k, v = varlen_tensors([*lengths_q, 30], [seqlen_k, 10, 30], dtype=dtype)
    cu_q, cu_k = offsets(lengths_q), offsets([seqlen_k, 10])
    given = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "return_lse": True}
    expected, expected_lse = dlpack.attention(q, k, v, **given)
    q[used:] = math.nan
    for x in (k, v):
        x[seqlen_k + 10 :] = math.nan
    out = torch.full_like(q, math.nan)
    _, lse = dlpack.attention(q, k, v, out=out, **given)
    assert same_bits(out[:used], expected[:used])
    assert same_bits(lse[:, :used], expected_lse[:, :used])
    assert not out[used:].any() and (lse[:, used:] == math.inf).all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_number_of_threads_does_not_change_results(dtype, dropout_p):
    problems = [tensors(2, 130, 260, dtype=dtype), tensors(3, 1, 700, dtype=dtype)]
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        count, source = _native.num_threads()
        assert "OpenMP" not in source or count == threads
        torch.manual_seed(1)
        results.append(
            [
                flash_attn_func(*problem, dropout_p, causal=True, return_attn_probs=True)
                for problem in problems
            ]
        )
    for other in results[1:]:
        for (out, lse, _), (expected, expected_lse, _) in zip(other, results[0]):
            assert same_bits(out, expected) and same_bits(lse, expected_lse)


@pytest.mark.native
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_tasks_of_many_threads_leave_nothing_out(dtype, causal):
    # With so many rows tasks have several panels of them, and more than four threads cut the last.
    q, k, v = tensors(2, 1100, 150, 8, 8, 16, dtype=dtype)
    torch.set_num_threads(1)
    expected = dlpack.attention(q, k, v, causal=causal)
    for threads in (5, 6):
        torch.set_num_threads(threads)
        out = torch.full_like(q, math.nan)
        dlpack.attention(q, k, v, out=out, causal=causal)
        assert same_bits(out, expected)


@pytest.mark.native
def test_pytorch_and_the_library_share_one_set_of_threads():
    flash_attn_func(*tensors())
    _, source = _native.num_threads()
    assert source == "OpenMP runtime of the process"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_entry_does_not_depend_on_the_others(dtype):
    q, k, v = tensors(5, 70, 140, dtype=dtype)
    together = flash_attn_func(q, k, v, causal=True)
    for b in range(5):
        alone = flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert same_bits(alone[0], together[b])


def test_calls_from_many_threads_do_not_disturb_one_another():
    problems = [tensors(1, 40 + i, 90 + i, seed=i) for i in range(8)]
    expected = [flash_attn_func(*problem, causal=True) for problem in problems]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                if not same_bits(flash_attn_func(*problems[i], causal=True), expected[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.native
def test_other_python_threads_run_during_a_call():
    q, k, v = tensors(1, 600, 600, num_heads=4, num_heads_kv=4)
    stop = threading.Event()
    ticks = []

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    dlpack.attention(q, k, v, backend="reference")
    end = time.perf_counter()
    stop.set()
    ticker.join()
    inside = [t for t in ticks if start + 0.01 < t < end - 0.01]
    assert end - start > 0.05, "too short a call to tell"
    assert len(inside) >= 3
