"""Embeddings of tokens, positions and token types, whole or spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..utils.distributed import all_reduce, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BertEmbeddings",
    "ColumnParallelEmbedding",
    "GPT2Embeddings",
    "ParallelGPT2Embeddings",
    "VocabParallelEmbedding",
]


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], dtype=torch.long, device=input_ids.device)


class GPT2Embeddings(nn.Module):
    """Embeddings of tokens plus, with max_position_embeddings > 0, those of positions.

    With word_embed_proj_dim the tokens are embedded there, and projected to embed_dim.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(
            vocab_size, word_dim, padding_idx=padding_idx, **factory
        )
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, seqlen, embed_dim] of ids [batch, seqlen]; positions count from 0 by default."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            position_ids = _positions(input_ids) if position_ids is None else position_ids
            embeddings = embeddings + self.position_embeddings(position_ids)
        return embeddings


class BertEmbeddings(nn.Module):
    """Embeddings of tokens plus those of positions and of token types, where there are any."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **factory
        )
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **factory)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[batch, seqlen, embed_dim] of ids [batch, seqlen]; by default positions count from 0, and
        all tokens are of type 0."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            position_ids = _positions(input_ids) if position_ids is None else position_ids
            embeddings = embeddings + self.position_embeddings(position_ids)
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(_positions(input_ids))
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return embeddings


def _split(name: str, size: int, process_group: ProcessGroup | None) -> int:
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    if size % world_size:
        raise ValueError(f"{name}: must be a multiple of {world_size} processes, is {size}")
    return size // world_size


class VocabParallelEmbedding(nn.Embedding):
    """nn.Embedding whose rows are spread over the processes of a group.

    The result is zero for tokens of other processes; the sum over the group is the embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        local = _split("num_embeddings", num_embeddings, process_group)
        if local != num_embeddings and padding_idx is not None:
            raise NotImplementedError("padding_idx: is not supported with several processes")
        super().__init__(local, *args, padding_idx=padding_idx, **kwargs)
        self.process_group = process_group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.process_group is None:
            return super().forward(input)
        local = input - dist.get_rank(self.process_group) * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        embeddings = super().forward(local.masked_fill(elsewhere, 0))
        return embeddings.masked_fill(elsewhere[..., None], 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """nn.Embedding whose columns are spread over the processes of a group."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        local = _split("embedding_dim", embedding_dim, process_group)
        super().__init__(num_embeddings, local, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """GPT2Embeddings spread over the processes of a group: tokens by rows, positions by columns.

    With sequence_parallel the result is each process' part of the first dimension, else the whole.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: ProcessGroup,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"process_group": process_group, "device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **options
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, **options
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> torch.Tensor:
        """[batch, seqlen, embed_dim], or with combine_batch_seqlen_dim [batch * seqlen, embed_dim],
        of ids [batch, seqlen]."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            position_ids = _positions(input_ids) if position_ids is None else position_ids
            positions = self.position_embeddings(position_ids)
            # Each process adds its columns; the sum over the group has them all.
            before = dist.get_rank(self.process_group) * positions.shape[-1]
            after = embeddings.shape[-1] - before - positions.shape[-1]
            embeddings = embeddings + nn.functional.pad(positions, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if dist.get_world_size(self.process_group) == 1:
            return embeddings
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(embeddings, self.process_group)
