"""Rotary embedding against multiplication by complex numbers; all layouts, offsets and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from flash_attn.layers.rotary import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.ops.triton.rotary import apply_rotary

from .plain import DTYPES, assert_rounded_once

HEAD_DIM = 12


def tables(positions: int = 16, rotary_dim: int = 8, dtype=torch.float64):
    angles = torch.rand(positions, rotary_dim // 2, dtype=torch.float64) * 6.0
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin, interleaved=False, conjugate=False, positions=None):
    """x [..., S, H, D] in fp64, row s turned by row positions[..., s] of the tables."""
    x = x.double()
    positions = torch.arange(x.shape[-3]) if positions is None else positions
    factor = torch.complex(cos.double(), sin.double())[positions].unsqueeze(-2)
    factor = factor.conj() if conjugate else factor
    rotary_dim = 2 * cos.shape[-1]
    head = x[..., :rotary_dim]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    result = result if interleaved else result.mT
    return torch.cat((result.flatten(-2), x[..., rotary_dim:]), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 8, HEAD_DIM])
def test_rotation(dtype, interleaved, conjugate, rotary_dim):
    cos, sin = tables(rotary_dim=rotary_dim, dtype=dtype)
    x = torch.randn(2, 7, 3, HEAD_DIM, dtype=dtype)
    before = x.clone()
    exact = turned(x, cos, sin, interleaved, conjugate)
    out = apply_rotary(x, cos, sin, interleaved=interleaved, conjugate=conjugate)
    assert out.dtype == dtype and torch.equal(x, before)
    assert_rounded_once(out, exact)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])
    result = apply_rotary(x, cos, sin, interleaved=interleaved, inplace=True, conjugate=conjugate)
    assert result is x and torch.equal(x, out)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 5, torch.tensor([3, 0, 7]), torch.tensor([1, 9, 2]).int()])
def test_offsets(interleaved, offsets):
    cos, sin = tables(dtype=torch.float32)
    x = torch.randn(3, 7, 2, HEAD_DIM)
    first = torch.full((3,), offsets) if isinstance(offsets, int) else offsets
    positions = first[:, None].long() + torch.arange(7)
    exact = turned(x, cos, sin, interleaved, positions=positions)
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    assert_rounded_once(out, exact)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([3, 0, 5, 1])])
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_sequences(interleaved, offsets, inplace):
    """Sequences of 3, 0, 5 and 1 tokens, and two tokens of no sequence behind them."""
    cos, sin = tables(dtype=torch.float32)
    lengths = [3, 0, 5, 1]
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    x = torch.randn(11, 2, HEAD_DIM)
    first = [offsets] * 4 if isinstance(offsets, int) else offsets.tolist()
    positions = torch.cat([torch.arange(n) + o for n, o in zip(lengths, first)])
    exact = torch.cat((turned(x[:9], cos, sin, interleaved, positions=positions), x[9:].double()))
    out = apply_rotary(x, cos, sin, offsets, cu_seqlens, 5, interleaved, inplace)
    assert_rounded_once(out, exact)
    assert (out is x) == inplace


def test_positions_beyond_the_tables_are_left_alone():
    cos, sin = tables(8, dtype=torch.float32)
    x = torch.randn(2, 5, 1, HEAD_DIM)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([2, 6]))
    assert_rounded_once(out[0], turned(x[0], cos, sin, positions=torch.arange(2, 7)))
    assert_rounded_once(out[1, :2], turned(x[1, :2], cos, sin, positions=torch.tensor([6, 7])))
    assert torch.equal(out[1, 2:], x[1, 2:])


@pytest.mark.parametrize("layout", ["heads_first", "every_other", "expanded"])
def test_strides(layout):
    cos, sin = tables(dtype=torch.float32)
    x = {
        "heads_first": torch.randn(2, 3, 7, HEAD_DIM).transpose(1, 2),
        "every_other": torch.randn(2, 7, 3, 2 * HEAD_DIM)[..., ::2],
        "expanded": torch.randn(1, 7, 3, HEAD_DIM).expand(2, -1, -1, -1),
    }[layout]
    assert_rounded_once(apply_rotary_emb(x, cos, sin), turned(x, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_plain_version_agrees(interleaved):
    cos, sin = tables(7)
    x = torch.randn(2, 7, 3, HEAD_DIM, dtype=torch.float64)
    out = apply_rotary_emb_torch(x, cos, sin, interleaved)
    torch.testing.assert_close(out, turned(x, cos, sin, interleaved))
    per_batch = apply_rotary_emb_torch(x, cos.expand(2, 7, 4), sin.expand(2, 7, 4), interleaved)
    torch.testing.assert_close(per_batch, out)
    quarter = rotate_half(x[..., :8], interleaved)
    right_angle = (torch.zeros(7, 4), torch.ones(7, 4))
    torch.testing.assert_close(quarter, turned(x[..., :8], *right_angle, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [1, torch.tensor([3, 0])])
def test_gradients(interleaved, offsets):
    cos, sin = tables()
    x = torch.randn(2, 2, 1, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: apply_rotary_emb(x, cos, sin, interleaved, False, offsets), x)
    qkv = torch.randn(2, 1, 3, 1, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    cos_k, sin_k = tables()

    def packed(qkv):
        tensors = (qkv.clone(), cos, sin, cos_k, sin_k)
        return apply_rotary_emb_qkv_(*tensors, interleaved, offsets)

    def grouped(qkv):
        heads = qkv.clone().flatten(2, 3)
        return apply_rotary_emb_qkv_(heads, cos, sin, None, None, interleaved, offsets, 1)

    assert gradcheck(packed, qkv)
    assert gradcheck(grouped, qkv)
    kv = torch.randn(2, 2, 2, 1, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda kv: apply_rotary_emb_kv_(kv.clone(), cos, sin, interleaved, offsets), kv
    )


def test_gradients_of_packed_sequences():
    cos, sin = tables()
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    x = torch.randn(6, 1, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x: apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=3), x
    )


def test_in_place_on_leaves_and_views_with_gradients():
    """As in the original: on a leaf that requires a gradient, and on a part of a split."""
    cos, sin = tables(dtype=torch.float32)
    x = torch.randn(1, 5, 2, HEAD_DIM, requires_grad=True)
    before = x.detach().clone()
    dout = torch.randn_like(x)
    out = apply_rotary_emb(x, cos, sin, inplace=True)
    assert out.data_ptr() == x.data_ptr()
    out.backward(dout)
    assert_rounded_once(out.detach(), turned(before, cos, sin))
    assert_rounded_once(x.grad, turned(dout, cos, sin, conjugate=True))

    both = torch.randn(1, 5, 4, HEAD_DIM, requires_grad=True)
    first, second = (2.0 * both).split(2, dim=2)
    (apply_rotary_emb(first, cos, sin, inplace=True).sum() + second.sum()).backward()
    expected = torch.cat(
        (turned(torch.full_like(first, 2.0), cos, sin, conjugate=True), 2 * second)
    )
    torch.testing.assert_close(both.grad[:, :, :2].double(), expected[:1])
    assert torch.equal(both.grad[:, :, 2:], torch.full_like(second, 2.0))


SPLITS = {
    "unbind": lambda qkv: qkv.unbind(2),
    "chunk": lambda qkv: qkv.flatten(2, 3).chunk(3, dim=2),
    "slices": lambda qkv: (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_parts_are_rotated_in_place_in_a_compiled_call(split):
    cos, sin = tables(dtype=torch.float32)

    def function(x):
        q, k, v = SPLITS[split](2.0 * x)
        q = apply_rotary_emb(q, cos, sin, inplace=True)
        return q * apply_rotary_emb(k, cos, sin, inplace=True) + v

    x = torch.randn(2, 5, 3, 2, HEAD_DIM, requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), function(x)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    gradients = [torch.autograd.grad(result, x, dout)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_the_incoming_gradient_is_not_overwritten():
    cos, sin = tables(dtype=torch.float32)
    qkv = torch.randn(1, 4, 3, 2, HEAD_DIM, requires_grad=True)
    dout = torch.randn_like(qkv)
    kept = dout.clone()
    apply_rotary_emb_qkv_(qkv, cos, sin).backward(dout)
    assert torch.equal(dout, kept) and not torch.equal(qkv.grad, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
def test_packed_qkv_in_place(dtype, separate):
    cos, sin = tables(dtype=dtype)
    cos_k, sin_k = tables(dtype=dtype) if separate else (cos, sin)
    own = (cos_k, sin_k) if separate else (None, None)
    qkv = torch.randn(2, 5, 3, 2, HEAD_DIM, dtype=dtype)
    before = qkv.clone()
    out = apply_rotary_emb_qkv_(qkv, cos, sin, *own, interleaved=True, seqlen_offsets=2)
    assert out.data_ptr() == qkv.data_ptr()
    positions = torch.arange(2, 7)
    assert_rounded_once(out[:, :, 0], turned(before[:, :, 0], cos, sin, True, positions=positions))
    exact_k = turned(before[:, :, 1], cos_k, sin_k, True, positions=positions)
    assert_rounded_once(out[:, :, 1], exact_k)
    assert torch.equal(out[:, :, 2], before[:, :, 2])


@pytest.mark.parametrize("separate", [False, True])
def test_grouped_heads_in_one_row(separate):
    cos, sin = tables(dtype=torch.float32)
    cos_k, sin_k = tables(dtype=torch.float32) if separate else (cos, sin)
    own = (cos_k, sin_k) if separate else (None, None)
    qkv = torch.randn(2, 5, 4 + 2 * 2, HEAD_DIM)
    before = qkv.clone()
    out = apply_rotary_emb_qkv_(qkv, cos, sin, *own, num_heads_q=4)
    assert_rounded_once(out[:, :, :4], turned(before[:, :, :4], cos, sin))
    assert_rounded_once(out[:, :, 4:6], turned(before[:, :, 4:6], cos_k, sin_k))
    assert torch.equal(out[:, :, 6:], before[:, :, 6:])


def test_packed_kv_in_place():
    cos, sin = tables(dtype=torch.float32)
    kv = torch.randn(2, 5, 2, 3, HEAD_DIM)
    before = kv.clone()
    out = apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=torch.tensor([4, 1]))
    assert out.data_ptr() == kv.data_ptr()
    positions = torch.tensor([[4], [1]]) + torch.arange(5)
    assert_rounded_once(out[:, :, 0], turned(before[:, :, 0], cos, sin, positions=positions))
    assert torch.equal(out[:, :, 1], before[:, :, 1])


def module_tables(dim: int, length: int, base: float = 10000.0):
    angles = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
def test_module_tables(dtype):
    module = RotaryEmbedding(8, base=500.0).to(dtype)
    module._update_cos_sin_cache(300, device=torch.get_default_device(), dtype=dtype)
    cos, sin = module_tables(8, 300, 500.0)
    # Angles up to 300 have an error of 300 * 2^-24; 16-bit buffers would be off by whole turns.
    for actual, exact in ((module._cos_cached, cos), (module._sin_cached, sin)):
        assert actual.dtype == dtype and actual.shape == (300, 4)
        bound = 4e-5 + torch.finfo(dtype).eps
        assert (actual.double() - exact).abs().max() < bound
    kept = module._cos_cached
    module._update_cos_sin_cache(200, device=torch.get_default_device(), dtype=dtype)
    assert module._cos_cached is kept
    module._update_cos_sin_cache(301, device=torch.get_default_device(), dtype=dtype)
    assert module._cos_cached.shape == (301, 4)
    other = torch.float32 if dtype != torch.float32 else torch.float16
    module._update_cos_sin_cache(301, device=torch.get_default_device(), dtype=other)
    assert module._cos_cached.dtype == other
    assert not module.state_dict()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([2, 5])])
def test_module_rotates_qkv_and_kv(interleaved, offset):
    module = RotaryEmbedding(8, interleaved=interleaved)
    longest = None if isinstance(offset, int) else 12
    cos, sin = module_tables(8, 12)
    first = torch.full((2,), offset) if isinstance(offset, int) else offset
    positions = first[:, None] + torch.arange(6)
    qkv = torch.randn(2, 6, 3, 2, HEAD_DIM)
    expected = qkv.double().clone()
    for part in (0, 1):
        expected[:, :, part] = turned(qkv[:, :, part], cos, sin, interleaved, positions=positions)
    q, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    out = module(qkv, seqlen_offset=offset, max_seqlen=longest)
    assert_rounded_once(out, expected, slack=1e-5)
    assert out.data_ptr() == qkv.data_ptr()
    q_out, kv_out = module(q, kv, seqlen_offset=offset, max_seqlen=longest)
    assert torch.equal(q_out, out[:, :, 0]) and torch.equal(kv_out, out[:, :, 1:])
    assert q_out.data_ptr() == q.data_ptr() and kv_out.data_ptr() == kv.data_ptr()


def test_module_with_packed_sequences():
    module = RotaryEmbedding(8)
    cu_seqlens = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    qkv = torch.randn(7, 3, 2, HEAD_DIM)
    cos, sin = module_tables(8, 4)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = qkv.double().clone()
    for part in (0, 1):
        expected[:, part] = turned(qkv[:, part], cos, sin, positions=positions)
    q, kv = qkv[:, 0].clone(), qkv[:, 1:].clone()
    out = module(qkv, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert_rounded_once(out, expected, slack=1e-5)
    q_out, kv_out = module(q, kv, cu_seqlens=cu_seqlens, max_seqlen=4)
    assert torch.equal(q_out, out[:, 0]) and torch.equal(kv_out, out[:, 1:])


def test_xpos_depends_on_distances_alone():
    """q scaled up and k scaled down by position: products are those of shifted positions."""
    module = RotaryEmbedding(8, scale_base=16)
    module._update_cos_sin_cache(20, device=torch.get_default_device(), dtype=torch.float32)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 20, 1, 8).clone()
    qkv = torch.stack((q, k, k), dim=2)
    out = module(qkv)
    products = torch.einsum("bihd,bjhd->bij", out[:, :, 0], out[:, :, 1])[0]
    for distance in (-3, 0, 5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-4)
    steps = torch.arange(0, 8, 2).double()
    scale = (steps + 0.4 * 8) / (1.4 * 8)
    power = (torch.arange(20).double() - 10) / 16
    cos, _ = module_tables(8, 20)
    expected = cos * scale ** power[:, None]
    assert (module._cos_cached.double() - expected).abs().max() < 1e-5
    expected = cos / scale ** power[:, None]
    assert (module._cos_k_cached.double() - expected).abs().max() < 1e-5
    # A model cast to 16 bits keeps fp32 tables.
    half = RotaryEmbedding(8, scale_base=16).half()
    half._update_cos_sin_cache(20, device=torch.get_default_device(), dtype=torch.float32)
    assert torch.equal(half._cos_cached, module._cos_cached)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_module_after_inference_mode_has_gradients(training, compiled):
    module = RotaryEmbedding(8).train(training)
    call = torch.compile(module, backend="aot_eager") if compiled else module
    with torch.inference_mode():
        call(torch.randn(1, 4, 3, 1, 8))
    leaf = torch.randn(1, 4, 3, 1, 8, requires_grad=True)
    call(leaf * 1.0).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_module_is_one_graph_at_every_call(training):
    module = RotaryEmbedding(8).train(training)
    compiled = torch.compile(lambda x: module(2.0 * x), backend="aot_eager", fullgraph=True)
    # The tables are made, found as they are, and grown.
    for seqlen in (4, 4, 6):
        x = torch.randn(2, seqlen, 3, 2, HEAD_DIM, requires_grad=True)
        out, expected = compiled(x), RotaryEmbedding(8)(2.0 * x)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        gradients = [torch.autograd.grad(result, x, dout)[0] for result in (out, expected)]
        torch.testing.assert_close(*gradients)


def test_as_megatron_and_transformers_use_it():
    """Positional interleaved; fp32 copies of q with tables cut in half."""
    cos, sin = tables(7, dtype=torch.float32)
    t = torch.randn(2, 7, 3, 8)
    assert_rounded_once(apply_rotary_emb(t, cos, sin, True), turned(t, cos, sin, True))
    q = torch.randn(1, 7, 2, 8, dtype=torch.bfloat16)
    doubled = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    halves = [table.chunk(2, dim=-1)[0].contiguous() for table in doubled]
    out = apply_rotary_emb(q.float(), *(half.float() for half in halves)).type_as(q)
    assert_rounded_once(out, turned(q, cos, sin))
    assert apply_rotary_emb_func is apply_rotary_emb


@pytest.mark.parametrize(
    ("function", "named", "shape", "options"),
    [
        (apply_rotary_emb, ApplyRotaryEmb, (2, 5, 2, 8), (True, False, 3)),
        (apply_rotary_emb_qkv_, ApplyRotaryEmbQKV_, (2, 5, 3, 2, 8), (None, None, True, 3)),
        (apply_rotary_emb_kv_, ApplyRotaryEmbKV_, (2, 5, 2, 2, 8), (True, 3)),
    ],
)
def test_as_remote_code_of_models_uses_it(function, named, shape, options):
    """The autograd.Functions themselves, by apply() with positional arguments."""
    cos, sin = tables(dtype=torch.float32)
    x = torch.randn(shape, requires_grad=True)
    out = named.apply(x.clone(), cos, sin, *options)
    assert torch.equal(out, function(x.clone(), cos, sin, *options))
    assert torch.autograd.grad(out.sum(), x)[0].any()


def test_as_mamba_uses_it():
    """The module's tables, as arguments of a cache's rotation."""
    module = RotaryEmbedding(8, interleaved=False)
    module._update_cos_sin_cache(32, device=torch.get_default_device(), dtype=torch.float16)
    assert module._cos_cached.shape == module._sin_cached.shape == (32, 4)
    assert module._cos_cached.dtype == torch.float16


def test_as_clients_of_an_earlier_version_make_it():
    """ModernBERT in transformers before 4.53, and StripedHyena, which reads it back."""
    options = {"dim": 8, "base": 500.0, "scale_base": None, "interleaved": False}
    module = RotaryEmbedding(**options, pos_idx_in_fp32=True, device=torch.get_default_device())
    assert module.pos_idx_in_fp32
    x = torch.randn(1, 4, 3, 2, 8)
    assert torch.equal(module(x.clone()), RotaryEmbedding(**options)(x.clone()))
    with pytest.raises(NotImplementedError, match="pos_idx_in_fp32: is False"):
        RotaryEmbedding(**options, pos_idx_in_fp32=False)


def test_as_modernbert_and_esm_use_it():
    """In place on a packed qkv seen as heads, with cu_seqlens and max_seqlen."""
    module = RotaryEmbedding(8)
    module._update_cos_sin_cache(5, device=torch.get_default_device(), dtype=torch.float32)
    qkv = torch.randn(9, 3, 2, 8)
    before = qkv.clone()
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    apply_rotary(
        qkv[:, :2].view(9, -1, 8),
        module._cos_cached,
        module._sin_cached,
        seqlen_offsets=0,
        cu_seqlens=cu_seqlens,
        max_seqlen=5,
        interleaved=False,
        inplace=True,
    )
    cos, sin = module_tables(8, 5)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    for part in (0, 1):
        exact = turned(before[:, part], cos, sin, positions=positions)
        assert_rounded_once(qkv[:, part], exact, slack=1e-5)
    assert torch.equal(qkv[:, 2], before[:, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 2, 12)}, "x: must have 4 dimensions"),
        ({"cos": torch.zeros(16, 7), "sin": torch.zeros(16, 7)}, "at most 6 columns"),
        ({"sin": torch.zeros(16, 3)}, "must both have shape"),
        ({"seqlen_offsets": 12}, "positions 12 to 16"),
        ({"seqlen_offsets": -1}, "positions -1 to 3"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, r"must have shape \[1\]"),
        ({"seqlen_offsets": torch.zeros(1)}, "must be int32 or int64"),
        ({"x": torch.zeros(5, 2, 12), "cu_seqlens": torch.tensor([0, 5]).int()}, "max_seqlen"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    cos, sin = tables(dtype=torch.float32)
    arguments = {"x": torch.zeros(1, 5, 2, 12), "cos": cos, "sin": sin, **change}
    with pytest.raises(ValueError, match=message):
        apply_rotary_emb(**arguments)
    with pytest.raises(ValueError, match=message):
        apply_rotary(**arguments)


def test_wrong_packed_tensors_are_refused():
    cos, sin = tables(dtype=torch.float32)
    with pytest.raises(ValueError, match="qkv: must have shape"):
        apply_rotary_emb_qkv_(torch.zeros(1, 4, 2, 2, 12), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q: must be given"):
        apply_rotary_emb_qkv_(torch.zeros(1, 4, 6, 12), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q: is 3"):
        apply_rotary_emb_qkv_(torch.zeros(1, 4, 6, 12), cos, sin, num_heads_q=3)
    with pytest.raises(ValueError, match="kv: must have shape"):
        apply_rotary_emb_kv_(torch.zeros(1, 4, 3, 2, 12), cos, sin)
    with pytest.raises(ValueError, match="max_seqlen"):
        RotaryEmbedding(8)(torch.zeros(2, 4, 3, 2, 12), seqlen_offset=torch.tensor([1, 2]))


def test_the_operator_itself_is_differentiable():
    cos, sin = tables()
    x = torch.randn(1, 3, 1, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: apply_rotary(x, cos, sin, interleaved=True, conjugate=True), x)


class Rotate(torch.autograd.Function):
    """As clients write it around apply_rotary()."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        apply_rotary(x, cos, sin, inplace=True)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dout):
        return apply_rotary(dout, *ctx.saved_tensors, conjugate=True), None, None


def test_parts_of_a_tensor_are_rotated_in_place_within_a_function():
    cos, sin = tables()
    x = torch.randn(2, 5, 6, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    qkv = x * 1.0
    q, k, v = qkv[:, :, :2], qkv[:, :, 2:4], qkv[:, :, 4:]
    q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
    torch.testing.assert_close(torch.cat((q, k), 2), turned(x, cos, sin)[:, :, :4])
    (q.sum() + k.square().sum() + v.sum()).backward()
    expected = turned(torch.ones_like(q), cos, sin, conjugate=True)
    torch.testing.assert_close(x.grad[:, :, :2], expected)
    torch.testing.assert_close(x.grad[:, :, 2:4], 2.0 * x.detach()[:, :, 2:4])
