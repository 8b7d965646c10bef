"""Transformer blocks: a mixer, such as attention, and an MLP, with norms, dropout and residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ops import rms_norm
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from .mha import MHA
from .mlp import Mlp

__all__ = ["Block", "ParallelBlock"]

Maker = Callable[[int], nn.Module]

_RMS_NORMS = (RMSNorm, rms_norm.RMSNorm, nn.RMSNorm)
# Whether nn.RMSNorm's default epsilon is, for 16-bit inputs, that of fp32: PyTorch's pull request
# 142848.
_EPSILON_OF_FP32 = torch.__version__ >= "2.7.0a0"


class StochasticDepth(nn.Module):
    """Drops whole rows of the first dimension in training, and scales the others by 1 / (1 - p)
    (Huang et al., "Deep Networks with Stochastic Depth", 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: must be in [0, 1], is {p}")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(1.0 - self.p)
        return x * (kept.div_(1.0 - self.p) if self.p < 1.0 else kept)


def _check_fused(*modules: nn.Module) -> None:
    norm, dropout = modules
    if not isinstance(norm, (nn.LayerNorm, *_RMS_NORMS)) or not isinstance(dropout, nn.Dropout):
        raise NotImplementedError(
            "fused_dropout_add_ln: needs a LayerNorm or RMSNorm and an nn.Dropout, has"
            f" {type(norm).__name__} and {type(dropout).__name__}"
        )


def _eps(norm: nn.Module) -> float:
    """The norm's epsilon; nn.RMSNorm's default is the machine's. Inputs have the weight's dtype."""
    if norm.eps is not None:
        return norm.eps
    dtype = norm.weight.dtype
    is_fp32 = _EPSILON_OF_FP32 and dtype != torch.float64
    return torch.finfo(torch.float32 if is_fp32 else dtype).eps


def _mark(norms: list[nn.Module], **marks: bool) -> None:
    for norm in norms:
        for parameter in norm.parameters():
            for mark, is_wanted in marks.items():
                if is_wanted:
                    setattr(parameter, mark, True)


class _WithMixer(nn.Module):
    """What Block and ParallelBlock share."""

    mixer: nn.Module

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class Block(_WithMixer):
    """A mixer and an MLP in sequence.

    prenorm: dropout -> add -> norm -> mixer -> dropout -> add -> norm -> MLP, from (the output of
    the last MLP, the residual) to the same two: the usual block, cut at another place, so that
    dropout, addition and norm are neighbours. Otherwise mixer -> dropout -> add -> norm -> MLP ->
    dropout -> add -> norm.

    Arguments:
        dim: of the tokens.
        mixer_cls, mlp_cls, norm_cls: functions of dim that make the modules; by default MHA with
            heads of 64, Mlp, nn.LayerNorm. An nn.Identity for the MLP leaves it out.
        dropout_cls: a function of a probability.
        resid_dropout1, resid_dropout2, drop_path1, drop_path2: probabilities of dropping elements,
            and sequences, before the first and the second addition.
        fused_dropout_add_ln: whether to run dropout, addition and norm as one function.
        return_residual: whether mixer and MLP return their inputs too (without prenorm).
        residual_in_fp32: whether the residual is kept in fp32 (with prenorm).
        sequence_parallel, mark_shared_params: whether to mark the norms' parameters for
            allreduce_sequence_parallel_grad, and for sync_shared_params.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Maker | None = None,
        mlp_cls: Maker | None = None,
        norm_cls: Maker = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise NotImplementedError("residual_in_fp32: needs prenorm=True")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        norms = [self.norm1]
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            _check_fused(self.norm1, self.dropout1)
        _mark(norms, _sequence_parallel=sequence_parallel, _shared_params=mark_shared_params)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Tokens [batch, seqlen, dim] to the same.

        Arguments:
            hidden_states: with prenorm the output of the last block, else its input.
            residual: with prenorm, that of the last block; None for the first.
            mixer_subset: with a mixer of cross-attention, an index of the tokens to go on with.
            mixer_kwargs: passed on to the mixer.

        Returns:
            (hidden states, residual) with prenorm, else the hidden states.
        """
        mixer_kwargs = dict(mixer_kwargs or {})
        if mixer_subset is not None:
            mixer_kwargs["mixer_subset"] = mixer_subset
        if not self.prenorm:
            return self._postnorm(hidden_states, residual, mixer_subset, mixer_kwargs)
        hidden_states, residual = self._add_norm(1, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, **mixer_kwargs)
        if mixer_subset is not None:
            residual = residual[:, mixer_subset]
        if not isinstance(self.mlp, nn.Identity):
            hidden_states, residual = self._add_norm(2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _postnorm(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        mixer_subset: Any,
        mixer_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if residual is not None or mixer_subset is not None:
            raise ValueError("residual, mixer_subset: need prenorm=True")
        out = self.mixer(hidden_states, **mixer_kwargs)
        out, hidden_states = out if self.return_residual else (out, hidden_states)
        hidden_states, _ = self._add_norm(1, out, hidden_states)
        if not isinstance(self.mlp, nn.Identity):
            out = self.mlp(hidden_states)
            out, hidden_states = out if self.return_residual else (out, hidden_states)
            hidden_states, _ = self._add_norm(2, out, hidden_states)
        return hidden_states

    def _add_norm(
        self, which: int, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of dropout(x) + residual, that sum)."""
        dropout = self.dropout1 if which == 1 else self.dropout2
        drop_path = self.drop_path1 if which == 1 else self.drop_path2
        norm = self.norm1 if which == 1 else self.norm2
        if not self.fused_dropout_add_ln:
            z = drop_path(dropout(x))
            z = z if residual is None else z + residual
            y = norm(z.to(norm.weight.dtype))
            return y, z.to(torch.float32) if self.residual_in_fp32 else z
        rowscale = None
        if self.training and drop_path.p > 0.0:
            rowscale = drop_path(x.new_ones(x.shape[:-1]))
        return layer_norm_fn(
            x,
            norm.weight,
            getattr(norm, "bias", None),
            residual=residual,
            eps=_eps(norm),
            dropout_p=dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            zero_centered_weight=getattr(norm, "zero_centered_weight", False),
            is_rms_norm=isinstance(norm, _RMS_NORMS),
        )


class ParallelBlock(_WithMixer):
    """A mixer and an MLP side by side, as in GPT-J and PaLM.

    dropout -> add -> norm -> mixer and MLP, from (the last mixer's output, the last MLP's output,
    the residual) to the same three. With tied_norm one norm serves both. The other arguments are
    those of Block.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Maker | None = None,
        mlp_cls: Maker | None = None,
        norm_cls: Maker = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        norms = [self.norm1]
        if not tied_norm:
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            _check_fused(self.norm1, self.dropout1)
            if resid_dropout1 != resid_dropout2:
                raise NotImplementedError(
                    "fused_dropout_add_ln: needs resid_dropout1 equal to resid_dropout2"
                )
        _mark(norms, _sequence_parallel=sequence_parallel, _shared_params=mark_shared_params)

    def forward(
        self,
        hidden_states1: torch.Tensor,
        hidden_states2: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mixer's output, MLP's output, residual) of the last block to those of this one; the
        first block has only the embeddings, as hidden_states1."""
        add_norm = self._fused if self.fused_dropout_add_ln else self._plain
        y1, y2, residual = add_norm(hidden_states1, hidden_states2, residual)
        return self.mixer(y1, **(mixer_kwargs or {})), self.mlp(y2), residual

    def _plain(
        self, x1: torch.Tensor, x2: torch.Tensor | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = self.dropout1(x1)
        z = z if residual is None else residual + z
        z = z if x2 is None else z + self.dropout2(x2)
        y1 = self.norm1(z.to(self.norm1.weight.dtype))
        y2 = y1 if self.tied_norm else self.norm2(z.to(self.norm2.weight.dtype))
        return y1, y2, z.to(torch.float32) if self.residual_in_fp32 else z

    def _fused(
        self, x1: torch.Tensor, x2: torch.Tensor | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm = self.norm1
        second = None if self.tied_norm else self.norm2
        y1, *rest = layer_norm_fn(
            x1,
            norm.weight,
            getattr(norm, "bias", None),
            residual=residual,
            x1=x2,
            weight1=None if second is None else second.weight,
            bias1=None if second is None else getattr(second, "bias", None),
            eps=_eps(norm),
            dropout_p=self.dropout1.p if self.training else 0.0,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            zero_centered_weight=getattr(norm, "zero_centered_weight", False),
            is_rms_norm=isinstance(norm, _RMS_NORMS),
        )
        return (y1, y1, *rest) if self.tied_norm else (y1, *rest)
