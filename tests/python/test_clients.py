"""Calls in the form in which clients make them, and results used as they use them.

Where the other clients are: private functions and the extension module, as diffusers, xformers,
unsloth, vortex and GPT-NeoX call them, in test_private.py; the distribution and its version there
too; models of transformers in test_transformers.py; bert_padding, rotary, norms, cross entropy,
modules and utils, as verl, axolotl, vLLM, esm, ModernBERT, nanotron, xtuner and safari use them, in
the tests of namespace/ that say so in their names; what each imports in
namespace/test_namespace_surface.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support import offsets, same_bits, tensors, varlen_tensors

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    maybe_contiguous,
    round_multiple,
)
from flash_attn.layers.rotary import RotaryEmbedding

WINDOW, SOFTCAP = 5, 3.0
LENGTHS = [6, 1, 9]


@pytest.fixture
def stock(monkeypatch) -> ModuleType:
    """transformers' own implementation `flash_attention_2`, as if this machine had a GPU."""
    pytest.importorskip("transformers", minversion="5")
    from transformers import modeling_flash_attention_utils as utils

    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    return utils


def options_of_models() -> dict[str, Any]:
    return {
        "is_causal": True,
        "softmax_scale": 0.2,
        "sliding_window": WINDOW,
        "softcap": SOFTCAP,
        "s_aux": torch.randn(4, generator=torch.Generator().manual_seed(3)),
        "attn_implementation": "flash_attention_2",
    }


def expected_of_models(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=options["softmax_scale"],
        causal=True,
        window_size=(WINDOW - 1, 0),
        softcap=SOFTCAP,
        learnable_sink=options["s_aux"],
    )


@pytest.mark.parametrize("seqlen_q", [12, 1])
def test_transformers_stock_path_dense(stock, seqlen_q):
    q, k, v = tensors(2, seqlen_q, 12)
    options = options_of_models()
    out = stock._flash_attention_forward(q, k, v, None, seqlen_q, **options)
    assert same_bits(out, expected_of_models(q, k, v, options))
    assert stock._flash_fn is flash_attn_func and stock._flash_varlen_fn is flash_attn_varlen_func


@pytest.mark.parametrize("seqlen_q", [12, 1])
def test_transformers_stock_path_padded(stock, seqlen_q):
    """unpad_input gives five values, pad_input takes the indices back."""
    q, k, v = tensors(2, seqlen_q, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :7] = 0
    options = options_of_models()
    out = stock._flash_attention_forward(q, k, v, mask, seqlen_q, **options)
    assert out.shape == q.shape
    first = expected_of_models(q[:1], k[:1], v[:1], options)
    kept = max(seqlen_q - 7, 0) or seqlen_q
    second = expected_of_models(q[1:, -kept:], k[1:, 7:], v[1:, 7:], options)
    torch.testing.assert_close(out[:1], first)
    torch.testing.assert_close(out[1:, -kept:], second)
    assert not out[1, :-kept].any()


