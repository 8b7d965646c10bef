// The five products of the backward in fp32, with the copies that they read. PairGradientProducts
// does the same in pairs of bfloat16.
#if defined(FA_CPU_GRADIENT_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_GRADIENT_PRODUCTS_INL_H_
#undef FA_CPU_GRADIENT_PRODUCTS_INL_H_
#else
#define FA_CPU_GRADIENT_PRODUCTS_INL_H_
#endif

#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// A panel and what phase `prepare` left of it.
struct BackwardPanel : QueryPanel {
  int64_t number;  // among the panels of the buffers
  float* q;        // Q and dO, packed as S and dP want them
  float* dout;
  float* lse;
  float* delta;
  float* dq;      // of one chunk of keys
  float* dq_sum;  // of the chunks before, where that is to be added; else dq
};

// Which of the sums that a panel and a tile add to start or end with them.
struct Turn {
  bool starts_chunk;  // dQ of the panel, within a chunk of keys
  bool ends_chunk;
  bool ends_queries;  // dQ of the panel
  bool ends_keys;     // dK and dV of the tile
};

class FloatGradientProducts {
 public:
  static constexpr bool kPairs = false;
  static constexpr bool kAddsShares = true;  // those of chunks of keys to dQ
  // Of packed Q or dO, in floats per query.
  static int64_t packed_size(int64_t head_dim) { return head_dim; }

  FloatGradientProducts(const BackwardCall& call, const SequenceRun& run,
                        const BackwardBuffers& buffers, const BackwardScratch& layout,
                        float* scratch)
      : call_(call),
        run_(run),
        buffers_(buffers),
        k_row_(padded_row(call.problem.head_dim)),
        v_row_(padded_row(call.problem.head_dim_v)),
        k_(scratch + layout.k),
        v_(scratch + layout.v),
        dk_(scratch + layout.dk),
        dv_(scratch + layout.dv),
        p_(scratch + layout.probabilities),
        ds_(scratch + layout.score_gradients),
        writes_dq_((call.num_chunks == 1 || call.owns_panels()) && may_write(call.args.dq)),
        writes_keys_(may_write(call.args.dk) && may_write(call.args.dv)) {}

  // Rows of Q and dO; Q^T, times scale * log2(e), and dO^T.
  HWY_INLINE void pack(const BackwardPanel& panel) const {
    const auto pack_rows = [&](const core::TensorView& from, int64_t row, float factor, float* rows,
                               float* transposed) HWY_ATTR {
      run_.load_queries(from, panel, row, rows);
      SequenceRun::transpose_panel<kStripLanes<Shapes>>(panel, rows, row, from.shape[from.ndim - 1],
                                                        factor, transposed);
    };
    pack_rows(call_.args.q, k_row_, call_.scale_log2, q_rows(panel), panel.q);
    pack_rows(call_.args.dout, v_row_, 1.0f, dout_rows(panel), panel.dout);
  }

  HWY_INLINE void load_tile(const KeyTile& tile, int64_t num_panels) {
    run_.load_rows(call_.args.k, tile, k_row_, k_);
    left_v_ = run_.left_rows(call_.args.v, tile, num_panels, Shapes::Scores::kRows, v_row_, v_);
  }

  // S = Q K^T.
  HWY_INLINE void scores(const BackwardPanel& panel, const ScoreTile& tile) const {
    const LeftRows k{{nullptr, 0}, 0, {k_, k_row_}};
    score_product<Shapes>(panel.q, panel.vectors(), k, call_.problem.head_dim,
                          run_.keys_of(panel, tile), p_);
  }

  // dP = dO V^T.
  HWY_INLINE void probability_gradients(const BackwardPanel& panel, const ScoreTile& tile) const {
    score_product<Shapes>(panel.dout, panel.vectors(), left_v_, call_.problem.head_dim_v,
                          run_.keys_of(panel, tile), ds_);
  }

