"""Generation, checkpoints, benchmarks and helpers of tests."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flash_attn.utils.benchmark import (
    benchmark_all,
    benchmark_backward,
    benchmark_forward,
    benchmark_memory,
    pytorch_profiler,
)
from flash_attn.utils.distributed import get_dim_for_local_rank
from flash_attn.utils.generation import (
    GenerationMixin,
    InferenceParams,
    allocate_inference_cache,
    decode,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from flash_attn.utils.pretrained import state_dict_from_pretrained
from flash_attn.utils.testing import (
    attention_ref,
    construct_local_mask,
    generate_qkv,
    generate_random_padding_mask,
)
from flash_attn.utils.torch import custom_bwd, custom_fwd

INF = float("inf")


class Counter(nn.Module, GenerationMixin):
    """The next token is the sum of all so far; the state of that sum is its cache."""

    def __init__(self, vocabulary: int = 10) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.calls: list[tuple] = []

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        assert num_last_tokens == 1
        places = None if position_ids is None else position_ids.tolist()
        self.calls.append((input_ids.tolist(), places, inference_params.seqlen_offset))
        cache = inference_params.key_value_memory_dict
        cache["sum"] = cache.get("sum", 0) + input_ids.sum(1)
        logits = torch.nn.functional.one_hot(cache["sum"] % self.vocabulary, self.vocabulary)
        return SimpleNamespace(logits=10.0 * logits[:, None].float())


def test_greedy_decoding():
    model, ids = Counter(), torch.tensor([[1, 2], [4, 4]])
    output = decode(ids, model, max_length=5)
    assert output.sequences.tolist() == [[1, 2, 3, 6, 2], [4, 4, 8, 6, 2]]
    assert len(output.scores) == 3 and output.scores[0].shape == (2, 10)
    assert model.calls == [
        ([[1, 2], [4, 4]], None, 0),
        ([[3], [8]], [[2], [2]], 2),
        ([[6], [6]], [[3], [3]], 3),
    ]


def test_generate_and_its_options(capsys):
    model, ids = Counter(), torch.tensor([[1, 2], [4, 4]])
    assert model.generate(ids, 4).tolist() == [[1, 2, 3, 6], [4, 4, 8, 6]]
    result = model.generate(ids, 4, return_dict_in_generate=True)
    assert result.scores is None and result.sequences.shape == (2, 4)
    result = model.generate(ids, 4, return_dict_in_generate=True, output_scores=True)
    assert len(result.scores) == 2
    # It stops where all sequences have ended, not before.
    assert model.generate(ids, 9, eos_token_id=6).shape == (2, 4)
    assert model.generate(ids, 9, eos_token_id=3).shape == (2, 9)
    teacher = torch.tensor([[1, 2, 7, 7], [4, 4, 0, 0]])
    assert decode(ids, Counter(), 5, teacher_outputs=teacher).sequences.tolist() == [
        [1, 2, 7, 7, 7],
        [4, 4, 0, 0, 8],
    ]
    assert decode(ids, Counter(), 4, vocab_size=5).scores[0].shape == (2, 5)
    decode(ids, Counter(), 4, enable_timing=True)
    assert "2 tokens of prompt, 2 of result" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="cg"):
        decode(ids, Counter(), 4, cg=True)
    with pytest.raises(NotImplementedError, match="allocate_inference_cache"):
        model.allocate_inference_cache(1, 2)


def test_filters():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 1.0]])
    top_k = logits.clone()
    modify_logits_for_top_k_filtering(top_k, 2)
    assert top_k.tolist() == [[3.0, -INF, 2.0, -INF], [-INF, -INF, 5.0, 1.0]]
    # Probabilities of 0.5, 0.25, 0.15 and 0.1, in another order.
    top_p = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    for share, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        filtered = top_p.clone()
        modify_logits_for_top_p_filtering(filtered, share)
        assert filtered.isfinite().nonzero()[:, 1].tolist() == kept


def test_sampling():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(4000, 4)
    before = logits.clone()

    def frequencies(**options):
        return torch.bincount(sample(logits, **options), minlength=4) / 4000

    assert (sample(logits) == 0).all()
    expected = torch.tensor([0.5, 0.25, 0.15, 0.1])
    assert (frequencies(top_k=0) - expected).abs().max() < 0.04
    assert (frequencies(top_k=2) - torch.tensor([2 / 3, 1 / 3, 0, 0])).abs().max() < 0.04
    assert (frequencies(top_k=0, top_p=0.8)[3]) == 0
    flat = frequencies(top_k=0, temperature=0.5)
    assert (flat - expected**2 / (expected**2).sum()).abs().max() < 0.04
    assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="top_p"):
        sample(logits, top_k=0, top_p=1.5)


def test_caches():
    cache = allocate_inference_cache(2, 8, 3, 4, [1, 5], "cpu", torch.float32)
    assert {k: tuple(v.shape) for k, v in cache.items()} == {1: (2, 8, 2, 3, 4), 5: (2, 8, 2, 3, 4)}
    assert list(allocate_inference_cache(1, 1, 1, 1, 2, "cpu")) == [0, 1]
    params = InferenceParams(8, 2, seqlen_offset=5, lengths_per_sample=torch.tensor([5, 4]))
    params.reset(9, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 3, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_checkpoints_in_a_folder(tmp_path, kind, in_parts):
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    stem = "model" if kind == "safetensors" else "pytorch_model"

    def save(tensors, name):
        if kind == "bin":
            torch.save(tensors, tmp_path / name)
        else:
            pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / name)

    if in_parts:
        names = {key: f"{stem}-{key}.{kind}" for key in weights}
        for key, name in names.items():
            save({key: weights[key]}, name)
        index = tmp_path / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    else:
        save(weights, f"{stem}.{kind}")
    loaded = state_dict_from_pretrained(str(tmp_path))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key].cpu(), weights[key].cpu()) for key in weights)
    device = torch.get_default_device()
    half = state_dict_from_pretrained(str(tmp_path), device=device, dtype=torch.float16)
    assert all(torch.equal(half[key], weights[key].half()) for key in weights)
    assert all(tensor.device.type == device.type for tensor in half.values())


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no weights are found"):
        state_dict_from_pretrained(str(tmp_path))


def test_benchmarks(capsys):
    calls = []

    def function(x, scale=1.0):
        calls.append(scale)
        return x * scale, "another result"

    x = torch.randn(4, requires_grad=True)
    _, measurement = benchmark_forward(function, x, repeats=3, desc="it", scale=2.0)
    assert measurement.number_per_run == 3 and set(calls) == {2.0}
    assert "it - Forward pass" in capsys.readouterr().out
    results = benchmark_all(function, x, repeats=2, verbose=False)
    assert len(results) == 3 and all(m.mean > 0 for _, m in results)
    assert capsys.readouterr().out == "" and x.grad is not None
    with pytest.raises(ValueError, match="grad: must have shape"):
        benchmark_backward(function, x, grad=torch.ones(5), verbose=False)
    pytorch_profiler(function, x, backward=True, cpu=True)
    assert "aten::mul" in capsys.readouterr().out
    if x.device.type == "cuda":
        assert benchmark_memory(function, x, verbose=False) > 0.0
    else:
        with pytest.raises(NotImplementedError, match=x.device.type):
            benchmark_memory(function, x)


def test_benchmarks_under_autocast():
    seen = []
    weight = torch.randn(3, 3, requires_grad=True)

    def function(x):
        seen.append((x @ weight).dtype)
        return x @ weight

    options = {"amp": True, "amp_dtype": torch.bfloat16, "repeats": 1, "verbose": False}
    benchmark_all(function, torch.randn(3, 3), **options)
    assert set(seen) == {torch.bfloat16}


def test_padding_masks():
    for mode, least in (("full", 30), ("random", 10), ("third", 10)):
        mask = generate_random_padding_mask(30, 400, torch.get_default_device(), mode)
        lengths = mask.sum(1)
        assert lengths.max() == 30 and lengths.min() == least
        assert torch.equal(mask, torch.arange(30) < lengths[:, None])
    device = torch.get_default_device()
    empty = generate_random_padding_mask(30, 12, device, zero_lengths=True).sum(1) == 0
    assert empty.nonzero().flatten().tolist() == [0, 5, 10, 11]
    with pytest.raises(ValueError, match="mode"):
        generate_random_padding_mask(3, 1, "cpu", "half")


@pytest.mark.parametrize("padded", [False, True])
def test_packed_arguments(padded):
    q, k, v = torch.randn(3, 3, 6, 2, 4)
    mask = generate_random_padding_mask(6, 3, q.device, "third") if padded else None
    results = generate_qkv(q, k, v, mask, mask)
    assert len(results) == 17 and all(results[i].requires_grad for i in range(3))
    tokens, cu_seqlens, pad = results[0], results[4], results[14]
    assert cu_seqlens[-1] == len(tokens) and cu_seqlens.dtype == torch.int32
    kept = torch.ones(3, 6) if mask is None else mask
    assert torch.equal(pad(tokens), q * kept[..., None, None])
    packed = generate_qkv(q, k, v, mask, mask, qkvpacked=True)
    assert len(packed) == 6 and packed[0].shape[1:] == (3, 2, 4)
    stacked = torch.stack((q, k, v), 2)
    assert torch.equal(packed[5](packed[0]), stacked * kept[..., None, None, None])
    packed = generate_qkv(q, k, v, mask, mask, kvpacked=True)
    assert len(packed) == 11
    assert torch.equal(packed[10](packed[1]), stacked[:, :, 1:] * kept[..., None, None, None])


def test_windows():
    hidden = construct_local_mask(3, 5, (1, 0))
    assert (~hidden).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert torch.equal(
        construct_local_mask(3, 5, (1, None), 1), construct_local_mask(3, 5, (1, -1), 1)
    )
    assert (~construct_local_mask(2, 4, (0, -1), sink_token_length=1)).int().tolist() == [
        [1, 0, 1, 1],
        [1, 0, 0, 1],
    ]
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    hidden = construct_local_mask(2, 4, (-1, 0), key_padding_mask=mask)
    assert (~hidden[0, 0]).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    hidden = construct_local_mask(1, 4, (-1, 0), key_leftpad=torch.tensor([2]))
    assert (~hidden[0, 0]).int().tolist() == [[0, 0, 1, 1]]


def test_reference_attention():
    """Against PyTorch's, and sinks and dropout by hand."""
    q, (k, v) = torch.randn(2, 5, 4, 8), torch.randn(2, 2, 7, 2, 8)
    out, probabilities = attention_ref(q, k, v, causal=True, attn_bias=torch.ones(5, 7))
    heads = [t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    visible = torch.ones(5, 7).bool().tril(2)
    expected = nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 5))
    reordered, _ = attention_ref(q, k, v, causal=True, reorder_ops=True, upcast=False)
    torch.testing.assert_close(reordered, out)

    sink = torch.randn(4)
    _, plain = attention_ref(q, k, v)
    lse = torch.logsumexp(
        torch.einsum("bihd,bjhd->bhij", heads[0].mT.mT.transpose(1, 2), k.repeat_interleave(2, 2))
        * 8**-0.5,
        -1,
    )
    _, with_sink = attention_ref(q, k, v, learnable_sink=sink)
    share = torch.sigmoid(lse - sink[:, None])
    torch.testing.assert_close(with_sink, plain * share[..., None])

    mask = torch.rand(2, 4, 5, 7) < 0.5
    dropped, kept = attention_ref(q, k, v, dropout_p=0.5, dropout_mask=mask)
    torch.testing.assert_close(kept, plain)
    exact = torch.einsum("bhij,bjhd->bihd", plain * mask * 2.0, v.repeat_interleave(2, 2))
    torch.testing.assert_close(dropped, exact)

    padding = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0] * 7]).bool()
    out, probabilities = attention_ref(q, k, v, key_padding_mask=padding, softcap=2.0)
    assert not out[1].any() and not probabilities[..., 2:].any() and out[0].any()
    rows = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
    out, _ = attention_ref(q, k, v, query_padding_mask=rows)
    assert not out[0, 3:].any() and out[1].any()
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        with pytest.raises(NotImplementedError, match=name):
            attention_ref(q, k, v, **{name: q})
    with pytest.raises(NotImplementedError, match="attention_chunk"):
        attention_ref(q, k, v, attention_chunk=4)


def test_decorators_of_autograd_functions():
    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            return 2.0 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, dout):
            return 2.0 * dout

    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dim", [1, 12, 13])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_dimensions_of_ranks(dim, multiple_of):
    parts = [get_dim_for_local_rank(dim, 3, rank, multiple_of) for rank in range(3)]
    assert sum(parts) == dim // multiple_of * multiple_of
    assert all(part % multiple_of == 0 for part in parts)
    assert parts == sorted(parts, reverse=True) and parts[0] - parts[-1] <= multiple_of