@pytest.mark.parametrize("said_by", ["positions", "lengths"])
def test_transformers_stock_path_packed(stock, said_by):
    q, k, v = (x[None] for x in varlen_tensors(LENGTHS, LENGTHS))
    options = options_of_models()
    if said_by == "positions":
        where = {"position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}
    else:
        # The longest length as transformers' collator gives it, a tensor without dimensions.
        lengths, longest = offsets(LENGTHS), torch.tensor(max(LENGTHS))
        where = dict(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
        where |= dict(max_length_q=longest, max_length_k=longest)
    out = stock._flash_attention_forward(q, k, v, None, sum(LENGTHS), **where, **options)
    parts = zip(*(x.split(LENGTHS, 1) for x in (q, k, v)))
    expected = torch.cat([expected_of_models(*part, options) for part in parts], 1)
    torch.testing.assert_close(out, expected)


def test_transformers_stock_path_with_pages(stock):
    """Continuous batching: one token of each sequence, appended to its pages."""
    pages, page_size, held = 8, 16, [20, 3, 16]
    k_cache, v_cache = torch.randn(2, pages, page_size, 2, 64)
    table = torch.tensor([[3, 5], [0, 7], [2, 1]], dtype=torch.int32)
    q, k, v = (x[:, 0][None] for x in tensors(3, 1, 1))
    options = options_of_models() | {"softcap": None, "sliding_window": None}
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    out = stock._flash_attention_forward(
        q,
        k,
        v,
        None,
        3,
        cu_seq_lens_q=offsets([1, 1, 1]),
        cu_seq_lens_k=offsets([length + 1 for length in held]),
        max_length_q=1,
        max_length_k=max(held) + 1,
        block_table=table,
        k_cache=caches[0][0],
        v_cache=caches[0][1],
        **options,
    )
    expected = flash_attn_with_kvcache(
        q.transpose(0, 1),
        *caches[1],
        k.transpose(0, 1),
        v.transpose(0, 1),
        cache_seqlens=torch.tensor(held, dtype=torch.int32),
        block_table=table,
        softmax_scale=0.2,
        causal=True,
        learnable_sink=options["s_aux"],
    )
    assert same_bits(out, expected.transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(*caches))


def test_transformers_finds_every_option_in_the_signatures(stock):
    options = {"dropout_p", "window_size", "softcap", "deterministic", "block_table"}
    process = stock._lazy_define_process_function(flash_attn_varlen_func)
    supported = process.keywords["supports_mapping"]
    assert all(supported[name] for name in options | {"max_seqlen_q", "max_seqlen_k"})
    assert supported["learnable_sink"] or supported["s_aux"]


def test_diffusers_takes_the_first_two_results():
    q, k, v = tensors()
    out, lse, *_ = flash_attn_func(q, k, v, dropout_p=0.0, causal=False, return_attn_probs=True)
    assert same_bits(out, flash_attn_func(q, k, v)) and lse.permute(0, 2, 1).shape == q.shape[:3]


# TransformerEngine passes the options by keyword, and takes results 0, 1 and 3.
TE_FORWARD: dict[str, Any] = dict(
    dropout_p=0.1,
    softmax_scale=0.125,
    causal=True,
    window_size_left=40,
    window_size_right=0,
    softcap=0.0,
    alibi_slopes=None,
)


def test_transformer_engine_dense():
    q, k, v = tensors()
    results = _flash_attn_forward(q, k, v, **TE_FORWARD, return_softmax=False)
    out, lse, rng_state = results[0], results[1], results[3]
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(
        *(out, q, k, v, out, lse, *gradients),
        **TE_FORWARD,
        deterministic=True,
        rng_state=rng_state,
    )
    again = [torch.empty_like(x) for x in (q, k, v)]
    options = (0.1, 0.125, True, 40, 0, 0.0, None)
    _flash_attn_backward(out, q, k, v, out, lse, *again, *options, True, rng_state)
    assert all(same_bits(a, b) and a.any() for a, b in zip(gradients, again))


def test_transformer_engine_varlen():
    from flash_attn_2_cuda import varlen_bwd

    q, k, v = varlen_tensors(LENGTHS, LENGTHS)
    where = (offsets(LENGTHS), offsets(LENGTHS), max(LENGTHS), max(LENGTHS))
    results = _flash_attn_varlen_forward(
        *(q, k, v, *where), **TE_FORWARD, return_softmax=False, block_table=None
    )
    out, lse, rng_state = results[0], results[1], results[3]
    gradients, again = ([torch.empty_like(x) for x in (q, k, v)] for _ in range(2))
    arguments = (out, q, k, v, out, lse)
    _flash_attn_varlen_backward(
        *(*arguments, *gradients, *where), **TE_FORWARD, deterministic=False, rng_state=rng_state
    )
    options = (0.1, 0.125, False, True, 40, 0, 0.0, False, None, rng_state)
    varlen_bwd(*arguments, *again, *where[:2], None, *where[2:], *options)
    assert all(same_bits(a, b) and a.any() for a, b in zip(gradients, again))


def default_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """All parameters by name, None where there is no default: how the ring attentions call."""
    function = function if inspect.isfunction(function) else function._init_fn
    specification = inspect.getfullargspec(function)
    defaults = specification.defaults or ()
    missing = len(specification.args) - len(defaults)
    return dict(zip(specification.args, (None,) * missing + defaults))


@pytest.mark.parametrize("varlen", [False, True])
def test_ring_attentions_fill_in_the_arguments_by_name(varlen):
    forward = _flash_attn_varlen_forward if varlen else _flash_attn_forward
    backward = _flash_attn_varlen_backward if varlen else _flash_attn_backward
    q, k, v = varlen_tensors(LENGTHS, LENGTHS) if varlen else tensors(seqlen_k=65)
    shared: dict[str, Any] = dict(
        dropout_p=0.0,
        softmax_scale=0.125,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
    )
    if varlen:
        shared |= dict(cu_seqlens_q=offsets(LENGTHS), cu_seqlens_k=offsets(LENGTHS))
        shared |= dict(max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS))
    arguments = default_arguments(forward) | dict(q=q, k=k, v=v, return_softmax=True) | shared
    results = forward(**arguments)
    assert len(results) == 4
    out, lse, _, _ = results
    assert lse.shape == ((4, sum(LENGTHS)) if varlen else (2, 4, 65))
    gradients = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (q, k, v))))
    arguments = default_arguments(backward) | shared
    arguments |= dict(dout=out, q=q, k=k, v=v, out=out, softmax_lse=lse, deterministic=False)
    backward(**(arguments | gradients))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    public = functools.partial(flash_attn_func, *inputs)
    if varlen:
        where = (offsets(LENGTHS), offsets(LENGTHS), max(LENGTHS), max(LENGTHS))
        public = functools.partial(flash_attn_varlen_func, *inputs, *where)
    with torch.enable_grad():
        expected = torch.autograd.grad(public(softmax_scale=0.125, causal=True), inputs, out)
    assert all(same_bits(a, b) for a, b in zip(gradients.values(), expected))


