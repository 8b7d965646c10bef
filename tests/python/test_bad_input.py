"""Wrong arguments: each raises an error that names the argument, and nothing is written."""

from __future__ import annotations

import math

import pytest
import torch
from support import offsets, tensors, varlen_tensors

from flash_attn import (
    dlpack,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def dense(**changes):
    q, k, v = tensors(2, 8, 12, 4, 2, 16)
    return {"q": q, "k": k, "v": v, **changes}


def varlen(**changes):
    q, k, v = varlen_tensors([3, 5], [4, 8], num_heads=4, num_heads_kv=2, head_dim=16)
    lengths = {"cu_seqlens_q": offsets([3, 5]), "cu_seqlens_k": offsets([4, 8])}
    return {"q": q, "k": k, "v": v, **lengths, "max_seqlen_q": 5, "max_seqlen_k": 8, **changes}


def paged(**changes):
    pages = torch.randn(6, 4, 2, 16)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return varlen(**{"k": pages, "v": pages, "block_table": table, **changes})


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# 2**64 bytes, of which 16 elements exist.
huge = torch.empty(16).expand(2, 2**56, 2, 16)

# name: (arguments, the argument that the message names).
DENSE = {
    "q_float64": (dense(q=torch.zeros(2, 8, 4, 16).double()), "q"),
    "q_int32": (dense(q=torch.zeros(2, 8, 4, 16, dtype=torch.int32)), "q"),
    "k_other_dtype": (dense(k=torch.zeros(2, 12, 2, 16).half()), "k"),
    "q_complex": (
        dense(q=torch.zeros(2, 8, 4, 16, dtype=torch.complex64)),
        "q: dtype is complex64",
    ),
    "k_float8": (dense(k=torch.zeros(2, 12, 2, 16).to(torch.float8_e5m2)), "k: dtype is float8"),
    "v_other_dtype": (dense(v=torch.zeros(2, 12, 2, 16).bfloat16()), "v"),
    "q_rank_3": (dense(q=torch.zeros(8, 4, 16)), "q"),
    "q_rank_5": (dense(q=torch.zeros(1, 2, 8, 4, 16)), "q"),
    "q_rank_6": (dense(q=torch.zeros(1, 1, 2, 8, 4, 16)), "q"),
    "q_rank_0": (dense(q=torch.zeros(())), "q"),
    "k_rank_3": (dense(k=torch.zeros(12, 2, 16)), "k"),
    "v_rank_2": (dense(v=torch.zeros(12, 16)), "v"),
    "k_other_batch": (dense(k=torch.zeros(3, 12, 2, 16)), "k"),
    "v_other_batch": (dense(v=torch.zeros(3, 12, 2, 16)), "v"),
    "v_other_length": (dense(v=torch.zeros(2, 11, 2, 16)), "v"),
    "k_other_head_dim": (dense(k=torch.zeros(2, 12, 2, 24)), "k"),
    "v_other_heads": (dense(v=torch.zeros(2, 12, 4, 16)), "v"),
    "heads_not_a_multiple": (dense(k=torch.zeros(2, 12, 3, 16), v=torch.zeros(2, 12, 3, 16)), "q"),
    "more_heads_kv": (dense(k=torch.zeros(2, 12, 8, 16), v=torch.zeros(2, 12, 8, 16)), "q"),
    "head_dim_0": (
        dense(q=torch.zeros(2, 8, 4, 0), k=torch.zeros(2, 12, 2, 0), v=torch.zeros(2, 12, 2, 16)),
        "q",
    ),
    "head_dim_513": (dense(q=torch.zeros(2, 8, 4, 513), k=torch.zeros(2, 12, 2, 513)), "q"),
    "head_dim_v_0": (dense(v=torch.zeros(2, 12, 2, 0)), "v"),
    "head_dim_v_513": (dense(v=torch.zeros(2, 12, 2, 513)), "v"),
    "sizes_overflow": (dense(k=huge, v=huge), "k"),
    "size_of_q_overflows": (dense(q=huge), "q"),
    "k_on_another_device": (
        dense(k=torch.zeros(2, 12, 2, 16, device="meta")),
        "k: is on meta, must be on q's device, cpu",
    ),
    "bias_on_another_device": (
        dense(attn_bias=torch.zeros(8, 12, device="meta")),
        "attn_bias: is on meta, must be on q's device, cpu",
    ),
    "scale_negative": (dense(softmax_scale=-1.0), "softmax_scale"),
    "scale_nan": (dense(softmax_scale=math.nan), "softmax_scale"),
    "scale_infinite": (dense(softmax_scale=math.inf), "softmax_scale"),
    "softcap_negative": (dense(softcap=-1.0), "softcap"),
    "softcap_nan": (dense(softcap=math.nan), "softcap"),
    "softcap_infinite": (dense(softcap=math.inf), "softcap"),
    "dropout_1": (dense(dropout_p=1.0), "dropout_p"),
    "dropout_negative": (dense(dropout_p=-0.1), "dropout_p"),
    "dropout_nan": (dense(dropout_p=math.nan), "dropout_p"),
    "window_left_below_minus_1": (dense(window_size=(-2, -1)), "window_size"),
    "window_right_below_minus_1": (dense(window_size=(-1, -7)), "window_size"),
    "window_of_one": (dense(window_size=(3,)), "window_size"),
    "window_of_three": (dense(window_size=(3, 4, 5)), "window_size"),
    "window_a_number": (dense(window_size=3), "window_size"),
    "window_beyond_int64": (dense(window_size=(2**70, 0)), "window_size"),
    "alibi_float64": (dense(alibi_slopes=torch.zeros(4).double()), "alibi_slopes"),
    "alibi_wrong_length": (dense(alibi_slopes=torch.zeros(3)), "alibi_slopes"),
    "alibi_wrong_batch": (dense(alibi_slopes=torch.zeros(3, 4)), "alibi_slopes"),
    "alibi_apart": (dense(alibi_slopes=torch.zeros(8)[::2]), "alibi_slopes"),
    "bias_not_broadcastable": (dense(attn_bias=torch.zeros(2, 4, 8, 11)), "attn_bias"),
    "bias_rank_5": (dense(attn_bias=torch.zeros(1, 2, 4, 8, 12)), "attn_bias"),
    "bias_float64": (dense(attn_bias=torch.zeros(8, 12).double()), "attn_bias"),
    "bias_int64": (dense(attn_bias=torch.zeros(8, 12).long()), "attn_bias"),
    "bias_other_16_bits": (dense(attn_bias=torch.zeros(8, 12).half()), "attn_bias"),
    "sink_wrong_length": (dense(learnable_sink=torch.zeros(5)), "learnable_sink"),
    "sink_rank_2": (dense(learnable_sink=torch.zeros(1, 4)), "learnable_sink"),
    "sink_float64": (dense(learnable_sink=torch.zeros(4).double()), "learnable_sink"),
}
VARLEN = {
    "q_rank_4": (varlen(q=torch.zeros(1, 8, 4, 16)), "q"),
    "k_rank_4_without_pages": (varlen(k=torch.zeros(3, 4, 2, 16)), "k"),
    "v_other_total": (varlen(v=torch.zeros(11, 2, 16)), "v"),
    "no_cu_seqlens_k": (varlen(cu_seqlens_k=None), "cu_seqlens_k"),
    "no_cu_seqlens_q": (varlen(cu_seqlens_q=None), "cu_seqlens_q"),
    "cu_seqlens_q_int64": (varlen(cu_seqlens_q=offsets([3, 5]).long()), "cu_seqlens_q"),
    "cu_seqlens_q_int16": (
        varlen(cu_seqlens_q=offsets([3, 5]).short()),
        "cu_seqlens_q: dtype is int16, .* int32 for lengths",
    ),
    "cu_seqlens_k_float": (varlen(cu_seqlens_k=offsets([4, 8]).float()), "cu_seqlens_k"),
    "cu_seqlens_q_rank_2": (varlen(cu_seqlens_q=offsets([3, 5])[None]), "cu_seqlens_q"),
    "cu_seqlens_q_empty": (varlen(cu_seqlens_q=int32()), "cu_seqlens_q"),
    "cu_seqlens_k_other_length": (varlen(cu_seqlens_k=offsets([4, 4, 4])), "cu_seqlens_k"),
    "cu_seqlens_q_decreases": (varlen(cu_seqlens_q=int32(0, 6, 5)), "cu_seqlens_q"),
    "cu_seqlens_k_starts_late": (varlen(cu_seqlens_k=int32(1, 4, 12)), "cu_seqlens_k"),
    "cu_seqlens_q_too_far": (varlen(cu_seqlens_q=int32(0, 3, 9)), "cu_seqlens_q"),
    "cu_seqlens_k_negative": (varlen(cu_seqlens_k=int32(0, -4, 12)), "cu_seqlens_k"),
    "cu_seqlens_q_apart": (varlen(cu_seqlens_q=int32(0, 9, 3, 9, 8)[::2]), "cu_seqlens_q"),
    "max_seqlen_q_too_small": (varlen(max_seqlen_q=4), "max_seqlen_q"),
    "max_seqlen_k_too_small": (varlen(max_seqlen_k=7), "max_seqlen_k"),
    "max_seqlen_q_negative": (varlen(max_seqlen_q=-1), "max_seqlen_q"),
    "max_seqlen_k_beyond_int64": (varlen(max_seqlen_k=2**70), "max_seqlen_k"),
    "seqused_k_int64": (varlen(seqused_k=torch.tensor([4, 8])), "seqused_k"),
    "seqused_k_wrong_length": (varlen(seqused_k=int32(4)), "seqused_k"),
    "seqused_k_too_large": (varlen(seqused_k=int32(5, 8)), "seqused_k"),
    "seqused_k_negative": (varlen(seqused_k=int32(-1, 8)), "seqused_k"),
    "bias_wrong_length": (varlen(attn_bias=torch.zeros(5, 9)), "attn_bias"),
    "block_table_int64": (paged(block_table=torch.zeros(2, 2).long()), "block_table"),
    "block_table_rank_1": (paged(block_table=int32(0, 1)), "block_table"),
    "block_table_wrong_batch": (paged(block_table=torch.zeros(3, 2).int()), "block_table"),
    "block_table_too_narrow": (paged(block_table=int32(0, 1)[:, None]), "block_table"),
    "block_table_page_too_large": (paged(block_table=int32(0, 6, 2, 6).view(2, 2)), "block_table"),
    "block_table_page_negative": (paged(block_table=int32(-1, 1, 2, 3).view(2, 2)), "block_table"),
    "page_size_0": (paged(k=torch.zeros(6, 0, 2, 16), v=torch.zeros(6, 0, 2, 16)), "k"),
}
PACKED = {
    "qkv_of_2": (flash_attn_qkvpacked_func, [torch.zeros(2, 8, 2, 4, 16)], "qkv"),
    "qkv_rank_4": (flash_attn_qkvpacked_func, [torch.zeros(8, 3, 4, 16)], "qkv"),
    "kv_of_3": (
        flash_attn_kvpacked_func,
        [torch.zeros(2, 8, 4, 16), torch.zeros(2, 8, 3, 4, 16)],
        "kv",
    ),
    "varlen_qkv_rank_5": (
        flash_attn_varlen_qkvpacked_func,
        [torch.zeros(2, 8, 3, 4, 16), offsets([8]), 8],
        "qkv",
    ),
    "varlen_kv_of_1": (
        flash_attn_varlen_kvpacked_func,
        [torch.zeros(8, 4, 16), torch.zeros(8, 1, 4, 16), offsets([8]), offsets([8]), 8, 8],
        "kv",
    ),
}
TYPES = {
    "q_a_list": (dense(q=[1.0]), "q"),
    "k_none": (dense(k=None), "k"),
    "scale_text": (dense(softmax_scale="1"), "softmax_scale"),
    "dropout_none": (dense(dropout_p=None), "dropout_p"),
    "softcap_none": (dense(softcap=None), "softcap"),
    "q_sparse": (dense(q=torch.zeros(2, 8, 4, 16).to_sparse()), "q: must be a dense tensor"),
    "causal_text": (dense(causal="yes"), "causal: must be True or False, is 'yes'"),
    "causal_a_mask": (
        dense(causal=torch.ones(8, 12, dtype=torch.bool)),
        r"causal: must be True or False, is a Tensor of shape \[8, 12\]$",
    ),
    "window_of_floats": (dense(window_size=(1.5, 2)), "window_size"),
    "window_none": (
        dense(window_size=(None, 0)),
        r"window_size\[0\]: .* -1 where there is no bound",
    ),
    "alibi_a_list": (dense(alibi_slopes=[1.0] * 4), "alibi_slopes"),
    "max_seqlen_q_none": (varlen(max_seqlen_q=None), "max_seqlen_q"),
    "cu_seqlens_q_a_list": (varlen(cu_seqlens_q=[0, 3, 8]), "cu_seqlens_q"),
}


def call(arguments):
    function = flash_attn_varlen_func if "max_seqlen_q" in arguments else flash_attn_func
    return function(**arguments)


def test_the_unchanged_arguments_are_right():
    for arguments in (dense(), varlen(), paged()):
        assert call(arguments).isfinite().all()


def test_there_are_at_least_forty_cases():
    assert len(DENSE) + len(VARLEN) + len(PACKED) >= 40


@pytest.mark.parametrize("case", [*DENSE.values(), *VARLEN.values()], ids=[*DENSE, *VARLEN])
@pytest.mark.parametrize("return_attn_probs", [False, True])
def test_a_wrong_value_is_named(case, return_attn_probs, pytestconfig):
    arguments, name = case
    # --device moves q, and leaves on the meta device what is there.
    name = name.replace("device, cpu", f"device, {pytestconfig.getoption('--device') or 'cpu'}")
    with pytest.raises(ValueError, match=rf"\b{name}") as raised:
        call({**arguments, "return_attn_probs": return_attn_probs})
    assert type(raised.value) is ValueError


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED.keys())
def test_a_wrong_packed_tensor_is_named(case):
    function, arguments, name = case
    with pytest.raises(ValueError, match=rf"\b{name}: .*shape"):
        function(*arguments)


