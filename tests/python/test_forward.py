"""The public functions against the fp64 oracle, and against one another."""

from __future__ import annotations

import math

import pytest
import torch
from support import (
    DTYPES,
    OUT_BOUND,
    check_dense,
    check_varlen,
    chosen,
    offsets,
    options_of_every_kind,
    same_bits,
    served,
    tensors,
    varlen_tensors,
)

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

OPTIONS = options_of_every_kind(65, 97)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dense_meets_the_oracle(options, dtype):
    check_dense(*tensors(dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 16.0])
def test_scores_that_grow_from_tile_to_tile(size, dtype):
    """What was accumulated is rescaled, in each tile anew; with 16-fold scores, fp32 does not hold
    the last probabilities times e to the first maximum."""
    keys = 900
    q, k, v = tensors(seqlen_q=70, seqlen_k=keys, dtype=dtype)
    k = k * torch.linspace(0.2, 4.0, keys, dtype=dtype)[:, None, None]
    check_dense(q, k, v, softmax_scale=size / math.sqrt(q.shape[-1]))


@pytest.mark.parametrize("name,dtype", served(), ids=str)
def test_a_forced_implementation_runs_and_meets_the_oracle(name, dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    q, k, v = tensors(dtype=dtype, head_dim=72, head_dim_v=40)
    for options in (OPTIONS["plain"], OPTIONS["everything"]):
        assert chosen(q, k, v, **options) == name
        check_dense(q, k, v, **options)


@pytest.mark.native
def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "cpu:no_such_thing")
    with pytest.raises(ValueError, match="no_such_thing"):
        flash_attn_func(*tensors())


@pytest.mark.parametrize(
    "head_dim,head_dim_v", [(1, 1), (3, 5), (64, 128), (192, 128), (256, 256), (512, 512)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_dim(head_dim, head_dim_v, dtype):
    q, k, v = tensors(
        seqlen_q=33, seqlen_k=70, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype
    )
    out, _ = check_dense(q, k, v, causal=True)
    assert out.shape == (2, 33, 4, head_dim_v)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 1), (1, 300), (300, 1), (200, 113), (257, 511)])
@pytest.mark.parametrize("causal", [False, True])
def test_any_lengths(seqlen_q, seqlen_k, causal):
    check_dense(*tensors(1, seqlen_q, seqlen_k, num_heads=2), causal=causal)


@pytest.mark.parametrize("num_heads,num_heads_kv", [(4, 4), (6, 2), (8, 1)])
def test_grouped_heads(num_heads, num_heads_kv):
    check_dense(*tensors(num_heads=num_heads, num_heads_kv=num_heads_kv), causal=True)


def test_empty_problems():
    for batch, seqlen_q, seqlen_k in [(0, 5, 5), (2, 0, 5), (2, 5, 0)]:
        out, lse, s_dmask = flash_attn_func(
            *tensors(batch, seqlen_q, seqlen_k), return_attn_probs=True
        )
        assert out.shape == (batch, seqlen_q, 4, 64)
        assert lse.shape == (batch, 4, seqlen_q)
        assert s_dmask.shape == (0,)
        assert not out.any()
        assert (lse == math.inf).all()


def test_rows_without_visible_keys_are_zero():
    out, lse = check_dense(*tensors(seqlen_q=50, seqlen_k=20), causal=True)
    assert not out[:, :30].any() and out[:, 30:].all(-1).all()
    assert (lse[:, :, :30] == math.inf).all() and lse[:, :, 30:].isfinite().all()


def test_rows_without_visible_keys_under_a_sink():
    """One that is -inf leaves a row without any term."""
    q, k, v = (x.requires_grad_() for x in tensors(seqlen_q=50, seqlen_k=20, num_heads=2))
    sink = torch.tensor([-math.inf, 0.5], requires_grad=True)
    _, lse = check_dense(q, k, v, causal=True, learnable_sink=sink)
    assert (lse[:, 0, :30] == -math.inf).all() and (lse[:, 1, :30] == 0.5).all()
    with torch.enable_grad():
        out = flash_attn_func(q, k, v, causal=True, learnable_sink=sink)
        gradients = torch.autograd.grad(out.sum(), (q, k, v, sink))
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][:, :30].any() and gradients[3][0] == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_unpacked_bitwise(dtype):
    qkv = torch.randn(2, 70, 3, 4, 64).to(dtype)
    q, k, v = (qkv[:, :, i].contiguous() for i in range(3))
    expected = flash_attn_func(q, k, v, causal=True)
    assert same_bits(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert same_bits(flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), expected)

    lengths = offsets([70, 70])
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    expected = flash_attn_varlen_func(flat_q, flat_k, flat_v, lengths, lengths, 70, 70, causal=True)
    packed = qkv.flatten(0, 1)
    out = flash_attn_varlen_qkvpacked_func(packed, lengths, 70, causal=True)
    assert same_bits(out, expected)
    out = flash_attn_varlen_kvpacked_func(
        flat_q, packed[:, 1:], lengths, lengths, 70, 70, causal=True
    )
    assert same_bits(out, expected)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["window_left_causal"]], ids=str)
def test_varlen_equals_dense_bitwise(options, dtype):
    lengths_q, lengths_k = [65, 1, 0, 130], [97, 200, 5, 130]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=dtype)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out, lse = check_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=130,
        max_seqlen_k=200,
        **options,
    )
    for b in range(4):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        dense, dense_lse, _ = flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], return_attn_probs=True, **options
        )
        assert same_bits(out[rows], dense[0])
        assert same_bits(lse[:, rows], dense_lse[0])


