"""Calls of a kind that has been made before skip the checks; nothing else may be taken for one."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import options_of_every_kind, same_bits, tensors
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import (
    _attention,
    _direct_call,
    _known,
    _native,
    flash_attn_func,
    flash_attn_varlen_func,
)

pytestmark = pytest.mark.native


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread that has made no call."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def known(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a plain call is of a kind that this thread has made before."""
    return _known.attention(q, k, v, None, False, (-1, -1), 0.0) is not None


@pytest.fixture
def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of a call that has been made."""
    q, k, v = tensors(2, 33, 47, head_dim=32)
    flash_attn_func(q, k, v)
    assert known(q, k, v)
    return q, k, v


def test_a_repeated_call_computes_from_its_own_tensors(made):
    q, k, v = made
    first = flash_attn_func(q, k, v)
    others = tensors(2, 33, 47, head_dim=32, seed=5)
    assert known(*others)
    again = flash_attn_func(*others)
    assert same_bits(flash_attn_func(q, k, v), first)
    whole = [torch.cat([x, y], 0) for x, y in zip(made, others)]
    assert same_bits(flash_attn_func(*whole), torch.cat([first, again], 0))


@pytest.mark.parametrize(
    "change",
    [
        {"softmax_scale": -1.0},
        {"softcap": -1.0},
        {"window_size": (-2, 0)},
        {"window_size": (1, 2, 3)},
        {"window_size": 5},
        {"softmax_scale": "a"},
        {"dropout_p": 1.5},
        {"dropout_p": None},
        {"causal": "yes"},
        {"alibi_slopes": torch.zeros(3)},
    ],
    ids=str,
)
def test_a_wrong_option_raises_as_ever(made, change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        flash_attn_func(*made, **change)


def test_wrong_tensors_raise_as_ever(made):
    q, k, v = made
    for bad in (
        (q, k[:, :-1], v),
        (q, k.half(), v),
        (q[..., :-1], k, v),
        (q[0], k, v),
        (q.double(), k.double(), v.double()),
        (q, k, v[:1]),
        (q, k, v.to("meta")),
    ):
        with pytest.raises(ValueError):
            flash_attn_func(*bad)
    with pytest.raises(TypeError, match=r"q: must be a torch\.Tensor"):
        flash_attn_func(q.numpy(), k, v)


def test_what_a_gradient_is_wanted_of_is_not_known(made):
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(made)]
        with torch.enable_grad():
            assert not known(*leaves)
            assert flash_attn_func(*leaves).grad_fn is not None
        with torch.no_grad():
            assert known(*leaves)
            assert flash_attn_func(*leaves).grad_fn is None


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 3.0}], ids=str)
def test_gradients_of_a_repeated_call_are_those_of_its_own_tensors(made, options):
    for seed in (0, 5, 6):
        leaves = [x.requires_grad_() for x in tensors(2, 33, 47, head_dim=32, seed=seed)]
        dout = torch.randn(2, 33, 4, 32)
        with torch.enable_grad():
            out = flash_attn_func(*leaves, **options)
            # Never taken for a known one.
            other, _, _ = flash_attn_func(*leaves, return_attn_probs=True, **options)
        results = torch.autograd.grad(out, leaves, dout)
        expected = torch.autograd.grad(other, leaves, dout)
        assert all(same_bits(x, y) for x, y in zip(results, expected))


@pytest.fixture
def backward_answers(monkeypatch) -> list[bool]:
    """What the native function for known backward calls has answered so far."""
    answers = []

    def run_backward(*arguments: Any) -> bool:
        answers.append(native(*arguments))
        return answers[-1]

    native = _direct_call.make(backward=True)
    monkeypatch.setattr(_known, "run_backward", run_backward)
    return answers


def gradients_of(leaves: list[torch.Tensor], dout: torch.Tensor, **options: Any) -> list[Any]:
    torch.manual_seed(3)  # of dropout
    with torch.enable_grad():
        out = flash_attn_func(*leaves, **options)
    return list(torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (5, 3)}, {"dropout_p": 0.2}, {"deterministic": True}],
    ids=str,
)
def test_a_repeated_backward_is_known_and_the_same(options, backward_answers):
    leaves = [x.requires_grad_() for x in tensors(2, 33, 47, num_heads_kv=2, head_dim=40)]
    dout = torch.randn(2, 33, 4, 40)
    expected = in_a_thread(lambda: gradients_of(leaves, dout, **options))
    backward_answers.clear()
    first, again = (gradients_of(leaves, dout, **options) for _ in range(2))
    assert backward_answers[-1] is True
    assert all(map(same_bits, first, expected)) and all(map(same_bits, again, expected))
    other = [x.detach().flip(1).requires_grad_() for x in leaves]
    assert not same_bits(gradients_of(other, dout, **options)[1], expected[1])


def test_gradients_that_the_known_way_does_not_serve(backward_answers):
    leaves = [x.requires_grad_() for x in tensors(2, 33, 47, head_dim=32)]
    dout = torch.randn(2, 33, 4, 32)
    expected = gradients_of(leaves, dout)
    negated = torch.view_as_complex(torch.stack([dout, -dout], -1)).conj().imag
    assert negated.is_neg() and torch.equal(negated, dout)
    for same in (negated, dout.transpose(1, 2).contiguous().transpose(1, 2)):
        assert all(map(same_bits, gradients_of(leaves, same), expected))
    spread = dout[:, :, :1, :1].expand_as(dout)  # of sum(), say
    ours = gradients_of(leaves, spread)
    assert all(map(same_bits, ours, gradients_of(leaves, spread.contiguous())))
    backward_answers.clear()
    with torch.enable_grad():
        out = flash_attn_func(*leaves)
        dq, *_ = torch.autograd.grad(out, leaves, dout, create_graph=True)
        with pytest.raises(NotImplementedError, match="second-order"):
            dq.sum().backward()
    assert backward_answers == []


def test_gradients_of_other_shapes_with_as_many_elements(backward_answers):
    for shape in ((2, 32, 4, 32), (1, 32, 8, 32), (2, 16, 8, 32), (2, 32, 4, 32)):
        leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        assert [x.shape for x in gradients_of(leaves, torch.randn(shape))] == [shape] * 3


def test_lengths_beside_dense_tensors_are_refused_as_ever(made):
    lengths = torch.tensor([0, 47], dtype=torch.int32)
    leaves = [x.clone().requires_grad_() for x in made]
    with torch.enable_grad():
        flash_attn_func(*leaves)
        for cu_seqlens in ((None, lengths), (lengths, None)):
            with pytest.raises(ValueError, match="cu_seqlens"):
                flash_attn_varlen_func(*leaves, *cu_seqlens, 33, 47)


def test_views_of_negated_values_are_not_known():
    for head_dim in (1, 8):
        shape = (1, 6, 2, head_dim)
        negated = torch.randn(shape, dtype=torch.complex64).conj().imag
        k, v = torch.randn(2, *shape)
        expected = flash_attn_func(negated.resolve_neg(), k, v)
        flash_attn_func(torch.randn(shape), k, v)
        assert negated.is_neg() and not known(negated, k, v)
        assert same_bits(flash_attn_func(negated, k, v), expected)


def test_rows_with_gaps_are_copied_as_ever(made):
    q, k, v = made
    spread = torch.empty(*q.shape, 2)[..., 0].copy_(q)
    assert spread.stride(-1) == 2 and not known(spread, k, v)
    assert same_bits(flash_attn_func(spread, k, v), flash_attn_func(q, k, v))


def test_lengths_on_the_cpu_are_checked_at_each_call():
    q, k, v = (x[0] for x in tensors(1, 20, 20))
    good = torch.tensor([0, 7, 20], dtype=torch.int32)
    for _ in range(3):
        flash_attn_varlen_func(q, k, v, good, good, 13, 13)
    with pytest.raises(ValueError, match="cu_seqlens_q: entry 0"):
        flash_attn_varlen_func(q, k, v, good.flip(0), good, 13, 13)


def test_each_thread_has_its_own(made):
    assert not in_a_thread(lambda: known(*made)) and known(*made)


KINDS = options_of_every_kind(33, 47) | {
    "dropout": {"dropout_p": 0.3},
    "dropout, S_dmask": {"dropout_p": 0.3, "return_attn_probs": True},
}


def native_call(options: dict[str, Any], seed: int) -> tuple[Any, ...]:
    """The native function's arguments for a call with `options`, with new outputs."""
    q, k, v = tensors(2, 33, 47, dtype=torch.float32)
    rest = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1)}
    rest |= {"softcap": 0.0, "alibi_slopes": None, "deterministic": False}
    rest |= {"return_attn_probs": False} | options
    extras = [rest.pop(name, None) for name in ("attn_bias", "learnable_sink")]
    known_options = _attention.Options(**rest)
    s_dmask = None
    if known_options.return_attn_probs:
        s_dmask = torch.zeros_like(_attention.new_s_dmask(q, k, known_options))
    outputs = torch.zeros_like(q), _attention.new_lse(q, None), s_dmask
    return _attention._arguments(q, k, v, *outputs, *extras, known_options, seed)


