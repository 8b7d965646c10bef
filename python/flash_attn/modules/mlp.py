"""MLPs of transformers: plain, gated, and spread over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.activations import swiglu
from ..ops.fused_dense import (
    ColumnParallelLinear,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
]

Activation = Callable[[torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))); hidden_features is 4 * in_features by default.

    With return_residual the result is (that, x).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        factory = {"device": device, "dtype": dtype}
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """Mlp whose hidden features are spread over the processes of a group."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        process_group: ProcessGroup | None = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        options = {"device": device, "dtype": dtype, "sequence_parallel": sequence_parallel}
        self.fc1 = ColumnParallelLinear(
            in_features, hidden_features, process_group, bias=bias1, **options
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **options
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _gated(y: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[..., 2 N] -> [..., N]: the first half, times the activation of the second."""
    value, gate = y.chunk(2, dim=-1)
    if activation is F.silu:
        return swiglu(gate, value)
    return value * activation(gate)


def _gated_features(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    features = int(8 * in_features / 3) if hidden_features is None else hidden_features
    return (features + multiple_of - 1) // multiple_of * multiple_of


class GatedMlp(nn.Module):
    """fc2(a * activation(b)), (a, b) the halves of fc1(x) (Shazeer, "GLU Variants", 2020).

    hidden_features is 8 / 3 in_features by default, and rounded up to a multiple of multiple_of.
    With return_residual the result is (that, x).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        factory = {"device": device, "dtype": dtype}
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = self.fc2(_gated(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """GatedMlp whose hidden features are spread over the processes of a group."""

    def __init__(
        self,
        in_features: int,
        process_group: ProcessGroup,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        options = {"device": device, "dtype": dtype, "sequence_parallel": sequence_parallel}
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden_features, process_group, bias=bias1, multiple_of=2, **options
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **options
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(_gated(self.fc1(x), self.activation))
