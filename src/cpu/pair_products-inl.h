// The two products of the forward in pairs of bfloat16: S^T = K Q^T with the keys' rows as they
// are, and O^T += V^T P^T, whose sums have the softmax statistics in their lanes as the scores do.
#if defined(FA_CPU_PAIR_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_PRODUCTS_INL_H_
#undef FA_CPU_PAIR_PRODUCTS_INL_H_
#else
#define FA_CPU_PAIR_PRODUCTS_INL_H_
#endif

#include "cpu/pair_softmax-inl.h"
#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// S^T[key][query] = sum of a[key][d] b[query][d], b being packed, for what the panel's queries see.
HWY_INLINE void pair_score_product(const AttentionCall& call, const SequenceRun& run,
                                   const QueryPanel& panel, const ScoreTile& tile,
                                   const uint16_t* a, int64_t depth, const float* b) {
  constexpr int64_t kStrip = 2 * kPairColumns;  // so that a causal mask cuts closely
  const int64_t columns = round_up(panel.num_lanes, kPairColumns);
  const int64_t strip = run.crosses_band(panel, tile) && panel.one_head() ? kStrip : columns;
  const auto keys_of = run.keys_of(panel, tile);
  for (int64_t column = 0; column < columns; column += strip) {
    const int64_t width = std::min(strip, columns - column);
    const semantics::Range keys = keys_of(column, column + width);
    if (keys.empty()) continue;
    const int64_t first = keys.begin / kPairRows * kPairRows;
    call.pairs->multiply({.a = a + first * depth,
                          .a_row_step = kPairRows * depth,
                          .b = reinterpret_cast<const uint32_t*>(b) + column * depth / 2,
                          .b_depth_step = kBlockB,
                          .b_column_step = kPairColumns * depth / 2,
                          .c = tile.at(first, column / kPairColumns),
                          .c_column_step = tile.column_step,
                          .rows = round_up(keys.end, kPairRows) - first,
                          .columns = width,
                          .depth = depth,
                          .accumulate = false});
  }
}

// The scores of the tile's chunk from row `first` on, in one of two buffers that take turns.
HWY_INLINE ScoreTile chunk_of(const ScoreTile& tile, int64_t first) {
  return {tile.scores + first / kChunkKeys % 2 * kChunkKeys * kPanel,
          tile.first_key + first,
          std::max<int64_t>(tile.begin - first, 0),
          std::min(tile.end - first, kChunkKeys),
          kLanes,
          kChunkColumn};
}

// s = -inf in rows outside the tile, so that the chunk is a whole one.
HWY_INLINE void hide_rows_outside(ScoreTile& chunk) {
  const auto hide = [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t v = 0; v < kPanel / kLanes; ++v) {
      std::fill_n(chunk.at(begin, v), (end - begin) * kLanes, kMinusInfinity);
    }
  };
  if (chunk.begin > 0) hide(0, chunk.begin);
  if (chunk.end < kChunkKeys) hide(chunk.end, kChunkKeys);
  chunk.begin = 0;
  chunk.end = kChunkKeys;
}

// Whether a panel's chunks are as wide as the kernels for chunks want them.
HWY_INLINE bool fills_chunks(const QueryPanel& panel) {
  return panel.vectors() * kLanes == kChunkLanes;
}

// The product of a whole chunk of keys.
HWY_INLINE PairProduct whole_product(const uint16_t* a, int64_t depth, const float* b,
                                     const ScoreTile& chunk) {
  return {.a = a,
          .a_row_step = kPairRows * depth,
          .b = reinterpret_cast<const uint32_t*>(b),
          .b_depth_step = kBlockB,
          .b_column_step = kPairColumns * depth / 2,
          .c = chunk.scores,
          .c_column_step = chunk.column_step,
          .rows = kChunkKeys,
          .columns = kChunkLanes,
          .depth = depth,
          .accumulate = false};
}

// C += A P^T or A dS^T, for what the panel's queries see. a: blocks of tile_keys of depth; p: pairs
// in the place of scores.
HWY_INLINE void pair_key_sum(const AttentionCall& call, const QueryPanel& panel, const ScoreTile& p,
                             const uint16_t* a, int64_t rows, bool accumulate, float* c) {
  const int64_t first = p.begin / kPairDepth * kPairDepth;
  call.pairs->multiply({.a = a + first * kPairRows,
                        .a_row_step = kPairRows * call.tile_keys,
                        .b = reinterpret_cast<const uint32_t*>(p.at(first / 2, 0)),
                        .b_depth_step = kBlockB,
                        .b_column_step = p.column_step,
                        .c = c,
                        .c_column_step = rows * kPairColumns,
                        .rows = rows,
                        .columns = round_up(panel.num_lanes, kPairColumns),
                        .depth = round_up(p.end, kPairDepth) - first,
                        .accumulate = accumulate});
}