def outputs_of(call: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in call[3:6] if x is not None]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_every_argument_reaches_the_library(options):
    def results() -> tuple[list[Any], ...]:
        first, again, reseeded = (native_call(options, seed) for seed in (3, 3, 4))
        answers = [_known.run(*first)]
        _native.forward(*first)
        answers += [_known.run(*again), _known.run(*reseeded)]
        _native.forward(*(other := native_call(options, 4)))
        return answers, *map(outputs_of, (first, again, reseeded, other))

    answers, first, again, reseeded, other = in_a_thread(results)
    assert answers == [False, True, True]
    assert all(map(same_bits, first, again)) and all(map(same_bits, reseeded, other))
    drops = "dropout_p" in options
    assert drops is not all(map(same_bits, first, reseeded))


WRONG = {
    "q": [None, 1, np.zeros(3)],
    "k": [None, "k", torch.zeros(2, 2).to_sparse()],
    "out": [None, torch.zeros(1)],
    "softmax_lse": [0.5],
    "max_seqlen_q": [None, 2.0, True, np.int64(0), 2**70, torch.tensor(0)],
    "softmax_scale": ["a", torch.tensor(0.3), True, 10**400],
    "causal": [None, 1, 0, "yes", torch.tensor(True)],
    "window_size[0]": [-1.0, 2**63],
    "softcap": [None, "", 1j],
    "seed": [None, 0.0, -(2**63) - 1],
    "backend": ["cpu:avx2", ""],
}


