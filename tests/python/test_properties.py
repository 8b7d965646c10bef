"""Random problems: the oracle and the exact promises over all options at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    available,
    check_dense,
    check_entry,
    check_varlen,
    chosen,
    offsets,
    same_bits,
    served,
    tensors,
    varlen_tensors,
)

from flash_attn import flash_attn_func

# Derived from the test's name, so that a run repeats.
REPEATABLE = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

SERVED = served()

lengths = st.one_of(st.integers(0, 40), st.integers(41, 300))
head_dims = st.one_of(st.sampled_from([8, 32, 64, 128]), st.integers(1, 160))


class Problem:
    """The tensors of a call and its options; printed by their shapes."""

    def __init__(self, q, k, v, options):
        self.q, self.k, self.v, self.options = q, k, v, options

    def __repr__(self) -> str:
        shapes = " ".join(f"{n}{list(x.shape)}" for n, x in zip("qkv", (self.q, self.k, self.v)))
        options = {
            name: f"{value.dtype}{list(value.shape)}" if torch.is_tensor(value) else value
            for name, value in self.options.items()
        }
        return f"{self.q.dtype} {shapes} {options}"

    @property
    def tensors(self):
        return self.q, self.k, self.v


@st.composite
def heads(draw):
    num_heads_kv = draw(st.integers(1, 3))
    return num_heads_kv * draw(st.integers(1, 4)), num_heads_kv


@st.composite
def options(draw, batch, num_heads, seqlen_q, seqlen_k):
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    result = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        result["window_size"] = (draw(st.integers(-1, 60)), draw(st.integers(-1, 60)))
    if draw(st.booleans()):
        result["softmax_scale"] = draw(st.floats(0.0, 0.4))
    if draw(st.booleans()):
        result["softcap"] = draw(st.floats(0.5, 30.0))
    if draw(st.booleans()):
        shape = (batch, num_heads) if draw(st.booleans()) else (num_heads,)
        result["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.1
    if draw(st.booleans()):
        full = (batch, num_heads, seqlen_q, seqlen_k)
        shape = [n if draw(st.booleans()) else 1 for n in full]
        bias = torch.randn(shape, generator=generator)
        result["attn_bias"] = bias > -1.0 if draw(st.booleans()) else bias
    if draw(st.booleans()):
        result["learnable_sink"] = torch.randn(num_heads, generator=generator)
    return result


@st.composite
def dense_problems(draw):
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 3)), draw(lengths), draw(lengths)
    num_heads, num_heads_kv = draw(heads())
    q, k, v = tensors(
        batch,
        seqlen_q,
        seqlen_k,
        num_heads,
        num_heads_kv,
        draw(head_dims),
        draw(head_dims),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return Problem(q, k, v, draw(options(batch, num_heads, seqlen_q, seqlen_k)))


@st.composite
def varlen_problems(draw):
    batch = draw(st.integers(1, 4))
    lengths_q = draw(st.lists(lengths, min_size=batch, max_size=batch))
    lengths_k = draw(st.lists(lengths, min_size=batch, max_size=batch))
    num_heads, num_heads_kv = draw(heads())
    q, k, v = varlen_tensors(
        lengths_q,
        lengths_k,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        head_dim=draw(head_dims),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    longest = {
        "max_seqlen_q": max(lengths_q) + draw(st.integers(0, 9)),
        "max_seqlen_k": max(lengths_k) + draw(st.integers(0, 9)),
    }
    cu_seqlens = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    more = draw(options(batch, num_heads, longest["max_seqlen_q"], longest["max_seqlen_k"]))
    return Problem(q, k, v, {**cu_seqlens, **longest, **more})


@REPEATABLE
@given(dense_problems())
def test_random_dense_problems_meet_the_oracle(problem):
    check_dense(*problem.tensors, **problem.options)


@REPEATABLE
@given(varlen_problems())
def test_random_varlen_problems_meet_the_oracle(problem):
    check_varlen(*problem.tensors, **problem.options)


@REPEATABLE
@given(dense_problems(), st.sampled_from(available()))
def test_random_problems_on_each_implementation(problem, name):
    assume((name, problem.tensors[0].dtype) in SERVED)
    assert chosen(*problem.tensors, backend=name, **problem.options) == name
    check_entry(*problem.tensors, backend=name, **problem.options)


@REPEATABLE
@given(dense_problems(), st.floats(0.0, 0.99), st.integers(0, 2**64 - 1))
def test_random_dropout_meets_the_oracle(problem, dropout_p, seed):
    check_entry(*problem.tensors, dropout_p=dropout_p, dropout_seed=seed, **problem.options)


@pytest.mark.native
@REPEATABLE
@given(dense_problems(), st.integers(1, 7))
def test_random_problems_do_not_depend_on_the_number_of_threads(problem, threads):
    torch.set_num_threads(1)
    expected = flash_attn_func(*problem.tensors, **problem.options)
    torch.set_num_threads(threads)
    assert same_bits(flash_attn_func(*problem.tensors, **problem.options), expected)
