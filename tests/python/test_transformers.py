"""Models of transformers with attn_implementation="flash_attention_plus" do as with "eager"."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import offsets

transformers = pytest.importorskip("transformers", minversion="5")

from flash_attn.integrations.transformers import (  # noqa: E402
    NAME,
    flash_attention_plus_forward,
)

# Of max |logits - eager's|, which are of size 1.
TOLERANCE = 2e-5
LEARNING_RATE = 2e-3
VOCABULARY = 96
BATCH, LENGTH = 3, 24
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models of this size are not worth a second one, and threads that wait for one another on a
    busy machine take a hundred times as long."""
    torch.set_num_threads(1)


def build(name: str, implementation: str) -> torch.nn.Module:
    """A small model with the same weights whatever the implementation."""
    group = dict(num_key_value_heads=2, head_dim=16)
    configuration, model = {
        "bert": lambda: (transformers.BertConfig(**_COMMON), "BertForMaskedLM"),
        "llama": lambda: (transformers.LlamaConfig(**_COMMON, **group), "LlamaForCausalLM"),
        "mistral": lambda: (
            transformers.MistralConfig(**_COMMON, **group, sliding_window=6),
            "MistralForCausalLM",
        ),
        "gemma2": lambda: (
            transformers.Gemma2Config(
                **_COMMON,
                **group,
                sliding_window=6,
                attn_logit_softcapping=2.0,
                query_pre_attn_scalar=16,
            ),
            "Gemma2ForCausalLM",
        ),
        "gpt_oss": lambda: (
            transformers.GptOssConfig(
                **_COMMON,
                **group,
                sliding_window=6,
                num_local_experts=2,
                num_experts_per_tok=1,
            ),
            "GptOssForCausalLM",
        ),
    }[name]()
    configuration.attention_dropout = 0.0
    if name == "bert":
        configuration.hidden_dropout_prob = configuration.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    built = getattr(transformers, model)._from_config(
        configuration, attn_implementation=implementation
    )
    assert built.config._attn_implementation == implementation
    return built.eval()


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[torch.nn.Module, torch.nn.Module]]:
    """(eager, ours) of a name, built once, with the same weights."""
    known: dict[str, tuple[torch.nn.Module, torch.nn.Module]] = {}

    def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        if name not in known:
            eager, ours = build(name, "eager"), build(name, NAME)
            if name == "gpt_oss":
                for parameter, value in eager.named_parameters():
                    if parameter.endswith("sinks"):
                        torch.nn.init.normal_(value)
            ours.load_state_dict(eager.state_dict())
            known[name] = eager, ours
        return known[name]

    return pair


def pair_of(
    name: str, models: Callable[[str], tuple[torch.nn.Module, torch.nn.Module]]
) -> tuple[torch.nn.Module, torch.nn.Module]:
    if name == "gpt_oss" and not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this release of transformers has no gpt-oss")
    return models(name)


DECODERS = ["llama", "mistral", "gemma2", "gpt_oss"]
NAMES = ["bert", *DECODERS]


def tokens(length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (BATCH, length), generator=generator)


