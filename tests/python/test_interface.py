"""The interface of the original: names, signatures, what is returned and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from support import offsets, same_bits, tensors, varlen_tensors

import flash_attn
from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
# FlashAttention 2.8.3: the parameters without a default; then names and defaults.
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], TAIL),
    "flash_attn_qkvpacked_func": (["qkv"], TAIL),
    "flash_attn_kvpacked_func": (["q", "kv"], TAIL),
    "flash_attn_varlen_func": (
        ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        {**TAIL, "block_table": None},
    ),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], TAIL),
    "flash_attn_varlen_kvpacked_func": (
        ["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
        TAIL,
    ),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_originals(name):
    function = getattr(flash_attn, name)
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required, defaults = SIGNATURES[name]
    assert [p.name for p in positional] == [*required, *defaults]
    assert {p.name: p.default for p in positional if p.default is not p.empty} == defaults
    # What this library adds comes by keyword only, and does nothing by default.
    extensions = [p for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extensions)
    assert {"attn_bias", "learnable_sink", "s_aux"} <= {p.name for p in extensions}


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstrings_name_every_required_parameter(name):
    text = inspect.getdoc(getattr(flash_attn, name))
    assert text is not None and "Returns:" in text
    for parameter in SIGNATURES[name][0]:
        assert parameter in text


def test_versions():
    assert flash_attn.__version__ == "2.8.3"
    assert flash_attn.plus_version == str(flash_attn._native.version())


def test_the_interface_module_is_importable_by_its_own_name():
    from flash_attn.flash_attn_interface import flash_attn_func as function

    assert function is flash_attn_func is flash_attn.flash_attn_interface.flash_attn_func
    assert set(flash_attn.__all__) <= set(dir(flash_attn))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flash_attn.no_such_name


def test_results_without_probabilities_are_one_tensor():
    q, k, v = tensors(dtype=torch.float16)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == q.dtype and out.shape == q.shape and not out.requires_grad


def test_results_with_probabilities_are_those_of_the_original():
    q, k, v = tensors(2, 65, 97, dtype=torch.bfloat16)
    out, lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 65) and lse.dtype == torch.float32
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype
    _, _, s_dmask = flash_attn_func(q, k, v, dropout_p=0.1, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 128, 128) and s_dmask.dtype == q.dtype
    q, k, v = varlen_tensors([30, 20], [30, 20])
    lengths = offsets([30, 20])
    out, lse, _ = flash_attn_varlen_func(q, k, v, lengths, lengths, 30, 30, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (4, 50)


def test_deterministic_is_accepted():
    q, k, v = tensors()
    assert same_bits(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))


def test_positional_arguments_in_the_originals_order():
    q, k, v = tensors()
    slopes = torch.rand(4)
    by_position = flash_attn_func(q, k, v, 0.0, 0.2, True, (9, -1), 4.0, slopes, False, True)
    by_name = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.2,
        causal=True,
        window_size=(9, -1),
        softcap=4.0,
        alibi_slopes=slopes,
        return_attn_probs=True,
    )
    assert same_bits(by_position[0], by_name[0]) and same_bits(by_position[1], by_name[1])


@torch.enable_grad()
def test_numbers_may_be_what_operators_of_pytorch_take_for_them():
    """The original's options pass through such operators."""
    one = torch.tensor
    q, k, v = (x.requires_grad_() for x in tensors(2, 6, 9))
    options = one(0.5), one(0.3), one(True), (one(4), one(0)), one(2.0), None, None
    torch.manual_seed(0)
    out = flash_attn_func(q, k, v, *options)
    torch.manual_seed(0)
    expected = flash_attn_func(q, k, v, 0.5, 0.3, True, (4, 0), 2.0)
    assert same_bits(out, expected)
    gradients = (torch.autograd.grad(x.sum(), q)[0] for x in (out, expected))
    assert same_bits(*gradients)
    assert same_bits(flash_attn_func(q, k, v, causal=None), flash_attn_func(q, k, v))
    cached = flash_attn_with_kvcache(q, k, v, cache_seqlens=7, softmax_scale=one(0.3), causal=None)
    assert same_bits(cached, flash_attn_with_kvcache(q, k, v, cache_seqlens=7, softmax_scale=0.3))


def test_a_number_that_wants_a_gradient_is_refused():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TypeError, match="softmax_scale: must be a number"):
        flash_attn_func(*tensors(2, 6, 9), softmax_scale=scale)


def test_a_nested_tensor_is_told_where_to_go():
    nested = torch.nested.nested_tensor([torch.ones(n, 2, 8) for n in (3, 2)], layout=torch.jagged)
    with pytest.raises(TypeError, match="k: must be a dense tensor, is a nested one"):
        flash_attn_func(torch.ones(2, 3, 2, 8), nested, nested)


def test_s_aux_is_another_name_for_the_learnable_sink():
    q, k, v = tensors(2, 65, 65, num_heads_kv=4)
    flat, lengths = torch.stack((q, k, v), 2).flatten(0, 1), offsets([65, 65])
    sink = torch.randn(4)
    calls = [
        lambda **it: flash_attn_func(q, k, v, **it),
        lambda **it: flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **it),
        lambda **it: flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **it),
        lambda **it: flash_attn_varlen_func(*flat.unbind(1), lengths, lengths, 65, 65, **it),
        lambda **it: flash_attn.flash_attn_varlen_kvpacked_func(
            flat[:, 0], flat[:, 1:], lengths, lengths, 65, 65, **it
        ),
        lambda **it: flash_attn.flash_attn_varlen_qkvpacked_func(flat, lengths, 65, **it),
        lambda **it: flash_attn.flash_attn_with_kvcache(q, k, v, **it),
    ]
    for call in calls:
        out = call(s_aux=sink)
        assert same_bits(out, call(learnable_sink=sink)) and not torch.equal(out, call())
        with pytest.raises(ValueError, match="s_aux: is given together with learnable_sink"):
            call(s_aux=sink, learnable_sink=sink)


def test_meta_tensors_give_shapes():
    q, k, v = (x.to("meta") for x in tensors(head_dim_v=24))
    out = flash_attn_func(q, k, v)
    assert out.device.type == "meta" and out.shape == (*q.shape[:-1], 24)


def test_tensors_expanded_along_head_dim_are_copied():
    q, k, v = (x[..., :1].expand(x.shape) for x in tensors())
    expected = flash_attn_func(*(x.contiguous() for x in (q, k, v)))
    assert same_bits(flash_attn_func(q, k, v), expected)
    leaves = [x[..., :1].clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = flash_attn_func(*(x.expand(y.shape) for x, y in zip(leaves, (q, k, v))))
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert same_bits(out, expected) and all(x.isfinite().all() for x in gradients)


def test_views_of_negated_values_are_resolved():
    q, k, v = tensors(num_heads=1, num_heads_kv=1)
    negated = torch.randn(1, dtype=torch.cfloat).conj().imag
    assert negated.is_neg()
    out = flash_attn_func(q, k, v, learnable_sink=negated)
    assert same_bits(out, flash_attn_func(q, k, v, learnable_sink=negated.clone()))
    view = torch.randn(*q.shape, dtype=torch.cfloat).conj().imag
    assert same_bits(flash_attn_func(view, k, v), flash_attn_func(view.clone(), k, v))
