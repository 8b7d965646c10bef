"""The dropout mask of src/core/semantics.h, from PyTorch's integer operators."""

from __future__ import annotations

import torch

# Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_KEYS_PER_DRAW = 8


def _multiply(x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) word of the product of words; int64 holds it only in halves."""
    low = x * (by & 0xFFFF)
    high = x * (by >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words drawn for counters of four words, int64 tensors broadcast to one another."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    key: tuple[int, int, int],
    threshold: int,
    batch: int,
    heads: int,
    tile: tuple[int, int, int, int],
    device: torch.device,
) -> torch.Tensor:
    """Where dropout keeps the probabilities of queries tile[0] to tile[1] and keys tile[2] to
    tile[3], bool [batch, heads, m, n]. `key` is Call.dropout_key."""
    first_q, last_q, first_k, last_k = tile
    draws = torch.arange(
        first_k // _KEYS_PER_DRAW, (last_k + _KEYS_PER_DRAW - 1) // _KEYS_PER_DRAW, device=device
    )
    row = torch.arange(first_q, last_q, device=device)[:, None]
    head = torch.arange(batch * heads, device=device)[:, None, None]
    shape = (batch * heads, last_q - first_q, draws.numel())
    last = torch.full((), key[2], dtype=torch.int64, device=device)
    words = philox((draws.expand(shape), row, head, last), key[:2])
    halves = torch.stack([part for w in words for part in (w & 0xFFFF, w >> 16)], -1)
    begin = first_k % _KEYS_PER_DRAW
    kept = (halves < threshold).flatten(-2)[..., begin : begin + last_k - first_k]
    return kept.view(batch, heads, last_q - first_q, last_k - first_k)
