"""Every function under torch.compile and torch.export: one graph, the bits of an eager call."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import offsets, same_bits, tensors
from test_import import run_python
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    _operators,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn._attention import Options
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

OPERATORS = torch.ops.flash_attention_plus
LENGTHS = offsets([7, 0, 13])


@pytest.fixture(autouse=True)
def a_fresh_compiler_and_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.enable_grad():
        yield


def normal(*shape: int, requires_grad: bool = True, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(requires_grad)


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def results_and_gradients(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """What `function` returns with the generator at a known state, and its first result's
    gradients."""
    torch.manual_seed(5)
    results = function(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    leaves = [x for x in inputs if x.requires_grad]
    dout = normal(*results[0].shape, requires_grad=False, seed=1)
    return results + list(torch.autograd.grad(results[0], leaves, dout))


def assert_compiles_to_the_same_bits(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], **options: Any
) -> None:
    eager = results_and_gradients(function, inputs)
    traced = results_and_gradients(compiled(function, **options), inputs)
    assert len(eager) == len(traced)
    for expected, actual in zip(eager, traced):
        assert expected.requires_grad == actual.requires_grad
        assert same_bits(expected.detach(), actual.detach())


SLOPES = normal(4, requires_grad=False).abs()
# Each call, and the shapes of its differentiable inputs.
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "dense": (
        partial(flash_attn_func, dropout_p=0.3, causal=True, return_attn_probs=True),
        [(2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 8)],
    ),
    "qkvpacked": (
        partial(flash_attn_qkvpacked_func, dropout_p=0.3, window_size=(3, 2), softcap=5.0),
        [(2, 9, 3, 4, 16)],
    ),
    "kvpacked": (
        partial(flash_attn_kvpacked_func, dropout_p=0.3, alibi_slopes=SLOPES),
        [(2, 9, 4, 16), (2, 12, 2, 2, 16)],
    ),
    "varlen": (
        lambda q, k, v: flash_attn_varlen_func(
            q, k, v, LENGTHS, LENGTHS, 13, 13, 0.3, causal=True, return_attn_probs=True
        ),
        [(20, 4, 16), (20, 2, 16), (20, 2, 16)],
    ),
    "varlen_qkvpacked": (
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, LENGTHS, 13, 0.3),
        [(20, 3, 4, 16)],
    ),
    "varlen_kvpacked": (
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, LENGTHS, LENGTHS, 13, 13, 0.3),
        [(20, 4, 16), (20, 2, 2, 16)],
    ),
    "bias_and_sink": (
        lambda q, k, v, bias, sink: flash_attn_func(
            q, k, v, 0.3, attn_bias=bias, learnable_sink=sink, return_attn_probs=True
        ),
        [(2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16), (1, 4, 9, 12), (4,)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_gradients_and_dropout_masks_are_those_of_eager_calls(name):
    function, shapes = CALLS[name]
    inputs = tuple(normal(*shape) for shape in shapes)
    assert_compiles_to_the_same_bits(function, inputs)


def test_inductor_keeps_the_bits_and_the_dropout_mask():
    function, shapes = CALLS["bias_and_sink"]
    inputs = tuple(normal(*shape) for shape in shapes)
    assert_compiles_to_the_same_bits(function, inputs, backend="inductor")


def test_strides_may_be_any():
    inputs = tuple(normal(2, 4, 9, 16) for _ in range(3))

    def heads_first(q, k, v):
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    assert_compiles_to_the_same_bits(heads_first, inputs)

    def last_dimension_apart(q, k, v):
        return flash_attn_func(*(x.permute(0, 2, 1, 3).mT for x in (q, k, v)))

    assert_compiles_to_the_same_bits(last_dimension_apart, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_cache_is_appended_to_in_place(backend):
    q, k, v = (normal(2, 3, heads, 16, requires_grad=False) for heads in (4, 2, 2))
    caches = [normal(3, 32, 2, 16, requires_grad=False, seed=s) for s in (1, 2)]
    cos, sin = torch.randn(2, 32, 8).unbind()
    rows = torch.tensor([2, 0], dtype=torch.int32)

    def step(q, k_cache, v_cache, k, v, lengths):
        first = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cos,
            sin,
            cache_seqlens=lengths,
            cache_batch_idx=rows,
            causal=True,
            return_softmax_lse=True,
        )
        # Reads what the first has written; and the row that it has not, of an int's length.
        again = flash_attn_with_kvcache(q, k_cache[:2], v_cache[:2], cache_seqlens=9)
        return *first, again

    results = []
    for function in (step, compiled(step, backend)):
        mutated = [cache.clone() for cache in caches]
        lengths = torch.tensor([5, 9], dtype=torch.int32)
        results.append([*function(q, *mutated, k, v, lengths), *mutated])
    assert not torch.equal(results[0][3], caches[0])
    assert all(same_bits(a, b) for a, b in zip(*results))


def test_two_draws_in_one_graph_differ_and_repeat_with_the_seed():
    qkv = normal(1, 40, 3, 2, 8, requires_grad=False)

    def two(qkv):
        return flash_attn_qkvpacked_func(qkv, 0.5), flash_attn_qkvpacked_func(qkv, 0.5)

    function = compiled(two, "inductor")
    torch.manual_seed(0)
    first, second = function(qkv)
    third, _ = function(qkv)
    assert not torch.equal(first, second) and not torch.equal(first, third)
    torch.manual_seed(0)
    assert all(same_bits(a, b) for a, b in zip(function(qkv), (first, second)))


def test_checkpointing_replays_the_dropout_mask():
    inputs = tuple(normal(1, 20, 2, 8) for _ in range(3))

    def block(q, k, v):
        return flash_attn_func(q * 2.0, k, v, dropout_p=0.5)

    def checkpointed(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=False)

    assert_compiles_to_the_same_bits(checkpointed, inputs)
    traced = results_and_gradients(compiled(checkpointed), inputs)
    plain = results_and_gradients(block, inputs)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(plain, traced))


class Block(torch.nn.Module):
    """A transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.up, self.down = torch.nn.Linear(dim, 2 * dim), torch.nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        x = x + self.out(flash_attn_qkvpacked_func(qkv, 0.1, causal=True).flatten(-2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_transformer_block_of_any_length_is_compiled_once(backend):
    torch.manual_seed(0)
    block = Block(32, 4)
    parameters = tuple(block.parameters())
    counter = CompileCounterWithBackend(backend)
    function = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for seqlen in (19, 24, 33):
        x = normal(2, seqlen, 32, requires_grad=False)
        steps = []
        for run in (block, function):
            torch.manual_seed(seqlen)
            loss = run(x).square().mean()
            steps.append([loss, *torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_a_packed_tensor_gets_one_packed_gradient_without_copies():
    backward_graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        backward_graphs.append(module.graph)
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=lambda module, _: make_boxed_func(module), bw_compiler=keep)
    qkv = normal(1, 9, 3, 2, 8)
    out = compiled(flash_attn_qkvpacked_func, backend)(qkv)
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    (graph,) = backward_graphs
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    without_views = [name for name in called if "detach" not in name and "getitem" not in name]
    assert without_views == ["flash_attention_plus.backward.default"]


def test_maximum_lengths_may_be_tensors():
    inputs = tuple(normal(20, 2, 8) for _ in range(3))
    longest = torch.tensor(13)

    def call(q, k, v):
        return flash_attn_varlen_func(q, k, v, LENGTHS, LENGTHS, longest, longest)

    assert_compiles_to_the_same_bits(call, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_private_functions(dropout_p):
    q, k, v, dout = (normal(20, 2, 8, requires_grad=False, seed=s) for s in range(4))

    def dense(*inputs):
        q, k, v, dout = (x[None] for x in inputs)
        options = (dropout_p, 0.25, True, -1, -1, 0.0, None, False)
        out, lse, _, rng_state = _flash_attn_forward(q, k, v, *options)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, *grads, *options, rng_state)
        return out, lse, *grads, softmax_d

    def varlen(q, k, v, dout):
        lengths = (LENGTHS, LENGTHS, 13, 13)
        options = (dropout_p, 0.25, True, -1, -1, 0.0, None)
        out, lse, _, rng_state = _flash_attn_varlen_forward(q, k, v, *lengths, *options)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        softmax_d = _flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *grads, *lengths, *options, False, rng_state
        )
        return out, lse, *grads, softmax_d

    for function in (dense, varlen):
        results = []
        for run in (function, compiled(function)):
            torch.manual_seed(2)
            results.append(run(q, k, v, dout))
        assert all(same_bits(a, b) for a, b in zip(*results))


def test_a_gradient_through_pages_is_refused():
    q, (_, k, v) = normal(4, 4, 64), tensors(1, 4, 16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    call = partial(flash_attn_varlen_func, cu_seqlens_q=offsets([4]), cu_seqlens_k=offsets([16]))
    call = torch.compile(partial(call, max_seqlen_q=4, max_seqlen_k=16), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="block_table"):
        call(q, k, v, block_table=table)
    with torch.no_grad():
        assert call(q, k, v, block_table=table).shape == q.shape
    sink = torch.randn(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="block_table"):
        call(q.detach(), k, v, block_table=table, learnable_sink=sink)


def test_bad_arguments_are_named():
    q, k, v = (normal(1, 8, 2, 8, requires_grad=False) for _ in range(3))
    with pytest.raises(ValueError, match="dtype"):
        compiled(flash_attn_func)(q.half(), k, v)
    with pytest.raises(ValueError, match="softcap"):
        compiled(partial(flash_attn_func, softcap=-1.0))(q, k, v)


# ---- The operators themselves ----


def flat(**given: Any) -> tuple[Any, ...]:
    """attn_bias, learnable_sink, rng_state and options, as the operators take them."""
    attn_bias, learnable_sink = given.pop("attn_bias", None), given.pop("learnable_sink", None)
    defaults = Options(0.0, None, True, (-1, -1), 0.0, None, False, False)
    rng_state = torch.tensor([11, 0]) if given.get("dropout_p") else None
    return _operators._flatten(defaults._replace(**given), attn_bias, learnable_sink, rng_state)


def forward_cases() -> dict[str, tuple[Any, ...]]:
    varlen = dict(cu_seqlens_q=LENGTHS, cu_seqlens_k=LENGTHS, max_seqlen_q=13, max_seqlen_k=13)
    return {
        "everything": (
            *(normal(2, 9, 4, 16, seed=s) for s in range(3)),
            *flat(
                attn_bias=normal(1, 4, 9, 9),
                learnable_sink=normal(4),
                dropout_p=0.2,
                return_attn_probs=True,
            ),
        ),
        "qkvpacked": (normal(2, 9, 3, 4, 16), None, None, *flat()),
        "varlen_kvpacked": (normal(20, 4, 16), normal(20, 2, 2, 16), None, *flat(**varlen)),
    }


@pytest.mark.parametrize("name", ["everything", "qkvpacked", "varlen_kvpacked"])
def test_opcheck_of_the_forward_and_its_gradient(name):
    torch.library.opcheck(OPERATORS.forward.default, forward_cases()[name])


@pytest.mark.parametrize("name", ["everything", "qkvpacked", "varlen_kvpacked"])
def test_opcheck_of_the_backward(name):
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in forward_cases()[name]]
    out, lse, _ = OPERATORS.forward(*inputs)
    wanted = (name == "everything",) * 2
    dout = torch.randn_like(out)
    torch.library.opcheck(OPERATORS.backward.default, (dout, out, lse, *inputs, *wanted))


def test_opcheck_of_the_cache():
    q, k, v = (normal(2, 1, heads, 16, requires_grad=False) for heads in (4, 2, 2))
    caches = [normal(2, 32, 2, 16, requires_grad=False, seed=s) for s in (1, 2)]
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    own = (lengths, None, None, k, v, None, None, True, 0)
    torch.library.opcheck(OPERATORS.with_kvcache.default, (q, *caches, *own, *flat()))


def test_a_second_derivative_of_the_operator_is_refused():
    q, k, v = (normal(1, 8, 2, 8, seed=s) for s in range(3))
    out, *_ = OPERATORS.forward(q, k, v, *flat())
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        torch.autograd.grad(dq.sum(), q)


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_any_length(strict):
    inputs = tuple(normal(2, 12, 4, 8, requires_grad=False) for _ in range(3))
    seqlen = torch.export.Dim("seqlen")
    program = torch.export.export(
        Attention(), inputs, strict=strict, dynamic_shapes=({1: seqlen},) * 3
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    shorter = tuple(x[:, :7] for x in inputs)
    out = torch.export.load(file).module()(*shorter)
    assert same_bits(out, flash_attn_func(*shorter, causal=True))


def test_fake_tensors_get_shapes_without_arithmetic():
    with FakeTensorMode() as mode:
        q, k, v = (
            mode.from_tensor(normal(2, 9, 4, width, requires_grad=False)) for width in (16, 16, 8)
        )
        out, lse, s_dmask = flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
        assert out.shape == (2, 9, 4, 8) and s_dmask.shape == (2, 4, 128, 128)
        assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32
        assert flash_attn_with_kvcache(q, k, v, cache_seqlens=3).shape == (2, 9, 4, 8)


def test_make_fx_records_the_operator_and_not_its_result():
    q, k, v = (normal(1, 8, 2, 8, requires_grad=False, seed=s) for s in range(3))
    graph = make_fx(lambda q, k, v: flash_attn_func(q, k, v))(q, k, v)
    assert same_bits(graph(k, q, v), flash_attn_func(k, q, v))


def test_eager_calls_do_not_register_operators():
    output = run_python(
        """
        import sys, torch
        from flash_attn import flash_attn_func
        q = torch.randn(1, 8, 2, 8, requires_grad=True)
        flash_attn_func(q, q, q).sum().backward()
        print("flash_attn._operators" in sys.modules, "torch._dynamo" in sys.modules)
        """
    )
    assert output.split() == ["False", "False"]


def test_jit_trace_records_the_operator_and_not_its_result():
    """What the native library does without PyTorch's dispatcher a trace would not hold."""
    q, k, v = (x.detach() for x in tensors(2, 6, 6))
    lengths = offsets([2, 4])

    def every_function(q, k, v, longest):
        dense = flash_attn_func(q, k, v, causal=True)
        flat = (x[0] for x in (q, k, v))
        varlen = flash_attn_varlen_func(*flat, lengths, lengths, longest, longest)
        cached = flash_attn_with_kvcache(q, k, v, cache_seqlens=5)
        private = _flash_attn_forward(q, k, v, 0.0, 0.5, True, -1, -1, 0.0, None, False)
        return dense, varlen, cached, *private[:2]

    flash_attn_func(q, k, v)  # so that there has been such a call
    traced = torch.jit.trace(every_function, (q, k, v, torch.tensor(5)))
    other = q * 2, k + 1, v - 1, torch.tensor(4)
    assert all(map(same_bits, traced(*other), every_function(*other)))


def test_jit_trace_draws_a_seed_at_every_call():
    q, k, v = (x.detach() for x in tensors(2, 6, 6))

    def dropping(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.5)

    traced = torch.jit.trace(dropping, (q, k, v), check_trace=False)
    torch.manual_seed(1)
    first = traced(q, k, v)
    assert not torch.equal(first, traced(q, k, v))
    torch.manual_seed(1)
    assert same_bits(first, traced(q, k, v))
