"""The calls that take turns: ours, and those of the peers that are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

from .cases import Case
from .timing import Call

OURS = "ours"
SDPA = "sdpa"
# Ours on the same values in fp32: what 16-bit inputs cost beyond it.
OURS_FLOAT32 = "ours_float32"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Inputs in our layout, [batch, seqlen, heads, head_dim]; varlen ones without batch."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(*(getattr(self, field.name).to(dtype) for field in dataclasses.fields(self)))

    def heads_first(self) -> Tensors:
        """Compact [batch, heads, seqlen, head_dim], the layout that PyTorch likes."""
        return Tensors(
            *(
                getattr(self, field.name).transpose(-3, -2).contiguous()
                for field in dataclasses.fields(self)
            )
        )


def make_tensors(case: Case) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(seqlen: int, num_heads: int) -> torch.Tensor:
        lead = (sum(case.lengths),) if case.lengths else (case.batch, seqlen)
        shape = (*lead, num_heads, case.head_dim)
        return torch.randn(shape, generator=generator).to(dtype)

    return Tensors(
        normal(case.seqlen_q, case.num_heads),
        normal(case.seqlen_k, case.num_heads_kv),
        normal(case.seqlen_k, case.num_heads_kv),
        normal(case.seqlen_q, case.num_heads),
    )


# ---- Ours ----


def ours(case: Case, tensors: Tensors) -> Call:
    q, k, v = tensors.q, tensors.k, tensors.v
    if case.mode == "decode":
        cache_seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
        return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, causal=True)
    if case.lengths:
        offsets = torch.tensor([0, *case.lengths]).cumsum(0, dtype=torch.int32)
        longest = max(case.lengths)

        def attend() -> torch.Tensor:
            return flash_attn_varlen_func(
                q, k, v, offsets, offsets, longest, longest, causal=case.causal
            )
    else:

        def attend() -> torch.Tensor:
            return flash_attn_func(q, k, v, causal=case.causal)

    return _in_direction(case, attend, [q, k, v], tensors.dout)


def _in_direction(
    case: Case, attend: Callable[[], torch.Tensor], inputs: list[torch.Tensor], dout: torch.Tensor
) -> Call:
    """The forward, or the backward alone of a forward that has run."""
    if case.mode != "backward":
        return attend
    for x in inputs:
        x.requires_grad_()
    with torch.enable_grad():
        out = attend()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


# ---- PyTorch ----


def sdpa(case: Case, tensors: Tensors) -> Call:
    """PyTorch's attention; varlen sequences one after the other, as it has no other way on CPUs."""
    if case.lengths:
        calls = [_sdpa_dense(case, one.heads_first()) for one in _sequences(case, tensors)]

        def all_sequences() -> None:
            for call in calls:
                call()

        return all_sequences
    return _sdpa_dense(case, tensors.heads_first())


def _sequences(case: Case, tensors: Tensors) -> list[Tensors]:
    parts = [
        getattr(tensors, field.name).detach().split(case.lengths)
        for field in dataclasses.fields(tensors)
    ]
    return [Tensors(*(x[None] for x in one)) for one in zip(*parts)]


def _sdpa_dense(case: Case, tensors: Tensors) -> Call:
    q, k, v, dout = (x.detach() for x in (tensors.q, tensors.k, tensors.v, tensors.dout))
    # A lone query of a cache sees all keys; is_causal aligns the mask to the top left.
    causal = case.causal and case.seqlen_q == case.seqlen_k
    if case.causal and not causal:
        raise NotImplementedError("is_causal is aligned to the top left")
    grouped = case.num_heads != case.num_heads_kv

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return _in_direction(case, attend, [q, k, v], dout)


def flex(case: Case, tensors: Tensors) -> Call:
    """PyTorch's FlexAttention, compiled; its kernels for CPUs have no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.lengths or case.mode == "backward":
        raise NotImplementedError("FlexAttention on CPUs: dense forward only")
    one = tensors.heads_first()
    mask = None
    if case.causal:
        shift = case.seqlen_k - case.seqlen_q
        sizes = (None, None, case.seqlen_q, case.seqlen_k)
        mask = create_block_mask(lambda b, h, i, j: i + shift >= j, *sizes, device="cpu")
    compiled = torch.compile(flex_attention)
    grouped = case.num_heads != case.num_heads_kv
    return lambda: compiled(one.q, one.k, one.v, block_mask=mask, enable_gqa=grouped)


# ---- Others ----


def xformers(case: Case, tensors: Tensors) -> Call:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if case.lengths or case.num_heads != case.num_heads_kv:
        raise NotImplementedError("measured dense, without groups of heads")
    q, k, v = tensors.q.detach(), tensors.k.detach(), tensors.v.detach()
    bias = LowerTriangularMask() if case.causal else None
    attend = lambda: memory_efficient_attention(q, k, v, attn_bias=bias)  # noqa: E731
    return _in_direction(case, attend, [q, k, v], tensors.dout)


def onnxruntime(case: Case, tensors: Tensors) -> Call:
    """ONNX Runtime's MultiHeadAttention, fp32 forward; [batch, seqlen, heads * head_dim]."""
    if case.mode == "backward" or case.lengths or case.dtype != "float32":
        raise NotImplementedError("ONNX Runtime: dense fp32 forward only")
    if case.num_heads != case.num_heads_kv:
        raise NotImplementedError("MultiHeadAttention has no groups of heads")
    import onnx
    from onnxruntime import InferenceSession, SessionOptions

    names = ("query", "key", "value")
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "MultiHeadAttention",
        names,
        ("out",),
        domain="com.microsoft",
        num_heads=case.num_heads,
        unidirectional=int(case.causal),
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "attention", [value(n, kind, [None] * 3) for n in names], [value("out", kind, None)]
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = (x.detach().flatten(-2).numpy() for x in (tensors.q, tensors.k, tensors.v))
    feed = dict(zip(names, arrays))
    return lambda: session.run(None, feed)


_PEERS: dict[str, Callable[[Case, Tensors], Call]] = {
    SDPA: sdpa,
    "flex": flex,
    "xformers": xformers,
    "onnxruntime": onnxruntime,
}
PEERS = tuple(_PEERS)
_MODULES = {"xformers": ("xformers",), "onnxruntime": ("onnx", "onnxruntime")}


def installed() -> list[str]:
    """Peers that are taken unless others are named: FlexAttention compiles for half a minute."""
    return [
        name
        for name in PEERS
        if name != "flex" and all(map(importlib.util.find_spec, _MODULES.get(name, ())))
    ]


def calls_of(case: Case, peers: list[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls for a case, ours first, and of the peers that cannot do it the reason."""
    tensors = make_tensors(case)
    calls = {OURS: ours(case, tensors)}
    refused = {}
    for name in peers:
        try:
            call = _PEERS[name](case, tensors)
            call()
        except Exception as error:  # a peer may fail in its own way
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            calls[name] = call
    if case.dtype != "float32":
        wide = tensors.to(torch.float32)
        detached = Tensors(*(getattr(wide, f.name).detach() for f in dataclasses.fields(wide)))
        calls[OURS_FLOAT32] = ours(dataclasses.replace(case, dtype="float32"), detached)
    return calls, refused
