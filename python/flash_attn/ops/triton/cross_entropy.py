"""Cross entropy with label smoothing and z-loss, over a vocabulary that processes may share.

With s = logit_scale * logits, lse = log sum_j exp(s_j), V classes and label y:

    z_loss = lse_square_scale * lse^2
    loss = lse - (1 - label_smoothing) * s_y - label_smoothing * mean(s) + z_loss

Computed in fp32 (fp64 for fp64 logits), some rows at a time: beside the logits and their gradient
no tensor of their size exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..._first_order import Tensors, first_order_only
from ...utils.distributed import all_gather_raw

__all__ = ["cross_entropy_loss"]

# Elements of the logits that are worked on at once: 64 MB in fp32, enough to fill any device.
_CHUNK = 2**24


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row, differentiable in the logits.

    Arguments:
        logits: [batch, classes], any floating dtype; with process_group, this process' classes.
        labels: [batch], int64 or int32, in [0, V), or ignore_index.
        precomputed_lse: [batch], the lse of the logits. Used where logit_scale is 1; it is no lse
            of scaled logits.
        label_smoothing: how much of the target is spread evenly over all classes.
        logit_scale: multiplies the logits.
        lse_square_scale: the factor of the z-loss.
        ignore_index: rows with this label have loss and gradient zero.
        inplace_backward: whether the backward pass writes the gradient over the logits.
        process_group: None, or a process group whose processes hold equal parts of the classes, in
            the order of their ranks.

    Returns:
        (losses [batch], z_losses [batch]), fp32 (fp64 for fp64 logits). The losses contain the
        z_losses, which are for logging and carry no gradient.

    Raises:
        ValueError: a shape or a dtype does not fit, or, on the CPU, a label is out of range.
            Elsewhere such a row loses the term of its label: looking would stall the device.
    """
    for name, tensor in (("logits", logits), ("precomputed_lse", precomputed_lse)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: must be of a floating dtype, is {tensor.dtype}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels: must be int32 or int64, is {labels.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"logits: must have shape [batch, classes], has {list(logits.shape)}")
    for name, tensor in (("labels", labels), ("precomputed_lse", precomputed_lse)):
        if tensor is not None and tensor.shape != logits.shape[:1]:
            raise ValueError(
                f"{name}: must have shape {list(logits.shape[:1])}, has {list(tensor.shape)}"
            )
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    classes = logits.shape[1]
    options = _Options(
        smoothing=label_smoothing,
        scale=logit_scale,
        square_scale=lse_square_scale,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        total_classes=world_size * classes,
        first_class=0 if process_group is None else dist.get_rank(process_group) * classes,
        process_group=process_group if world_size > 1 else None,
    )
    # A compiled graph would break at the question.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_labels(labels, options)
    lse = precomputed_lse if logit_scale == 1.0 else None
    return _CrossEntropy.apply(logits, labels, lse, options)


@dataclass(frozen=True)
class _Options:
    smoothing: float
    scale: float
    square_scale: float
    ignore_index: int
    inplace_backward: bool
    total_classes: int
    first_class: int
    process_group: Any


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        precomputed_lse: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # lse: [batch]; target: [batch], what the loss subtracts from it.
        lse, target = _lse_and_target(logits, labels, precomputed_lse, options)
        if options.process_group is not None:
            lse, target = _over_processes(lse, target, options.process_group)
        known = _known(labels, 0, options.total_classes)
        # A label out of range: smoothing * (lse - mean), and nothing without smoothing.
        losses = torch.where(known, lse, options.smoothing * lse) - target
        z_losses = options.square_scale * lse.square()
        ignored = labels == options.ignore_index
        losses = (losses + z_losses).masked_fill_(ignored, 0.0)
        z_losses.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = options
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @first_order_only
    def backward(ctx: Any, saved: Tensors, dlosses: torch.Tensor, _: torch.Tensor) -> Tensors:
        logits, labels, lse = saved
        options = ctx.options
        # Rows of an expanded tensor share memory, which cannot hold their gradients.
        inplace = options.inplace_backward and 0 not in logits.stride()
        dlogits = logits if inplace else torch.empty_like(logits)
        known = _known(labels, 0, options.total_classes).to(lse.dtype)
        weight = known + (1.0 - known) * options.smoothing + 2.0 * options.square_scale * lse
        dlosses = dlosses.to(lse.dtype).masked_fill(labels == options.ignore_index, 0.0)
        dlosses = dlosses * options.scale
        here, index = _local_labels(labels, logits.shape[1], options)
        hit = here.to(lse.dtype) * (options.smoothing - 1.0)
        for rows in _chunks(logits):
            # d lse / d s = exp(s - lse)
            gradient = (_scaled(logits[rows], options) - lse[rows, None]).exp_()
            gradient.mul_(weight[rows, None])
            gradient.scatter_add_(1, index[rows, None], hit[rows, None])
            if options.smoothing != 0.0:
                gradient.sub_(options.smoothing / options.total_classes)
            dlogits[rows] = gradient.mul_(dlosses[rows, None])
        return dlogits, None, None, None


def _lse_and_target(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lse of this process' classes, and its share of
    (1 - smoothing) * s_y + smoothing * mean(s)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    here, index = _local_labels(labels, logits.shape[1], options)
    target = logits.gather(1, index[:, None])[:, 0].to(dtype) * options.scale
    target = torch.where(here, target * (1.0 - options.smoothing), 0.0)
    if precomputed_lse is not None and options.smoothing == 0.0:
        return precomputed_lse.to(dtype), target
    lse = torch.empty_like(target)
    for rows in _chunks(logits):
        scaled = _scaled(logits[rows], options)
        if options.smoothing != 0.0:
            target[rows] += scaled.sum(1) * (options.smoothing / options.total_classes)
        if precomputed_lse is None:
            lse[rows] = torch.logsumexp(scaled, 1)
    return lse if precomputed_lse is None else precomputed_lse.to(dtype), target


def _over_processes(
    lse: torch.Tensor, target: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lse over the classes of all processes, and the sum of their targets."""
    reduction = dist.all_reduce(target, group=group, async_op=True)
    parts, _ = all_gather_raw(lse[None], group)
    reduction.wait()
    return torch.logsumexp(parts, 0), target


def _local_labels(
    labels: torch.Tensor, classes: int, options: _Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each label is among this process' classes, and its index there, else 0."""
    here = _known(labels, options.first_class, classes) & (labels != options.ignore_index)
    return here, torch.where(here, labels - options.first_class, 0).long()


def _known(labels: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return (labels >= first) & (labels < first + count)


def _scaled(logits: torch.Tensor, options: _Options) -> torch.Tensor:
    """scale * logits in the dtype of the computation; logits itself where that is the same."""
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return logits if options.scale == 1.0 else logits * options.scale


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows, of at most _CHUNK elements or one row."""
    rows, classes = logits.shape
    step = max(1, _CHUNK // max(classes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check_labels(labels: torch.Tensor, options: _Options) -> None:
    wrong = ~_known(labels, 0, options.total_classes) & (labels != options.ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"labels: must be in [0, {options.total_classes}) or ignore_index"
            f" {options.ignore_index}, one is {int(labels[wrong][0])}"
        )