// Rows of a panel from their transpose in blocks of C: to[lane][0 .. n).
HWY_INLINE void rows_of_blocks(const float* HWY_RESTRICT from, int64_t n, int64_t num_lanes,
                               float* HWY_RESTRICT to, int64_t row) {
  for (int64_t lane = 0; lane < num_lanes; lane += kPairColumns) {
    for (int64_t d = 0; d < n; d += 4) {
      transpose_4_rows(from + lane * n + d * kPairColumns, kPairColumns,
                       std::min(kPairColumns, num_lanes - lane), 1.0f, to + lane * row + d, row);
    }
  }
}

class PairProducts {
 public:
  // Probabilities become pairs of keys; o is transposed.
  static constexpr bool kPairs = true;
  static constexpr bool kFewQueries = false;

  PairProducts(const ForwardCall& call, const SequenceRun& run, const ForwardScratch& layout,
               float* scratch)
      : call_(call),
        run_(run),
        depth_(round_up(call.problem.head_dim, kPairDepth)),
        v_rows_(round_up(call.problem.head_dim_v, kPairRows)),
        scales_late_(run.may_scale_late() && !call.problem.dropout),
        scale_(scales_late_ ? call.scale_log2 : 1.0f),
        most_lag_(call.problem.wants_s_dmask ? 0.0f : kMostLag),  // which wants the maximum itself
        own_k_(reinterpret_cast<uint16_t*>(scratch + layout.k)),
        own_v_(reinterpret_cast<uint16_t*>(scratch + layout.v)),
        k_(own_k_),
        v_(own_v_) {
    call_.pairs->begin();
  }
  ~PairProducts() { call_.pairs->end(); }
  PairProducts(const PairProducts&) = delete;
  PairProducts& operator=(const PairProducts&) = delete;

