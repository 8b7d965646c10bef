"""The functions of the original's extension module `flash_attn_2_cuda`, on every device.

Arguments are positional, in the extension's order; results are lists, as there. None of them
records gradients. Shapes are those of flash_attn_interface: q [B, Sq, H, D] or, with varlen,
[total_q, H, D].

`rng_state`, int64 [2], is (seed, offset) of the dropout mask and enough to repeat a call. `gen`, a
torch.Generator, is what the seed is drawn from; None is PyTorch's default CPU generator.

Errors: as flash_attn_func.
"""

from __future__ import annotations

import torch

from ._attention import Options, backward, draw_seed, forward, length, round_multiple

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

# What softmax_d's sequences are rounded up to, or with varlen apart by.
_SOFTMAX_D_MULTIPLE = 128


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    p_dropout: float,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """[out [B, Sq, H, Dv], softmax_lse [B, H, Sq] fp32, S_dmask, rng_state].

    `out`, where given, is written and returned. S_dmask is empty unless return_softmax and dropout.
    """
    options = Options(
        p_dropout,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        False,
        return_softmax,
    )
    return _forward(q, k, v, out, options, gen)


def varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """[out [total_q, H, Dv], softmax_lse [H, total_q] fp32, S_dmask, rng_state].

    As fwd. zero_tensors changes nothing: every element of the results is written.

    leftpad_k, int32 [B], is how many keys at the start of each sequence are padding: sequence b's
    are those from cu_seqlens_k[b] + leftpad_k[b], and seqused_k counts the padding. With it the
    call waits for the device.

    Raises:
        NotImplementedError: leftpad_k is given together with block_table.
    """
    if leftpad_k is not None:
        _check_leftpad(leftpad_k, cu_seqlens_k, seqused_k, block_table)
        k, v, cu_seqlens_k, seqused_k = _skip_left_padding(k, v, cu_seqlens_k, seqused_k, leftpad_k)
    options = Options(
        p_dropout,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        False,
        return_softmax,
        cu_seqlens_q,
        cu_seqlens_k,
        length("max_seqlen_q", max_seqlen_q),
        length("max_seqlen_k", max_seqlen_k),
        seqused_k,
        block_table,
    )
    return _forward(q, k, v, out, options, gen)


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    p_dropout: float,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: torch.Generator | None = None,
    rng_state: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d [B, H, Sq rounded up to 128] fp32].

    dq, dk and dv, where given, are written and returned. softmax_d is sum_d dout * out, and 0
    behind Sq.

    Raises:
        ValueError: dropout without the forward's rng_state.
    """
    options = Options(
        p_dropout,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        deterministic,
        False,
    )
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), options, rng_state)


def varlen_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: torch.Generator | None = None,
    rng_state: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """[dq, dk, dv, softmax_d [H, total_q + 128 * B] fp32].

    As bwd. In softmax_d sequence b begins at cu_seqlens_q[b] + 128 * b, with zeros between.
    """
    options = Options(
        p_dropout,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        deterministic,
        False,
        cu_seqlens_q,
        cu_seqlens_k,
        length("max_seqlen_q", max_seqlen_q),
        length("max_seqlen_k", max_seqlen_k),
    )
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), options, rng_state)


def fwd_kvcache(
    q: torch.Tensor,
    kcache: torch.Tensor,
    vcache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[torch.Tensor]:
    """[out [B, Sq, H, Dv], softmax_lse [B, H, Sq] fp32]: flash_attn_with_kvcache.

    `out`, where given, is written and returned.
    """
    from .flash_attn_interface import flash_attn_with_kvcache  # which imports this module

    _check_tensors(q=q, kcache=kcache, vcache=vcache)
    if out is not None and q.dim() == vcache.dim() == 4:  # else what follows refuses q or vcache
        # Before k and v are written into the cache.
        _check_given("out", out, (*q.shape[:3], vcache.size(3)), q.dtype)
    result, lse = flash_attn_with_kvcache(
        q,
        kcache,
        vcache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        seqlens_k,
        cache_batch_idx,
        leftpad_k,
        block_table,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        is_rotary_interleaved,
        alibi_slopes,
        num_splits,
        return_softmax_lse=True,
    )
    return [_into("out", out, result), lse]


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    options: Options,
    gen: torch.Generator | None,
) -> list[torch.Tensor]:
    _check_tensors(q=q, k=k, v=v)
    with torch.no_grad():
        seed = draw_seed(gen) if options.dropout_p else 0
        result, lse, s_dmask, _ = forward(q, k, v, None, None, options, True, seed)
        if s_dmask is None:
            s_dmask = torch.empty((0,), dtype=q.dtype, device=q.device)
        rng_state = torch.tensor([seed, 0], dtype=torch.int64, device=q.device)
        return [_into("out", out, result), lse, s_dmask, rng_state]


def _check_leftpad(
    leftpad_k: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    _check_tensors(leftpad_k=leftpad_k, cu_seqlens_k=cu_seqlens_k)
    if block_table is not None:
        raise NotImplementedError(
            "leftpad_k: no implementation takes it together with block_table;"
            " flash_attn_with_kvcache takes pages with cache_leftpad"
        )
    batch = cu_seqlens_k.numel() - 1
    if leftpad_k.shape != (batch,) or leftpad_k.dtype != torch.int32:
        raise ValueError(
            f"leftpad_k: must be int32 [{batch}], one for each sequence,"
            f" is {leftpad_k.dtype} {list(leftpad_k.shape)}"
        )
    if leftpad_k.device.type != "cpu":
        return
    seqlens = cu_seqlens_k.diff().tolist()
    ends = seqlens if seqused_k is None else seqused_k.tolist()
    for sequence, (padding, end, seqlen) in enumerate(zip(leftpad_k.tolist(), ends, seqlens)):
        # Behind a sequence lies the padding of the next one, which nothing else keeps apart.
        if end > seqlen:
            raise ValueError(f"seqused_k: entry {sequence} is {end}, must be in [0, {seqlen}]")
        if not 0 <= padding <= end:
            raise ValueError(
                f"leftpad_k: entry {sequence} is {padding}, must be in [0, {end}],"
                " the keys of that sequence"
            )


def _skip_left_padding(
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor | None,
    leftpad_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, cu_seqlens_k and seqused_k of the same sequences without their padding; no key moves.

    A sequence begins behind its padding and is followed by that of the next one, which is not used.
    """
    used = (cu_seqlens_k.diff() if seqused_k is None else seqused_k) - leftpad_k
    starts = cu_seqlens_k + torch.nn.functional.pad(leftpad_k, (0, 1))
    if leftpad_k.numel() > 0:
        # Sequences are counted from the first key of the first one.
        first = int(leftpad_k[0])
        k, v, starts = k[first:], v[first:], starts - first
    return k, v, starts, used


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    gradients: tuple[torch.Tensor | None, ...],
    options: Options,
    rng_state: torch.Tensor | None,
) -> list[torch.Tensor]:
    _check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
    for name, gradient, x in zip(("dq", "dk", "dv"), gradients, (q, k, v)):
        if gradient is not None:
            _check_given(name, gradient, x.shape, x.dtype)
    with torch.no_grad():
        seed, offset = _seed_and_offset(options.dropout_p, rng_state)
        dout, out = _compact(dout), _compact(out)
        # The native library writes compact rows only.
        written = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if gradient is None or gradient.stride(-1) != 1
            else gradient
            for gradient, x in zip(gradients, (q, k, v))
        ]
        backward(
            (dout, *written, None, None),
            q,
            k,
            v,
            out,
            softmax_lse.contiguous(),
            None,
            None,
            options,
            seed,
            offset,
        )
        results = [
            _into(name, gradient, computed)
            for name, gradient, computed in zip(("dq", "dk", "dv"), gradients, written)
        ]
        return [*results, _softmax_d(dout, out, options.cu_seqlens_q)]


