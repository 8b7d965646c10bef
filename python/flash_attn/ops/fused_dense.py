"""Linear layers and MLPs, with recomputation and tensor parallelism, under the original's names.

The original fuses bias and activation into cuBLAS' matrix products. Here the products are
PyTorch's, on every device; what recomputation saves in memory is saved here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .._first_order import Tensors, first_order_only
from ..utils.distributed import (
    all_gather,
    all_reduce,
    get_dim_for_local_rank,
    reduce_scatter,
    share,
)
from .activations import gelu_bwd, gelu_fwd, relu_bwd, sqrelu_bwd, sqrelu_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedMLP",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "fused_dense_func",
    "fused_mlp_func",
]

_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "gelu_approx": (gelu_fwd, gelu_bwd),
    "relu": (F.relu, relu_bwd),
    "sqrelu": (sqrelu_fwd, sqrelu_bwd),
}


def fused_dense_func(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    return_residual: bool = False,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A linear layer: F.linear(x, weight, bias).

    Arguments:
        x: [..., in_features].
        weight: [out_features, in_features]. bias: [out_features] or None.
        return_residual: whether to return x too.
        process_group: None, or the processes that hold the rows of a larger weight.
        sequence_parallel: with process_group, whether x is this process' part of the first
            dimension, and is gathered; else x is the same everywhere.

    Returns:
        [..., out_features]; with return_residual (that, x).
    """
    out = F.linear(_for_all(x, process_group, sequence_parallel), weight, bias)
    return (out, x) if return_residual else out


def _for_all(
    x: torch.Tensor, process_group: ProcessGroup | None, sequence_parallel: bool
) -> torch.Tensor:
    if process_group is None:
        return x
    return (all_gather if sequence_parallel else share)(x, process_group)


