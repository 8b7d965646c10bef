"""Repeated calls on an NVIDIA GPU take the short way, and nothing else is taken for one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import offsets, same_bits, tensors, varlen_tensors
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import (
    _known,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

Call = tuple[Callable[..., Any], dict[str, Any]]


def dense() -> Call:
    q, k, v = (x.cuda() for x in tensors(2, 100, 130, head_dim=64, dtype=torch.bfloat16))
    return flash_attn_func, {"q": q, "k": k, "v": v}


def varlen() -> Call:
    lengths = [70, 0, 130]
    q, k, v = (x.cuda() for x in varlen_tensors(lengths, lengths, dtype=torch.bfloat16))
    cu = offsets(lengths).cuda()
    call = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    return flash_attn_varlen_func, call | {"max_seqlen_q": 130, "max_seqlen_k": 130}


def kvcache() -> Call:
    q, k, v = (x.cuda() for x in tensors(3, 1, 1, head_dim=64, dtype=torch.bfloat16))
    _, k_cache, v_cache = (x.cuda() for x in tensors(3, 1, 256, head_dim=64, dtype=torch.bfloat16))
    lengths = torch.tensor([7, 200, 130], dtype=torch.int32, device="cuda")
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    return flash_attn_with_kvcache, call | {"cache_seqlens": lengths, "causal": True}


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


# What else a call may say, by which it is another kind of call.
SCORES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "other window": {"window_size": (3, 9)},
    "scale": {"softmax_scale": 0.3},
    "integral scale": {"softmax_scale": 1},
    "softcap": {"softcap": 2.0},
}


def varlen_changes() -> dict[str, dict[str, Any]]:
    pages, table = torch.randn(2, 9, 16, 2, 64, dtype=torch.bfloat16, device="cuda"), {}
    table["block_table"] = integers(*range(8, -1, -1), *range(9), *range(9)).view(3, 9)
    return SCORES | {
        "seqused_k": {"seqused_k": integers(30, 0, 100)},
        "pages": {"k": pages[0], "v": pages[1], "max_seqlen_k": 130} | table,
        "longer": {"max_seqlen_q": 140, "max_seqlen_k": 150},
    }


def kvcache_changes() -> dict[str, dict[str, Any]]:
    angles = torch.arange(256, device="cuda")[:, None] * 0.5 ** torch.arange(8, device="cuda")
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    pages = torch.randn(2, 48, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.arange(48, dtype=torch.int32, device="cuda").flip(0).view(3, 16)
    changes = {name: change for name, change in SCORES.items() if name != "causal"}
    return changes | {
        "full": {"causal": False},
        "nothing new": {"k": None, "v": None},
        "rotary": rotary,
        "rotary by halves": rotary | {"rotary_interleaved": False},
        "rows": {"cache_batch_idx": integers(2, 0, 1)},
        "padding": {"cache_leftpad": integers(3, 0, 5)},
        "splits": {"num_splits": 3},
        "pages": {"k_cache": pages[0], "v_cache": pages[1], "block_table": table},
    }


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each call that is asked whether it is known: the answer."""
    answers: list[bool] = []
    _known.run(None)  # the native function takes its place
    run = _known.run

    def asked(*arguments: Any) -> bool:
        answers.append(run(*arguments))
        return answers[-1]

    monkeypatch.setattr(_known, "run", asked)
    yield answers


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose caches are copies, as it may write there."""
    return {name: x.clone() if name.endswith("_cache") else x for name, x in call.items()}


def run(function: Callable[..., Any], call: dict[str, Any]) -> list[torch.Tensor]:
    """What a call returns, and leaves in its caches."""
    given = copied(call)
    out = function(**given)
    return [out, *(x for name, x in given.items() if name.endswith("_cache"))]


def by_the_long_way(function: Callable[..., Any], call: dict[str, Any]) -> list[torch.Tensor]:
    """run() by a thread that knows nothing."""
    results: list[torch.Tensor] = []

    def body() -> None:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(_known, "run", lambda *_: False)
            results.extend(run(function, call))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(same_bits(x, y) for x, y in zip(some, others))


@pytest.mark.parametrize("kind", [dense, varlen, kvcache])
@pytest.mark.parametrize("grad", [False, True])
def test_a_repeated_call_is_known(known, kind, grad):
    function, call = kind()
    expected = by_the_long_way(function, call)
    with torch.set_grad_enabled(grad):
        run(function, call)
        known.clear()
        assert equal(run(function, call), expected) and known == [True]
        # Of its own tensors.
        call = {n: x.flip(0) if n in "qkv" and kind is not varlen else x for n, x in call.items()}
        known.clear()
        assert equal(run(function, call), by_the_long_way(function, call)) and known == [True]


@pytest.mark.parametrize("kind", [dense, varlen, kvcache])
def test_whatever_a_call_says_makes_it_another_kind(known, kind):
    function, call = kind()
    changes = {dense: lambda: SCORES, varlen: varlen_changes, kvcache: kvcache_changes}[kind]()
    expected = by_the_long_way(function, call)
    for _ in range(2):
        run(function, call)
    for name, change in changes.items():
        changed = call | change
        reference = by_the_long_way(function, changed)
        known.clear()
        assert equal(run(function, changed), reference), name
        assert True not in known, name
        known.clear()
        assert equal(run(function, changed), reference) and known == [True], name
        assert equal(run(function, call), expected), name


@pytest.mark.parametrize("kind", [dense, varlen, kvcache])
def test_a_known_call_runs_on_the_current_stream_and_into_a_graph(known, kind):
    function, call = kind()
    expected = by_the_long_way(function, call)
    run(function, call)
    torch.cuda.synchronize()
    late = copied(call) | {"q": torch.zeros_like(call["q"])}
    stream = torch.cuda.Stream()
    known.clear()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(30_000_000)
        late["q"].copy_(call["q"])
        out = function(**late)
    stream.synchronize()
    assert same_bits(out, expected[0]) and known == [True]

    static = copied(call) | {"q": torch.zeros_like(call["q"])}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**static)
    static["q"].copy_(call["q"])
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected[0]) and known == [True, True]


@pytest.mark.parametrize("kind", [varlen, kvcache])
def test_lengths_are_checked_on_request_whatever_is_known(known, kind, monkeypatch):
    function, call = kind()
    for _ in range(2):
        run(function, call)
    monkeypatch.setenv("FLASH_ATTENTION_CHECK", "1")
    assert equal(run(function, call), by_the_long_way(function, call))
    name = "cu_seqlens_k" if kind is varlen else "cache_seqlens"
    with pytest.raises(ValueError, match=name):
        run(function, call | {name: call[name] + 1000})
    assert known[-1] is False


def test_what_pytorch_wraps_or_watches_is_not_known(known):
    class Wrapped(torch.Tensor):
        pass

    function, call = dense()
    expected = run(function, call)
    run(function, call)
    wrapped = {name: x.as_subclass(Wrapped) for name, x in call.items()}
    with FlopCounterMode(display=False):
        assert equal(run(function, call), expected)
    assert same_bits(run(function, wrapped)[0].as_subclass(torch.Tensor), expected[0])
    needy = {name: x.clone().requires_grad_() for name, x in call.items()}
    with torch.no_grad():
        known.clear()
        assert equal(run(function, needy), expected) and known == [True]


@pytest.mark.parametrize(
    "wrong", [{"causal": "yes"}, {"softcap": -1.0}, {"window_size": (1, 2, 3)}]
)
@pytest.mark.parametrize("kind", [dense, varlen, kvcache])
def test_a_wrong_option_raises_as_ever(kind, wrong):
    function, call = kind()
    for _ in range(2):
        run(function, call)
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        run(function, call | wrong)
