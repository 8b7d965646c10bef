"""Attention from PyTorch's own operators, for devices that have nothing better.

Blocks of queries meet blocks of keys with an online softmax (Dao et al., "FlashAttention", 2022;
the backward after Dao, "FlashAttention-2", 2023), all in fp32. The matrix of scores is never
stored, so memory grows linearly with the sequence length. Nothing is read back from the device:
lengths and pages stay where they are, which also makes every call traceable on meta tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ._call import Cache, Call, Gradients, Request
from ._philox import keep_mask

# Elements of a tile of scores over all batches and heads: 16 MB of fp32, which stays in caches and
# is enough to fill a device.
_TILE_ELEMENTS = 2**22
_TILE_KEYS = 256
_MIN_TILE_QUERIES = 16


DESCRIPTION = "blockwise composition of PyTorch's operators: correct on any device, seldom fast"


def refusal(request: Request) -> str:
    """Why this implementation does not take a request; "" where it does."""
    if request.gradients is not None and request.call.block_table is not None:
        return "block_table: there is no backward through pages"
    return ""


def run(request: Request) -> None:
    """Computes a request that has been validated."""
    call, cache, gradients, _ = request
    device = call.q.device.type
    # Autocast would turn the products of fp32 tiles into ones of 16 bits.
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocasts else nullcontext():
        if gradients is not None:
            _Backward(call, gradients).run()
        elif cache is not None:
            _Forward(_append(call, cache), cache).run()
        else:
            _Forward(call, None).run()


# ---- Where rows lie. ----


class _Slices:
    """Rows of a dense tensor [B, S, H, D]."""

    def __init__(self, length: int) -> None:
        self.length = length

    def load(self, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows first to last of each sequence, fp32 [B, n, H, D]."""
        return tensor[:, first:last].float()

    def accumulator(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros, in fp32, for what is added up for the rows of `tensor`."""
        return torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)

    def add(self, to: torch.Tensor, first: int, last: int, value: torch.Tensor) -> None:
        """Adds `value` [B, n, H, D] to rows first to last."""
        to[:, first:last] += value

    def finish(self, to: torch.Tensor, accumulated: torch.Tensor) -> None:
        """Copies what was added up to where it goes."""
        to.copy_(accumulated)


class _Tokens:
    """Rows of a tensor [total, H, D] of sequences laid end to end. Rows that a sequence does not
    have are zeros when they are read, and go to one row behind the others when they are written."""

    def __init__(self, begins: torch.Tensor, lengths: torch.Tensor, total: int) -> None:
        self.begins, self.lengths, self.total = begins[:, None], lengths[:, None], total

    def index(self, first: int, last: int) -> torch.Tensor:
        """[B, n]: where rows first to last lie; `total` where there is none."""
        row = torch.arange(first, last, device=self.begins.device)
        return torch.where(row < self.lengths, self.begins + row, self.total).clamp_(0, self.total)

    def load(self, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        index = self.index(first, last)
        if self.total == 0:
            return tensor.new_zeros((*index.shape, *tensor.shape[1:]), dtype=torch.float32)
        rows = tensor[index.clamp(max=self.total - 1)].float()
        return rows.masked_fill_((index == self.total)[..., None, None], 0.0)

    def accumulator(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = (self.total + 1, *tensor.shape[1:])
        return torch.zeros(shape, dtype=torch.float32, device=tensor.device)

    def add(self, to: torch.Tensor, first: int, last: int, value: torch.Tensor) -> None:
        index = self.index(first, last)
        to[index] = to[index] + value

    def finish(self, to: torch.Tensor, accumulated: torch.Tensor) -> None:
        to.copy_(accumulated[: self.total])


class _Cached:
    """Rows of a cache [B_cache, S_cache, H, D], or of pages [num_blocks, page_size, H, D]; reads
    and writes stay within the tensor, whatever the lengths and pages are."""

    def __init__(self, call: Call, begins: torch.Tensor, lengths: torch.Tensor, rows: Any) -> None:
        self.table, self.begins, self.lengths = call.block_table, begins[:, None], lengths[:, None]
        self.rows = rows  # [B, 1]: the row of each batch; unused with pages
        self.blocks, self.block_size = call.k.size(0), call.k.size(1)

    def locate(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(block, row in it) of token position [B, n]; a block is a page, or a row of the cache."""
        if self.table is None:
            return self.rows.expand_as(position), position.clamp(0, max(0, self.block_size - 1))
        column = (position // self.block_size).clamp_(0, max(0, self.table.size(1) - 1))
        block = self.table.long().gather(1, column).clamp_(0, max(0, self.blocks - 1))
        return block, position % self.block_size

    def load(self, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        row = torch.arange(first, last, device=tensor.device)
        if tensor.size(0) == 0 or tensor.size(1) == 0 or self.begins.size(0) == 0:
            shape = (self.begins.size(0), last - first, *tensor.shape[2:])
            return tensor.new_zeros(shape, dtype=torch.float32)
        rows = tensor[self.locate(self.begins + row)].float()
        return rows.masked_fill_((row >= self.lengths)[..., None, None], 0.0)


def _key_rows(call: Call, cache: Cache | None) -> tuple[Any, torch.Tensor | int]:
    """Where keys lie, and how many each sequence has: [B], or an int for all."""
    if cache is not None:
        begins = torch.zeros_like(cache.seqlens) if cache.leftpad is None else cache.leftpad
        begins = begins.long()
        lengths = cache.seqlens.long() + cache.seqlen_new - begins
        return _Cached(call, begins, lengths, _cache_rows(call, cache)), lengths
    if not call.varlen:
        return _Slices(call.k.size(1)), call.k.size(1)
    starts = call.cu_seqlens_k.long()
    lengths = starts.diff() if call.seqused_k is None else call.seqused_k.long()
    if call.block_table is not None:
        return _Cached(call, torch.zeros_like(lengths), lengths, None), lengths
    return _Tokens(starts[:-1], lengths, call.k.size(0)), lengths


def _cache_rows(call: Call, cache: Cache) -> torch.Tensor:
    if cache.batch_idx is not None:
        return cache.batch_idx.long().clamp(0, max(0, call.k.size(0) - 1))[:, None]
    return torch.arange(call.batch, device=call.q.device)[:, None]


def _query_rows(call: Call) -> tuple[Any, torch.Tensor | int]:
    if not call.varlen:
        return _Slices(call.q.size(1)), call.q.size(1)
    starts = call.cu_seqlens_q.long()
    return _Tokens(starts[:-1], starts.diff(), call.q.size(0)), starts.diff()


# ---- Scores. ----


class _Tile(NamedTuple):
    """Queries first_q to last_q against keys first_k to last_k."""

    first_q: int
    last_q: int
    first_k: int
    last_k: int


class _Scores:
    """The scores of a call, tile by tile, as [B, H, m, n]."""

    def __init__(self, call: Call, cache: Cache | None) -> None:
        self.call = call
        self.queries, self.seqlen_q = _query_rows(call)
        self.keys, self.seqlen_k = _key_rows(call, cache)
        self.dense = isinstance(self.seqlen_q, int) and isinstance(self.seqlen_k, int)
        self.longest_q, self.longest_k = call.longest_q, call.longest_k
        self.heads, self.heads_kv = call.q.size(-2), call.k.size(-2)
        self.bias = call.bias_over_scores()
        # Clamped, so that sums of positions stay within int64.
        self.left, self.right = (min(bound, 2**40) for bound in call.band)
        rows = max(1, call.batch * self.heads)
        self.tile_k = max(1, min(_TILE_KEYS, self.longest_k))
        fitting = _TILE_ELEMENTS // (rows * self.tile_k)
        self.tile_q = max(1, min(max(fitting, _MIN_TILE_QUERIES), self.longest_q))

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.longest_q, self.tile_q):
            yield first, min(first + self.tile_q, self.longest_q)

    def key_blocks(self, first_q: int, last_q: int) -> Iterator[_Tile]:
        """The tiles that hold the keys that some of the queries see."""
        begin, end = 0, self.longest_k
        if self.dense:
            offset = self.seqlen_k - self.seqlen_q
            if self.left >= 0:
                begin = max(0, first_q + offset - self.left)
            if self.right >= 0:
                end = min(end, last_q + offset + self.right)
        # From a multiple of the tile on, so that a key falls in the same tile for all queries.
        begin = begin // self.tile_k * self.tile_k
        for first in range(begin, end, self.tile_k):
            yield _Tile(first_q, last_q, first, min(first + self.tile_k, self.longest_k))

    def hidden(self, tile: _Tile) -> torch.Tensor | None:
        """True where a query does not see a key, broadcastable to [B, H, m, n]; None: nowhere."""
        if self.dense and self.left < 0 and self.right < 0:
            return self._hidden_by_bias(tile)
        device = self.call.q.device
        i = torch.arange(tile.first_q, tile.last_q, device=device)[:, None]
        j = torch.arange(tile.first_k, tile.last_k, device=device)
        seqlen_q, seqlen_k = (
            x if isinstance(x, int) else x[:, None, None, None]
            for x in (self.seqlen_q, self.seqlen_k)
        )
        distance = i + (seqlen_k - seqlen_q) - j
        hidden = j >= seqlen_k
        if self.left >= 0:
            hidden = hidden | (distance > self.left)
        if self.right >= 0:
            hidden = hidden | (distance < -self.right)
        by_bias = self._hidden_by_bias(tile)
        return hidden if by_bias is None else hidden | by_bias

    def _hidden_by_bias(self, tile: _Tile) -> torch.Tensor | None:
        if self.bias is None or self.bias.is_floating_point():
            return None
        return self.part(self.bias, tile) == 0

    @staticmethod
    def part(bias: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """The part of a bias, or of its gradient, that belongs to a tile."""
        if bias.size(2) > 1:
            bias = bias[:, :, tile.first_q : tile.last_q]
        return bias[..., tile.first_k : tile.last_k] if bias.size(3) > 1 else bias

    def product(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """sum_d rows_id columns_jd as [B, H, m, n], of [B, m, H, D] and [B, n, Hk, D]."""
        product = self.by_group(rows) @ columns.permute(0, 2, 3, 1)
        return product.view(rows.size(0), self.heads, rows.size(1), columns.size(1))

    def by_group(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, m, H, D] as [B, Hk, G * m, D]: the heads that share a head of k and v together."""
        batch, length, heads, dim = rows.shape
        grouped = rows.permute(0, 2, 1, 3)
        return grouped.reshape(batch, self.heads_kv, heads // self.heads_kv * length, dim)

    def weigh(self, weights: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """sum_j weights_ij columns_jd as [B, H, m, D]."""
        sums = self.grouped(weights) @ columns.permute(0, 2, 1, 3)
        return sums.view(*weights.shape[:3], columns.size(-1))

    def grouped(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, H, m, n] as [B, Hk, G * m, n]."""
        batch, heads, length, width = weights.shape
        return weights.reshape(batch, self.heads_kv, heads // self.heads_kv * length, width)

    def of(
        self, q: torch.Tensor, k: torch.Tensor, tile: _Tile
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(scores, -inf where hidden; softcap's tanh; what is hidden)."""
        call = self.call
        scores = self.product(q, k).mul_(call.scale)
        tanh = None
        if call.softcap > 0.0:
            tanh = (scores / call.softcap).tanh_()
            scores = tanh * call.softcap
        if call.alibi_slopes is not None:
            scores = scores - self._alibi(tile)
        if self.bias is not None and self.bias.is_floating_point():
            scores = scores + self.part(self.bias, tile).float()
        hidden = self.hidden(tile)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores, tanh, hidden

    def _alibi(self, tile: _Tile) -> torch.Tensor:
        slopes = self.call.alibi_slopes
        i = torch.arange(tile.first_q, tile.last_q, device=slopes.device)[:, None]
        j = torch.arange(tile.first_k, tile.last_k, device=slopes.device)
        shift = self.seqlen_k - self.seqlen_q
        shift = shift if isinstance(shift, int) else shift[:, None, None, None]
        return slopes.view(-1, self.heads, 1, 1) * (i + shift - j).abs().float()

    def kept(self, tile: _Tile) -> torch.Tensor:
        """Where dropout keeps a probability."""
        call = self.call
        return keep_mask(
            call.dropout_key, call.dropout_threshold, call.batch, self.heads, tile, call.q.device
        )


def _exp(x: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """exp(x - minus), and 0 for x = -inf whatever `minus` is."""
    return (x - minus.clamp(min=torch.finfo(torch.float32).min)).exp_()


# ---- Forward. ----


class _Forward:
    def __init__(self, call: Call, cache: Cache | None) -> None:
        self.call = call
        self.scores = _Scores(call, cache)

    def run(self) -> None:
        call, rows = self.call, self.scores.queries
        out = rows.accumulator(call.out)
        # lse as [.., H, 1], like the rows of out.
        lse = rows.accumulator(call.out[..., :1])
        for first, last in self.scores.query_blocks():
            o, log_sum, greatest = self.attend(first, last)
            rows.add(out, first, last, o.permute(0, 2, 1, 3))
            rows.add(lse, first, last, log_sum.permute(0, 2, 1, 3))
            if call.s_dmask is not None:
                self.write_s_dmask(first, last, greatest)
        if call.s_dmask is not None:
            self.clear_s_dmask_behind_the_sequences()
        rows.finish(call.out, out)
        if call.lse is not None:
            if call.varlen:  # rows of no sequence are still zeros, which out's are to be
                row = torch.arange(lse.size(0), device=lse.device)[:, None, None]
                lse.masked_fill_(row >= call.cu_seqlens_q[-1], math.inf)
            rows.finish(call.lse.transpose(-1, -2)[..., None], lse)

    def attend(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(out [B, H, m, Dv], lse and greatest score [B, H, m, 1]) of a block of queries."""
        call, scores = self.call, self.scores
        q = scores.queries.load(call.q, first, last)
        greatest = q.new_full((q.size(0), scores.heads, last - first, 1), -math.inf)
        total = torch.zeros_like(greatest)
        out = q.new_zeros((*greatest.shape[:3], call.v.size(-1)))
        for tile in scores.key_blocks(first, last):
            k = scores.keys.load(call.k, tile.first_k, tile.last_k)
            v = scores.keys.load(call.v, tile.first_k, tile.last_k)
            s, _, _ = scores.of(q, k, tile)
            previous, greatest = greatest, greatest.maximum(s.amax(-1, keepdim=True))
            weights = _exp(s, greatest)
            shrink = _exp(previous, greatest)
            total = total * shrink + weights.sum(-1, keepdim=True)
            if call.dropout_p > 0.0:
                weights = weights.masked_fill(~scores.kept(tile), 0.0)
            out = out * shrink + scores.weigh(weights, v)
        return *self.normalise(out, total, greatest), greatest

    def normalise(
        self, out: torch.Tensor, total: torch.Tensor, greatest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = self.call
        if call.learnable_sink is not None:
            sink = call.learnable_sink.float().view(1, -1, 1, 1)
            above = greatest.maximum(sink)
            shrink = _exp(greatest, above)
            out, total, greatest = out * shrink, total * shrink + _exp(sink, above), above
        empty = total == 0.0
        nothing = math.inf if call.learnable_sink is None else -math.inf
        lse = torch.where(empty, nothing, greatest + total.log())
        factor = 1.0 / (1.0 - call.dropout_p)
        return out * torch.where(empty, 0.0, factor / total), lse

    def write_s_dmask(self, first: int, last: int, greatest: torch.Tensor) -> None:
        call, scores = self.call, self.scores
        q = scores.queries.load(call.q, first, last)
        call.s_dmask[:, :, first:last] = 0.0
        for tile in scores.key_blocks(first, last):
            k = scores.keys.load(call.k, tile.first_k, tile.last_k)
            s, _, _ = scores.of(q, k, tile)
            weights = _exp(s, greatest)
            kept = scores.kept(tile)
            call.s_dmask[:, :, first:last, tile.first_k : tile.last_k] = torch.where(
                kept, weights, -weights
            )

    def clear_s_dmask_behind_the_sequences(self) -> None:
        s_dmask, scores = self.call.s_dmask, self.scores
        s_dmask[:, :, scores.longest_q :] = 0.0
        if isinstance(scores.seqlen_q, int):
            return
        row = torch.arange(scores.longest_q, device=s_dmask.device)[:, None]
        behind = row >= scores.seqlen_q[:, None, None, None]
        s_dmask[:, :, : scores.longest_q].masked_fill_(behind, 0.0)


def write_s_dmask(call: Call) -> None:
    """S_dmask of a call, whatever computes its other results: it is quadratic, and for tests."""
    forward = _Forward(call, None)
    for first, last in forward.scores.query_blocks():
        _, _, greatest = forward.attend(first, last)
        forward.write_s_dmask(first, last, greatest)
    forward.clear_s_dmask_behind_the_sequences()


# ---- Backward. ----


class _Backward:
    """dS = P (dP - delta), tile by tile, from the forward's lse."""

    def __init__(self, call: Call, gradients: Gradients) -> None:
        self.call, self.gradients = call, gradients
        self.scores = _Scores(call, None)
        self.d_bias = None
        if gradients.d_attn_bias is not None:
            shape = self.scores.bias.shape
            self.d_bias = torch.zeros(shape, dtype=torch.float32, device=call.q.device)

    def run(self) -> None:
        call, gradients, scores = self.call, self.gradients, self.scores
        dq = scores.queries.accumulator(call.q)
        dk, dv = scores.keys.accumulator(call.k), scores.keys.accumulator(call.v)
        # [.., H, 1], like the rows of out.
        delta = (gradients.dout.float() * call.out.float()).sum(-1, keepdim=True)
        lse = _lse_of_terms(call)[..., None]
        for first, last in scores.query_blocks():
            q, dout, row_delta, row_lse = (
                scores.queries.load(x, first, last) for x in (call.q, gradients.dout, delta, lse)
            )
            row = _Row(q, dout, row_delta.permute(0, 2, 1, 3), row_lse.permute(0, 2, 1, 3))
            for tile in scores.key_blocks(first, last):
                self.add_tile(tile, row, dq, dk, dv)
        scores.queries.finish(gradients.dq, dq)
        scores.keys.finish(gradients.dk, dk)
        scores.keys.finish(gradients.dv, dv)
        if self.d_bias is not None:
            gradients.d_attn_bias.copy_(self.d_bias.view(gradients.d_attn_bias.shape))
        if gradients.d_learnable_sink is not None:
            write_sink_gradient(call, gradients, delta[..., 0])

    def add_tile(
        self, tile: _Tile, row: _Row, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        call, scores = self.call, self.scores
        k = scores.keys.load(call.k, tile.first_k, tile.last_k)
        v = scores.keys.load(call.v, tile.first_k, tile.last_k)
        s, tanh, hidden = scores.of(row.q, k, tile)
        # A query that sees nothing has lse = +inf, and so P = 0.
        probabilities = (s - row.lse).exp_()
        if not isinstance(scores.seqlen_q, int):
            # Rows behind a sequence's end have been read as zeros, their lse too.
            i = torch.arange(tile.first_q, tile.last_q, device=s.device)[:, None]
            probabilities.masked_fill_(i >= scores.seqlen_q[:, None, None, None], 0.0)
        d_probabilities = scores.product(row.dout, v)
        if call.dropout_p > 0.0:
            factor = scores.kept(tile).float().mul_(1.0 / (1.0 - call.dropout_p))
            d_probabilities = d_probabilities * factor
            self.add_columns(dv, tile, probabilities * factor, row.dout)
        else:
            self.add_columns(dv, tile, probabilities, row.dout)
        ds = probabilities * (d_probabilities - row.delta)
        if hidden is not None:
            ds = ds.masked_fill_(hidden, 0.0)
        if self.d_bias is not None:
            part = scores.part(self.d_bias, tile)
            part += ds.sum_to_size(part.shape)
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = ds * call.scale
        dq_tile = scores.weigh(ds, k).permute(0, 2, 1, 3)
        scores.queries.add(dq, tile.first_q, tile.last_q, dq_tile)
        self.add_columns(dk, tile, ds, row.q)

    def add_columns(
        self, to: torch.Tensor, tile: _Tile, weights: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Adds sum_i weights_ij rows_id, summed over the heads of a group too."""
        scores = self.scores
        sums = scores.grouped(weights).transpose(-1, -2) @ scores.by_group(rows)
        scores.keys.add(to, tile.first_k, tile.last_k, sums.permute(0, 2, 1, 3))


class _Row(NamedTuple):
    """A block of queries: [B, m, H, D], and [B, H, m, 1] of what each has one of."""

    q: torch.Tensor
    dout: torch.Tensor
    delta: torch.Tensor
    lse: torch.Tensor


def _lse_of_terms(call: Call) -> torch.Tensor:
    """lse like the rows of out; +inf also where there is no term but a sink of -inf: P = 0."""
    lse = call.lse.transpose(-1, -2)
    return lse if call.learnable_sink is None else lse.masked_fill(lse == -math.inf, math.inf)


def write_sink_gradient(call: Call, gradients: Gradients, delta: torch.Tensor) -> None:
    """d sink_h = -sum_i exp(sink_h - lse_i) delta_i; delta [B, Sq, H], varlen [total_q, H]."""
    terms = (call.learnable_sink.float() - _lse_of_terms(call)).exp_() * delta
    if call.varlen:  # rows that belong to no sequence hold anything
        row = torch.arange(terms.size(0), device=terms.device)[:, None]
        terms = terms.masked_fill_(row >= call.cu_seqlens_q[-1], 0.0)
    gradients.d_learnable_sink.copy_(-terms.flatten(0, -2).sum(0))


# ---- The KV cache. ----


def _append(call: Call, cache: Cache) -> Call:
    """Writes the new keys and values behind the cached ones; the call with its queries rotated."""
    if cache.k_new is None:
        return call
    seqlens = cache.seqlens.long()[:, None]
    rows = None if call.block_table is not None else _cache_rows(call, cache)
    where = _Cached(call, seqlens, seqlens, rows)
    position = seqlens + torch.arange(cache.seqlen_new, device=seqlens.device)
    target = where.locate(position)
    k_new = cache.k_new
    if cache.rotary_cos is not None:
        k_new = rotate(k_new, cache, position)
        if min(call.band) >= 0 or max(call.band) >= 0:
            position = seqlens + torch.arange(call.q.size(1), device=seqlens.device)
        else:
            position = seqlens.expand(-1, call.q.size(1))
        call = call._replace(q=rotate(call.q, cache, position))
    if position.numel() > 0 or k_new.numel() > 0:
        call.k[target] = k_new
        call.v[target] = cache.v_new
    return call


def rotate(x: torch.Tensor, cache: Cache, position: torch.Tensor) -> torch.Tensor:
    """x [B, n, H, D] turned by the angles of position [B, n] (Su et al., "RoFormer", 2021)."""
    half = cache.rotary_cos.size(1)
    if half == 0 or cache.rotary_cos.size(0) == 0:
        return x
    position = position.clamp(0, cache.rotary_cos.size(0) - 1)
    cos, sin = (t[position][:, :, None].float() for t in (cache.rotary_cos, cache.rotary_sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if cache.rotary_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