def padding(side: str, length: int = LENGTH) -> torch.Tensor:
    """A mask [BATCH, length] of sequences of several lengths."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    for row, missing in enumerate((0, 5, length - 3)):
        if side == "left":
            mask[row, :missing] = 0
        else:
            mask[row, length - missing :] = 0
    return mask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits(name, side, models):
    eager, ours = pair_of(name, models)
    inputs = {"input_ids": tokens()}
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if side is not None:
        inputs["attention_mask"] = padding(side)
        seen = inputs["attention_mask"].bool()
    expected, actual = eager(**inputs).logits, ours(**inputs).logits
    assert expected.std() > 0.1
    assert (actual - expected)[seen].abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation(name, padded, models):
    eager, ours = pair_of(name, models)
    mask = padding("left") if padded else torch.ones(BATCH, LENGTH, dtype=torch.long)
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
    expected = eager.generate(tokens(), **arguments)
    assert expected.shape == (BATCH, LENGTH + 10)
    assert torch.equal(ours.generate(tokens(), **arguments), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step(name, models):
    mask = padding("right")
    labels = tokens().masked_fill(mask == 0, -100)
    results = []
    for model in pair_of(name, models):
        model = copy.deepcopy(model).train()
        with torch.enable_grad():
            loss = model(input_ids=tokens(), attention_mask=mask, labels=labels).loss
            loss.backward()
        gradients = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
        results.append((loss.detach(), gradients))
    (expected_loss, expected), (loss, actual) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert actual.keys() == expected.keys()
    scale = max(x.abs().max() for x in expected.values())
    for key, want in expected.items():
        assert (actual[key] - want).abs().max() < 1e-5 * scale, key
    if name == "gpt_oss":
        assert any(key.endswith("sinks") and x.any() for key, x in actual.items())


@pytest.mark.parametrize("name", NAMES)
def test_twenty_training_steps(name, models):
    histories = []
    for model in pair_of(name, models):
        model = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        losses = []
        for step in range(20):
            ids, mask = tokens(seed=10 + step % 4), padding("right" if step % 2 else "left")
            # Padding predicts nothing: neither is it a label, nor is the token behind it.
            behind = torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1]
            labels = ids.masked_fill(mask * behind == 0, -100)
            with torch.enable_grad():
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        histories.append(torch.tensor(losses))
    expected, actual = histories
    assert expected[-1] < 0.7 * expected[0]
    # Rounding makes the weights part, and AdamW divides small gradients by their own size.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


PACKED_LENGTHS = [7, 1, 12]


def padded_and_packed() -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
    """The mask [3, 12] of a padded batch; the batch; the same sequences in one row."""
    rows = tokens()[0, : sum(PACKED_LENGTHS)].split(PACKED_LENGTHS)
    mask = torch.arange(max(PACKED_LENGTHS)) < torch.tensor(PACKED_LENGTHS)[:, None]
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": mask.long(),
    }
    positions = torch.cat([torch.arange(length) for length in PACKED_LENGTHS])
    return mask, padded, {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}


def by_lengths() -> dict[str, Any]:
    """What says where the packed sequences lie, if not the positions."""
    cu_seqlens, longest = offsets(PACKED_LENGTHS), max(PACKED_LENGTHS)
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@pytest.mark.parametrize("name", NAMES)
def test_padded_packed_and_separate_sequences_agree(name, models):
    _, ours = pair_of(name, models)
    mask, padded, packed = padded_and_packed()
    if name != "bert":
        packed["use_cache"] = False
    rows = packed["input_ids"].split(PACKED_LENGTHS, 1)
    expected = torch.cat([ours(input_ids=row).logits for row in rows], 1)[0]
    tolerance = dict(rtol=1e-5, atol=TOLERANCE)
    torch.testing.assert_close(ours(**padded).logits[mask], expected, **tolerance)
    by_positions = ours(**packed).logits[0]
    torch.testing.assert_close(by_positions, expected, **tolerance)
    assert torch.equal(ours(**packed, **by_lengths()).logits[0], by_positions)


def test_packed_sequences_in_several_rows(models):
    """Positions say where they begin, and eager reads them."""
    eager, ours = models("llama")
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]).expand(BATCH, -1)
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    expected = eager(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("padded", [False, True])
def test_an_image_sees_both_ways(padded):
    """The mask's function says so, no option does."""
    image = VOCABULARY - 1
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={
            "model_type": "gemma3_text",
            **_COMMON,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 6,
        },
        mm_tokens_per_image=4,
        image_token_index=image,
    )
    input_ids = tokens()[:1] % image
    input_ids[:, 8:12] = image
    inputs = {
        "input_ids": input_ids,
        "pixel_values": torch.randn(1, 3, 16, 16),
        "token_type_ids": (input_ids == image).long(),
        "attention_mask": torch.ones_like(input_ids),
    }
    if padded:
        inputs["attention_mask"][:, :3] = 0
    models, logits = [], []
    for implementation in ("eager", NAME):
        model = transformers.Gemma3ForConditionalGeneration._from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        if models:
            model.load_state_dict(models[0].state_dict())
        models.append(model)
        with torch.no_grad():
            logits.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_training_on_padded_and_on_packed_sequences_agrees(name, models):
    _, ours = pair_of(name, models)
    mask, padded, packed = padded_and_packed()
    padded["labels"] = padded["input_ids"].masked_fill(~mask, -100)
    packed["labels"] = packed["input_ids"].clone()
    if name != "bert":
        # Nothing predicts the first token of a sequence.
        packed["labels"][0, offsets(PACKED_LENGTHS)[:-1].long()] = -100
        packed["use_cache"] = False
    results = []
    for inputs in (padded, packed):
        model = copy.deepcopy(ours).train()
        with torch.enable_grad():
            loss = model(**inputs).loss
            loss.backward()
        results.append((loss.detach(), [x.grad for x in model.parameters() if x.grad is not None]))
    (expected_loss, expected), (loss, actual) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    scale = max(x.abs().max() for x in expected)
    assert len(actual) == len(expected)
    assert all((a - b).abs().max() < 1e-5 * scale for a, b in zip(actual, expected))