def test_varlen_options_meet_the_oracle():
    lengths_q, lengths_k = [30, 0, 17], [64, 5, 99]
    q, k, v = varlen_tensors(lengths_q, lengths_k, dtype=torch.bfloat16)
    check_varlen(
        q,
        k,
        v,
        cu_seqlens_q=offsets(lengths_q),
        cu_seqlens_k=offsets(lengths_k),
        max_seqlen_q=40,
        max_seqlen_k=100,
        seqused_k=torch.tensor([50, 0, 99], dtype=torch.int32),
        causal=True,
        softcap=10.0,
        alibi_slopes=torch.rand(3, 4),
        attn_bias=torch.randn(3, 1, 40, 100),
        learnable_sink=torch.randn(4),
    )


@pytest.mark.parametrize("name,dtype", served(), ids=str)
def test_a_larger_max_seqlen_changes_nothing(name, dtype, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", name)
    lengths_q, lengths_k = [65, 130, 1], [97, 131, 200]
    q, k, v = varlen_tensors(lengths_q, lengths_k, head_dim=72, dtype=dtype)
    cu_seqlens = offsets(lengths_q), offsets(lengths_k)
    tight, loose = (
        flash_attn_varlen_func(q, k, v, *cu_seqlens, 130 + more, 200 + more, causal=True)
        for more in (0, 1000)
    )
    assert (tight - loose).abs().max() <= 2 * OUT_BOUND[dtype]


def test_max_seqlen_may_be_a_tensor():
    q, k, v = varlen_tensors([7, 9], [7, 9])
    lengths = offsets([7, 9])
    expected = flash_attn_varlen_func(q, k, v, lengths, lengths, 9, 9)
    longest = lengths.diff().max()
    assert same_bits(flash_attn_varlen_func(q, k, v, lengths, lengths, longest, longest), expected)


def test_pages_equal_one_piece_bitwise():
    page_size, lengths_q, lengths_k = 16, [20, 5], [45, 33]
    q, k, v = varlen_tensors(lengths_q, lengths_k)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    table = torch.tensor([[6, 1, 4], [0, 5, 2]], dtype=torch.int32)
    pages_k, pages_v = torch.full((2, 8, page_size, 2, 64), math.nan).unbind(0)
    for b in range(2):
        for j in range(lengths_k[b]):
            page = table[b, j // page_size]
            pages_k[page, j % page_size] = k[cu_k[b] + j]
            pages_v[page, j % page_size] = v[cu_k[b] + j]
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 45, causal=True)
    out = flash_attn_varlen_func(
        q, pages_k, pages_v, cu_q, cu_k, 20, 45, causal=True, block_table=table
    )
    assert same_bits(out, expected)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x again, laid out otherwise."""
    if kind == "heads_major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "gaps":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), math.nan, dtype=x.dtype)
        wide[..., 8 : 8 + x.shape[-1]] = x
        return wide[..., 8 : 8 + x.shape[-1]]
    if kind == "batch_last":
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    return x.transpose(2, 3).contiguous().transpose(2, 3)  # last_dimension_apart


@pytest.mark.parametrize("kind", ["heads_major", "gaps", "batch_last", "last_dimension_apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_results(kind, dtype):
    q, k, v = tensors(dtype=dtype)
    other = [strided(x, kind) for x in (q, k, v)]
    assert all(not x.is_contiguous() for x in other)
    assert same_bits(flash_attn_func(*other, causal=True), flash_attn_func(q, k, v, causal=True))


@pytest.mark.native
def test_a_bias_of_any_strides():
    q, k, v = tensors()
    bias = torch.randn(2, 4, 97, 65).transpose(2, 3)
    expected = flash_attn_func(q, k, v, attn_bias=bias.contiguous())
    assert same_bits(flash_attn_func(q, k, v, attn_bias=bias), expected)
    narrow = torch.randn(2, 4, 65, 1)
    expected = flash_attn_func(q, k, v, attn_bias=narrow.expand(2, 4, 65, 97).contiguous())
    assert same_bits(flash_attn_func(q, k, v, attn_bias=narrow.expand(2, 4, 65, 97)), expected)
    assert same_bits(flash_attn_func(q, k, v, attn_bias=narrow), expected)


def test_views_with_the_negative_bit_are_resolved():
    complex_values = torch.randn(2, 65, 4, 64, dtype=torch.complex64)
    negated = complex_values.conj().imag
    assert negated.is_neg()
    _, k, v = tensors()
    assert same_bits(flash_attn_func(negated, k, v), flash_attn_func(negated.resolve_neg(), k, v))


def test_a_broadcast_batch():
    q, k, v = tensors(1)
    out = flash_attn_func(*(x.expand(3, -1, -1, -1) for x in (q, k, v)))
    for b in range(3):
        assert same_bits(out[b], flash_attn_func(q, k, v)[0])


def test_inference_mode_and_parameters():
    q, k, v = tensors()
    expected = flash_attn_func(q, k, v)
    with torch.inference_mode():
        assert same_bits(flash_attn_func(q.clone(), k, v), expected)
    parameter = torch.nn.Parameter(q)
    assert same_bits(flash_attn_func(parameter, k, v), expected)


def test_a_compiled_caller():
    q, k, v = tensors()

    @torch.compile(backend="eager")
    def block(q, k, v):
        return flash_attn_func(q * 2.0, k, v, causal=True) + 1.0

    assert torch.equal(block(q, k, v), flash_attn_func(q * 2.0, k, v, causal=True) + 1.0)
