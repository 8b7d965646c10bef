"""The original's private functions and its extension module, called as clients call them; and the
distribution whose name clients look for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import offsets, same_bits, tensors, varlen_tensors

import flash_attn
import flash_attn_2_cuda
from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    flash_attn_gpu,
)

_DENSE = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
_LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
_GRADIENTS = "dout q k v out softmax_lse dq dk dv"
# Parameters and the defaults of the last of them, as the original has them.
SIGNATURES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "_flash_attn_forward": (f"q k v {_DENSE} return_softmax", ()),
    "_flash_attn_varlen_forward": (
        f"q k v {_LENGTHS} {_DENSE} return_softmax block_table leftpad_k seqused_k zero_tensors",
        (-1, -1, 0.0, None, False, None, None, None, False),
    ),
    "_flash_attn_backward": (f"{_GRADIENTS} {_DENSE} deterministic rng_state", (None,)),
    "_flash_attn_varlen_backward": (
        f"{_GRADIENTS} {_LENGTHS} {_DENSE} deterministic rng_state zero_tensors",
        (None, False),
    ),
}
_SCALARS = "is_causal window_size_left window_size_right softcap"
# The order in which the extension's C++ functions take their arguments; all positional.
EXTENSION = {
    "fwd": f"q k v out alibi_slopes p_dropout softmax_scale {_SCALARS} return_softmax gen",
    "varlen_fwd": (
        "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes"
        " max_seqlen_q max_seqlen_k p_dropout softmax_scale zero_tensors"
        f" {_SCALARS} return_softmax gen"
    ),
    "bwd": (
        f"{_GRADIENTS} alibi_slopes p_dropout softmax_scale {_SCALARS} deterministic gen rng_state"
    ),
    "varlen_bwd": (
        f"{_GRADIENTS} cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q max_seqlen_k p_dropout"
        f" softmax_scale zero_tensors {_SCALARS} deterministic gen rng_state"
    ),
    "fwd_kvcache": (
        "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k block_table"
        f" alibi_slopes out softmax_scale {_SCALARS} is_rotary_interleaved num_splits"
    ),
}
LENGTHS_Q, LENGTHS_K = [30, 0, 65, 7], [40, 9, 65, 0]
VARLEN = (offsets(LENGTHS_Q), offsets(LENGTHS_K), 65, 65)
# dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes.
OPTIONS = (0.2, 0.125, True, 40, 0, 5.0, torch.tensor([0.02, 0.05, 0.1, 0.2]))


def public(options: tuple[Any, ...]) -> dict[str, Any]:
    """The keywords of the public functions for the positions of the private ones."""
    dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes = options
    return dict(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_originals(name):
    function = getattr(flash_attn_interface, name)
    names, defaults = SIGNATURES[name]
    specification = inspect.getfullargspec(function)
    assert specification.args == names.split()
    assert (specification.defaults or ()) == defaults
    assert specification.varargs is None and specification.varkw is None
    assert not specification.kwonlyargs
    assert getattr(flash_attn_interface, f"_wrapped{name}") is function


def test_forward_equals_the_public_function():
    q, k, v = tensors()
    torch.manual_seed(5)
    out, lse, s_dmask, rng_state = _wrapped_flash_attn_forward(q, k, v, *OPTIONS, True)
    torch.manual_seed(5)
    expected = flash_attn_func(q, k, v, return_attn_probs=True, **public(OPTIONS))
    assert all(same_bits(a, b) for a, b in zip((out, lse, s_dmask), expected))
    assert rng_state.dtype == torch.int64 and rng_state.shape == (2,)
    plain = _flash_attn_forward(q, k, v, 0.0, 0.125, False, -1, -1, 0.0, None, True)
    assert plain[2].shape == (0,) and not plain[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_equals_autograd_and_replays_the_dropout_mask(dtype):
    q, k, v = tensors(dtype=dtype)
    dout = torch.randn(q.shape).to(dtype)
    torch.manual_seed(5)
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, *OPTIONS, False)
    dq, dk, dv = torch.full_like(q, torch.nan), torch.empty_like(k), torch.empty_like(v)
    torch.manual_seed(99)
    softmax_d = _wrapped_flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, *OPTIONS, False, rng_state
    )
    assert softmax_d.shape == (2, 4, 128) and softmax_d.dtype == torch.float32
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[:, :, :65].double(), delta, rtol=1e-5, atol=1e-5)
    assert not softmax_d[:, :, 65:].any()
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(5)
        expected = torch.autograd.grad(flash_attn_func(*inputs, **public(OPTIONS)), inputs, dout)
    assert all(same_bits(a, b) for a, b in zip((dq, dk, dv), expected))


def test_varlen_equals_the_public_function_and_autograd():
    q, k, v = varlen_tensors(LENGTHS_Q, LENGTHS_K)
    dout = torch.randn(q.shape)
    torch.manual_seed(5)
    out, lse, s_dmask, rng_state = _flash_attn_varlen_forward(
        q,
        k,
        v,
        *VARLEN,
        *OPTIONS[:3],
        window_size_left=40,
        window_size_right=0,
        softcap=5.0,
        alibi_slopes=OPTIONS[6],
        return_softmax=False,
        block_table=None,
    )
    assert lse.shape == (4, sum(LENGTHS_Q)) and s_dmask.shape == (0,)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    softmax_d = _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, *VARLEN, *OPTIONS, True, rng_state=rng_state
    )
    assert softmax_d.shape == (4, sum(LENGTHS_Q) + 4 * 128)
    delta = (dout * out).sum(-1)
    for batch, (start, length) in enumerate(zip(VARLEN[0].tolist(), LENGTHS_Q)):
        there = start + 128 * batch
        torch.testing.assert_close(
            softmax_d[:, there : there + length], delta[start : start + length].T
        )
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(5)
        same = flash_attn_varlen_func(*inputs, *VARLEN, **public(OPTIONS))
        expected = torch.autograd.grad(same, inputs, dout)
    assert same_bits(out, same.detach())
    assert all(same_bits(a, b) for a, b in zip((dq, dk, dv), expected))


def leftpad_problem() -> tuple[Any, ...]:
    """q, k and v with padding of NaN; the padding and the last used key of each sequence."""
    q, k, v = varlen_tensors(LENGTHS_Q, LENGTHS_K)
    padding, ends = [11, 0, 64, 0], [40, 7, 65, 0]
    for start, first, last, length in zip(VARLEN[1].tolist(), padding, ends, LENGTHS_K):
        for x in (k, v):
            x[start : start + first] = torch.nan
            x[start + last : start + length] = torch.nan
    return q, k, v, torch.tensor(padding, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_left_padding_is_as_if_it_were_not_there(dropout_p):
    q, k, v, padding, ends = leftpad_problem()
    kept = torch.cat(
        [
            torch.arange(start + first, start + last)
            for start, first, last in zip(VARLEN[1].tolist(), padding.tolist(), ends.tolist())
        ]
    )
    slopes = torch.rand(4, 4)
    options = (dropout_p, 0.125, True, 20, 0, 5.0, slopes, dropout_p > 0)
    torch.manual_seed(7)
    results = _flash_attn_varlen_forward(
        q, k, v, *VARLEN, *options, leftpad_k=padding, seqused_k=ends
    )
    torch.manual_seed(7)
    lengths = (VARLEN[0], offsets((ends - padding).tolist()), *VARLEN[2:])
    expected = _flash_attn_varlen_forward(q, k[kept], v[kept], *lengths, *options)
    assert all(same_bits(a, b) for a, b in zip(results[:3], expected[:3]))
    assert results[0].isfinite().all() and results[0].any()


def test_left_padding_alone_cuts_no_key_at_the_end():
    q, k, v = varlen_tensors(LENGTHS_Q, LENGTHS_K)
    padding = torch.tensor([11, 9, 0, 0], dtype=torch.int32)
    options = (0.0, None, False)
    out, *_ = _flash_attn_varlen_forward(q, k, v, *VARLEN, *options, leftpad_k=padding)
    first = flash_attn_func(q[None, :30], k[None, 11:40], v[None, 11:40])
    third = flash_attn_func(q[None, 30:95], k[None, 49:114], v[None, 49:114])
    torch.testing.assert_close(out[:30], first[0])
    torch.testing.assert_close(out[30:95], third[0])
    assert not out[95:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leftpad_k": [12, 0, 0, 0], "seqused_k": [11, 9, 65, 0]}, "leftpad_k: entry 0 is 12"),
        ({"leftpad_k": [0, -1, 0, 0]}, "leftpad_k: entry 1 is -1"),
        ({"leftpad_k": [0, 0, 66, 0]}, "leftpad_k: entry 2 is 66"),
        ({"leftpad_k": [0, 0, 0]}, "leftpad_k: must be int32"),
        ({"leftpad_k": [0, 3, 0, 0], "seqused_k": [41, 9, 65, 0]}, "seqused_k: entry 0 is 41"),
    ],
)
def test_wrong_left_padding_is_named(changes, message):
    q, k, v = varlen_tensors(LENGTHS_Q, LENGTHS_K)
    changes = {name: torch.tensor(value, dtype=torch.int32) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        _flash_attn_varlen_forward(q, k, v, *VARLEN, 0.0, None, False, **changes)
    with pytest.raises(ValueError, match="leftpad_k: must be int32"):
        _flash_attn_varlen_forward(q, k, v, *VARLEN, 0.0, None, False, leftpad_k=VARLEN[0].long())


def test_gradients_are_written_where_the_caller_says_or_lost():
    q, k, v = tensors()
    options = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, *_ = _flash_attn_forward(q, k, v, *options, False)
    dout = torch.randn_like(out)
    plain = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(dout, q, k, v, out, lse, *plain, *options, False)
    # Part of a packed tensor, a last dimension that is not contiguous, and none.
    dkv = torch.empty(*k.shape[:2], 2, *k.shape[2:])
    dq = torch.empty(q.transpose(1, 3).shape).transpose(1, 3)
    _flash_attn_backward(dout, q, k, v, out, lse, dq, None, dkv[:, :, 1], *options, False)
    assert torch.equal(dq, plain[0]) and torch.equal(dkv[:, :, 1], plain[2])


def test_parts_of_the_keys_combine_to_the_whole_as_in_ring_attention():
    q, k, v = tensors(seqlen_k=96)
    options = (0.0, 0.125, False, -1, -1, 0.0, None)
    dout = torch.randn(q.shape)
    parts = [(k[:, a : a + 48], v[:, a : a + 48]) for a in (0, 48)]
    results = [_flash_attn_forward(q, *part, *options, False)[:2] for part in parts]
    lse = torch.logaddexp(results[0][1], results[1][1])
    out = sum(o * (part - lse).exp().transpose(1, 2)[..., None] for o, part in results)
    whole_out, whole_lse, *_ = _flash_attn_forward(q, k, v, *options, False)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for a, part in zip((0, 48), parts):
        gradients = [torch.empty_like(x) for x in (q, *part)]
        _flash_attn_backward(dout, q, *part, out, lse, *gradients, *options, False)
        dq += gradients[0]
        dk[:, a : a + 48], dv[:, a : a + 48] = gradients[1:]
    whole = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(dout, q, k, v, whole_out, whole_lse, *whole, *options, False)
    for got, want in zip((dq, dk, dv), whole):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_smallest_dropout_drops_nothing():
    q, k, v = tensors()
    out, lse, _, rng_state = _wrapped_flash_attn_forward(
        q, k, v, 1e-30, 0.125, False, -1, -1, 0.0, None, False
    )
    assert same_bits(out, flash_attn_func(q, k, v, softmax_scale=0.125))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    _wrapped_flash_attn_backward(
        out, q, k, v, out, lse, *gradients, 1e-30, 0.125, False, -1, -1, 0.0, None, False, rng_state
    )
    assert all(x.isfinite().all() for x in gradients)


def test_the_extension_module_is_flash_attn_gpu():
    for name in ("fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"):
        assert getattr(flash_attn_2_cuda, name) is getattr(flash_attn_gpu, name)


@pytest.mark.parametrize("name", EXTENSION)
def test_the_order_of_arguments_is_the_extensions(name):
    specification = inspect.getfullargspec(getattr(flash_attn_2_cuda, name))
    assert specification.args == EXTENSION[name].split()
    assert specification.varargs is None and not specification.kwonlyargs


def test_extension_dense():
    q, k, v = tensors()
    given = torch.empty_like(q)
    arguments = (q, k, v, given, None, 0.3, 0.125, True, -1, 0, 0.0, True)
    results = flash_attn_2_cuda.fwd(*arguments, torch.Generator().manual_seed(3))
    assert isinstance(results, list)
    out, lse, s_dmask, rng_state = results
    assert out is given and s_dmask.shape == (2, 4, 128, 128)
    again = flash_attn_2_cuda.fwd(*arguments, torch.Generator().manual_seed(3))
    assert same_bits(out, again[0]) and torch.equal(rng_state, again[3])
    options = (None, 0.3, 0.125, True, -1, 0, 0.0, False, None, rng_state)
    gradients = flash_attn_2_cuda.bwd(out, q, k, v, out, lse, None, None, None, *options)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape, (2, 4, 128)]
    dq = torch.empty_like(q)
    assert flash_attn_2_cuda.bwd(out, q, k, v, out, lse, dq, None, None, *options)[0] is dq
    assert same_bits(dq, gradients[0])


def test_extension_varlen():
    q, k, v = varlen_tensors(LENGTHS_Q, LENGTHS_K)
    cu_q, cu_k, *longest = VARLEN
    options = (0.0, 0.125, False, True, -1, 0, 0.0)
    out, lse, s_dmask, rng_state = flash_attn_2_cuda.varlen_fwd(
        q, k, v, None, cu_q, cu_k, None, None, None, None, *longest, *options, False, None
    )
    assert same_bits(
        out, flash_attn_varlen_func(q, k, v, *VARLEN, softmax_scale=0.125, causal=True)
    )
    assert s_dmask.numel() == 0
    outputs = flash_attn_2_cuda.varlen_bwd(
        out,
        *(q, k, v, out, lse, None, None, None),
        *(cu_q, cu_k, None, *longest, *options, True, None, rng_state),
    )
    assert [x.shape for x in outputs[:3]] == [q.shape, k.shape, v.shape]


def test_extension_kvcache():
    q, k, v = tensors(2, 3, 3)
    k_cache, v_cache = torch.randn(2, 2, 32, 2, 64)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    angles = torch.arange(32)[:, None] * 0.5 ** torch.arange(8)
    rotary = (angles.cos(), angles.sin())
    given = torch.empty_like(q)
    out, lse = flash_attn_2_cuda.fwd_kvcache(
        *(q, *caches[0], k, v, lengths, *rotary, None, None, None, None, given),
        *(0.125, True, -1, 0, 0.0, False, 0),
    )
    expected = flash_attn_with_kvcache(
        q,
        *caches[1],
        k,
        v,
        *rotary,
        lengths,
        softmax_scale=0.125,
        causal=True,
        rotary_interleaved=False,
        return_softmax_lse=True,
    )
    assert out is given and same_bits(out, expected[0]) and same_bits(lse, expected[1])
    assert all(torch.equal(a, b) for a, b in zip(*caches))
    whole, _ = flash_attn_2_cuda.fwd_kvcache(
        q, *caches[0], *(None,) * 10, 0.125, False, -1, -1, 0.0, True, 0
    )
    assert same_bits(whole, flash_attn_with_kvcache(q, *caches[1], softmax_scale=0.125))


def test_bad_input():
    q, k, v = tensors()
    options = (0.5, None, False, -1, -1, 0.0, None)
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, *options, False)

    def backward(rng_state: Any, dq: torch.Tensor | None = None) -> None:
        arguments = (out, q, k, v, out, lse, dq, None, None)
        _flash_attn_backward(*arguments, *options, False, rng_state)

    with pytest.raises(ValueError, match="rng_state: is None"):
        backward(None)
    with pytest.raises(ValueError, match="rng_state: must be int64"):
        backward(rng_state.int())
    with pytest.raises(ValueError, match="dq: must be"):
        backward(rng_state, torch.empty(3, 5))
    with pytest.raises(TypeError, match=r"k: must be a torch\.Tensor"):
        _flash_attn_forward(q, [1.0], v, *options, False)
    with pytest.raises(ValueError, match="out: must be"):
        flash_attn_2_cuda.fwd(q, k, v, q[:1], None, 0.0, None, False, -1, -1, 0.0, False, None)
    with pytest.raises(NotImplementedError, match="leftpad_k"):
        _flash_attn_varlen_forward(
            *(q[0], k[0], v[0], offsets([65]), offsets([97]), 65, 97, 0.0, None, False),
            block_table=torch.zeros((1, 1), dtype=torch.int32),
            leftpad_k=torch.zeros(1, dtype=torch.int32),
        )


# What is wrong with a backward, and what the message names.
BAD_BACKWARD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "dout_of_another_length": (lambda it: {"dout": it["dout"][:, 1:]}, "dout: shape"),
    "dout_of_another_dtype": (lambda it: {"dout": it["dout"].half()}, "dout: dtype"),
    "dout_a_list": (lambda it: {"dout": [1.0]}, r"dout: must be a torch\.Tensor"),
    "out_of_another_head_dim": (lambda it: {"out": it["out"][..., 1:]}, "out: shape"),
    "lse_of_another_length": (lambda it: {"softmax_lse": it["softmax_lse"][..., 1:]}, "lse"),
    "lse_of_another_dtype": (lambda it: {"softmax_lse": it["softmax_lse"].half()}, "lse"),
    "k_of_another_head_dim": (
        lambda it: {"k": it["k"][..., 1:], "dk": it["k"][..., 1:].clone()},
        "k: head_dim",
    ),
    "dk_of_another_shape": (lambda it: {"dk": it["dk"][:, 1:]}, "dk: must be"),
    "dv_of_another_dtype": (lambda it: {"dv": it["dv"].half()}, "dv: must be"),
    "dv_of_another_dtype_and_apart": (
        lambda it: {"dv": torch.empty(2, 97, 2, 128).half()[..., ::2]},
        "dv: must be",
    ),
    "dq_broadcast": (lambda it: {"dq": torch.empty(1, 1, 1, 64).expand(2, 65, 4, 64)}, "dq: "),
    "dropout_of_1": (lambda it: {"dropout_p": 1.0}, "dropout_p"),
    "softcap_negative": (lambda it: {"softcap": -1.0}, "softcap"),
    "window_below_minus_1": (lambda it: {"window_size_left": -3}, "window_size"),
    "no_rng_state": (lambda it: {"rng_state": None}, "rng_state: is None"),
}


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_a_bad_backward_is_named_and_writes_nothing(name):
    q, k, v = tensors()
    options = (0.5, None, False, -1, -1, 0.0, None)
    out, lse, _, rng_state = _flash_attn_forward(q, k, v, *options, False)
    names = SIGNATURES["_flash_attn_backward"][0].split()
    gradients = [torch.full_like(x, 7.0) for x in (q, k, v)]
    values = (out, q, k, v, out, lse, *gradients, *options, False, rng_state)
    arguments = dict(zip(names, values, strict=True))
    change, message = BAD_BACKWARD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        _flash_attn_backward(**(arguments | change(arguments)))
    assert all((x == 7.0).all() for x in gradients)


def test_a_bad_out_of_the_extension_leaves_the_cache_as_it_is():
    q, k, v = tensors(2, 3, 3)
    cache = torch.full((2, 8, 2, 64), 7.0)
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    for out in (torch.empty(2, 3, 4, 32), torch.empty(2, 3, 4, 64).half()):
        with pytest.raises(ValueError, match="out: must be"):
            flash_attn_2_cuda.fwd_kvcache(
                *(q, cache, cache, k, v, lengths, *(None,) * 6, out),
                *(0.125, True, -1, 0, 0.0, False, 0),
            )
    assert (cache == 7.0).all()


def test_clients_find_the_distribution_and_its_version():
    assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
    for name in ("flash-attn", "flash_attn"):
        assert importlib.metadata.version(name) == flash_attn.__version__ == "2.8.3"
    # It owns nothing but its metadata, so that removing it leaves the library as it is.
    files = importlib.metadata.files("flash-attn")
    assert files is not None
    assert {file.parts[0] for file in files} == {"flash_attn-2.8.3.dist-info"}
    assert importlib.util.find_spec("flash_attn") is not None
    utilities = pytest.importorskip("transformers.utils")
    # is_flash_attn_2_available() asks for a GPU beside what this one asks.
    assert utilities.is_flash_attn_greater_or_equal("2.3.3")
    assert not utilities.is_flash_attn_greater_or_equal("2.8.4")


def test_the_metadata_wheel_builds_without_any_package(tmp_path: Path, root: Path):
    code = "import sys, metadata_wheel; print(metadata_wheel.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        cwd=root / "packaging" / "flash-attn",
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "flash_attn-2.8.3-py3-none-any.whl"
    path = zipfile.Path(tmp_path / done.stdout.strip(), "flash_attn-2.8.3.dist-info/")
    built = importlib.metadata.PathDistribution(path)
    assert built.metadata["Name"] == "flash-attn" and built.version == "2.8.3"
    assert built.read_text("top_level.txt") == "flash_attn\n"
