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
    call.pairs->multiply({a + first * depth, depth, reinterpret_cast<const uint32_t*>(b) + column,
                          kPanel, tile.scores + first * kPanel + column, kPanel,
                          round_up(keys.end, kPairRows) - first, width, depth, false});
  }
}

class PairProducts {
 public:
  // Probabilities become pairs of keys, [key / 2][query]; o is [dv][query].
  static constexpr bool kPairs = true;

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
    call_.pairs->pack_transposed({rows, panel.num_lanes, call_.problem.head_dim},
                                 reinterpret_cast<uint32_t*>(panel.q), kPanel);
  }

  HWY_INLINE void load_keys(const KeyTile& tile) const {
    run_.copy_rows(call_.args.k, tile, depth_, k_);
  }

  // V^T: [v_rows][tile_keys]; zeros where the tile has no key, since a zero P meets them.
  HWY_INLINE void load_values(const KeyTile& tile) const {
    const core::TensorView& view = call_.args.v;
    const core::Rows rows = core::key_rows(view, run_.sequence());
    const uint16_t* from[kPairTileKeys] = {};
    for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
      from[key - tile.first_key] = view.as<const uint16_t>() + run_.key_offset(view, rows, key);
    }
    call_.pairs->transpose({from, tile.keys.end - tile.first_key, call_.problem.head_dim_v}, v_,
                           call_.tile_keys);
  }

  // Folded into q it would be rounded with it.
  HWY_INLINE float pending_scale() const { return call_.scale_log2; }

  HWY_INLINE void scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, depth_, panel.q);
  }

  HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction) const {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      const Float factor = hn::Load(kFloats, correction + v * kLanes);
      if (hn::AllTrue(kFloats, hn::Eq(factor, hn::Set(kFloats, 1.0f)))) continue;
      float* HWY_RESTRICT o = panel.o + v * kLanes;
      for (int64_t d = 0; d < v_rows_; ++d) {
        hn::Store(hn::Mul(hn::Load(kFloats, o + d * kPanel), factor), kFloats, o + d * kPanel);
      }
    }
  }

  HWY_INLINE void values(const ForwardPanel& panel, const ScoreTile& tile) const {
    const int64_t first = tile.begin / kPairDepth * kPairDepth;
    call_.pairs->multiply({v_ + first, call_.tile_keys,
                           reinterpret_cast<const uint32_t*>(tile.scores) + first / 2 * kPanel,
                           kPanel, panel.o, kPanel, v_rows_,
                           round_up(panel.num_lanes, kPairColumns),
                           round_up(tile.end, kPairDepth) - first, panel.started});
  }

  // O from O^T, one row per lane.
  HWY_INLINE void store_rows(const ForwardPanel& panel, float* HWY_RESTRICT rows) const {
    const int64_t row = round_up(call_.problem.head_dim_v, kMaxLanes);
    for (int64_t d = 0; d < v_rows_; d += 4) {
      transpose_4_rows(panel.o + d * kPanel, kPanel, panel.num_lanes, 1.0f, rows + d, row);
    }
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
