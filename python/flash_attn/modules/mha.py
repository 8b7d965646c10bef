"""Multi-head attention: projections, rotary embedding, attention and a cache of keys and values."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ..layers.rotary import RotaryEmbedding
from ..ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from ..utils.distributed import get_dim_for_local_rank
from ._attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    Window,
    get_alibi_slopes,
    slopes_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..utils.generation import InferenceParams

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "LinearResidual",
    "ParallelMHA",
    "SelfAttention",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
]


class LinearResidual(nn.Linear):
    """nn.Linear that returns its input too."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(input), input


def _update_kv_cache(
    kv: torch.Tensor, inference_params: InferenceParams, layer_idx: int
) -> torch.Tensor:
    """Writes kv [B, S, 2, Hk, D] to the layer's cache, made if need be; returns all keys so far."""
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        size = (inference_params.max_batch_size, inference_params.max_seqlen)
        caches[layer_idx] = kv.new_empty((*size, *kv.shape[2:]))
    cache = caches[layer_idx]
    rows, first = _rows(kv, inference_params), inference_params.seqlen_offset
    last = first + kv.shape[1]
    if rows.stop > cache.shape[0] or last > cache.shape[1]:
        raise ValueError(
            f"inference_params: its cache has room for {cache.shape[0]} sequences of"
            f" {cache.shape[1]} tokens, and {rows.stop} of {last} are needed"
        )
    cache[rows, first:last] = kv
    return cache[rows, :last]


def _rows(x: torch.Tensor, inference_params: InferenceParams) -> slice:
    """The rows of the cache that are those of x [B, ...]."""
    first = inference_params.batch_size_offset
    return slice(first, first + x.shape[0])


def _lengths(x: torch.Tensor, inference_params: InferenceParams) -> int | torch.Tensor:
    """How many tokens the cache has for the sequences of x [B, ...]."""
    if inference_params.lengths_per_sample is None:
        return inference_params.seqlen_offset
    return inference_params.lengths_per_sample[_rows(x, inference_params)]


