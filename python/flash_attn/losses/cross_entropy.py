"""Cross entropy as a module; the formula and its options are ops.triton.cross_entropy's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.triton.cross_entropy import cross_entropy_loss

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.Module):
    """The loss of a batch of logits.

    Arguments:
        ignore_index: rows with this label have no loss, and do not count in the mean.
        reduction: "mean", "sum" or "none".
        label_smoothing, logit_scale, lse_square_scale, inplace_backward, process_group: as in
            cross_entropy_loss.
        return_z_loss: whether to return the part of the loss that lse_square_scale adds too, for
            logging; it carries no gradient.

    Raises:
        NotImplementedError: another reduction.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise NotImplementedError(
                f"reduction: must be 'mean', 'sum' or 'none', is {reduction!r}"
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        precomputed_lse: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The loss of logits [batch, classes] and labels [batch].

        Returns:
            A scalar, or [batch] without a reduction, fp32; with return_z_loss (loss, z_loss). The
            mean over no row is NaN.
        """
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduce(losses, target)
        return (loss, self._reduce(z_losses, target)) if self.return_z_loss else loss

    def _reduce(self, losses: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()
