"""Dropout: the mask of semantics, its repeatability, and S_dmask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import (
    DTYPES,
    OUT_BOUND,
    assert_close,
    check_dense,
    offsets,
    same_bits,
    served,
    tensors,
    varlen_tensors,
)

from flash_attn import dlpack, flash_attn_func, flash_attn_varlen_func
from flash_attn._attention import draw_seed
from flash_attn.flash_attn_interface import _get_block_size_n

UINT32 = np.uint64(0xFFFFFFFF)


def philox_4x32_10(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox-4x32-10 (Salmon et al., 2011) of arrays of counters, words as uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k0,
            product1 & UINT32,
            (product0 >> np.uint64(32)) ^ c[3] ^ k1,
            product0 & UINT32,
        ]
        k0 = (k0 + np.uint64(0x9E3779B9)) & UINT32
        k1 = (k1 + np.uint64(0xBB67AE85)) & UINT32
    return c


def kept(p: float, seed: int, offset: int, batch: int, heads: int, rows: int, keys: int):
    """Which elements of P [batch, heads, rows, keys] dropout keeps."""
    b, h, i, j = np.meshgrid(
        *(np.arange(n, dtype=np.uint64) for n in (batch, heads, rows, keys)), indexing="ij"
    )
    key = (seed & 0xFFFFFFFF, (seed >> 32 & 0xFFFFFFFF) ^ (offset >> 32 & 0xFFFFFFFF))
    counter3 = np.full_like(b, offset & 0xFFFFFFFF)
    words = np.stack(
        philox_4x32_10([j // np.uint64(8), i, b * np.uint64(heads) + h, counter3], key)
    )
    lane = (j % np.uint64(8)).astype(int)
    word = np.take_along_axis(words, (lane // 2)[None], axis=0)[0]
    half = (word >> (np.uint64(16) * (lane % 2).astype(np.uint64))) & np.uint64(0xFFFF)
    return half < max(1, int((1.0 - p) * 65536 + 0.5))


def seed_of_next_call(seed: int) -> int:
    """The dropout seed of the first call after torch.manual_seed(seed), which is set again."""
    torch.manual_seed(seed)
    drawn = draw_seed()
    torch.manual_seed(seed)
    return drawn


def test_philox_known_answers():
    answers = {
        (0, 0): [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        (0xFFFFFFFF, 0xFFFFFFFF): [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    }
    for key, expected in answers.items():
        counter = [np.array([key[0]], dtype=np.uint64)] * 4
        assert [int(word[0]) for word in philox_4x32_10(counter, key)] == expected


@pytest.mark.parametrize("name,dtype", served(), ids=str)
@pytest.mark.parametrize("dropout_p", [1e-30, 0.17, 0.5, 0.9])
def test_the_mask_is_philox_of_the_seed(name, dtype, dropout_p, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    q, k, v = tensors(2, 37, 141, num_heads=3, num_heads_kv=3, dtype=dtype)
    seed = seed_of_next_call(1234)
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
    assert s_dmask.shape == (2, 3, 128, 256) and s_dmask.dtype == q.dtype
    dropped = np.signbit(s_dmask[:, :, :37, :141].float().numpy())
    assert np.array_equal(~dropped, kept(dropout_p, seed, 0, 2, 3, 37, 141))


def test_varlen_counts_sequences_and_positions_within_them():
    lengths_q, lengths_k = [30, 0, 41], [50, 3, 129]
    q, k, v = varlen_tensors(lengths_q, lengths_k, num_heads=2, num_heads_kv=1)
    seed = seed_of_next_call(99)
    _, _, s_dmask = flash_attn_varlen_func(
        q,
        k,
        v,
        offsets(lengths_q),
        offsets(lengths_k),
        41,
        129,
        dropout_p=0.3,
        return_attn_probs=True,
    )
    assert s_dmask.shape == (3, 2, 128, 256)
    expected = kept(0.3, seed, 0, 3, 2, 41, 129)
    for b in range(3):
        part = np.signbit(s_dmask[b, :, : lengths_q[b], : lengths_k[b]].numpy())
        assert np.array_equal(~part, expected[b, :, : lengths_q[b], : lengths_k[b]])


@pytest.mark.parametrize("offset", [0, 5, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("seed", [0, 7, 2**63 + 11, 2**64 - 1])
def test_all_64_bits_of_seed_and_offset_count(seed, offset):
    q, k, _ = tensors(1, 9, 40, num_heads=1, num_heads_kv=1, head_dim=40)
    # With v the identity, out is dropout(P) itself.
    v = torch.eye(40).reshape(1, 40, 1, 40)
    out = dlpack.attention(q, k, v, dropout_p=0.5, dropout_seed=seed, dropout_offset=offset)
    assert np.array_equal(out[0, :, 0].numpy() != 0.0, kept(0.5, seed, offset, 1, 1, 9, 40)[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [1e-30, 0.1, 0.5, 0.9])
def test_dropout_meets_the_oracle(dtype, dropout_p):
    q, k, v = tensors(dtype=dtype)
    seed = seed_of_next_call(5)
    out, lse, _ = flash_attn_func(q, k, v, dropout_p, causal=True, return_attn_probs=True)
    exact = dlpack.oracle(q, k, v, dropout_p=dropout_p, dropout_seed=seed, causal=True)
    assert_close(out, lse, exact, OUT_BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_s_dmask_is_the_exponential_of_the_score_below_its_maximum(dtype):
    q, k, v = tensors(1, 20, 50, num_heads=2, num_heads_kv=2, dtype=dtype)
    _, _, s_dmask = flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8.0
    expected = (scores - scores.amax(-1, keepdim=True)).exp()
    error = (s_dmask[:, :, :20, :50].abs().double() - expected).abs().max()
    assert error <= {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_s_dmask_normalises_to_the_probabilities():
    q, k, v = tensors(1, 20, 300, num_heads=2, num_heads_kv=2)
    assert _get_block_size_n(q.device, 64, True, False) >= 300
    out, lse, s_dmask = flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8.0
    weights = s_dmask[:, :, :20, :300] * (scores.amax(-1) - lse).exp()[..., None]
    dropped = torch.where(torch.signbit(weights), 0.0, weights * 2.0)
    assert (torch.einsum("bhij,bjhd->bihd", dropped, v) - out).abs().max() < 1e-5


def test_manual_seed_repeats_a_call_and_calls_differ():
    q, k, v = tensors()
    torch.manual_seed(3)
    first, second = (flash_attn_func(q, k, v, 0.3) for _ in range(2))
    torch.manual_seed(3)
    assert same_bits(flash_attn_func(q, k, v, 0.3), first)
    assert not same_bits(first, second)


def test_no_dropout_draws_no_random_numbers():
    torch.manual_seed(4)
    state = torch.get_rng_state()
    check_dense(*tensors())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_is_kept():
    q, k, _ = tensors(1, 512, 512, num_heads=1, num_heads_kv=1)
    v = torch.ones(1, 512, 1, 64)
    torch.manual_seed(0)
    out = flash_attn_func(q, k, v, 0.25)
    assert abs(out.mean().item() - 1.0) < 0.01
