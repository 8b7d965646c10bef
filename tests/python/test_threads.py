"""Threads: how many a call uses, forks, several callers at once, and PyTorch by turns."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from support import same_bits, tensors

from flash_attn import _native, flash_attn_func
from flash_attn.bench import experiments

LONG = 60.0  # seconds that no healthy child needs
PROCESSORS = len(os.sched_getaffinity(0))


def count_threads() -> int:
    return int(_native.num_threads()[0])


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "FLASH_ATTENTION_"))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def in_fork(function) -> object:
    """function()'s result in a forked child; fails where the child hangs."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function()), daemon=True)
    child.start()
    if not queue._reader.poll(LONG):
        child.kill()
        pytest.fail("the child of a fork hangs")
    result = queue.get()
    child.join()
    return result


# ---- How many ----

WITH_TORCH = "import torch; from flash_attn import _native; print(_native.num_threads()[0])"
# tvm-ffi imports PyTorch where it is installed.
ALONE = "import sys; sys.modules['torch'] = None" + WITH_TORCH.removeprefix("import torch")


@pytest.mark.parametrize("code", [ALONE, WITH_TORCH], ids=["alone", "with_torch"])
def test_omp_num_threads_holds(code):
    assert run_python(code, OMP_NUM_THREADS="1") == "1"


def test_variables_hold_for_the_librarys_own_pool():
    assert run_python(ALONE, OMP_NUM_THREADS="7") == "7"
    assert run_python(ALONE, OMP_NUM_THREADS="2", FLASH_ATTENTION_NUM_THREADS="5") == "5"


@pytest.mark.parametrize("code", [ALONE, WITH_TORCH], ids=["alone", "with_torch"])
def test_the_affinity_mask_holds(code):
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert run_python(pin + code) == "1"
    # Set after the library was loaded, as workers of a data loader do.
    later = f"{code}; {pin} print(_native.num_threads()[0])"
    assert run_python(later).split()[-1] == "1"


def test_a_new_python_thread_has_pytorchs_number():
    for threads in (1, 3):
        torch.set_num_threads(threads)
        seen: list[int] = []
        thread = threading.Thread(target=lambda seen=seen: seen.append(count_threads()))
        thread.start()
        thread.join()
        assert seen == [threads]


def test_pytorch_imported_after_the_first_call_is_respected():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, flash_attn
q = np.zeros((1, 64, 2, 16), np.float32)
flash_attn.attention(q, q, q)
del sys.modules["torch"]
import torch
torch.set_num_threads(1)
from flash_attn import flash_attn_func, _native
flash_attn_func(*torch.zeros(3, 1, 64, 2, 16))
print(_native.num_threads()[0])
"""
    assert run_python(code) == "1"


# ---- Forks ----


def bits(problem: tuple[torch.Tensor, ...]) -> bytes:
    """Of the result, for forked children, in which PyTorch's own parallel operators hang."""
    return flash_attn_func(*problem, causal=True).numpy().tobytes()


def test_a_forked_child_computes_the_same():
    problem = tensors(2, 300, 300)
    expected = bits(problem)
    assert in_fork(lambda: bits(problem)) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_takes_pytorchs_number_of_threads(threads):
    flash_attn_func(*tensors(2, 300, 300))
    torch.set_num_threads(threads)
    assert in_fork(count_threads) == min(threads, PROCESSORS)

    def set_in_child() -> int:
        torch.set_num_threads(1)
        return count_threads()

    assert in_fork(set_in_child) == 1


def test_a_fork_while_other_threads_are_in_calls_is_safe():
    problem = tensors(2, 300, 300)
    expected = bits(problem)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            flash_attn_func(*problem, causal=True)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(5):
            assert in_fork(lambda: bits(problem)) == expected
    finally:
        stop.set()
        for worker in workers:
            worker.join()


class AttentionInWorkers(torch.utils.data.Dataset):
    """Attention as a data set: each item is computed in the loader's worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return flash_attn_func(*tensors(1, 100 + index, 150, seed=index))[0, -1], count_threads()


def test_workers_of_a_data_loader_compute_the_same_on_one_thread_each():
    data = AttentionInWorkers()
    expected = [data[i][0] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LONG
    )
    for (out, threads), want in zip(loader, expected, strict=True):
        assert same_bits(out, want)
        assert threads == 1  # the loader's setting


# ---- Several callers, and PyTorch by turns ----


def test_python_threads_with_numbers_of_their_own_get_the_same_results():
    problem = tensors(1, 200, 300)
    expected = flash_attn_func(*problem, causal=True)
    wrong = []

    def work(threads: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(20):
            with torch.no_grad():
                torch.mm(torch.ones(64, 64), torch.ones(64, 64))
                if not same_bits(flash_attn_func(*problem, causal=True), expected):
                    wrong.append(threads)

    workers = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("size", list(experiments.ALTERNATION))
def test_alternating_with_pytorch_slows_neither(size):
    # Two sets of threads cost a factor of ten and more, a noisy machine a few hundredths: the least
    # of a few parts tells them apart.
    tries = (experiments.alternation(size, repeats=50)["least"] for _ in range(6))
    assert any(least < 1.05 for least in tries)