def test_a_mask_of_the_callers_own(models):
    eager, ours = models("llama")
    keep = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4
    keep |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = eager(input_ids=tokens(), attention_mask=additive).logits
    for mask in (additive, keep):
        actual = ours(input_ids=tokens(), attention_mask=mask).logits
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=TOLERANCE)


def test_a_static_cache(models):
    eager, ours = models("llama")
    arguments: dict[str, Any] = dict(
        attention_mask=padding("left"),
        max_new_tokens=10,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    expected = eager.generate(tokens(), **arguments)
    assert torch.equal(ours.generate(tokens(), **arguments), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_static_cache_without_a_mask(name, models):
    """The room in the cache is not seen; a window's cache is full after some tokens."""
    results = []
    for model in models(name):
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 8)
        parts = tokens().split([4, LENGTH - 6, 1, 1], 1)
        results.append([model(input_ids=x, past_key_values=cache).logits for x in parts])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=TOLERANCE)


def test_keys_of_another_sequence_than_the_queries_get_no_mask(models):
    masks = pytest.importorskip("transformers.masking_utils")
    _, ours = models("bert")
    queries, keys = torch.zeros(BATCH, 4, 64), torch.zeros(BATCH, 9, 64)
    names = inspect.signature(masks.create_bidirectional_mask).parameters
    embeds = next(name for name in names if "embeds" in name)
    arguments = {embeds: queries, "encoder_hidden_states": keys, "attention_mask": None}
    assert masks.create_bidirectional_mask(ours.config, **arguments) is None


def test_the_implementation_of_a_built_model_can_be_changed(models):
    eager, ours = models("llama")
    model = copy.deepcopy(eager)
    model.set_attn_implementation(NAME)
    assert torch.equal(model(input_ids=tokens()).logits, ours(input_ids=tokens()).logits)


@pytest.mark.parametrize("name", ["T5", "GPTJ"])
def test_models_that_would_drop_a_mask_are_refused(name):
    """T5 passes a position bias, GPT-J reads the name alone: both ran, and were wrong or failed."""
    config = getattr(transformers, f"{name}Config")(num_layers=1, n_layer=1, vocab_size=VOCABULARY)
    model = getattr(transformers, f"{name}Model")
    with pytest.raises(ValueError, match=f"attn_implementation: {name}Model"):
        model._from_config(config, attn_implementation=NAME)


def test_a_class_without_source_is_asked_by_its_parent():
    ours = type("Ours", (transformers.LlamaForCausalLM,), {"__module__": "a_notebook"})
    config = transformers.LlamaConfig(**_COMMON)
    assert ours._from_config(config, attn_implementation=NAME).config._attn_implementation == NAME


def function_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 7, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 9, 16, generator=generator)
    return SimpleNamespace(is_causal=False), q.to(dtype), k.to(dtype), v.to(dtype)


def test_padding_of_other_sequences_than_the_queries():
    module, q, k, v = function_inputs(torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    out, weights = flash_attention_plus_forward(module, q, k, v, mask)
    assert out.shape == (2, 7, 4, 16) and weights is None
    short, _ = flash_attention_plus_forward(module, q[1:], k[1:, :, :4], v[1:, :, :4], None)
    torch.testing.assert_close(out[1:], short)


def test_dtypes_that_differ_take_that_of_the_values():
    module, q, k, v = function_inputs(torch.bfloat16)
    out, _ = flash_attention_plus_forward(module, q.float(), k.float(), v, None)
    assert torch.equal(out, flash_attention_plus_forward(module, q, k, v, None)[0])


def test_a_paged_cache_is_refused():
    with pytest.raises(NotImplementedError, match="cache"):
        flash_attention_plus_forward(*function_inputs(torch.float32), None, cache=object())