class _CachedAttention(nn.Module):
    """Rotary embedding, attention and cache: what MHA and ParallelMHA share."""

    inner_attn: nn.Module
    inner_cross_attn: nn.Module
    out_proj: nn.Linear

    def _set(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None,
        causal: bool,
        layer_idx: int | None,
        use_flash_attn: bool,
        checkpointing: bool,
    ) -> None:
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % num_heads_kv:
            raise ValueError(f"num_heads_kv: must divide num_heads {num_heads}, is {num_heads_kv}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: must divide embed_dim {embed_dim}, is {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.layer_idx = layer_idx
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing

    def _build_attention(
        self,
        dropout: float,
        softmax_scale: float | None,
        alibi_slopes: list[float] | None,
        window_size: Window,
        device: Any,
    ) -> None:
        options: dict[str, Any] = {
            "causal": self.causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        if self.use_flash_attn:
            slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, device=device)
            options.update(alibi_slopes=slopes, window_size=window_size)
            self.inner_attn = FlashSelfAttention(**options)
            self.inner_cross_attn = FlashCrossAttention(**options)
            return
        if alibi_slopes is not None:
            raise NotImplementedError("use_alibi: needs use_flash_attn=True")
        if tuple(window_size) != (-1, -1):
            raise NotImplementedError("window_size: needs use_flash_attn=True")
        self.inner_attn = SelfAttention(**options)
        self.inner_cross_attn = CrossAttention(**options)

    def _build_rotary(
        self, dim: int, base: float, scale_base: float | None, interleaved: bool, device: Any
    ) -> None:
        self.rotary_emb_dim = dim
        if dim > 0:
            self.rotary_emb = RotaryEmbedding(dim, base, interleaved, scale_base, device)

    def _new_cache(
        self, batch_size: int, max_seqlen: int, num_heads_kv: int, dtype: torch.dtype | None
    ) -> torch.Tensor:
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _attend(
        self, module: nn.Module, tensors: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if self.checkpointing:
            return checkpoint(module, *tensors, use_reentrant=False, **kwargs)
        return module(*tensors, **kwargs)

    def _attend_qkv(
        self,
        qkv: torch.Tensor,
        inference_params: InferenceParams | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """qkv [B, S, 3, H, D], or [total, 3, H, D] with cu_seqlens in kwargs -> [..., H, D]."""
        if inference_params is not None:
            return self._attend_q_kv(qkv[:, :, 0], qkv[:, :, 1:], inference_params, kwargs)
        if self.rotary_emb_dim > 0:
            qkv = self.rotary_emb(qkv, **_packing(kwargs))
        return self._attend(self.inner_attn, (qkv,), kwargs)

    def _attend_q_kv(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        inference_params: InferenceParams | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """q [B, Sq, H, D] and kv [B, Sk, 2, Hk, D], or as varlen -> [..., H, D]."""
        if inference_params is None:
            if self.rotary_emb_dim > 0:
                q, kv = self.rotary_emb(q, kv, **_packing(kwargs))
            return self._attend(self.inner_cross_attn, (q, kv), kwargs)
        if self.layer_idx is None:
            raise ValueError("layer_idx: must be given to the constructor for generation, is None")
        if inference_params.lengths_per_sample is not None and not self.use_flash_attn:
            raise NotImplementedError("lengths_per_sample: needs use_flash_attn=True")
        decoding = self.use_flash_attn and inference_params.seqlen_offset > 0
        with_rotary = self.rotary_emb_dim > 0
        if decoding and with_rotary and self.rotary_emb.scale is None:
            return self._apply_rotary_update_kvcache_attention(q, kv, inference_params)
        if with_rotary:
            offset, longest = _lengths(q, inference_params), inference_params.max_seqlen
            q, kv = self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=longest)
        if decoding:
            return self._update_kvcache_attention(q, kv, inference_params)
        return self.inner_cross_attn(q, self._update_kv_cache(kv, inference_params))

    def _update_kv_cache(self, kv: torch.Tensor, inference_params: InferenceParams) -> torch.Tensor:
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _apply_rotary_update_kvcache_attention(
        self, q: torch.Tensor, kv: torch.Tensor, inference_params: InferenceParams
    ) -> torch.Tensor:
        """Rotation, append and attention in one call."""
        self.rotary_emb._update_cos_sin_cache(
            inference_params.max_seqlen, device=q.device, dtype=q.dtype
        )
        return self._update_kvcache_attention(
            q,
            kv,
            inference_params,
            rotary_cos=self.rotary_emb._cos_cached,
            rotary_sin=self.rotary_emb._sin_cached,
            rotary_interleaved=self.rotary_emb.interleaved,
        )

    def _update_kvcache_attention(
        self, q: torch.Tensor, kv: torch.Tensor, inference_params: InferenceParams, **rotary: Any
    ) -> torch.Tensor:
        """Append and attention in one call."""
        cache = inference_params.key_value_memory_dict[self.layer_idx][_rows(q, inference_params)]
        attention = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=_lengths(q, inference_params),
            softmax_scale=attention.softmax_scale,
            causal=attention.causal,
            window_size=attention.window_size,
            alibi_slopes=slopes_of(attention),
            **rotary,
        )


def _packing(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What rotary embedding must know of a packed batch."""
    if kwargs.get("cu_seqlens") is None:
        return {}
    return {"cu_seqlens": kwargs["cu_seqlens"], "max_seqlen": kwargs["max_seqlen"]}


class MHA(_CachedAttention):
    """Multi-head self-attention or cross-attention.

    Arguments:
        embed_dim: of the tokens; num_heads divides it.
        num_heads_kv: heads of k and v, which divides num_heads; None is num_heads.
        cross_attn: whether k and v come from another input.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: the probability of dropping an element of P, in training.
        softmax_scale: None is head_dim**-0.5.
        causal: whether a query sees no later keys.
        layer_idx: the layer's key in the cache; needed for generation.
        dwconv: whether a depthwise convolution of three tokens follows the projections.
        rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: of
            RotaryEmbedding; 0 is none.
        use_alibi, window_size: as in flash_attn_func; they need use_flash_attn.
        fused_bias_fc: whether the projections are FusedDense.
        use_flash_attn: whether to use this library's attention, else PyTorch's own.
        return_residual: whether to return x too.
        checkpointing: whether the backward pass computes the attention again.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = (num_heads, num_heads_kv)
        self._set(embed_dim, *heads, causal, layer_idx, use_flash_attn, checkpointing)
        self.cross_attn = cross_attn
        self.dwconv = dwconv
        self.return_residual = return_residual
        if rotary_emb_dim > 0 and cross_attn:
            raise NotImplementedError("rotary_emb_dim: is not supported with cross_attn=True")
        rotary = (rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)
        self._build_rotary(rotary_emb_dim, *rotary)
        factory = {"device": device, "dtype": dtype}
        self._build_projections(fused_bias_fc, qkv_proj_bias, out_proj_bias, factory)
        slopes = get_alibi_slopes(num_heads) if use_alibi else None
        self._build_attention(dropout, softmax_scale, slopes, window_size, device)

    def _build_projections(
        self, fused: bool, qkv_bias: bool, out_bias: bool, factory: dict[str, Any]
    ) -> None:
        linear: Any = FusedDense if fused else nn.Linear
        first: Any = linear
        if self.return_residual:
            first = partial(FusedDense, return_residual=True) if fused else LinearResidual
        dim, kv_dim = self.embed_dim, 2 * self.head_dim * self.num_heads_kv
        if self.cross_attn:
            self.Wq = linear(dim, dim, bias=qkv_bias, **factory)
            self.Wkv = first(dim, kv_dim, bias=qkv_bias, **factory)
        else:
            self.Wqkv = first(dim, dim + kv_dim, bias=qkv_bias, **factory)
        if self.dwconv:
            if self.num_heads_kv == self.num_heads and not self.cross_attn:
                self.dwconv_qkv = _depthwise(dim + kv_dim, factory)
            else:
                self.dwconv_q = _depthwise(dim, factory)
                self.dwconv_kv = _depthwise(kv_dim, factory)
        self.out_proj = linear(dim, dim, bias=out_bias, **factory)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """An uninitialized cache [batch_size, max_seqlen, 2, num_heads_kv, head_dim]."""
        return self._new_cache(batch_size, max_seqlen, self.num_heads_kv, dtype)

    def forward(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention from x to itself, or to x_kv.

        Arguments:
            x: [batch, seqlen, embed_dim]; with cu_seqlens [total, embed_dim].
            x_kv: for cross-attention, the input of k and v; None is x.
            key_padding_mask: [batch, seqlen], bool, true where a key is kept. Without
                use_flash_attn only.
            cu_seqlens, max_seqlen: as in flash_attn_varlen_func, of x. With use_flash_attn only.
            mixer_subset: for cross-attention, an index of the tokens of x that are queries.
            inference_params: for generation: the cache, and how far it is filled.
            kwargs: passed on to the attention, such as cu_seqlens_k and max_seqlen_k.

        Returns:
            x's shape; with return_residual (that, x).

        Raises:
            ValueError, NotImplementedError: arguments that do not go together.
        """
        self._check(key_padding_mask, cu_seqlens, max_seqlen, inference_params)
        if self.use_flash_attn:
            kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            kwargs = {"key_padding_mask": key_padding_mask, **kwargs}
        if self.cross_attn:
            q, kv, x = self._project_q_kv(x, x_kv, mixer_subset)
        elif x_kv is not None or mixer_subset is not None:
            raise ValueError("x_kv, mixer_subset: need cross_attn=True")
        else:
            qkv = self.Wqkv(x)
            if self.return_residual:
                qkv, x = qkv
            if self.num_heads_kv == self.num_heads:
                qkv = _convolved(self.dwconv_qkv, qkv) if self.dwconv else qkv
                qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
                context = self._attend_qkv(qkv, inference_params, kwargs)
                return self._result(context, x)
            q, kv = qkv.tensor_split([self.embed_dim], dim=-1)
            if cu_seqlens is not None:
                kwargs = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **kwargs}
        if self.dwconv:
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        kv = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        if key_padding_mask is not None and not self.cross_attn:
            # Queries are padded as keys are, and CrossAttention takes them to be the last tokens.
            kv = kv.repeat_interleave(self.num_heads // self.num_heads_kv, dim=3)
            qkv = torch.cat((q.unsqueeze(2), kv), dim=2)
            return self._result(self._attend_qkv(qkv, inference_params, kwargs), x)
        return self._result(self._attend_q_kv(q, kv, inference_params, kwargs), x)

    def _check(
        self, key_padding_mask: Any, cu_seqlens: Any, max_seqlen: Any, inference_params: Any
    ) -> None:
        if cu_seqlens is not None and max_seqlen is None:
            raise ValueError("max_seqlen: must be given with cu_seqlens, is None")
        if cu_seqlens is not None and not self.use_flash_attn:
            raise NotImplementedError("cu_seqlens: needs use_flash_attn=True")
        if key_padding_mask is not None and self.use_flash_attn:
            raise NotImplementedError(
                "key_padding_mask: needs use_flash_attn=False; unpad the batch, and give cu_seqlens"
            )
        if self.dwconv and (cu_seqlens is not None or inference_params is not None):
            raise NotImplementedError("dwconv: supports neither cu_seqlens nor inference_params")
        if inference_params is not None and (
            key_padding_mask is not None or cu_seqlens is not None
        ):
            raise NotImplementedError(
                "inference_params: supports neither key_padding_mask nor cu_seqlens"
            )

    def _project_q_kv(
        self, x: torch.Tensor, x_kv: torch.Tensor | None, mixer_subset: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kv = self.Wkv(x if x_kv is None else x_kv)
        if self.return_residual:
            kv, source = kv
            x = source if x_kv is None else x
        return self.Wq(x if mixer_subset is None else x[:, mixer_subset]), kv, x

    def _result(
        self, context: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out


def _depthwise(channels: int, factory: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **factory)


def _convolved(convolution: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution over the tokens of x [B, S, channels]."""
    return convolution(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()


class ParallelMHA(_CachedAttention):
    """Multi-head self-attention whose heads are spread over the processes of a group.

    The arguments are those of MHA; process_group is the group, and sequence_parallel whether the
    input is each process' part of the tokens.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: ProcessGroup,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = (num_heads, num_heads_kv)
        self._set(embed_dim, *heads, causal, layer_idx, use_flash_attn, checkpointing)
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self.local_rank = dist.get_rank(process_group)
        # Heads are given away in groups that share a head of k and v.
        group = self.num_heads // self.num_heads_kv
        self.num_heads_kv_per_rank = get_dim_for_local_rank(
            self.num_heads_kv, self.world_size, self.local_rank
        )
        self.num_heads_per_rank = group * self.num_heads_kv_per_rank
        rotary = (rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)
        self._build_rotary(rotary_emb_dim, *rotary)
        options = {"device": device, "dtype": dtype, "sequence_parallel": sequence_parallel}
        self.Wqkv = ColumnParallelLinear(
            embed_dim,
            self.head_dim * (num_heads + 2 * self.num_heads_kv),
            process_group,
            bias=qkv_proj_bias,
            multiple_of=self.head_dim * (group + 2),
            **options,
        )
        self.out_proj = RowParallelLinear(
            embed_dim,
            embed_dim,
            process_group,
            bias=out_proj_bias,
            multiple_of=self.head_dim * group,
            **options,
        )
        slopes = self._local_slopes() if use_alibi else None
        self._build_attention(dropout, softmax_scale, slopes, window_size, device)

    def _local_slopes(self) -> list[float]:
        group = self.num_heads // self.num_heads_kv
        first = group * sum(
            get_dim_for_local_rank(self.num_heads_kv, self.world_size, rank)
            for rank in range(self.local_rank)
        )
        return get_alibi_slopes(self.num_heads)[first : first + self.num_heads_per_rank]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """An uninitialized cache [batch_size, max_seqlen, 2, num_heads_kv_per_rank, head_dim]."""
        return self._new_cache(batch_size, max_seqlen, self.num_heads_kv_per_rank, dtype)

    def forward(
        self,
        x: torch.Tensor,
        seqlen: int | None = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Self-attention of x [batch, seqlen, embed_dim]; with seqlen x is [batch * seqlen,
        embed_dim], and so is the result."""
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        if self.num_heads_kv == self.num_heads:
            qkv = qkv.unflatten(-1, (3, self.num_heads_per_rank, self.head_dim))
            context = self._attend_qkv(qkv, inference_params, kwargs)
        else:
            q, kv = qkv.tensor_split([self.num_heads_per_rank * self.head_dim], dim=-1)
            q = q.unflatten(-1, (self.num_heads_per_rank, self.head_dim))
            kv = kv.unflatten(-1, (2, self.num_heads_kv_per_rank, self.head_dim))
            context = self._attend_q_kv(q, kv, inference_params, kwargs)
        context = context.flatten(-2)
        return self.out_proj(context if seqlen is None else context.flatten(0, 1))