class FusedDense(nn.Linear):
    """nn.Linear that can return its input too, and gather it from a process group."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(
        self, x: torch.Tensor, process_group: ProcessGroup | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """fused_dense_func with sequence parallelism."""
        return fused_dense_func(
            x, self.weight, self.bias, self.return_residual, process_group=process_group
        )


def _local_features(name: str, features: int, process_group: ProcessGroup, multiple_of: int) -> int:
    if features % multiple_of:
        raise ValueError(f"{name}: must be a multiple of {multiple_of}, is {features}")
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return get_dim_for_local_rank(features, world_size, rank, multiple_of)


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose outputs are spread over processes, in units of multiple_of.

    The input [n, ...] is this process' part of the first dimension, and is gathered; or, without
    sequence_parallel, the same in all processes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused_dense_func(
            x,
            self.weight,
            self.bias,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )


class RowParallelLinear(nn.Linear):
    """A linear layer whose inputs are spread over processes, in units of multiple_of.

    The processes' results are summed; each gets its part of the first dimension, or, without
    sequence_parallel, everything. The first process alone has the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("in_features", in_features, process_group, multiple_of)
        bias = bias and dist.get_rank(process_group) == 0
        super().__init__(local, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = fused_dense_func(x, self.weight, self.bias)
        return (reduce_scatter if self.sequence_parallel else all_reduce)(out, self.process_group)


def fused_mlp_func(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int | str = 0,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """An MLP: F.linear(act(F.linear(x, weight1, bias1)), weight2, bias2).

    Arguments:
        x: [..., in_features].
        weight1: [hidden_features, in_features]. weight2: [out_features, hidden_features].
        bias1: [hidden_features] or None. bias2: [out_features] or None.
        activation: "gelu_approx", "relu" or "sqrelu".
        save_pre_act: False is checkpoint_lvl 2.
        return_residual: whether to return x too.
        checkpoint_lvl: what the backward pass computes again rather than keeps: 0 nothing, 1 the
            activation's output, 2 its input as well.
        heuristic: -1 to 4, or "auto": the original's choice among algorithms for one result; there
            is one algorithm here.
        process_group, sequence_parallel: as in fused_dense_func, for the first layer. The sum of
            the processes' results is the caller's to make.

    Returns:
        [..., out_features]; with return_residual (that, x).

    Raises:
        ValueError: an unknown activation, level or heuristic.
    """
    _check_mlp(activation, checkpoint_lvl, heuristic)
    tensors = [_for_all(x, process_group, sequence_parallel), weight1, bias1, weight2, bias2]
    if torch.is_autocast_enabled(x.device.type):
        # Cast outside of the function, so that autograd casts the gradients back.
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    level = checkpoint_lvl if save_pre_act else 2
    out = _Mlp.apply(*tensors, activation, level)
    return (out, x) if return_residual else out


def _check_mlp(activation: str, checkpoint_lvl: int, heuristic: int | str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: must be one of {[*_ACTIVATIONS]}, is {activation!r}")
    if checkpoint_lvl not in (0, 1, 2):
        raise ValueError(f"checkpoint_lvl: must be 0, 1 or 2, is {checkpoint_lvl}")
    if heuristic not in ("auto", *range(-1, 5)):
        raise ValueError(f"heuristic: must be -1 to 4 or 'auto', is {heuristic!r}")


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor | None,
        weight2: torch.Tensor,
        bias2: torch.Tensor | None,
        activation: str,
        level: int,
    ) -> torch.Tensor:
        pre = F.linear(x, weight1, bias1)
        post = _ACTIVATIONS[activation][0](pre)
        kept = ((pre, post), (pre, None), (None, None))[level]
        ctx.save_for_backward(x, weight1, bias1, weight2, *kept)
        ctx.activation = activation
        return F.linear(post, weight2, bias2)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: Tensors, dout: torch.Tensor) -> Tensors:
        x, weight1, bias1, weight2, pre, post = saved
        act, act_backward = _ACTIVATIONS[ctx.activation]
        pre = F.linear(x, weight1, bias1) if pre is None else pre
        post = act(pre) if post is None else post
        needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = ctx.needs_input_grad[:5]
        dweight2 = _rows(dout).t() @ _rows(post) if needs_weight2 else None
        dpre = act_backward(dout @ weight2, pre)
        return (
            dpre @ weight1 if needs_x else None,
            _rows(dpre).t() @ _rows(x) if needs_weight1 else None,
            _rows(dpre).sum(0) if needs_bias1 else None,
            dweight2,
            _rows(dout).sum(0) if needs_bias2 else None,
            None,
            None,
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class FusedMLP(nn.Module):
    """fused_mlp_func with its weights; hidden_features is 4 * in_features by default.

    In evaluation nothing is kept for a backward pass but the inputs.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_mlp(activation, checkpoint_lvl, heuristic)
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        linear = partial(nn.Linear, device=device, dtype=dtype)
        hidden_features = hidden_features or 4 * in_features
        self.fc1 = linear(in_features, hidden_features, bias=bias1)
        self.fc2 = linear(hidden_features, out_features or in_features, bias=bias2)

    def forward(
        self, x: torch.Tensor, process_group: ProcessGroup | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[..., out_features]; with return_residual (that, x). With process_group, x is gathered,
        and each process gets its part of the sum of the results."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=process_group,
        )
        if process_group is not None:
            out = reduce_scatter(out, process_group)
        return (out, x) if self.return_residual else out


class ParallelFusedMLP(nn.Module):
    """FusedMLP whose hidden features are spread over the processes of a group."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: ProcessGroup | None = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_mlp(activation, checkpoint_lvl, heuristic)
        if process_group is None:
            raise ValueError("process_group: must be given, is None")
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        options = {"device": device, "dtype": dtype, "sequence_parallel": sequence_parallel}
        hidden_features = hidden_features or 4 * in_features
        self.fc1 = ColumnParallelLinear(
            in_features, hidden_features, process_group, bias=bias1, **options
        )
        self.fc2 = RowParallelLinear(
            hidden_features, out_features or in_features, process_group, bias=bias2, **options
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This process' part of [..., out_features], or without sequence_parallel all of it."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return (reduce_scatter if self.sequence_parallel else all_reduce)(out, self.process_group)
