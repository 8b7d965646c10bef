"""The framework-free entry, on NumPy and on whatever speaks DLPack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import DTYPES, chosen, offsets, same_bits, served, tensors, varlen_tensors

import flash_attn
from flash_attn import dlpack, flash_attn_func, flash_attn_varlen_func


def arrays(dtype=np.float32, **sizes):
    return tuple(x.numpy().astype(dtype) for x in tensors(**sizes))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_equals_torch_bitwise(dtype):
    q, k, v = arrays(dtype)
    out, lse = flash_attn.attention(q, k, v, causal=True, softcap=9.0, return_lse=True)
    expected, expected_lse, _ = flash_attn_func(
        *map(torch.from_numpy, (q, k, v)), causal=True, softcap=9.0, return_attn_probs=True
    )
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    assert same_bits(torch.from_numpy(out), expected)
    assert same_bits(torch.from_numpy(lse), expected_lse)


def test_out_is_written_and_returned():
    q, k, v = arrays()
    out = np.full(q.shape, 7.0, dtype=q.dtype)
    assert flash_attn.attention(q, k, v, out=out) is out
    assert np.array_equal(out, flash_attn.attention(q, k, v))


def test_varlen_reads_the_longest_sequence_from_the_offsets():
    q, k, v = (x.numpy() for x in varlen_tensors([9, 30], [50, 8]))
    cu_q, cu_k = offsets([9, 30]).numpy(), offsets([50, 8]).numpy()
    out = flash_attn.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    expected = flash_attn_varlen_func(
        *map(torch.from_numpy, (q, k, v, cu_q, cu_k)), max_seqlen_q=30, max_seqlen_k=50
    )
    assert same_bits(torch.from_numpy(out), expected)


def test_any_numpy_layout():
    q, k, v = arrays()
    expected = flash_attn.attention(q, k, v)
    apart = np.ascontiguousarray(q.swapaxes(2, 3)).swapaxes(2, 3)
    read_only = k.copy()
    read_only.flags.writeable = False
    swapped = v.astype(v.dtype.newbyteorder(">"))
    records = np.zeros(q.shape, dtype=[("value", np.float32), ("gap", np.int8)])
    records["value"] = q
    assert np.array_equal(flash_attn.attention(apart, read_only, swapped), expected)
    assert np.array_equal(flash_attn.attention(records["value"], k, v), expected)
    assert np.array_equal(flash_attn.attention(q[::-1], k[::-1], v[::-1]), expected[::-1])


def test_options_as_numpy_arrays():
    q, k, v = arrays()
    options = {
        "alibi_slopes": np.linspace(0.1, 0.4, 4, dtype=np.float32),
        "attn_bias": np.random.default_rng(0).random((65, 97)) > 0.2,
        "learnable_sink": np.zeros(4, dtype=np.float32),
    }
    out = flash_attn.attention(q, k, v, **options)
    expected = flash_attn_func(
        *map(torch.from_numpy, (q, k, v)),
        **{name: torch.from_numpy(value) for name, value in options.items()},
    )
    assert same_bits(torch.from_numpy(out), expected)


class Foreign:
    """An array of some library that only speaks DLPack."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_that_only_speak_dlpack(dtype):
    q, k, v = tensors(dtype=dtype)
    out = torch.empty_like(q)
    flash_attn.attention(Foreign(q), Foreign(k), Foreign(v), out=out, causal=True)
    assert same_bits(out, flash_attn_func(q, k, v, causal=True))
    with pytest.raises(ValueError, match="out: must be given"):
        flash_attn.attention(Foreign(q), Foreign(k), Foreign(v))


def test_torch_tensors():
    q, k, v = tensors(dtype=torch.bfloat16)
    out, lse = flash_attn.attention(q, k, v, return_lse=True)
    assert same_bits(out, flash_attn_func(q, k, v)) and lse.dtype == torch.float32


def test_torch_tensors_that_require_a_gradient_are_refused():
    q, k, v = tensors()
    q.requires_grad_()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="gradient"):
        flash_attn.attention(q, k, v)


def test_torch_views_with_the_negative_bit_are_resolved():
    negated = torch.randn(2, 65, 4, 64, dtype=torch.complex64).conj().imag
    _, k, v = tensors()
    expected = flash_attn.attention(negated.resolve_neg(), k, v)
    assert same_bits(flash_attn.attention(negated, k, v), expected)


@pytest.mark.parametrize("name", [name for name, dtype in served() if dtype == torch.float32])
def test_a_backend_by_argument(name):
    q, k, v = arrays()
    assert chosen(q, k, v, backend=name) == name
    out = flash_attn.attention(q, k, v, backend=name)
    np.testing.assert_allclose(out, flash_attn.attention(q, k, v), atol=1e-5)


def test_a_family_of_backends_by_argument():
    assert chosen(*arrays(), backend="cpu").startswith("cpu:")


def test_a_forced_backend_never_falls_back():
    with pytest.raises(ValueError, match="no_such_backend"):
        flash_attn.attention(*arrays(), backend="no_such_backend")


def test_explain_has_a_line_for_each_implementation():
    text = flash_attn.explain(*arrays(), causal=True, backend="reference")
    listed = [line.split()[0] for line in text.splitlines()]
    assert listed == [it.name for it in flash_attn.implementations()]
    assert "excluded" in text and text.count("chosen") == 1


def test_implementations():
    listed = flash_attn.implementations()
    assert listed[-1].name == "reference" and listed[-1].available
    assert all(it.available == (it.reason == "") for it in listed)
    with pytest.raises(ValueError, match="device"):
        flash_attn.implementations("abacus")


def test_wrong_types_are_named():
    q, k, v = arrays()
    for change, name in [({"q": 3}, "q"), ({"v": None}, "v"), ({"backend": 7}, "backend")]:
        with pytest.raises(TypeError, match=f"^{name}:"):
            flash_attn.attention(**{"q": q, "k": k, "v": v, **change})
    with pytest.raises(ValueError, match="dropout_seed"):
        flash_attn.attention(q, k, v, dropout_p=0.5, dropout_seed=2**64)


def test_the_oracle_is_softmax_in_fp64():
    q, k, v = (x.astype(np.float64) for x in arrays(num_heads=2, num_heads_kv=2))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 8.0
    weights = np.exp(scores)
    total = weights.sum(-1)
    expected = np.einsum("bhij,bjhd->bihd", weights / total[..., None], v)
    exact = dlpack.oracle(*(x.astype(np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(exact.out, expected, atol=1e-12)
    np.testing.assert_allclose(exact.lse, np.log(total), atol=1e-12)
    assert (exact.bound >= np.abs(exact.out)).all()
