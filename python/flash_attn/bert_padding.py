"""Taking the padding out of a batch, and putting it back.

A padded batch [batch, seqlen, ...] becomes its tokens laid end to end [total, ...], with the
offsets cu_seqlens that the varlen functions take, and back. All functions are differentiable, work
for every dtype and on every device, and index rows with integers; a boolean mask would be expanded
to the size of the data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ._rearrange import rearrange

__all__ = [
    "IndexFirstAxis",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows `indices` of a tensor.

    Arguments:
        input: [rows, ...], any dtype.
        indices: [n], int64 or int32; the gradient of a row that occurs twice is summed.

    Returns:
        [n, ...], input's dtype.
    """
    return input.index_select(0, indices)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """Zeros with `values` at the rows `indices`: the inverse of index_first_axis.

    Arguments:
        values: [n, ...], any dtype.
        indices: [n], int64 or int32, without repetitions.
        first_axis_dim: the number of rows of the result.

    Returns:
        [first_axis_dim, ...], values' dtype.
    """
    output = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return output.index_copy_(0, indices.long(), values)


class IndexFirstAxis:
    """index_first_axis under the name of the original's autograd.Function."""

    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    """index_put_first_axis under the name of the original's autograd.Function."""

    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual(torch.autograd.Function):
    """Rows of a tensor and the tensor itself, with one gradient for both."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor, grad_residual: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def index_first_axis_residual(
    input: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows `indices` of a tensor, and the tensor itself for a residual connection.

    The gradients of the two are added in one step, without a padded tensor for the first.

    Arguments:
        input: [rows, ...].
        indices: [n], int64 or int32.

    Returns:
        (rows [n, ...], an alias of input).
    """
    return IndexFirstAxisResidual.apply(input, indices)


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Takes the padding out of a batch.

    Arguments:
        hidden_states: [batch, seqlen, ...], any dtype.
        attention_mask: [batch, seqlen], bool or a number: nonzero at tokens.
        unused_mask: [batch, seqlen], as attention_mask: nonzero at places that are kept in the
            result without being tokens.

    Returns:
        (tokens [total, ...], indices [total] int64 of the tokens among batch * seqlen places,
        cu_seqlens [batch + 1] int32, the longest sequence's length as an int, seqused [batch]
        int32: the number of tokens of each sequence, unused places not counted). Waits for the
        device, to learn how many tokens there are.

    Raises:
        ValueError: a mask does not have the shape [batch, seqlen].
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name}: must have shape {list(hidden_states.shape[:2])}, has {list(mask.shape)}"
            )
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    seqused = used.sum(dim=-1, dtype=torch.int32)
    lengths = seqused if unused_mask is None else kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), _longest(lengths), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Takes the padding out of a batch whose rows each hold several sequences, end to end.

    Arguments:
        hidden_states: [batch, seqlen, ...], any dtype.
        attention_mask_in_length: [batch, seqlen], integers: each row lists the lengths of the
            sequences in it, and is zero elsewhere. [[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]] is a
            row of two sequences and one place of padding, and a row of one sequence.

    Returns:
        (tokens [total, ...], indices [total] int64 of the tokens among batch * seqlen places,
        cu_seqlens [sequences + 1] int32, the longest sequence's length as an int).

    Raises:
        ValueError: attention_mask_in_length does not have the shape [batch, seqlen].
    """
    if attention_mask_in_length.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask_in_length: must have shape {list(hidden_states.shape[:2])},"
            f" has {list(attention_mask_in_length.shape)}"
        )
    row_lengths = attention_mask_in_length.sum(dim=-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[1], device=row_lengths.device)
    indices = (places < row_lengths).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0].to(torch.int32)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), _longest(lengths)


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """Puts tokens back into a batch with padding, which is zero.

    Arguments:
        hidden_states: [total, ...], any dtype.
        indices: [total], of the tokens among the batch * seqlen places; from unpad_input.
        batch, seqlen: the sizes of the result.

    Returns:
        [batch, seqlen, ...], hidden_states' dtype.
    """
    output = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return output.view(batch, seqlen, *hidden_states.shape[1:])


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    """[n] lengths -> [n + 1] int32: 0 and the running sums."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: torch.Tensor) -> int:
    return int(lengths.max()) if lengths.numel() > 0 else 0
