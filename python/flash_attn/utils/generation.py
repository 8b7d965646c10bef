"""Generation, token by token, with models that keep a cache of keys and values.

A model is called as model(input_ids, position_ids=..., inference_params=..., num_last_tokens=1) and
returns something with logits [batch, 1, vocabulary].
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "GenerationMixin",
    "InferenceParams",
    "allocate_inference_cache",
    "decode",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
]


@dataclass
class InferenceParams:
    """The state of a generation, which layers read and write.

    key_value_memory_dict maps a layer's index to its cache [max_batch_size, max_seqlen, 2, heads,
    head_dim], of which seqlen_offset tokens are filled; with lengths_per_sample [batch] int32, that
    many of each sequence. The batch starts at row batch_size_offset.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts a new generation, in the same memory."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class DecoderOutput:
    """sequences: [batch, seqlen], the prompt included. scores: for each new token the logits
    [batch, vocabulary] that it was sampled from."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None


def modify_logits_for_top_k_filtering(logits: torch.Tensor, top_k: int) -> None:
    """Sets all logits but the top_k largest of each row to -inf, in place."""
    smallest = torch.topk(logits, top_k).values[..., -1:]
    logits.masked_fill_(logits < smallest, float("-inf"))


def modify_logits_for_top_p_filtering(logits: torch.Tensor, top_p: float) -> None:
    """Sets to -inf, in place, the logits of the least likely tokens of each row whose probabilities
    add up to at most 1 - top_p (Holtzman et al., "Neural Text Degeneration", 2020)."""
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ordered, indices = torch.sort(logits)
    rare = ordered.softmax(-1).cumsum(-1) <= 1.0 - top_p
    logits.masked_fill_(torch.zeros_like(rare).scatter_(-1, indices, rare), float("-inf"))


def sample(
    logits: torch.Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """One token for each row of logits [batch, vocabulary]: [batch], int64.

    top_k: 1 takes the most likely token, n samples among the n most likely, 0 among all. top_p: if
    above 0, then among those that have this share of the probability. ValueError if above 1.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if top_p > 1.0:
        raise ValueError(f"top_p: must be in [0, 1], is {top_p}")
    indices = None
    if top_k > 0:
        logits, indices = torch.topk(logits, min(top_k, logits.shape[-1]))
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    choice = torch.multinomial(logits.softmax(-1), num_samples=1)
    return (choice if indices is None else indices.gather(-1, choice)).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: torch.Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: torch.Tensor | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
) -> DecoderOutput:
    """Continues prompts of one length until max_length, or until all end with eos_token_id.

    Arguments:
        input_ids: [batch, seqlen].
        model: see the module.
        max_length: of the sequences, prompts included.
        top_k, top_p, temperature: as in sample.
        teacher_outputs: [batch, n]: the tokens to take in place of sampled ones, prompts included.
        vocab_size: how many logits belong to tokens; None is all.
        tensor_parallel: how many processes decode together; they wait for each other when timed.
        enable_timing: whether to print how long it took.

    Returns:
        sequences and scores.

    Raises:
        NotImplementedError: cg, a CUDA graph, is asked for.
    """
    if cg:
        raise NotImplementedError("cg: decoding in a CUDA graph is not in this version")
    batch, prompt = input_ids.shape
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    start = _now(input_ids.device, tensor_parallel) if enable_timing else 0.0
    sequences, scores = [input_ids], []
    while True:
        tokens = sequences[-1]
        positions = None
        if params.seqlen_offset > 0:
            positions = torch.full_like(tokens, params.seqlen_offset, dtype=torch.long)
        output = model(tokens, position_ids=positions, inference_params=params, num_last_tokens=1)
        logits = output.logits.squeeze(1)
        scores.append(logits if vocab_size is None else logits[..., :vocab_size])
        params.seqlen_offset += tokens.shape[1]
        if teacher_outputs is not None and teacher_outputs.shape[1] > params.seqlen_offset:
            token = teacher_outputs[:, params.seqlen_offset]
        else:
            token = sample(scores[-1], top_k, top_p, temperature)
        sequences.append(token[:, None])
        if eos_token_id is not None and bool((token == eos_token_id).all()):
            break
        if params.seqlen_offset >= max_length - 1:
            break
    if enable_timing:
        elapsed = _now(input_ids.device, tensor_parallel) - start
        print(f"{prompt} tokens of prompt, {len(scores)} of result: {elapsed * 1e3:.0f} ms")
    return DecoderOutput(torch.cat(sequences, dim=1), tuple(scores))


def _now(device: torch.device, tensor_parallel: int) -> float:
    if tensor_parallel > 1:
        dist.barrier()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


class GenerationMixin:
    """Gives a model generate()."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[Any, Any]:
        """The caches of all layers; models that have one define it."""
        raise NotImplementedError(f"{type(self).__name__} defines no allocate_inference_cache()")

    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | DecoderOutput:
        """decode() with this model: the sequences [batch, seqlen], or with return_dict_in_generate
        an object with these, and with output_scores the scores."""
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            **kwargs,
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Sequence[int],
    device: Any,
    dtype: torch.dtype = torch.float16,
) -> dict[int, torch.Tensor]:
    """An uninitialized cache [max_batch_size, max_seqlen, 2, nheads, headdim] for each layer: for
    the first `layers`, or for those listed."""
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    indices = range(layers) if isinstance(layers, int) else layers
    return {index: torch.empty(shape, device=device, dtype=dtype) for index in indices}
