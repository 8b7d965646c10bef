"""Attention for Hugging Face transformers, on every device::

    import flash_attn.integrations.transformers

    model = AutoModel.from_pretrained(name, attn_implementation="flash_attention_plus")

Importing the module registers `flash_attention_plus` and changes nothing else. It takes what the
implementation `flash_attention_2` takes, and fp32, learnable sinks and arbitrary masks beside,
those of a model's own among them (images that see both ways, prefixes); a model that refuses
flash_attention_2, or computes attention outside transformers' AttentionInterface, raises
ValueError. Attention weights are not computed: `output_attentions=True` gives None in their place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import PreTrainedModel

    _check = PreTrainedModel._check_and_adjust_attn_implementation
except (ImportError, AttributeError) as error:
    raise ImportError(
        "flash_attn.integrations.transformers needs transformers 4.57 or newer"
        " (pip install transformers)"
    ) from error

from ..flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["NAME", "flash_attention_plus_forward"]

NAME = "flash_attention_plus"


def flash_attention_plus_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface.

    Arguments:
        query: [B, H, Sq, D], fp32, fp16 or bf16.
        key, value: [B, Hk, Sk, D] and [B, Hk, Sk, Dv].
        attention_mask: None; or which keys are no padding, [B, Sk]; or a mask that replaces
            causality and window, broadcastable to [B, H, Sq, Sk], boolean or additive.
        is_causal: None is module.is_causal.
        sliding_window: how many keys a query sees to its left, itself among them; without
            causality as many to its right.
        s_aux: [H], one sink per head.
        position_ids: [1, Sq]; where they begin anew, so does a packed sequence.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, int32 [n + 1].

    Returns:
        (out [B, Sq, H, Dv], None).

    Raises:
        NotImplementedError: a paged cache of continuous batching is passed.
        ValueError, TypeError: as flash_attn_func.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(f"cache: {NAME} does not serve continuous batching")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # Some models keep a norm or a rotation in fp32; autocast does too.
    q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux if s_aux is None or s_aux.dtype == torch.float32 else s_aux.to(q),
    }
    if attention_mask is not None and attention_mask.dim() == 4:
        bias = attention_mask[..., : k.size(1)]
        if bias.dtype not in (torch.bool, torch.float32):
            bias = bias.to(q.dtype)
        return flash_attn_func(q, k, v, attn_bias=bias, **options), None
    options["causal"] = causal
    windowed = sliding_window is not None and k.size(1) > sliding_window
    if windowed:
        options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    if attention_mask is not None:
        # Without causality and window a query's place does not matter; it may be one of another
        # sequence than the keys, to which the mask says nothing.
        return _attend_padded(q, k, v, attention_mask, causal or windowed, options), None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if max_length_q is None:
            max_length_q = cu_seq_lens_q.diff().max()
        if max_length_k is None:
            max_length_k = cu_seq_lens_k.diff().max()
    elif _is_packed(position_ids, q, k):
        starts = (position_ids[0] == position_ids.min()).nonzero().flatten()
        cu_seq_lens_q = cu_seq_lens_k = torch.nn.functional.pad(starts, (0, 1), value=q.size(1))
        max_length_q = max_length_k = cu_seq_lens_q.diff().max()
    else:
        return flash_attn_func(q, k, v, **options), None
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        max_length_q,
        max_length_k,
        **options,
    )
    return out.unflatten(0, query.shape[0:3:2]), None


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    queries_are_keys: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention without the padding. `queries_are_keys`: the last of them, and padding where they
    are; its results are 0."""
    batch, seqlen_q = q.shape[:2]
    # A static cache has room behind the keys of the mask.
    k, v = k[:, : mask.size(1)], v[:, : mask.size(1)]
    mask = mask.bool()
    indices_k, cu_seqlens_k, max_seqlen_k = _lengths(mask)
    k, v = (x.flatten(0, 1).index_select(0, indices_k) for x in (k, v))
    if not queries_are_keys:
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q
        arguments = (cu_seqlens_q, cu_seqlens_k, seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(q.flatten(0, 1), k, v, *arguments, **options).unflatten(
            0, (batch, seqlen_q)
        )
    indices_q, cu_seqlens_q, max_seqlen_q = indices_k, cu_seqlens_k, max_seqlen_k
    if seqlen_q != mask.size(1):
        indices_q, cu_seqlens_q, max_seqlen_q = _lengths(mask[:, -seqlen_q:])
    q = q.flatten(0, 1).index_select(0, indices_q)
    arguments = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = flash_attn_varlen_func(q, k, v, *arguments, **options)
    padded = out.new_zeros((batch * seqlen_q, *out.shape[1:]))
    return padded.index_copy(0, indices_q, out).unflatten(0, (batch, seqlen_q))


def _lengths(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of a mask [B, S]: where it is true, flattened; cu_seqlens; the longest sequence."""
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max())


def _is_packed(position_ids: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the positions are those of several sequences, one behind the other."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.size(0) != 1:
        return False
    seqlen = position_ids.size(1)
    if q.size(0) != 1 or seqlen < 2 or not q.size(1) == k.size(1) == seqlen:
        return False
    return bool((position_ids.diff() != 1).any())


def _mask(**given: Any) -> torch.Tensor | None:
    """Which keys are no padding, [B, keys so far], or None where all are that there is room for: a
    static cache has more behind them. Where the mask's function says what the call's options will
    not, all of it, [B, 1, Sq, Sk]."""
    if not _options_tell(given["mask_function"], given["batch_size"]):
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**given | skips)
    mask, kv_offset, kv_length = (
        given.get(x) for x in ("attention_mask", "kv_offset", "kv_length")
    )
    if mask is not None:
        mask = mask[:, -kv_length:]
        return None if mask.size(1) == kv_length and mask.all() else mask
    if "cache_position" in given:  # transformers 4
        end = int(given["cache_position"][-1]) + 1
    else:
        end = int(given.get("q_offset", 0)) + given["q_length"]
    # Keys of another sequence than the queries are seen, those to come are not.
    places = (torch.tensor(place) for place in (0, 0, end - 1, kv_offset + kv_length - 1))
    if end >= kv_offset + kv_length or given["mask_function"](*places):
        return None
    shape = given["batch_size"], end - kv_offset
    return torch.ones(shape, dtype=torch.bool, device=given.get("device"))


# Those of transformers.masking_utils that say what options say; not every version has all.
_TOLD_BY_OPTIONS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
)


def _options_tell(mask_function: Callable[..., Any], batch_size: int) -> bool:
    """Whether a mask's function is made of causality, windows and packed sequences of one row."""
    if getattr(mask_function, "__module__", "") != AttentionMaskInterface.__module__:
        return False
    name = mask_function.__qualname__.split(".")[0]
    if name in _TOLD_BY_OPTIONS:
        return True
    if name == "packed_sequence_mask_function":
        return batch_size == 1
    if name not in ("and_masks", "remap_positions_for_packed_sequence"):
        return False
    within = inspect.getclosurevars(mask_function).nonlocals
    parts = within["mask_functions"] if name == "and_masks" else (within["mask_function"],)
    return all(_options_tell(part, batch_size) for part in parts)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises ValueError where transformers would refuse `flash_attention_2`, and where the model's
    attention would not come here: left to itself such a model drops its mask or position bias."""
    flags = ("_supports_flash_attn", "_supports_flash_attn_2")  # the second is remote code's
    supported = any(getattr(model, flag, False) for flag in flags)
    # Of the user's own classes the parent is asked: the question reads the source, which a notebook
    # has not.
    base = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    if supported and base._can_set_attn_implementation():
        return
    raise ValueError(
        f"attn_implementation: {type(model).__name__} supports no flash attention through"
        f" transformers' AttentionInterface, and so not {NAME!r}; leave the argument out"
    )


def _register() -> None:
    AttentionInterface.register(NAME, flash_attention_plus_forward)
    AttentionMaskInterface.register(NAME, _mask)
    # transformers takes a name with "flash" in it for one of its own implementations, and loads it
    # from its hub. This one is loaded already.
    if getattr(_check, "knows_flash_attention_plus", False):
        return

    @functools.wraps(_check)
    def check_unless_ours(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation == NAME:
            _refuse_unsupported(self)
            return NAME
        return _check(self, attn_implementation, *args, **kwargs)

    check_unless_ours.knows_flash_attention_plus = True  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = check_unless_ours


_register()
