// The two products of the forward in pairs of bfloat16: S^T = K Q^T with the keys' rows as they
// are, and O^T += V^T P^T, whose sums have the softmax statistics in their lanes as the scores do.
#if defined(FA_CPU_PAIR_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_PRODUCTS_INL_H_
#undef FA_CPU_PAIR_PRODUCTS_INL_H_
#else
#define FA_CPU_PAIR_PRODUCTS_INL_H_
#endif

#include "cpu/pairs.h"
#include "cpu/sequence-inl.h"
#include "cpu/softmax-inl.h"

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
        k_(reinterpret_cast<uint16_t*>(scratch + layout.k)),
        v_(reinterpret_cast<uint16_t*>(scratch + layout.v)) {
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

  HWY_INLINE void load_keys(const KeyTile& tile) const {
    const uint16_t* rows[kLongTileKeys];
    run_.find_rows(call_.args.k, tile, rows);
    call_.pairs->pack_a({rows, tile.keys.end - tile.first_key, call_.problem.head_dim}, k_,
                        kPairRows * depth_);
  }

  // V^T; zeros where the tile has no key, since a zero P meets them.
  HWY_INLINE void load_values(const KeyTile& tile) const {
    const uint16_t* rows[kLongTileKeys];
    run_.find_rows(call_.args.v, tile, rows);
    call_.pairs->pack_a_transposed({rows, tile.keys.end - tile.first_key, call_.problem.head_dim_v},
                                   v_, kPairRows * call_.tile_keys);
  }

  HWY_INLINE void scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, depth_, panel.q);
  }

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

  HWY_INLINE void values(const ForwardPanel& panel, const ScoreTile& tile) const {
    pair_key_sum(call_, panel, tile, v_, v_rows_, panel.started, panel.o);
  }

  // O from O^T, one row per lane.
  HWY_INLINE void store_rows(const ForwardPanel& panel, float* HWY_RESTRICT rows) const {
    rows_of_blocks(panel.o, v_rows_, panel.num_lanes, rows, v_rows_);
  }

 private:
  const ForwardCall& call_;
  const SequenceRun& run_;
  const int64_t depth_;
  const int64_t v_rows_;
  uint16_t* const k_;
  uint16_t* const v_;
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
