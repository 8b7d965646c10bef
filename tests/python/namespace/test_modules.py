"""Attention, blocks and embeddings: against plain attention, and one path against another."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flash_attn
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules import mha
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.embedding import BertEmbeddings, GPT2Embeddings
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.utils.generation import InferenceParams

from .plain import attention, not_after

HAS_LIBRARY = any((Path(flash_attn.__file__).parent / "lib").glob("flash_attn_plus_ffi*"))
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the native library is not built")

DIM, HEADS = 32, 4


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_self_attention(causal, padded, scale):
    qkv = torch.randn(3, 6, 3, 2, 8, requires_grad=True)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0] * 6]).bool() if padded else None
    out = SelfAttention(causal, scale)(qkv, key_padding_mask=mask)
    visible = not_after(6, 6) if causal else torch.ones(1, 1, 6, 6).bool()
    if padded:
        visible = visible & mask[:, None, None, :]
    expected = attention(*qkv.unbind(2), visible, scale or 8**-0.5)
    close(out, expected)
    assert not padded or not out[2].any()
    dout = torch.randn_like(out)
    dqkv = torch.autograd.grad(out, qkv, dout)[0]
    assert dqkv.isfinite().all()
    rows = slice(0, 2) if padded else slice(None)
    close(dqkv[rows], torch.autograd.grad(expected, qkv, dout)[0][rows])
    close(SelfAttention(not causal, scale)(qkv, causal=causal, key_padding_mask=mask), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 6), (3, 6), (6, 3)])
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_cross_attention(causal, padded, seqlen_q, seqlen_k, heads_kv):
    q, kv = torch.randn(2, seqlen_q, 4, 8), torch.randn(2, seqlen_k, 2, heads_kv, 8)
    lengths = torch.tensor([seqlen_k, seqlen_k - 1]) if padded else torch.full((2,), seqlen_k)
    mask = torch.arange(seqlen_k) < lengths[:, None]
    out = CrossAttention(causal)(q, kv, key_padding_mask=mask if padded else None)
    visible = mask[:, None, None, :].expand(2, 1, seqlen_q, seqlen_k).clone()
    if causal:
        for b, length in enumerate(lengths.tolist()):
            visible[b] &= torch.ones(seqlen_q, seqlen_k).bool().tril(length - seqlen_q)
    close(out, attention(q, *kv.unbind(2), visible, 8**-0.5))


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_flash_modules(causal):
    qkv = torch.randn(2, 7, 3, 4, 8)
    plain = SelfAttention(causal)(qkv)
    close(FlashSelfAttention(causal)(qkv), plain)
    cu_seqlens = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = FlashSelfAttention(not causal)(qkv.flatten(0, 1), causal, cu_seqlens, 7)
    close(packed.view_as(plain), plain)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:, :2]
    plain = CrossAttention(causal)(q, kv)
    close(FlashCrossAttention(causal)(q, kv), plain)
    lengths = (cu_seqlens, 7, cu_seqlens, 7)
    packed = FlashCrossAttention(causal)(q.flatten(0, 1), kv.flatten(0, 1), None, *lengths)
    close(packed.view_as(plain), plain)


@needs_library
@torch.no_grad()
def test_flash_modules_pass_on_their_options():
    qkv = torch.randn(2, 9, 3, 4, 8)
    slopes = torch.tensor(get_alibi_slopes(4))
    options = {"softmax_scale": 0.2, "window_size": (3, 1), "alibi_slopes": slopes}
    module = FlashSelfAttention(**options, attention_dropout=0.5).eval()
    expected = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(module(qkv), expected)
    # A model in 16 bits has its slopes in 16 bits.
    assert torch.equal(module.half()(qkv), expected)
    assert not module.state_dict()
    cross = FlashCrossAttention(**options).eval()
    assert torch.equal(cross(qkv[:, :, 0], qkv[:, :, 1:]), expected)
    assert not torch.equal(module.train()(qkv), expected)
    for module, arguments in (
        (FlashSelfAttention(), (qkv[0],)),
        (cross, (qkv[0, :, 0], qkv[0, :, 1:])),
    ):
        with pytest.raises(ValueError, match="max_seqlen: must be given"):
            module(*arguments, cu_seqlens=torch.tensor([0, 9]).int())


def plain_mha(module: MHA, x: torch.Tensor, causal: bool, rotary_dim: int = 0) -> torch.Tensor:
    """Self-attention from the module's weights."""
    q, k, v = module.Wqkv(x).split([DIM, *[module.num_heads_kv * module.head_dim] * 2], -1)
    q, k, v = (t.unflatten(-1, (-1, module.head_dim)) for t in (q, k, v))
    if rotary_dim:
        table = RotaryEmbedding(rotary_dim)
        table._update_cos_sin_cache(x.shape[1])
        q, k = (apply_rotary_emb(t, table._cos_cached, table._sin_cached) for t in (q, k))
    visible = not_after(x.shape[1], x.shape[1]) if causal else torch.ones(1, 1, 1, 1).bool()
    return module.out_proj(attention(q, k, v, visible, module.head_dim**-0.5).flatten(2))