def native_backward(options: dict[str, Any]) -> tuple[Any, ...]:
    """The native function's arguments for the backward of a call with `options`."""
    call = native_call(options | {"return_attn_probs": False}, 3)
    _native.forward(*call)
    of_qkv = [torch.full_like(x, torch.nan) for x in call[:3]]
    dout = torch.randn(call[3].shape, generator=torch.Generator().manual_seed(7))
    bias, sink = call[11:13]
    of_bias = None if bias is None or bias.dtype == torch.bool else torch.zeros_like(bias)
    of_sink = None if sink is None else torch.zeros_like(sink)
    return dout, *of_qkv, of_bias, of_sink, False, *call


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_every_argument_of_the_backward_reaches_the_library(options):
    def results() -> tuple[list[Any], ...]:
        first, again = (native_backward(options) for _ in range(2))
        answers = [_known.run_backward(*first)]
        _native.backward(*first)
        answers.append(_known.run_backward(*again))
        return answers, *([x for x in call[1:6] if x is not None] for call in (first, again))

    answers, first, again = in_a_thread(results)
    assert answers == [False, True]
    assert all(map(same_bits, first, again)) and all(x.isfinite().all() for x in first)


def test_a_wrong_argument_of_the_backward_is_not_known_and_raises_nothing():
    call = native_backward({})
    _native.backward(*call)
    wrong = {0: [1, None, "dout", np.zeros(3)], 2: [None, torch.zeros(1)], 6: [None, 1, "yes"]}
    for at, values in wrong.items():
        for value in values:
            assert _known.run_backward(*call[:at], value, *call[at + 1 :]) is False, (at, value)
            ctypes.pythonapi.PyErr_Occurred()  # raises what has been left behind
    assert [_known.run_backward(*call[:n]) for n in range(10)] == [False] * 10
    assert _known.run_backward(*call) is True


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_type_is_not_known_and_raises_nothing(name):
    call = native_call({}, 0)
    _native.forward(*call)
    for wrong in WRONG[name]:
        at = list(_native.ARGUMENTS).index(name)
        for count in (at + 1, 20, len(call)):
            changed = *call[:at], wrong, *call[at + 1 : count]
            assert _known.run(*changed) is False, (wrong, count)
            ctypes.pythonapi.PyErr_Occurred()  # raises what has been left behind
    assert _known.run(*call) is True


def test_a_call_of_too_few_or_too_many_arguments_is_not_known():
    call = native_call({}, 0)
    _native.forward(*call)
    assert _known.run(*call[:20]) is True  # what is missing is as usual
    assert [_known.run(*call[:n]) for n in range(4)] == [False] * 4
    no_cache = *[None] * (len(_native.KVCACHE_ARGUMENTS) - 2), True, 0
    assert _known.run(*call, *no_cache) is True
    assert _known.run(*call, *no_cache, None) is False


