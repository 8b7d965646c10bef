"""Problems, and the comparison with the fp64 oracle that all tests share."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch

import flash_attn
from flash_attn import dlpack, flash_attn_func, flash_attn_varlen_func

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The bounds of tests/case_runner.h. Of max |out - oracle| / sum_j P_ij |v_jd|: 2u for 16-bit types
# with unit round-off u, and for fp32 one that was calibrated on scores of the usual size.
OUT_BOUND = {torch.float32: 4e-6, torch.float16: 2 * 2.0**-11, torch.bfloat16: 2 * 2.0**-8}
USUAL_SCORE = 16.0
# Of max |lse - oracle| / max(1, |oracle|).
LSE_BOUND = 1e-5


def available() -> list[str]:
    """The implementations that this machine can run; with --backend, that one."""
    forced = os.environ.get("FLASH_ATTENTION_BACKEND")
    if forced:
        return [forced]
    return [it.name for it in flash_attn.implementations() if it.available]


def chosen(q: Any, k: Any, v: Any, **options: Any) -> str:
    """The implementation that runs a call."""
    for line in flash_attn.explain(q, k, v, **options).splitlines():
        name, outcome, *_ = line.split()
        if outcome == "chosen":
            return name
    return ""


def served() -> list[tuple[str, torch.dtype]]:
    """Those implementations, each with the dtypes that it takes."""
    return [
        (name, dtype)
        for name in available()
        for dtype in DTYPES
        if chosen(*tensors(dtype=dtype), backend=name) == name
    ]


def options_of_every_kind(seqlen_q: int, seqlen_k: int) -> dict[str, dict[str, Any]]:
    """Options of every kind for two sequences of four heads, each under a name."""
    bias = torch.randn(2, 4, seqlen_q, seqlen_k)
    return {
        "plain": {},
        "causal": {"causal": True},
        "scale": {"softmax_scale": 0.3},
        "scale_of_zero": {"softmax_scale": 0.0, "causal": True},
        "window": {"window_size": (17, 3)},
        "window_left_causal": {"window_size": (20, -1), "causal": True},
        "window_right": {"window_size": (-1, 5)},
        "softcap": {"softcap": 5.0},
        "softcap_causal": {"softcap": 30.0, "causal": True},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        "alibi_per_batch": {"alibi_slopes": torch.rand(2, 4), "causal": True},
        "bias": {"attn_bias": bias},
        "bias_broadcast": {"attn_bias": bias[:1, :, :1]},
        "bias_boolean": {"attn_bias": bias[:, :1] > -0.5, "causal": True},
        "sink": {"learnable_sink": torch.randn(4)},
        "everything": {
            "causal": True,
            "window_size": (40, -1),
            "softcap": 20.0,
            "softmax_scale": 0.2,
            "alibi_slopes": torch.rand(4),
            "attn_bias": bias[0],
            "learnable_sink": torch.randn(4),
        },
    }


def tensors(
    batch: int = 2,
    seqlen_q: int = 65,
    seqlen_k: int = 97,
    num_heads: int = 4,
    num_heads_kv: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q, k and v of a dense problem."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        normal(batch, seqlen_q, num_heads, head_dim),
        normal(batch, seqlen_k, num_heads_kv, head_dim),
        normal(batch, seqlen_k, num_heads_kv, head_dim_v or head_dim),
    )


def offsets(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def varlen_tensors(
    lengths_q: list[int],
    lengths_k: list[int],
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q, k and v of sequences laid end to end."""
    q, k, v = tensors(1, sum(lengths_q), sum(lengths_k), **options)
    return q[0], k[0], v[0]


def out_bound(q: torch.Tensor, longest: int, options: dict[str, Any]) -> float:
    """The bound for out. In fp32 the error of a score, and so that of its probability, grows with
    the score, and the bound with it."""
    bound = OUT_BOUND[q.dtype]
    if q.dtype != torch.float32:
        return bound
    scale = options.get("softmax_scale")
    size = 1.0 if scale is None else scale * math.sqrt(q.shape[-1])
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.numel() > 0:
        size += slopes.max().item() * longest / USUAL_SCORE
    return bound * max(1.0, size)


def assert_close(out: torch.Tensor, lse: torch.Tensor, exact: dlpack.Oracle, bound: float) -> None:
    """out and lse are within their bounds; infinities stand where they should."""
    actual = out.double().numpy()
    # Nobody rounds a subnormal result better than to half the spacing of subnormals.
    finfo = torch.finfo(out.dtype)
    error = np.maximum(np.abs(actual - exact.out) - finfo.smallest_normal * finfo.eps / 2, 0.0)
    # A bound of 0 asks for the exact value.
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(
            exact.bound > 0.0, error / exact.bound, np.where(error == 0.0, 0.0, np.inf)
        )
    worst = error.max(initial=0.0)
    assert worst <= bound, f"out is off by {worst:.3g}, the bound is {bound:.3g}"
    actual_lse = lse.double().numpy()
    finite = np.isfinite(exact.lse)
    assert np.array_equal(actual_lse[~finite], exact.lse[~finite])
    lse_error = np.abs(actual_lse[finite] - exact.lse[finite]) / np.maximum(
        1.0, np.abs(exact.lse[finite])
    )
    assert lse_error.max(initial=0.0) <= LSE_BOUND


def check_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_func meets the oracle. Returns (out, lse)."""
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    bound = out_bound(q, max(q.shape[1], k.shape[1]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)
    return out, lse


def check_entry(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str | None = None, **options: Any
) -> None:
    """The framework-free entry meets the oracle on a dense problem."""
    out, lse = dlpack.attention(q, k, v, backend=backend, return_lse=True, **options)
    bound = out_bound(q, max(q.shape[1], k.shape[1]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)


def check_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_varlen_func meets the oracle. Returns (out, lse)."""
    out, lse, _ = flash_attn_varlen_func(q, k, v, return_attn_probs=True, **options)
    bound = out_bound(q, max(options["max_seqlen_q"], options["max_seqlen_k"]), options)
    assert_close(out, lse, dlpack.oracle(q, k, v, **options), bound)
    return out, lse


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a and b are equal bit for bit, NaN and the sign of zero included."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
    )