def test_megatron_decodes_with_pages_and_takes_the_lse():
    q, k, v = tensors(2, 1, 1)
    k_cache, v_cache = torch.randn(2, 6, 16, 2, 64)
    held = torch.tensor([20, 9], dtype=torch.int32)
    table = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_seqlens=held,
        causal=True,
        block_table=table,
        num_splits=1,
        return_softmax_lse=True,
    )
    assert out.shape == q.shape and lse.shape == (2, 4, 1)
    for row, length in enumerate([21, 10]):
        keys, values = (
            x[table[row].long()].flatten(0, 1)[None, :length] for x in (k_cache, v_cache)
        )
        expected, expected_lse, _ = flash_attn_func(
            q[row : row + 1], keys, values, return_attn_probs=True
        )
        torch.testing.assert_close(out[row : row + 1], expected)
        torch.testing.assert_close(lse[row : row + 1], expected_lse)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_mamba_decodes_with_the_tables_of_its_rotary_module(as_tensor):
    """An inference cache [B, S, 2, Hk, D]; the lengths an int at first, a tensor later."""
    rotary = RotaryEmbedding(32, interleaved=False)
    rotary._update_cos_sin_cache(24, device=torch.device("cpu"), dtype=torch.float32)
    qkv = torch.randn(2, 20, 3, 4, 64)
    cache = torch.full((2, 24, 2, 4, 64), torch.nan)
    outs = []
    for first, last in ((0, 13), *((t, t + 1) for t in range(13, 20))):
        q, kv = qkv[:, first:last, 0], qkv[:, first:last, 1:]
        lengths = torch.full((2,), first, dtype=torch.int32) if as_tensor else first
        outs.append(
            flash_attn_with_kvcache(
                q,
                cache[:, :, 0],
                cache[:, :, 1],
                kv[:, :, 0],
                kv[:, :, 1],
                rotary_cos=rotary._cos_cached,
                rotary_sin=rotary._sin_cached,
                cache_seqlens=lengths,
                softmax_scale=None,
                causal=True,
                rotary_interleaved=rotary.interleaved,
            )
        )
    turned = RotaryEmbedding(32).eval()(qkv.clone())
    expected = flash_attn_func(*turned.unbind(2), causal=True)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-5)


def test_helpers_that_clients_import():
    assert [round_multiple(x, 8) for x in (0, 1, 8, 9)] == [0, 8, 8, 16]
    x = torch.randn(3, 4)
    assert maybe_contiguous(None) is None and maybe_contiguous(x) is x
    assert maybe_contiguous(x.T).stride(-1) == 1
