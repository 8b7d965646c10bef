// The two products of the forward in fp32, S^T = K Q^T and O += P V, with the copies of keys,
// values and queries that they read. PairProducts does the same in pairs of bfloat16.
#if defined(FA_CPU_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PRODUCTS_INL_H_
#undef FA_CPU_PRODUCTS_INL_H_
#else
#define FA_CPU_PRODUCTS_INL_H_
#endif

#include "cpu/sequence-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// TileShapes: Shapes or WideShapes.
template <class TileShapes>
class FloatProductsOf {
 public:
  // Queries whose values are added at once.
  static constexpr int64_t kQueries = TileShapes::Values::kRows;
  // Probabilities stay fp32, [key][query]; o is [query][dv].
  static constexpr bool kPairs = false;
  static constexpr bool kFewQueries = false;

  FloatProductsOf(const ForwardCall& call, const SequenceRun& run, const ForwardScratch& layout,
                  float* scratch)
      : call_(call),
        run_(run),
        k_row_(padded_row(call.problem.head_dim)),
        v_row_(padded_row(call.problem.head_dim_v)),
        o_row_(round_up(call.problem.head_dim_v, kMaxLanes)),
        k_(scratch + layout.k),
        v_(scratch + layout.v),
        scores_(scratch + layout.scores) {}

  // Packs Q^T, times scale * log2(e).
  HWY_INLINE void load_queries(const ForwardPanel& panel) const {
    run_.template load_transposed<kStripLanes<TileShapes>>(call_.q, panel, call_.scale_log2,
                                                           scores_, panel.q);
  }
  HWY_INLINE void load_keys(const KeyTile& tile, int64_t num_panels) {
    left_k_ = run_.left_rows(call_.args.k, tile, num_panels, TileShapes::Scores::kRows, k_row_, k_);
  }
  HWY_INLINE void load_values(const KeyTile& tile) const {
    run_.load_rows(call_.args.v, tile, v_row_, v_);
  }

  HWY_INLINE void scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    score_product<TileShapes>(panel.q, panel.vectors(), left_k_, call_.problem.head_dim,
                              run_.keys_of(panel, tile), tile.scores);
  }

  // Multiplies what was accumulated for queries whose maximum rose.
  HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction) const {
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      if (correction[lane] == 1.0f) continue;
      const Float factor = hn::Set(kFloats, correction[lane]);
      float* HWY_RESTRICT o = panel.o + lane * o_row_;
      for (int64_t d = 0; d < o_row_; d += kLanes) {
        hn::Store(hn::Mul(hn::Load(kFloats, o + d), factor), kFloats, o + d);
      }
    }
  }

  // O += P V.
  HWY_INLINE void values(const ForwardPanel& panel, const ScoreTile& tile) const {
    const int64_t vectors = ceil_div(call_.problem.head_dim_v, kLanes);
    const KeptRows o{panel.o, o_row_};
    value_product<TileShapes>(tile.scores, panel.num_lanes, v_, v_row_, vectors,
                              run_.keys_of(panel, tile), panel.started, o, o, o);
  }

 private:
  const ForwardCall& call_;
  const SequenceRun& run_;
  const int64_t k_row_;
  const int64_t v_row_;
  const int64_t o_row_;
  float* const k_;       // [tile_keys][k_row]
  float* const v_;       // [tile_keys][v_row]
  float* const scores_;  // [tile_keys][kPanel]
  LeftRows left_k_{};    // of the tile in work
};

using FloatProducts = FloatProductsOf<Shapes>;

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