def _seed_and_offset(dropout_p: float, rng_state: torch.Tensor | None) -> tuple[int, int]:
    if not dropout_p:
        return 0, 0
    if rng_state is None:
        raise ValueError("rng_state: is None, must be the forward's where dropout_p > 0")
    if rng_state.shape != (2,) or rng_state.dtype != torch.int64:
        raise ValueError(
            "rng_state: must be int64 [2], (seed, offset), is"
            f" {rng_state.dtype} {list(rng_state.shape)}"
        )
    seed, offset = rng_state.tolist()
    return seed, offset


def _softmax_d(
    dout: torch.Tensor, out: torch.Tensor, cu_seqlens_q: torch.Tensor | None
) -> torch.Tensor:
    delta = torch.einsum("...d,...d->...", dout.float(), out.float())
    if cu_seqlens_q is None:
        batch, seqlen, heads = delta.shape
        rounded = round_multiple(seqlen, _SOFTMAX_D_MULTIPLE)
        softmax_d = delta.new_zeros((batch, heads, rounded))
        softmax_d[:, :, :seqlen] = delta.transpose(1, 2)
        return softmax_d
    total, heads = delta.shape
    starts = cu_seqlens_q.long()
    batch = starts.numel() - 1
    softmax_d = delta.new_zeros((heads, total + _SOFTMAX_D_MULTIPLE * batch))
    # Without sizes that depend on lengths, which compilers would stop at.
    token = torch.arange(total, device=starts.device)
    sequence = torch.bucketize(token, starts, right=True) - 1
    is_of_one = (sequence >= 0) & (sequence < batch)
    place = token + _SOFTMAX_D_MULTIPLE * sequence.clamp(0, max(batch - 1, 0))
    softmax_d[:, place] = delta.where(is_of_one[:, None], 0.0).T
    return softmax_d


def _check_tensors(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, is {type(tensor).__name__}")


def _compact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _check_given(
    name: str, given: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    _check_tensors(**{name: given})
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(
            f"{name}: must be {dtype} {list(shape)}, is {given.dtype} {list(given.shape)}"
        )


def _into(name: str, given: torch.Tensor | None, computed: torch.Tensor) -> torch.Tensor:
    """`computed`, in `given` where the caller has given a tensor."""
    if given is None or given is computed:
        return computed
    _check_given(name, given, computed.shape, computed.dtype)
    return given.copy_(computed)