  HWY_INLINE void start_tile(const KeyTile& tile) {
    num_rows_ = tile.keys.end - tile.first_key;
    started_ = false;
    written_ = {0, 0};
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K. Sums that end go where they belong.
  HWY_INLINE void accumulate(const BackwardPanel& panel, const ScoreTile& tile, Turn turn) {
    if (!started_) clear_rows(0, tile.begin);
    if (turn.ends_keys && writes_keys_) {
      written_ = {tile.begin, tile.end};
      accumulate_keys(panel, tile, run_.key_target(call_.args.dk, tile.first_key, call_.scale),
                      run_.key_target(call_.args.dv, tile.first_key, call_.keep_scale));
    } else {
      accumulate_keys(panel, tile, KeptRows{dk_, k_row_}, KeptRows{dv_, v_row_});
    }
    if (!started_) clear_rows(tile.end, num_rows_);
    started_ = true;
    accumulate_queries(panel, tile, turn);
  }

  HWY_INLINE void finish_tile() const {
    if (!started_) clear_rows(0, num_rows_);
  }

  // Rounds those of dK and dV that no product has written, times their factors, to where they
  // belong.
  HWY_INLINE void store(const KeyTile& tile) const {
    const semantics::Range around[] = {{tile.keys.begin, tile.first_key + written_.begin},
                                       {tile.first_key + written_.end, tile.keys.end}};
    for (const semantics::Range keys : around) {
      if (keys.empty()) continue;
      run_.store_rows(call_.args.dk, {keys, tile.first_key}, dk_, k_row_, call_.scale);
      run_.store_rows(call_.args.dv, {keys, tile.first_key}, dv_, v_row_, call_.keep_scale);
    }
  }

  // The same for dQ.
  HWY_INLINE void store_queries(const BackwardPanel& panel) const {
    const bool is_written = writes_dq_ && !panel.keys.empty();
    const int64_t first = is_written ? panel.num_lanes / kValueRows * kValueRows : 0;
    run_.store_queries(call_.args.dq, panel.from(first), panel.dq + first * dq_row(), dq_row(),
                       call_.scale);
  }

 private:
  // Whether products may write a gradient: in fp32, and whole vectors.
  static bool may_write(const core::TensorView& gradient) {
    return gradient.dtype == core::DataType::kFloat32 &&
           gradient.shape[gradient.ndim - 1] % kLanes == 0;
  }
  int64_t dq_row() const { return round_up(call_.problem.head_dim, kMaxLanes); }

  HWY_INLINE void accumulate_queries(const BackwardPanel& panel, const ScoreTile& tile,
                                     Turn turn) const {
    const KeptRows sums{panel.dq, dq_row()};
    const auto accumulate = [&](const auto& dq, const auto& rest) HWY_ATTR {
      const int64_t k_vectors = ceil_div(call_.problem.head_dim, kLanes);
      value_product<Shapes>(ds_, panel.num_lanes, k_, k_row_, k_vectors, run_.keys_of(panel, tile),
                            !turn.starts_chunk, sums, dq, rest);
    };
    const bool adds = turn.ends_chunk && panel.dq_sum != panel.dq;
    const bool writes = turn.ends_queries && writes_dq_;
    if (!adds && !writes) return accumulate(sums, sums);
    const FinishedRows rest{adds ? panel.dq_sum : panel.dq, dq_row(), 1.0f,
                            adds ? panel.dq_sum : nullptr, dq_row()};
    FinishedRows dq = rest;
    if (writes) {
      dq = run_.query_target(call_.args.dq, panel, call_.scale);
      dq.plus = rest.plus;
      dq.plus_row = rest.plus_row;
    }
    accumulate(dq, rest);
  }

  // dV and dK; the first panel of a tile starts them.
  template <class To>
  HWY_INLINE void accumulate_keys(const BackwardPanel& panel, const ScoreTile& tile, const To& dk,
                                  const To& dv) const {
    if (started_) {
      multiply_keys<true>(panel, tile, dk, dv);
    } else {
      multiply_keys<false>(panel, tile, dk, dv);
    }
  }
  template <bool kAccumulate, class To>
  HWY_INLINE void multiply_keys(const BackwardPanel& panel, const ScoreTile& tile, const To& dk,
                                const To& dv) const {
    const auto queries_of = run_.queries_of(panel, tile);
    const int64_t k_vectors = ceil_div(call_.problem.head_dim, kLanes);
    const int64_t v_vectors = ceil_div(call_.problem.head_dim_v, kLanes);
    key_product<kAccumulate>(p_, dout_rows(panel), v_row_, v_vectors, tile.begin, tile.end,
                             queries_of, {dv_, v_row_}, dv);
    key_product<kAccumulate>(ds_, q_rows(panel), k_row_, k_vectors, tile.begin, tile.end,
                             queries_of, {dk_, k_row_}, dk);
  }

  // Rows of dK and dV that the first panel does not see.
  HWY_INLINE void clear_rows(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    std::fill_n(dk_ + begin * k_row_, (end - begin) * k_row_, 0.0f);
    std::fill_n(dv_ + begin * v_row_, (end - begin) * v_row_, 0.0f);
  }

  // [kPanel][k_row], [kPanel][v_row]
  float* q_rows(const BackwardPanel& panel) const {
    return buffers_.q_right + panel.number * kPanel * k_row_;
  }
  float* dout_rows(const BackwardPanel& panel) const {
    return buffers_.dout_right + panel.number * kPanel * v_row_;
  }

  const BackwardCall& call_;
  const SequenceRun& run_;
  const BackwardBuffers& buffers_;
  const int64_t k_row_;
  const int64_t v_row_;
  float* const k_;  // the tile: [tile_keys][k_row], [tile_keys][v_row]
  float* const v_;
  float* const dk_;
  float* const dv_;
  float* const p_;        // [tile_keys][kPanel]
  float* const ds_;       // [tile_keys][kPanel]
  const bool writes_dq_;  // products write dQ, and dK and dV, where their sums end
  const bool writes_keys_;
  int64_t num_rows_ = 0;            // of the tile
  semantics::Range written_{0, 0};  // of those, by products
  bool started_ = false;            // dk_ and dv_ hold something
  LeftRows left_v_{};               // of the tile
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