def test_arguments_are_neither_kept_nor_let_go():
    call = native_call({"causal": True, "softmax_scale": 0.123}, 12345678901)
    _native.forward(*call)
    _known.run(*call)
    objects = (*call, True, False, int, float, str, torch.Tensor)
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(2000):
        _known.run(*call)
        _known.run(*call[:15], "wrong")
    after = [sys.getrefcount(x) for x in objects]
    assert max(abs(x - y) for x, y in zip(before, after)) < 100


def test_other_threads_run_during_a_known_call():
    x = torch.randn(1, 3000, 4, 64)
    flash_attn_func(x, x, x)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    assert known(x, x, x)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(begin < t < end for t in ticks) > 3


def test_where_pytorch_lends_no_tensors_to_c_no_call_is_known(made, monkeypatch):
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert _direct_call.make()(*native_call({}, 0)) is False


@pytest.mark.parametrize("version", [7, 1], ids=["another version", "no function"])
def test_the_functions_of_another_dlpack_are_not_called(version, monkeypatch):
    call = native_call({}, 0)
    _native.forward(*call)
    another = (ctypes.c_uint32 * 32)(version, 0)
    address = ctypes.addressof(another)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", address)
    assert _direct_call.make()(*call) is False
    assert _known.run(*call) is True


def test_a_call_with_a_gradient_leaves_its_guess():
    leaves = [x.requires_grad_() for x in tensors(2, 21, 23, head_dim=24)]
    with torch.enable_grad():
        flash_attn_func(*leaves)
    wants_lse = True
    assert _known.attention(*leaves, None, False, (-1, -1), 0.0, wants_lse) is not None


def test_transforms_are_refused_whatever_is_known(made):
    q, k, v = made

    def attend(q: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q, k, v)

    for _ in range(2):
        attend(q)
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.func.vmap(attend)(q[None])
        with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
            torch.func.grad(lambda q: attend(q).sum())(q)
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(attend, (q,), (q,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward_ad"):
            attend(forward_ad.make_dual(q, q))


def test_modes_see_what_is_known(made):
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    expected = flash_attn_func(*made)
    with Watching():
        assert same_bits(flash_attn_func(*made), expected)
    assert any("flash_attention_plus.forward" in name for name in seen)


@pytest.mark.parametrize("layout", ["rows of more heads", "heads first"])
def test_tensors_that_lie_anyhow_are_known(layout):
    q, k, v = tensors(2, 33, 47, head_dim=32)
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        q = torch.cat([q, q], 2)[:, :, :4]
    expected = in_a_thread(lambda: flash_attn_func(q, k, v))
    assert same_bits(flash_attn_func(q, k, v), expected)
    assert known(q, k, v) and same_bits(flash_attn_func(q, k, v), expected)


def test_a_wrong_guess_is_noticed(made):
    q, k, v = made
    expected = flash_attn_func(q, k, v)
    whole = torch.randn(1, 33, 8, 32)  # as many elements as q
    assert whole.numel() == q.numel()
    for _ in range(2):
        other = flash_attn_func(whole, whole, whole)
        assert other.shape == whole.shape
        assert same_bits(flash_attn_func(q, k, v), expected)


def test_a_forced_backend_is_heeded(made, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "reference")
    assert not known(*made)
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "another")
    with pytest.raises(ValueError, match="'another'"):
        flash_attn_func(*made)


def test_decisions_are_told_at_each_call(made, monkeypatch, capfd):
    monkeypatch.setenv("FLASH_ATTENTION_VERBOSE", "dispatch")
    assert not known(*made)
    flash_attn_func(*made)
    assert "flash_attn dispatch" in capfd.readouterr().err


def test_several_kinds_are_kept():
    kinds = [
        (softmax_scale, causal, window_size, softcap)
        for softmax_scale in (None, 0.3)
        for causal in (False, True)
        for window_size in ((-1, -1), (4, 0))
        for softcap in (0.0, 3.0)
    ]
    q, k, v = tensors(1, 20, 20)
    for kind in kinds:
        flash_attn_func(q, k, v, 0.0, *kind)
    # Two that share their places take turns with a third; most do not.
    assert sum(_known.attention(q, k, v, *kind) is not None for kind in kinds) > len(kinds) // 2


def test_more_kinds_than_are_kept(made):
    for length in range(1, 200):
        x = torch.randn(1, length, 1, 8)
        assert same_bits(flash_attn_func(x, x, x), flash_attn_func(x, x, x))
