// The five products of the backward in pairs of bfloat16.
//
//   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q   dQ^T += K^T dS^T
//
// P and dS of several panels are gathered before dV and dK, whose sums are read and written once
// per product.
#if defined(FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#undef FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#else
#define FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#endif

#include "cpu/gradient_products-inl.h"
#include "cpu/pair_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class PairGradientProducts {
 public:
  static constexpr bool kPairs = true;
  static int64_t packed_size(int64_t head_dim) { return round_up(head_dim, kPairDepth) / 2; }

  PairGradientProducts(const BackwardCall& call, const SequenceRun& run,
                       const BackwardScratch& layout, float* scratch)
      : call_(call),
        run_(run),
        k_depth_(round_up(call.problem.head_dim, kPairDepth)),
        v_depth_(round_up(call.problem.head_dim_v, kPairDepth)),
        k_row_(round_up(call.problem.head_dim, kMaxLanes)),
        v_row_(round_up(call.problem.head_dim_v, kMaxLanes)),
        k_(halves(scratch + layout.k)),
        k_transposed_(halves(scratch + layout.k_transposed)),
        v_(halves(scratch + layout.v)),
        dk_(scratch + layout.dk),
        dv_(scratch + layout.dv),
        p_(scratch + layout.probabilities),
        ds_(scratch + layout.score_gradients),
        gathered_p_(halves(scratch + layout.gathered_p)),
        gathered_ds_(halves(scratch + layout.gathered_ds)),
        rows_(scratch + layout.rows) {
    call_.pairs->begin();
  }
  ~PairGradientProducts() { call_.pairs->end(); }
  PairGradientProducts(const PairGradientProducts&) = delete;
  PairGradientProducts& operator=(const PairGradientProducts&) = delete;

  // Q and dO, both ways: pairs along head_dim for S and dP, pairs of queries for dK and dV.
  HWY_INLINE void pack(const BackwardPanel& panel) const {
    const uint16_t* rows[kMaxPanel] = {};
    const auto pack_rows = [&](const core::TensorView& from, float* transposed, uint32_t* pairs,
                               int64_t row) HWY_ATTR {
      for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
        rows[lane] = from.as<const uint16_t>() +
                     run_.query_offset(from, panel.head(lane), panel.query(lane));
      }
      const PairRows all{rows, kPanel, from.shape[from.ndim - 1]};
      call_.pairs->pack_transposed(all, words(transposed), kPanel);
      call_.pairs->pack(all, pairs, row);
    };
    pack_rows(call_.args.q, panel.q, q_pairs(panel.number), k_row_);
    pack_rows(call_.args.dout, panel.dout, dout_pairs(panel.number), v_row_);
  }

  HWY_INLINE void load_tile(const KeyTile& tile) const {
    run_.copy_rows(call_.args.k, tile, k_depth_, k_);
    run_.copy_rows(call_.args.v, tile, v_depth_, v_);
    const uint16_t* rows[kPairTileKeys];
    for (int64_t row = 0; row < tile.keys.end - tile.first_key; ++row) {
      rows[row] = tile.first_key + row < tile.keys.begin ? nullptr : k_ + row * k_depth_;
    }
    call_.pairs->transpose({rows, tile.keys.end - tile.first_key, call_.problem.head_dim},
                           k_transposed_, call_.tile_keys);
  }

  HWY_INLINE float pending_scale() const { return call_.scale_log2; }

  HWY_INLINE void scores(const BackwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, k_depth_, panel.q);
  }

  HWY_INLINE void probability_gradients(const BackwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, {ds_, tile.first_key, tile.begin, tile.end}, v_,
                       v_depth_, panel.dout);
  }

  HWY_INLINE void start_tile(const KeyTile& tile) {
    num_rows_ = round_up(tile.keys.end - tile.first_key, kPairRows);
    gathered_ = {0, 0};
    started_ = false;
  }

  // Panels come in the order of their numbers.
  HWY_INLINE void accumulate(const BackwardPanel& panel, const ScoreTile& tile) {
    if (gathered_.empty() || panel.number >= gathered_.begin + kGatheredPanels) {
      flush();
      gathered_ = {panel.number, panel.number};
    }
    // Those that were left out see nothing of the tile.
    for (int64_t p = gathered_.end; p < panel.number; ++p) {
      clear(gathered_at(gathered_p_, p), 0, num_rows_);
      clear(gathered_at(gathered_ds_, p), 0, num_rows_);
    }
    gathered_.end = panel.number + 1;
    gather(panel, tile, p_, gathered_at(gathered_p_, panel.number));
    gather(panel, tile, ds_, gathered_at(gathered_ds_, panel.number));

    const ScoreTile ds{ds_, tile.first_key, tile.begin, tile.end};
    pack_pairs(panel, ds);
    clear_pairs_around(panel, ds);
    const int64_t first = tile.begin / kPairDepth * kPairDepth;
    call_.pairs->multiply({k_transposed_ + first, call_.tile_keys, words(ds_) + first / 2 * kPanel,
                           kPanel, panel.dq, kPanel, k_row_,
                           round_up(panel.num_lanes, kPairColumns),
                           round_up(tile.end, kPairDepth) - first, true});
  }

  HWY_INLINE void finish_tile() {
    flush();
    if (started_) return;  // else no panel sees the tile
    std::fill_n(dk_, num_rows_ * k_row_, 0.0f);
    std::fill_n(dv_, num_rows_ * v_row_, 0.0f);
  }

  // dQ's rows, from its transpose.
  HWY_INLINE const float* rows(const BackwardPanel& panel) const {
    for (int64_t d = 0; d < k_row_; d += 4) {
      transpose_4_rows(panel.dq + d * kPanel, kPanel, panel.num_lanes, 1.0f, rows_ + d, k_row_);
    }
    return rows_;
  }

 private:
  static uint16_t* halves(float* at) { return reinterpret_cast<uint16_t*>(at); }
  static uint32_t* words(float* at) { return reinterpret_cast<uint32_t*>(at); }

  // [panels][kPanel / 2][row]: those of neighbouring panels lie end to end.
  HWY_INLINE uint32_t* q_pairs(int64_t number) const {
    return words(call_.buffers.q_pairs) + number * kPanel / 2 * k_row_;
  }
  HWY_INLINE uint32_t* dout_pairs(int64_t number) const {
    return words(call_.buffers.dout_pairs) + number * kPanel / 2 * v_row_;
  }

  HWY_INLINE uint16_t* gathered_at(uint16_t* gathered, int64_t number) const {
    return gathered + (number - gathered_.begin) * kPanel;
  }

  // Rows [begin, end) of one panel's columns.
  HWY_INLINE static void clear(uint16_t* columns, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(columns + row * kGatheredRow, kPanel, uint16_t{0});
    }
  }

  // Rounds a panel's P or dS: zero where it sees no key or has no query.
  HWY_INLINE void gather(const BackwardPanel& panel, const ScoreTile& tile, const float* from,
                         uint16_t* to) const {
    clear(to, 0, tile.begin);
    call_.pairs->round_rows(from + tile.begin * kPanel, kPanel, tile.end - tile.begin,
                            panel.vectors() * kLanes, kPanel, to + tile.begin * kGatheredRow,
                            kGatheredRow);
    clear(to, tile.end, num_rows_);
  }

  // dV += P^T dO, dK += dS^T Q, for the panels that were gathered.
  HWY_INLINE void flush() {
    if (gathered_.empty()) return;
    const int64_t depth = (gathered_.end - gathered_.begin) * kPanel;
    const auto add = [&](const uint16_t* left, const uint32_t* right, int64_t row, float* sums)
                         HWY_ATTR {
                           call_.pairs->multiply({left, kGatheredRow, right, row, sums, row,
                                                  num_rows_, row, depth, started_});
                         };
    add(gathered_p_, dout_pairs(gathered_.begin), v_row_, dv_);
    add(gathered_ds_, q_pairs(gathered_.begin), k_row_, dk_);
    started_ = true;
    gathered_ = {0, 0};
  }

  static constexpr int64_t kGatheredRow = kGatheredPanels * kPanel;

  const BackwardCall& call_;
  const SequenceRun& run_;
  const int64_t k_depth_;
  const int64_t v_depth_;
  const int64_t k_row_;
  const int64_t v_row_;
  uint16_t* const k_;                // [tile_keys][k_depth]
  uint16_t* const k_transposed_;     // [k_row][tile_keys]
  uint16_t* const v_;                // [tile_keys][v_depth]
  float* const dk_;                  // [tile_keys][k_row]
  float* const dv_;                  // [tile_keys][v_row]
  float* const p_;                   // [tile_keys][kPanel]
  float* const ds_;                  // [tile_keys][kPanel]
  uint16_t* const gathered_p_;       // [tile_keys][kGatheredRow]
  uint16_t* const gathered_ds_;      // [tile_keys][kGatheredRow]
  float* const rows_;                // [kPanel][k_row]
  int64_t num_rows_ = 0;             // of the tile, filled up
  semantics::Range gathered_{0, 0};  // numbers of the panels
  bool started_ = false;             // dk and dv hold something
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
