"""Functions whose backward passes cannot be differentiated again say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor | None, ...]

_NO_SECOND_ORDER = (
    "second-order gradients of fused norms, activations, MLPs and losses are not implemented: their"
    " backward passes cannot be differentiated again; use torch.nn.functional's functions where"
    " they are needed"
)


class NotDifferentiable(torch.autograd.Function):
    """Ties gradients to what they depend on, so that differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, message: str, gradients: Tensors, *_: torch.Tensor | None) -> Tensors:
        ctx.message = message
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise NotImplementedError(ctx.message)


def first_order_only(backward: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """Makes backward(ctx, saved_tensors, *douts) the backward pass of an autograd.Function, whose
    gradients raise when they are differentiated again.

    That takes a path to every input that they depend on: one that is not saved itself must have a
    saved output. A saved intermediate result has no graph.
    """

    @functools.wraps(backward)
    def first_order(ctx: Any, *douts: torch.Tensor | None) -> Tensors:
        saved = ctx.saved_tensors  # once: checkpointing allows no more
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *douts)
        with torch.no_grad():
            gradients = backward(ctx, saved, *douts)
        return NotDifferentiable.apply(_NO_SECOND_ORDER, gradients, *douts, *saved)

    return first_order