@pytest.mark.parametrize("case", TYPES.values(), ids=TYPES.keys())
def test_a_wrong_type_is_named(case):
    arguments, name = case
    with pytest.raises(TypeError, match=rf"\b{name}"):
        call(arguments)


@pytest.mark.parametrize("case", [*DENSE.values(), *VARLEN.values()], ids=[*DENSE, *VARLEN])
def test_nothing_is_written(case):
    arguments = dict(case[0])
    q, v = arguments["q"], arguments["v"]
    shape = (varlen() if "max_seqlen_q" in arguments else dense())["q"].shape
    if q.dim() == len(shape) and q.numel() < 2**20:
        shape = (*q.shape[:-1], v.shape[-1])
    out = torch.full(shape, 7.0, dtype=q.dtype)
    with pytest.raises(ValueError):
        dlpack.attention(out=out, **arguments)
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    "out,text",
    [
        (torch.zeros(2, 8, 4, 15), "out"),
        (torch.zeros(2, 8, 4, 16).half(), "out"),
        (torch.zeros(2, 8, 4, 32)[..., ::2], "out"),
        (torch.zeros(2, 8, 1, 16).expand(2, 8, 4, 16), "out"),
    ],
    ids=["shape", "dtype", "last_dimension_apart", "broadcast"],
)
def test_a_wrong_out_is_named(out, text):
    with pytest.raises(ValueError, match=text):
        dlpack.attention(**dense(), out=out)
    assert not out.any()
