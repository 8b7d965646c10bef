"""Calls of a kind that has been made before skip the checks; nothing else may be taken for one."""

from __future__ import annotations

import threading

import pytest
import torch
from support import same_bits, tensors

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn._attention import known_dense

pytestmark = pytest.mark.native


def known(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a plain call is of a kind that this thread has made before."""
    return known_dense(q, k, v, None, False, (-1, -1), 0.0) is not None


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
    seen = []
    thread = threading.Thread(target=lambda: seen.append(known(*made)))
    thread.start()
    thread.join()
    assert seen == [False] and known(*made)


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
    assert sum(known_dense(q, k, v, *kind) is not None for kind in kinds) > len(kinds) // 2


def test_more_kinds_than_are_kept(made):
    for length in range(1, 200):
        x = torch.randn(1, length, 1, 8)
        assert same_bits(flash_attn_func(x, x, x), flash_attn_func(x, x, x))
