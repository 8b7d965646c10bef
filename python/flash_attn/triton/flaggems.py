"""The candidate "flaggems": FlagGems' operators, where they do exactly what a call asks.

Of FlagGems 5.0.2 (flag_gems.ops.attention) this uses `flash_attention_forward` alone. What was read
in that release, and is never used:

- scaled_dot_product_attention adds -1e6 where a boolean mask is true, so it keeps what the mask
  hides;
- scaled_dot_product_attention_backward passes neither the mask nor is_causal to its kernel;
- flash_attention_forward leaves a window that is bounded on one side only without any bound, takes
  a scale of 0 for the default, refuses varlen, and draws a dropout mask of its own;
- flash_attn_varlen_func has vLLM's order of arguments, max_seqlen_q before cu_seqlens_q, and reads
  max_seqlen back from the device where it is a tensor.

Whether a feature that looks right is right is probed: its first call on a device is preceded by a
small one, whose result must agree with the composition of PyTorch's operators.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from .. import _composition
from .._call import Call, Request
from .backend import why_no_driver

DESCRIPTION = "FlagGems' flash_attention_forward"

_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Of the probe: both results are within twice the unit round-off of the truth, and v is below 1.
_TOLERANCE = {torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


def refusal(request: Request) -> str:
    """Why FlagGems is not used for a request; "" where it is."""
    reason = why_no_driver(request.call.q.device.type)
    if reason:
        return reason
    if importlib.util.find_spec("flag_gems") is None:
        return "FlagGems is not installed (pip install flag-gems)"
    reason = why_not_taken(request) or _why_not_imported(request.call.q.device.type)
    return reason or _why_defective(request.call.q.device, request.call.q.dtype, *_traits(request))


def run(request: Request) -> None:
    """Computes a request that refusal() lets pass."""
    call = request.call
    out, lse = _forward(call)
    call.out.copy_(out)
    if call.lse is not None:
        call.lse.copy_(lse)


def why_not_taken(request: Request) -> str:
    """Why FlagGems' operators cannot do a request, installed or not; "" where they can."""
    call, cache, gradients, _ = request
    left, right = call.band
    refusals = {
        "the backward: FlagGems' ignores masks": gradients is not None,
        "a KV cache is not taken": cache is not None,
        "cu_seqlens_q: varlen is not taken": call.varlen,
        "attn_bias is not taken": call.attn_bias is not None,
        "learnable_sink is not taken": call.learnable_sink is not None,
        "dropout_p: the mask would be another": call.dropout_p > 0.0,
        "q: float32 is not taken": call.q.dtype == torch.float32,
        f"head_dim: must be one of {_HEAD_DIMS}, and v's the same": (
            call.q.size(-1) not in _HEAD_DIMS or call.v.size(-1) != call.q.size(-1)
        ),
        "softmax_scale: 0 is taken for the default": call.scale == 0.0,
        "window_size: bounded on one side, it is ignored": (left >= 0 and right < 0)
        or (left < 0 and right > 0),
        # A row without visible keys, and the grouped rows of one query, are written otherwise.
        "more queries than keys, or a single one": not 1 < call.longest_q <= call.longest_k,
        "an empty batch": call.batch == 0,
    }
    return next((reason for reason, holds in refusals.items() if holds), "")


def _traits(request: Request) -> tuple[bool, bool, bool, bool, bool]:
    """Which features of FlagGems a request uses."""
    call = request.call
    return (
        call.band[1] >= 0,
        call.band[0] >= 0,
        call.softcap > 0.0,
        call.alibi_slopes is not None,
        call.q.size(-2) != call.k.size(-2),
    )


def _forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    from flag_gems.ops.attention import flash_attention_forward

    left, right = call.band
    out, lse, *_ = flash_attention_forward(
        call.q,
        call.k,
        call.v,
        None,
        None,
        call.longest_q,
        call.longest_k,
        0.0,
        right == 0 and left < 0,
        False,
        scale=call.scale,
        softcap=call.softcap,
        window_size_left=left,
        window_size_right=right,
        alibi_slopes=call.alibi_slopes,
        # Splits were seen to write with the stride of another dimension.
        disable_splitkv=True,
    )
    return out, lse


@functools.cache
def _why_not_imported(device: str) -> str:
    try:
        import flag_gems
    except Exception as error:  # whatever its detection of a vendor raises
        return f"FlagGems cannot be imported: {error}"
    return "" if flag_gems.device == device else f"FlagGems is for {flag_gems.device!r}"


@functools.cache
def _why_defective(
    device: torch.device,
    dtype: torch.dtype,
    causal: bool,
    window: bool,
    softcap: bool,
    alibi: bool,
    grouped: bool,
) -> str:
    """Why features are not used on a device, by a small call against the composition."""
    import flag_gems

    call = _probe(device, dtype, causal, window, softcap, alibi, grouped)
    exact = call._replace(out=torch.empty_like(call.out), lse=torch.empty_like(call.lse))
    _composition.run(Request(exact))
    try:
        out, lse = _forward(call)
    except Exception as error:
        return f"FlagGems {flag_gems.__version__} fails on a small call: {error}"
    worst = max((out - exact.out).abs().max().item(), (lse - exact.lse).abs().max().item())
    if worst <= _TOLERANCE[dtype]:
        return ""
    return f"FlagGems {flag_gems.__version__} is off by {worst:.2g} in a small call of this kind"


def _probe(
    device: torch.device,
    dtype: torch.dtype,
    causal: bool,
    window: bool,
    softcap: bool,
    alibi: bool,
    grouped: bool,
) -> Call:
    """A call of 100 queries and 150 keys with these features."""
    generator = torch.Generator().manual_seed(0)

    def uniform(length: int, heads: int) -> torch.Tensor:
        x = torch.rand((1, length, heads, 64), generator=generator) * 2.0 - 1.0
        return x.to(device, dtype)

    heads_kv = 2 if grouped else 4
    q, k, v = uniform(100, 4), uniform(150, heads_kv), uniform(150, heads_kv)
    fields: dict[str, Any] = dict.fromkeys(Call._fields) | {
        "q": q,
        "k": k,
        "v": v,
        "out": torch.empty_like(q),
        "lse": torch.empty((1, 4, 100), dtype=torch.float32, device=device),
        "alibi_slopes": torch.full((4,), 0.1, device=device) if alibi else None,
        "max_seqlen_q": 0,
        "max_seqlen_k": 0,
        "causal": False,
        "window_left": 20 if window else -1,
        "window_right": (3 if window else 0) if causal else -1,
        "softcap": 2.0 if softcap else 0.0,
        "dropout_p": 0.0,
        "seed": 0,
        "offset": 0,
    }
    return Call(**fields)
