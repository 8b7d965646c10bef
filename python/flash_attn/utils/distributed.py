"""Collective operations for tensor and sequence parallelism, raw and differentiable.

all_gather concatenates the first dimension of the processes' tensors, reduce_scatter sums the
tensors and leaves each process its part of the first dimension; each is the other's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]

Work = Any  # None, or with async_op a handle with wait()


def all_gather_raw(
    input_: torch.Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[torch.Tensor, Work]:
    """(the tensors [n, ...] of all processes as [world_size * n, ...], a handle if async_op).

    Not differentiable.
    """
    size = dist.get_world_size(process_group) * input_.shape[0]
    output = input_.new_empty((size, *input_.shape[1:]))
    # The name since PyTorch 2.13, and the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    handle = gather(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(
    input_: torch.Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[torch.Tensor, Work]:
    """(this process' part [n, ...] of the sum of the tensors [world_size * n, ...], a handle).

    Not differentiable. ValueError where the first dimension cannot be split evenly.
    """
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size:
        raise ValueError(
            f"input_: its first dimension must be a multiple of the {world_size} processes, has"
            f" shape {list(input_.shape)}"
        )
    output = input_.new_empty((input_.shape[0] // world_size, *input_.shape[1:]))
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    handle = reduce(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(
    input_: torch.Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[torch.Tensor, Work]:
    """(the sum of the tensors of all processes, a handle if async_op). Not differentiable.

    A contiguous input_ is overwritten with the sum, as in the original.
    """
    output = input_.contiguous()
    handle = dist.all_reduce(output, group=process_group, async_op=async_op)
    return output, handle


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_raw(doutput, ctx.process_group)[0], None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_raw(doutput, ctx.process_group)[0], None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor, None]:
        return doutput, None


class _Share(torch.autograd.Function):
    """The identity of a tensor that all processes go on with; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
        ctx.process_group = process_group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_raw(doutput.clone(), ctx.process_group)[0], None


def all_gather(input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
    """The tensors [n, ...] of all processes as [world_size * n, ...], in the order of their ranks.

    Differentiable: the gradient is reduce_scatter of the gradient.
    """
    return _AllGather.apply(input_, process_group)


def reduce_scatter(input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
    """This process' part [n, ...] of the sum of the processes' tensors [world_size * n, ...].

    Differentiable: the gradient is all_gather of the gradient.
    """
    return _ReduceScatter.apply(input_, process_group)


def all_reduce(input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
    """The sum of the processes' tensors. Differentiable: the gradient is the gradient.

    That is the right one where all processes compute the same loss from the sum.
    """
    return _AllReduce.apply(input_, process_group)


def share(input_: torch.Tensor, process_group: ProcessGroup) -> torch.Tensor:
    """The tensor itself, before each process uses its part of a weight on all of it.

    Differentiable: the gradient is the sum of the processes' gradients.
    """
    return _Share.apply(input_, process_group)


def sync_shared_params(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """Gives the parameters that have _shared_params = True the values of the group's first process.

    Every process must have those parameters, under the same names.
    """
    source = dist.get_global_rank(process_group, 0)
    for parameter in _marked(model, "_shared_params"):
        with torch.no_grad():
            dist.broadcast(parameter, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """Sums the gradients of the parameters that have _sequence_parallel = True, over the group."""
    gradients = [parameter.grad for parameter in _marked(model, "_sequence_parallel")]
    if not gradients:
        return
    with torch.no_grad():
        # One message for all.
        total = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(total, group=process_group)
        sums = total.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, sums):
            gradient.copy_(part.view_as(gradient))


def _marked(model: torch.nn.Module, mark: str) -> Iterator[torch.nn.Parameter]:
    """Parameters by name: processes may have different ones beside, and must agree on an order."""
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if getattr(parameter, mark, False):
            yield parameter


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """How much of `dim` falls to a process, in units of `multiple_of`; the first ones get more."""
    units = dim // multiple_of
    return (units // world_size + int(local_rank < units % world_size)) * multiple_of