  HWY_INLINE void load_queries(const ForwardPanel& panel) const {
    const uint16_t* rows[kMaxPanel];
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      rows[lane] = call_.q.as<const uint16_t>() +
                   run_.query_offset(call_.q, panel.head(lane), panel.query(lane));
    }
    call_.pairs->pack_b_transposed({rows, panel.num_lanes, call_.problem.head_dim},
                                   reinterpret_cast<uint32_t*>(panel.q), depth_ / 2 * kPairColumns);
  }

  HWY_INLINE void load_keys(const KeyTile& tile) {
    if (call_.packed.tiles != nullptr) {
      k_ = packed_keys(call_, run_, tile);
    } else {
      pack_keys(call_, run_, tile, own_k_);
    }
  }

  HWY_INLINE void load_values(const KeyTile& tile) {
    if (call_.packed.tiles != nullptr) {
      v_ = packed_keys(call_, run_, tile) + call_.tile_keys * depth_;
    } else {
      pack_values(call_, run_, tile, own_v_);
    }
  }

  // Where ForwardCall::packed has a tile: K, and V^T behind it.
  HWY_INLINE static uint16_t* packed_keys(const ForwardCall& call, const SequenceRun& run,
                                          const KeyTile& tile) {
    return reinterpret_cast<uint16_t*>(
        call.packed.at(run.number(), tile.first_key / call.tile_keys));
  }

  HWY_INLINE static void pack_keys(const ForwardCall& call, const SequenceRun& run,
                                   const KeyTile& tile, uint16_t* to) {
    const uint16_t* rows[kPairTileKeys];
    run.find_rows(call.args.k, tile, rows);
    call.pairs->pack_a({rows, tile.keys.end - tile.first_key, call.problem.head_dim}, to,
                       kPairRows * round_up(call.problem.head_dim, kPairDepth));
  }

  // V^T; zeros where the tile has no key, since a zero P meets them.
  HWY_INLINE static void pack_values(const ForwardCall& call, const SequenceRun& run,
                                     const KeyTile& tile, uint16_t* to) {
    const uint16_t* rows[kPairTileKeys];
    run.find_rows(call.args.v, tile, rows);
    call.pairs->pack_a_transposed({rows, tile.keys.end - tile.first_key, call.problem.head_dim_v},
                                  to, kPairRows * call.tile_keys);
  }

  HWY_INLINE void scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, depth_, panel.q);
  }

  // S, P = softmax(S), O += P V for one panel and one tile. The scores of a chunk of keys become
  // probabilities before they leave L1; O += P V has the whole tile, since it reads and writes O.
  HWY_INLINE void attend(ForwardPanel& panel, const ScoreTile& tile, int64_t batch) const {
    if (!panel.started) {
      std::fill_n(panel.running_max, kPanel, kMinusInfinity);
      std::fill_n(panel.running_sum, kPanel, 0.0f);
    }
    const bool whole = fills_chunks(panel) && !call_.problem.dropout;
    ScoreTile pairs = pairs_of(tile);
    pairs.end = pairs.begin;
    for (int64_t first = tile.begin / kChunkKeys * kChunkKeys; first < tile.end;
         first += kChunkKeys) {
      ScoreTile chunk = chunk_of(tile, first);
      if (!whole || pairs.end == tile.begin) {  // else it was multiplied beside the one before
        pair_score_product(call_, run_, panel, chunk, k_ + first * depth_, depth_, panel.q);
      }
      run_.finish_scores(panel, chunk, scales_late_);
      const int64_t end = first + chunk.end;
      if (whole) hide_rows_outside(chunk);
      alignas(64) float correction[kPanel];
      if (raise_maxima(panel, chunk, scale_, most_lag_, correction)) {
        add_values(panel, pairs);
        pairs.begin = pairs.end;
        if (panel.started) rescale(panel, correction);
      }
      if (whole) {
        exponentiate(panel, tile, first, pairs);
      } else {
        store_probabilities(call_, panel, chunk, scale_, batch, pairs.at(first / 2, 0),
                            pairs.column_step);
      }
      pairs.end = end;
    }
    add_values(panel, pairs);
  }

  // O from O^T, one row per lane.
  HWY_INLINE void store_rows(const ForwardPanel& panel, float* HWY_RESTRICT rows) const {
    rows_of_blocks(panel.o, v_rows_, panel.num_lanes, rows, v_rows_);
  }

 private:
  // The subtrahend of scores in base 2 is a maximum that may lag behind by as much, so that what
  // was accumulated is rescaled rarely. Sums stay far from overflow, and bfloat16 as precise.
  static constexpr float kMostLag = 8.0f;

  // The tile's probabilities, in pairs behind both: [kPanel / kLanes][tile_keys / 2][kLanes].
  HWY_INLINE ScoreTile pairs_of(const ScoreTile& tile) const {
    ScoreTile pairs = tile.in(tile.scores + 2 * kChunkKeys * kPanel);
    pairs.column_step = call_.tile_keys / 2 * kLanes;
    return pairs;
  }

  // p = exp2(s - maximum) of a whole chunk, while the scores of the next one are multiplied.
  HWY_INLINE void exponentiate(const ForwardPanel& panel, const ScoreTile& tile, int64_t first,
                               const ScoreTile& pairs) const {
    alignas(64) float maximum[kPanel];
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      const Float m = hn::Load(kFloats, panel.running_max + v * kLanes);
      hn::Store(finite_maximum(m), kFloats, maximum + v * kLanes);
    }
    const int64_t next = first + kChunkKeys;
    const PairProduct product =
        whole_product(k_ + next * depth_, depth_, panel.q, chunk_of(tile, next));
    call_.pairs->exponentiate(
        {chunk_of(tile, first).scores, scale_, maximum, panel.running_sum,
         reinterpret_cast<uint32_t*>(pairs.at(first / 2, 0)), pairs.column_step},
        next < tile.end ? &product : nullptr);
  }

  // O += P V.
  HWY_INLINE void add_values(ForwardPanel& panel, const ScoreTile& pairs) const {
    if (pairs.begin >= pairs.end) return;
    clear_pairs_around(panel, pairs);
    pair_key_sum(call_, panel, pairs, v_, v_rows_, panel.started, panel.o);
    panel.started = true;
  }

  // Multiplies what was accumulated for queries whose maximum was replaced.
  HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction) const {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      const Float factor = hn::Load(kFloats, correction + v * kLanes);
      if (hn::AllTrue(kFloats, hn::Eq(factor, hn::Set(kFloats, 1.0f)))) continue;
      float* HWY_RESTRICT o = panel.o + v * kLanes * v_rows_;
      for (int64_t d = 0; d < v_rows_; ++d) {
        hn::Store(hn::Mul(hn::Load(kFloats, o + d * kLanes), factor), kFloats, o + d * kLanes);
      }
    }
  }

  const ForwardCall& call_;
  const SequenceRun& run_;
  const int64_t depth_;
  const int64_t v_rows_;
  const bool scales_late_;  // the exponential applies the scale
  const float scale_;       // by which
  const float most_lag_;
  uint16_t* const own_k_;
  uint16_t* const own_v_;
  // The tile in work.
  const uint16_t* k_;
  const uint16_t* v_;
};

// The keys and values of a run of tiles, for all tasks that read them.
inline void pack_tiles(const ForwardCall& call, const ForwardTask& task, float*) {
  const SequenceRun run(call, task.batch, task.head_kv);
  const int64_t end = (task.first_panel + task.num_panels) * call.tile_keys;
  const semantics::Range keys{task.first_panel * call.tile_keys,
                              std::min<int64_t>(end, run.sequence().seqlen_k)};
  run.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
    uint16_t* to = PairProducts::packed_keys(call, run, tile);
    PairProducts::pack_keys(call, run, tile, to);
    PairProducts::pack_values(call, run, tile,
                              to + call.tile_keys * round_up(call.problem.head_dim, kPairDepth));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
