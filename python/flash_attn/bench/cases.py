"""What is measured: the cases of each mode, their operations and their bytes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MODES = ("forward", "backward", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call.

    `lengths`, where given, are those of varlen sequences, queries and keys alike; `batch` and the
    two `seqlen` then only bound them. In mode "decode" one query of each sequence attends to a
    cache of `seqlen_k` keys.
    """

    mode: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """As `--shapes` reads it."""
        heads = f"h{self.num_heads}"
        if self.num_heads_kv != self.num_heads:
            heads += f"/{self.num_heads_kv}"
        if self.lengths:
            parts = [heads, "varlen" + "+".join(map(str, _grouped(self.lengths)))]
        else:
            parts = [f"b{self.batch}", heads, f"s{self.seqlen_k}"]
            if self.seqlen_q != self.seqlen_k and self.mode != "decode":
                parts.insert(2, f"q{self.seqlen_q}")
        parts.append(f"d{self.head_dim}")
        return " ".join(parts + ["causal"] * self.causal)

    def sequences(self) -> list[tuple[int, int]]:
        """(queries, keys) of each sequence."""
        if self.lengths:
            return [(length, length) for length in self.lengths]
        return [(self.seqlen_q, self.seqlen_k)] * self.batch

    def flops(self) -> int:
        """Floating-point operations of the matrix products, of those pairs that are not masked.

        Two products forward, five backward (Dao, "FlashAttention-2", 2023, section 4.1).
        """
        pairs = sum(_pairs(q, k, self.causal) for q, k in self.sequences())
        products = 5 if self.mode == "backward" else 2
        return 2 * products * pairs * self.num_heads * self.head_dim

    def bytes(self) -> int:
        """What must be read and written at least: each tensor once."""
        queries = sum(q for q, _ in self.sequences()) * self.num_heads * self.head_dim
        keys = sum(k for _, k in self.sequences()) * self.num_heads_kv * self.head_dim
        # Forward: q, k, v and out. Backward: those and dout read, dq, dk and dv written.
        tensors = 4 * queries + 4 * keys if self.mode == "backward" else 2 * queries + 2 * keys
        return tensors * BYTES[self.dtype]


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key that the mask, aligned bottom right, lets through."""
    if not causal:
        return queries * keys
    return sum(max(0, min(keys, keys - queries + i + 1)) for i in range(queries))


def _grouped(lengths: tuple[int, ...]) -> list[str]:
    """(64, 64, 512) -> ["2x64", "512"]."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    return [f"{count}x{length}" if count > 1 else str(length) for length, count in runs]


# Sequences of one training batch: alike, halving, and one long among many short ones.
VARLEN_MIXES = (
    (512,) * 8,
    (2048, 1024, 512, 256, 128, 64, 64),
    (4096, *(64,) * 31),
)


def _dense(mode: str, dtype: str, quick: bool) -> list[Case]:
    lengths = (128, 512, 2048) if quick else (64, 128, 512, 1024, 2048, 4096)
    heads = (8,) if quick else (8, 16)
    cases = [
        Case(mode, dtype, 1, s, s, h, h, d, causal)
        for d, h, s, causal in itertools.product((64, 128), heads, lengths, (False, True))
    ]
    if dtype != "float32" and not quick:
        cases.append(Case(mode, dtype, 1, 4096, 4096, 32, 32, 128))
    mixes = VARLEN_MIXES[1:2] if quick else VARLEN_MIXES
    for lengths_, d in itertools.product(mixes, (64,) if quick else (64, 128)):
        longest = max(lengths_)
        cases.append(Case(mode, dtype, len(lengths_), longest, longest, 8, 8, d, True, lengths_))
    return cases


def _decode(dtype: str, quick: bool) -> list[Case]:
    num_heads, head_dim = 32, 128
    keys = (4096,) if quick else (4096, 16384, 65536)
    batches = (1, 8) if quick else (1, 8, 64)
    cases = [
        Case("decode", dtype, b, 1, s, num_heads, num_heads // group, head_dim)
        for group, s, b in itertools.product((1, 4, 8), keys, batches)
    ]
    # Ours and the peers' copies, and those that PyTorch makes of grouped heads, must fit.
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 20
    return [case for case in cases if case.bytes() <= limit]


def table(mode: str, dtype: str, quick: bool = False) -> list[Case]:
    """The cases of a mode."""
    return _decode(dtype, quick) if mode == "decode" else _dense(mode, dtype, quick)


_TOKEN = re.compile(r"(?:([bqsd])(\d+)|h(\d+)(?:/(\d+))?|(causal))")


def parse(shapes: str, mode: str, dtype: str) -> list[Case]:
    """Cases from text such as "b2 h16/4 s4096 d128 causal; h8 q1 s512 d64".

    Of each: batch, heads (of queries, of keys), queries (else as many as keys), keys, head_dim.
    Raises ValueError where it is not such.
    """
    return [_parse_one(text, mode, dtype) for text in shapes.split(";") if text.strip()]


def _parse_one(text: str, mode: str, dtype: str) -> Case:
    numbers = {"b": 1, "h": 8, "d": 64}
    causal = False
    for token in text.split():
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(
                f"--shapes: {token!r} is none of bN, hN, hN/N, qN, sN, dN and causal, in {text!r}"
            )
        letter, number, heads, heads_kv, is_causal = match.groups()
        causal |= is_causal is not None
        if letter:
            numbers[letter] = int(number)
        if heads:
            numbers["h"], numbers["kv"] = int(heads), int(heads_kv or heads)
    if "s" not in numbers:
        raise ValueError(f"--shapes: {text!r} has no number of keys, sN")
    heads_kv = numbers.get("kv", numbers["h"])
    if min(numbers.values()) < 1 or numbers["h"] % heads_kv != 0:
        raise ValueError(f"--shapes: {text!r} has a zero, or heads that do not divide")
    queries = numbers.get("q", 1 if mode == "decode" else numbers["s"])
    sizes = (numbers["b"], queries, numbers["s"], numbers["h"], heads_kv, numbers["d"])
    return Case(mode, dtype, *sizes, causal)