@pytest.mark.parametrize("heads_kv", [None, 2, 1])
@pytest.mark.parametrize("rotary_dim", [0, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mha(heads_kv, rotary_dim, causal, checkpointing):
    module = MHA(
        DIM, HEADS, heads_kv, causal=causal, rotary_emb_dim=rotary_dim, checkpointing=checkpointing
    )
    x = torch.randn(2, 6, DIM)
    out = module(x)
    expected = plain_mha(module, x, causal, rotary_dim)
    close(out, expected)
    dout = torch.randn_like(out)
    parameters = list(module.parameters())
    actual = torch.autograd.grad(out, parameters, dout)
    for one, other in zip(actual, torch.autograd.grad(expected, parameters, dout)):
        close(one, other)


def gradients(module, out, dout):
    return torch.autograd.grad(out, list(module.parameters()), dout)


@needs_library
@pytest.mark.parametrize("heads_kv", [None, 2])
@pytest.mark.parametrize("rotary_dim", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mha_with_flash_attention_dense_and_packed(heads_kv, rotary_dim, checkpointing):
    """The same weights with PyTorch's attention, with ours, and packed without padding."""
    options = {"causal": True, "rotary_emb_dim": rotary_dim}
    plain = MHA(DIM, HEADS, heads_kv, **options)
    options["checkpointing"] = checkpointing
    flash = MHA(DIM, HEADS, heads_kv, **options, use_flash_attn=True)
    flash.load_state_dict(plain.state_dict())
    x, dout = torch.randn(2, 2, 6, DIM)
    expected, out = plain(x), flash(x)
    close(out, expected)
    for one, other in zip(gradients(flash, out, dout), gradients(plain, expected, dout)):
        close(one, other)

    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    tokens, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
    packed = pad_input(flash(tokens, cu_seqlens=cu_seqlens, max_seqlen=longest), indices, 2, 6)
    expected = plain(x) * mask[..., None]
    close(packed, expected)
    for one, other in zip(gradients(flash, packed, dout), gradients(plain, expected, dout)):
        close(one, other)


@pytest.mark.parametrize("heads_kv", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_mha_with_a_mask_of_padding(heads_kv, causal):
    """Padding on the right changes nothing for the tokens before it."""
    module = MHA(DIM, HEADS, heads_kv, causal=causal, rotary_emb_dim=4)
    x = torch.randn(2, 6, DIM)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    out = module(x, key_padding_mask=mask)
    close(out[:1], module(x[:1]))
    close(out[1:, :4], module(x[1:, :4]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("return_residual", [False, True])
@pytest.mark.parametrize("heads_kv", [None, 2])
def test_mha_across_two_inputs(fused, return_residual, heads_kv):
    module = MHA(
        DIM,
        HEADS,
        heads_kv,
        cross_attn=True,
        fused_bias_fc=fused,
        return_residual=return_residual,
        qkv_proj_bias=False,
    )
    x, x_kv = torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)

    def call(*args, **kwargs):
        result = module(*args, **kwargs)
        assert not return_residual or result[1] is x
        return result[0] if return_residual else result

    def expected(x_kv):
        q = (x @ module.Wq.weight.t()).unflatten(-1, (HEADS, -1))
        kv = (x_kv @ module.Wkv.weight.t()).unflatten(-1, (2, heads_kv or HEADS, -1))
        out = attention(q, *kv.unbind(2), torch.ones(1, 1, 1, 1).bool(), module.head_dim**-0.5)
        return module.out_proj(out.flatten(2))

    close(call(x, x_kv), expected(x_kv))
    close(call(x), expected(x))
    close(call(x, mixer_subset=slice(0, 1)), expected(x)[:, :1])


def test_mha_with_a_depthwise_convolution_is_causal():
    for options in ({}, {"num_heads_kv": 2}, {"num_heads_kv": 2, "cross_attn": True}):
        module = MHA(DIM, HEADS, causal=True, dwconv=True, **options)
        x = torch.randn(1, 6, DIM)
        changed = x.clone()
        changed[:, 4:] += 1.0
        out, other = module(x), module(changed)
        close(out[:, :4], other[:, :4])
        assert (out[:, 4:] - other[:, 4:]).abs().max() > 1e-3
    convolution = nn.Conv1d(6, 6, 3, padding=2, groups=6)
    x = torch.randn(1, 5, 6)
    expected = torch.zeros(1, 5, 6) + convolution.bias
    for lag in range(3):
        shifted = F.pad(x, (0, 0, lag, 0))[:, :5]
        expected = expected + shifted * convolution.weight[:, 0, 2 - lag]
    close(mha._convolved(convolution, x), expected)


def plain_kvcache(
    q,
    k_cache,
    v_cache,
    k,
    v,
    rotary_cos=None,
    rotary_sin=None,
    *,
    cache_seqlens,
    softmax_scale,
    causal,
    window_size,
    alibi_slopes,
    rotary_interleaved=False,
):
    """flash_attn_with_kvcache as its documentation has it, for one new token per sequence."""
    assert window_size == (-1, -1) and alibi_slopes is None and causal
    batch = q.shape[0]
    lengths = torch.as_tensor(cache_seqlens).expand(batch)
    if rotary_cos is not None:
        q, k = (
            apply_rotary_emb(
                t, rotary_cos, rotary_sin, rotary_interleaved, seqlen_offsets=lengths.long()
            )
            for t in (q, k)
        )
    outs = []
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, length : length + k.shape[1]] = k[b]
        v_cache[b, length : length + k.shape[1]] = v[b]
        seqlen = length + k.shape[1]
        visible = not_after(q.shape[1], seqlen)
        keys, values = k_cache[b : b + 1, :seqlen], v_cache[b : b + 1, :seqlen]
        scale = softmax_scale or q.shape[-1] ** -0.5
        outs.append(attention(q[b : b + 1], keys, values, visible, scale))
    return torch.cat(outs)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["torch", "plain", "flash"])
@pytest.mark.parametrize("heads_kv", [None, 2])
@pytest.mark.parametrize(
    "rotary", [{}, {"rotary_emb_dim": 4}, {"rotary_emb_dim": 4, "rotary_emb_interleaved": True}]
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_decoding_is_the_forward_of_the_whole(cache, heads_kv, rotary, per_sample, monkeypatch):
    """With PyTorch's attention, with a plain append, and with ours, token by token."""
    if cache == "plain":
        monkeypatch.setattr(mha, "flash_attn_with_kvcache", plain_kvcache)
    if cache != "torch" and not HAS_LIBRARY:
        pytest.skip("the native library is not built")
    options = {"num_heads_kv": heads_kv, "causal": True, "layer_idx": 3, **rotary}
    module = MHA(DIM, HEADS, **options, use_flash_attn=cache != "torch")
    x = torch.randn(2, 7, DIM)
    expected = module(x)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    if per_sample and cache != "torch":
        params.lengths_per_sample = torch.zeros(2, dtype=torch.int32)
    outs = [module(x[:, :4], inference_params=params)]
    for t in range(4, 7):
        params.seqlen_offset = t
        if params.lengths_per_sample is not None:
            params.lengths_per_sample.fill_(t)
        outs.append(module(x[:, t : t + 1], inference_params=params))
    close(torch.cat(outs, 1), expected)
    assert params.key_value_memory_dict[3].shape == (2, 9, 2, heads_kv or HEADS, 8)
    made = module.allocate_inference_cache(2, 9, dtype=torch.float16)
    assert made.shape == (2, 9, 2, heads_kv or HEADS, 8) and made.dtype == torch.float16


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("scale_base", [None, 16])
def test_rows_of_a_larger_batch_have_their_own_lengths(scale_base):
    """The first and the later tokens, with rotation inside and outside of the attention."""
    rotary = {"rotary_emb_dim": 4, "rotary_emb_scale_base": scale_base}
    module = MHA(DIM, HEADS, causal=True, layer_idx=0, use_flash_attn=True, **rotary)
    lengths = torch.tensor([5, 3, 0, 0], dtype=torch.int32)
    params = InferenceParams(9, 4, batch_size_offset=2, lengths_per_sample=lengths)
    x = torch.randn(2, 7, DIM)
    outs = [module(x[:, :4], inference_params=params)]
    for t in range(4, 7):
        params.seqlen_offset = t
        lengths[2:] = t
        outs.append(module(x[:, t : t + 1], inference_params=params))
    close(torch.cat(outs, 1), module(x))


def test_a_cache_too_small_is_refused_before_it_is_written():
    module = MHA(DIM, HEADS, causal=True, layer_idx=0)
    params = InferenceParams(max_seqlen=4, max_batch_size=2)
    module(torch.randn(2, 3, DIM), inference_params=params)
    kept = params.key_value_memory_dict[0].clone()
    params.seqlen_offset = 3
    with pytest.raises(ValueError, match="room for 2 sequences of 4 tokens"):
        module(torch.randn(2, 2, DIM), inference_params=params)
    assert torch.equal(params.key_value_memory_dict[0][:, :3], kept[:, :3])
    with pytest.raises(ValueError, match="layer_idx"):
        MHA(DIM, HEADS)(torch.randn(1, 1, DIM), inference_params=params)


def test_mha_refuses_what_does_not_go_together():
    x, lengths = torch.randn(1, 4, DIM), torch.tensor([0, 4], dtype=torch.int32)
    mask = torch.ones(1, 4).bool()
    decoding = {"inference_params": InferenceParams(9, 1, lengths_per_sample=lengths[1:])}
    for options, arguments, error, message in (
        ({"layer_idx": 0}, decoding, NotImplementedError, "lengths_per_sample: needs use_flash"),
        ({}, {"cu_seqlens": lengths, "max_seqlen": 4}, NotImplementedError, "use_flash_attn=True"),
        ({"use_flash_attn": True}, {"cu_seqlens": lengths}, ValueError, "max_seqlen"),
        ({"use_flash_attn": True}, {"key_padding_mask": mask}, NotImplementedError, "unpad"),
        ({}, {"x_kv": x}, ValueError, "cross_attn=True"),
        ({}, {"mixer_subset": 0}, ValueError, "cross_attn=True"),
    ):
        with pytest.raises(error, match=message):
            MHA(DIM, HEADS, **options)(x, **arguments)
    for options, error, message in (
        ({"use_alibi": True}, NotImplementedError, "use_alibi"),
        ({"window_size": (2, 0)}, NotImplementedError, "window_size"),
        ({"cross_attn": True, "rotary_emb_dim": 4}, NotImplementedError, "rotary_emb_dim"),
        ({"num_heads_kv": 3}, ValueError, "num_heads_kv"),
    ):
        with pytest.raises(error, match=message):
            MHA(DIM, HEADS, **options)
    with pytest.raises(ValueError, match="embed_dim"):
        MHA(DIM, 5)


def test_slopes_of_alibi():
    """The published ones: powers of 2^-8/n; others filled up from twice the power below."""
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(1) == [2.0**-8]
    torch.testing.assert_close(
        torch.tensor(get_alibi_slopes(12)),
        torch.tensor([2.0**-i for i in range(1, 9)] + [2.0 ** -(0.5 + i) for i in range(4)]),
    )


def make_block(cls=Block, **options):
    mixer = partial(MHA, num_heads=HEADS, causal=True)
    return cls(DIM, mixer, partial(Mlp, hidden_features=48), **options)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm, partial(RMSNorm, zero_centered_weight=True)]
)
@pytest.mark.parametrize("in_fp32", [False, True])
def test_prenorm_block(norm, in_fp32):
    """The fused and the plain path, against the block as one would write it."""
    plain = make_block(norm_cls=norm, residual_in_fp32=in_fp32)
    fused = make_block(norm_cls=norm, residual_in_fp32=in_fp32, fused_dropout_add_ln=True)
    fused.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 2, 5, DIM)
    z1 = x + residual
    z2 = plain.mixer(plain.norm1(z1)) + z1
    expected = plain.mlp(plain.norm2(z2))
    for block in (plain, fused):
        out, total = block(x, residual)
        close(out, expected)
        close(total, z2)
    close(plain(x)[1], fused(x)[1])


@pytest.mark.parametrize("cls", [Block, ParallelBlock])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
def test_fused_blocks_take_pytorchs_own_epsilon(cls, dtype, norm_dtype):
    """Where it shows: small values, whose mean square is less than the epsilon of 16 bits."""
    norm = partial(nn.RMSNorm, dtype=norm_dtype or dtype)
    x = 0.01 * torch.randn(2, 5, DIM, dtype=dtype)
    outs = [
        cls(DIM, nn.Identity, nn.Identity, norm_cls=norm, fused_dropout_add_ln=fused)(x)[0]
        for fused in (False, True)
    ]
    torch.testing.assert_close(outs[1].float(), outs[0].float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("return_residual", [False, True])
def test_postnorm_block(fused, return_residual):
    mixer = partial(MHA, num_heads=HEADS, return_residual=return_residual)
    mlp = partial(Mlp, hidden_features=48, return_residual=return_residual)
    block = Block(
        DIM, mixer, mlp, prenorm=False, fused_dropout_add_ln=fused, return_residual=return_residual
    )
    x = torch.randn(2, 5, DIM)

    def first(out):
        return out[0] if return_residual else out

    y = block.norm1(first(block.mixer(x)) + x)
    close(block(x), block.norm2(first(block.mlp(y)) + y))
    with pytest.raises(ValueError, match="residual"):
        block(x, x)


@pytest.mark.parametrize("fused", [False, True])
def test_block_drops_elements_and_sequences_in_training(fused):
    block = make_block(
        resid_dropout1=0.5,
        drop_path1=0.5,
        fused_dropout_add_ln=fused,
        mark_shared_params=True,
        sequence_parallel=True,
    )
    block.mixer = nn.Identity()
    block.mlp = nn.Identity()
    x, residual = torch.randn(400, 2, DIM), torch.zeros(400, 2, DIM)
    _, total = block.train()(x, residual)
    rows = total.flatten(1).any(1)
    assert 0.4 < rows.float().mean() < 0.6
    kept = total[rows]
    assert 0.45 < (kept != 0).float().mean() < 0.55
    torch.testing.assert_close(kept[kept != 0], 4.0 * x[rows][kept != 0])
    close(block.eval()(x, residual)[1], x)
    for name, parameter in block.named_parameters():
        assert getattr(parameter, "_shared_params", False) == ("norm" in name)
        assert getattr(parameter, "_sequence_parallel", False) == ("norm" in name)


def test_block_without_an_mlp_and_with_a_subset():
    block = Block(DIM, partial(MHA, num_heads=HEADS, cross_attn=True), nn.Identity)
    assert not hasattr(block, "norm2")
    x = torch.randn(2, 5, DIM)
    out, total = block(x, mixer_subset=slice(0, 1))
    assert out.shape == total.shape == (2, 1, DIM)
    close(out, block.mixer(block.norm1(x))[:, :1])
    cache = make_block().allocate_inference_cache(2, 3)
    assert cache.shape == (2, 3, 2, HEADS, 8)


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_parallel_block(norm, tied):
    plain = make_block(ParallelBlock, norm_cls=norm, tied_norm=tied)
    fused = make_block(ParallelBlock, norm_cls=norm, tied_norm=tied, fused_dropout_add_ln=True)
    fused.load_state_dict(plain.state_dict())
    x1, x2, residual = torch.randn(3, 2, 5, DIM)
    for arguments in ((x1,), (x1, x2), (x1, x2, residual)):
        z = sum(arguments)
        second = plain.norm1 if tied else plain.norm2
        expected = (plain.mixer(plain.norm1(z)), plain.mlp(second(z)), z)
        for block in (plain, fused):
            for one, other in zip(block(*arguments), expected):
                close(one, other)


def test_blocks_refuse_what_they_cannot_fuse():
    with pytest.raises(NotImplementedError, match="fused_dropout_add_ln: needs a LayerNorm"):
        make_block(norm_cls=lambda dim: nn.Identity(), fused_dropout_add_ln=True)
    with pytest.raises(NotImplementedError, match="resid_dropout1 equal"):
        make_block(ParallelBlock, fused_dropout_add_ln=True, resid_dropout1=0.1)
    with pytest.raises(NotImplementedError, match="residual_in_fp32"):
        make_block(prenorm=False, residual_in_fp32=True)


def test_default_blocks_have_heads_of_64():
    block = Block(128)
    assert block.mixer.num_heads == 2 and block.mlp.fc1.out_features == 512
    block = Block(128, mlp_cls=FusedMLP)
    assert block(torch.randn(1, 3, 128))[0].shape == (1, 3, 128)


def test_gpt2_embeddings():
    ids, positions = torch.randint(0, 20, (2, 5)), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    module = GPT2Embeddings(8, 20, 10, padding_idx=0)
    words, places = module.word_embeddings.weight, module.position_embeddings.weight
    close(module(ids), words[ids] + places[:5])
    close(module(ids, position_ids=positions), words[ids] + places[positions])
    assert not words[0].any()
    module = GPT2Embeddings(8, 20, 0, word_embed_proj_dim=4)
    close(module(ids), module.project_in(module.word_embeddings(ids)))


def test_bert_embeddings():
    ids, types = torch.randint(0, 20, (2, 5)), torch.randint(0, 2, (2, 5))
    module = BertEmbeddings(8, 20, 10, 2)
    words, places = module.word_embeddings.weight, module.position_embeddings.weight
    kinds = module.token_type_embeddings.weight
    close(module(ids), words[ids] + places[:5] + kinds[0])
    close(module(ids, token_type_ids=types), words[ids] + places[:5] + kinds[types])
    bare = BertEmbeddings(8, 20, 0, 0)
    close(bare(ids), bare.word_embeddings(ids))


def test_as_safari_uses_it():
    """A decoder of blocks with fused norms, a shared final norm, and a loss that falls."""
    embeddings = GPT2Embeddings(DIM, 11, 16)
    blocks = nn.ModuleList(
        make_block(fused_dropout_add_ln=True, residual_in_fp32=True) for _ in range(2)
    )
    final = nn.LayerNorm(DIM)
    head = nn.Linear(DIM, 11, bias=False)
    head.weight = embeddings.word_embeddings.weight
    modules = nn.ModuleList((embeddings, blocks, final, head))
    ids = torch.randint(0, 11, (4, 9))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        hidden, residual = embeddings(ids[:, :-1]), None
        for block in blocks:
            hidden, residual = block(hidden, residual)
        logits = head(final(hidden + residual))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0)])
def test_decoding_with_alibi_and_a_window(window_size):
    """What the original forgets when it decodes: the window; and slopes in 16 bits."""
    options = {"causal": True, "use_alibi": True, "window_size": window_size, "layer_idx": 0}
    module = MHA(DIM, HEADS, use_flash_attn=True, **options).bfloat16()
    x = torch.randn(2, 7, DIM, dtype=torch.bfloat16)
    params = InferenceParams(max_seqlen=8, max_batch_size=2)
    outs = [module(x[:, :3], inference_params=params)]
    for t in range(3, 7):
        params.seqlen_offset = t
        outs.append(module(x[:, t : t + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(outs, 1), module(x), rtol=2e-2, atol=2e-2)
