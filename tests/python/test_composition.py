"""The composition of PyTorch's operators: what serves a device that has nothing better."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import offsets, tensors, varlen_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

HERE = Path(__file__).parent

EVERYTHING: dict[str, Any] = {
    "causal": True,
    "window_size": (40, -1),
    "softcap": 20.0,
    "alibi_slopes": torch.rand(4),
    "attn_bias": torch.randn(4, 65, 97),
    "learnable_sink": torch.randn(4),
}


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}


def test_the_suites_hold():
    """A sample of each; `pytest --backend torch` runs them whole."""
    sample = (
        "dense_meets and (plain or everything or boolean)"
        " or any_head_dim or grouped or empty_problems or without_visible or pages"
        " or varlen_options or strides"
        " or dense_gradients and (dropout or window or softcap) or attn_bias_has or sink_has"
        " or varlen_gradients or leak or nan_past or behind_the_last"
        " or token_by_token and 16 or rows_and_left or the_mask_is or all_64_bits or s_dmask"
        " or a_wrong_value and False or a_bad_argument"
    )
    files = ["forward", "backward", "exact", "kvcache", "dropout", "bad_input"]
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "torch", "-k", sample]
    command += [str(HERE / f"test_{name}.py") for name in files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


def test_a_device_with_nothing_better_gets_it():
    q, k, v = (x.to("meta") for x in tensors())
    lines = {line.split()[0]: line for line in flash_attn.explain(q, k, v).splitlines()}
    assert "chosen" in lines["torch"] and "composition" in lines["torch"]
    assert "refused" in lines["triton"] and "refused" in lines["flaggems"]


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"dropout_p": 0.3}], ids=str)
def test_nothing_of_a_dense_call_is_read_back(options):
    # On meta there is no data: reading a length or a value raises.
    q, k, v = (x.to("meta").requires_grad_() for x in tensors(head_dim_v=40))
    with torch.enable_grad():
        out, lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True, **on("meta", options))
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == (2, 65, 4, 40) and lse.shape == (2, 4, 65)
    assert s_dmask.shape == ((2, 4, 128, 128) if "dropout_p" in options else (0,))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert all(x.device.type == "meta" for x in (out, lse, *gradients))


def test_nothing_of_a_varlen_call_is_read_back():
    q, k, v = (x.to("meta").requires_grad_() for x in varlen_tensors([30, 0, 17], [64, 5, 99]))
    lengths = offsets([1, 2, 3]).to("meta")
    with torch.enable_grad():
        out = flash_attn_varlen_func(q, k, v, lengths, lengths, 40, 100, causal=True)
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_nothing_of_a_call_over_a_cache_is_read_back():
    q, pages, new = (torch.empty(2, n, h, 32, device="meta") for n, h in ((1, 4), (16, 2), (1, 2)))
    angles = torch.empty(64, 8, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    table = torch.empty(2, 4, dtype=torch.int32, device="meta")
    out, lse = flash_attn_with_kvcache(
        q, pages, pages, new, new, angles, angles, lengths,
        block_table=table, causal=True, return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (2, 4, 1)


def test_a_device_that_only_pytorch_knows():
    command = [sys.executable, str(HERE / "pretend_device.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch           chosen" in result.stdout


def test_fake_tensors():
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, device="meta") for x in tensors())
        out = flash_attn_func(q, k, v, causal=True, alibi_slopes=torch.empty(4, device="meta"))
    assert out.shape == q.shape


def test_wrong_arguments_meet_the_same_errors_off_the_cpu():
    q, k, v = (x.to("meta") for x in tensors())
    for changed, message in (
        ({"k": k[..., :8]}, "k: head_dim is 8, must equal q's 64"),
        ({"v": v.half()}, "v: dtype is float16, must equal q's float32"),
        ({"k": torch.zeros(k.shape)}, "k: is on cpu, must be on q's device, meta"),
        ({"dropout_p": 1.5}, "dropout_p: is 1.5"),
        ({"alibi_slopes": torch.zeros(3, device="meta")}, r"alibi_slopes: shape is \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_func(**({"q": q, "k": k, "v": v} | changed))
