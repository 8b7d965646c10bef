"""Padding goes out and comes back, with gradients; rearrange() does what einops' does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from flash_attn import _rearrange
from flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    rearrange,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

# Right and left padding, a row in pieces, an empty row, a full one.
MASK = torch.tensor(
    [
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]
)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_unpad_takes_the_tokens_in_order(kind, shape):
    x = torch.randn(5, 5, *shape)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, MASK.to(kind))
    rows = [x[b, s] for b in range(5) for s in range(5) if MASK[b, s]]
    assert torch.equal(tokens, torch.stack(rows))
    assert indices.tolist() == [5 * b + s for b in range(5) for s in range(5) if MASK[b, s]]
    assert indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 6, 9, 9, 14] and cu_seqlens.dtype == torch.int32
    assert longest == 5 and type(longest) is int
    assert used.tolist() == [3, 3, 3, 0, 5] and used.dtype == torch.int32


def test_unused_places_are_kept_but_not_counted_as_used():
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 3, 7] and longest == 4
    assert used.tolist() == [2, 1]
    # A place that is both counts once.
    assert unpad_input(x, mask, mask)[2].tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK), torch.ones_like(MASK)])
def test_padding_again_restores_the_tokens_and_zeros(mask, dtype):
    x = torch.randint(0, 9, (5, 5, 2, 3)).to(dtype)
    tokens, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
    assert cu_seqlens[-1] == len(tokens) == mask.sum() and longest == mask.sum(-1).max()
    again = pad_input(tokens, indices, 5, 5)
    assert again.dtype == dtype
    assert torch.equal(again, x * mask[..., None, None].to(dtype))


def test_an_empty_batch():
    tokens, indices, cu_seqlens, longest, used = unpad_input(torch.randn(0, 4, 2), torch.ones(0, 4))
    assert tokens.shape == (0, 2) and indices.shape == used.shape == (0,)
    assert cu_seqlens.tolist() == [0] and longest == 0
    assert pad_input(tokens, indices, 0, 4).shape == (0, 4, 2)


def test_concatenated_sequences():
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6
    assert torch.equal(pad_input(tokens, indices, 3, 6)[0, :5], x[0, :5])


def test_gradients():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    picked = torch.tensor([3, 0, 2])
    assert gradcheck(lambda x: index_first_axis(x, picked), x)
    assert gradcheck(lambda x: index_put_first_axis(x, torch.tensor([5, 0, 2, 3]), 6), x)
    assert gradcheck(lambda x: index_first_axis_residual(x, picked), x)
    assert gradcheck(lambda x: index_first_axis_residual(x, picked)[0], x)
    # A row that is taken twice gets both gradients.
    assert gradcheck(lambda x: index_first_axis(x, torch.tensor([1, 1])), x)

    padded = torch.randn(5, 5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        tokens, indices, *_ = unpad_input(x, MASK)
        return pad_input(tokens**2, indices, 5, 5)

    assert gradcheck(there_and_back, padded)


def test_the_residual_aliases_the_input():
    x = torch.randn(4, 2, requires_grad=True)
    rows, residual = index_first_axis_residual(x, torch.tensor([1, 2]))
    assert residual.data_ptr() == x.data_ptr() and torch.equal(rows, x[1:3])
    (residual.sum() + 2.0 * rows.sum()).backward()
    assert x.grad.tolist() == [[1.0, 1.0], [3.0, 3.0], [3.0, 3.0], [1.0, 1.0]]


def test_wrong_shapes_are_refused():
    x = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"attention_mask: must have shape \[2, 4\]"):
        unpad_input(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match="unused_mask"):
        unpad_input(x, torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="attention_mask_in_length"):
        unpad_input_for_concatenated_sequences(x, torch.ones(3, 4))


def test_as_verl_uses_it():
    """Ids, positions and log-probabilities go through; a packed batch comes back."""
    ids, mask = torch.arange(12).view(3, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1] * 4])
    unpadded, indices, *_ = unpad_input(ids.unsqueeze(-1), mask)
    assert unpadded.transpose(0, 1).shape == (1, 9)
    positions = torch.arange(24).view(2, 3, 4)
    rows = index_first_axis(rearrange(positions, "c b s ... -> (b s) c ..."), indices)
    assert torch.equal(rows, positions.flatten(1).t()[indices])
    flat = index_first_axis(rearrange(ids.unsqueeze(-1), "b s ... -> (b s) ..."), indices)
    assert torch.equal(flat, unpadded)
    values = torch.randn(9, requires_grad=True)
    full = pad_input(values.unsqueeze(-1), indices=indices, batch=3, seqlen=4).squeeze(-1)
    assert torch.equal(full[mask.bool()], values)


def test_as_transformers_uses_it():
    """Heads are selected by the indices of their tokens; the fifth result may be dropped."""
    key, mask = torch.randn(2, 6, 2, 8), torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    hidden, indices, _, longest, *_ = unpad_input(key, mask)
    again = index_first_axis(key.reshape(12, 2, 8), indices)
    assert torch.equal(hidden, again) and longest == 6


def test_as_remote_code_of_models_uses_it():
    """The autograd.Functions themselves, by apply()."""
    x = torch.randn(4, 2, requires_grad=True)
    indices = torch.tensor([2, 0])
    rows = IndexFirstAxis.apply(x, indices)
    assert torch.equal(rows, x[indices])
    again = IndexPutFirstAxis.apply(rows, indices, 4)
    assert torch.equal(again[indices], rows) and not again[[1, 3]].any()
    again.sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


PATTERNS = [
    ("b s ... -> (b s) ...", (2, 3, 4, 5), {}, lambda x: x.reshape(6, 4, 5)),
    ("(b s) ... -> b s ...", (6, 4), {"b": 2}, lambda x: x.reshape(2, 3, 4)),
    ("c b s ... -> (b s) c ...", (2, 3, 4), {}, lambda x: x.reshape(2, 12).t()),
    ("b s -> b s 1", (2, 3), {}, lambda x: x[..., None]),
    ("b 1 s -> (b s)", (2, 1, 3), {}, lambda x: x.reshape(6)),
    ("b ... -> b (...)", (2, 3, 4), {}, lambda x: x.reshape(2, 12)),
    ("... (h d) -> ... h d", (2, 6), {"d": 3}, lambda x: x.reshape(2, 2, 3)),
    ("b s (three h d) -> b s three h d", (2, 3, 12), {"three": 3, "d": 2}, None),
    ("b c (h p) (w q) -> b (h w) (c p q)", (1, 2, 4, 6), {"p": 2, "q": 3}, None),
    ("a b -> b a", (2, 3), {}, lambda x: x.t()),
    ("... -> ...", (2, 3), {}, lambda x: x),
]


@pytest.mark.parametrize(("pattern", "shape", "sizes", "expected"), PATTERNS)
def test_rearrange(pattern, shape, sizes, expected):
    x = torch.randn(shape)
    actual = _rearrange.rearrange_tensor(x, pattern, **sizes)
    if expected is not None:
        assert torch.equal(actual, expected(x))
    elif "three" in pattern:
        assert torch.equal(actual, x.reshape(2, 3, 3, 2, 2))
    else:
        patches = x.reshape(1, 2, 2, 2, 2, 3).permute(0, 2, 4, 1, 3, 5)
        assert torch.equal(actual, patches.reshape(1, 4, 12))


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes"),
    [
        ("b s", (2, 3), {}),
        ("b s -> b", (2, 3), {}),
        ("b b -> b", (2, 2), {}),
        ("b s -> b s", (2, 3, 4), {}),
        ("(b s) -> b s", (6,), {}),
        ("(b s) -> b s", (6,), {"b": 4}),
        ("b s -> s b", (2, 3), {"d": 2}),
        ("(b s -> b s", (6,), {"b": 2}),
        ("b 1 -> b", (2, 3), {}),
    ],
)
def test_wrong_patterns_are_refused(pattern, shape, sizes):
    with pytest.raises(ValueError, match="'"):
        _rearrange.rearrange_tensor(torch.zeros(shape), pattern, **sizes)


def test_rearrange_is_einops_own_where_that_is_installed(monkeypatch):
    calls = []
    fake = SimpleNamespace(rearrange=lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, "einops", fake)
    _rearrange._einops_rearrange.cache_clear()
    try:
        rearrange("anything", "a b -> b a", a=2)
    finally:
        _rearrange._einops_rearrange.cache_clear()
    assert calls == [(("anything", "a b -> b a"), {"a": 2})]
