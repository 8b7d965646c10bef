// The five products of the backward in pairs of bfloat16.
//
//   S^T = K Q^T   dP^T = V dO^T   dV += P^T dO   dK += dS^T Q   dQ^T += K^T dS^T
#if defined(FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#undef FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#else
#define FA_CPU_PAIR_GRADIENT_PRODUCTS_INL_H_
#endif

#include "cpu/gradient_products-inl.h"
#include "cpu/pair_gathering-inl.h"
#include "cpu/pair_parts-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class PairGradientProducts {
 public:
  static constexpr bool kPairs = true;
  static constexpr bool kAddsShares = false;
  static int64_t packed_size(int64_t head_dim) { return round_up(head_dim, kPairDepth) / 2; }

  PairGradientProducts(const BackwardCall& call, const SequenceRun& run,
                       const BackwardBuffers& buffers, const BackwardScratch& layout,
                       float* scratch)
      : call_(call),
        run_(run),
        buffers_(buffers),
        k_depth_(round_up(call.problem.head_dim, kPairDepth)),
        v_depth_(round_up(call.problem.head_dim_v, kPairDepth)),
        k_row_(round_up(call.problem.head_dim, kMaxLanes)),
        v_row_(round_up(call.problem.head_dim_v, kMaxLanes)),
        k_(halves(scratch + layout.k)),
        k_transposed_(halves(scratch + layout.k_transposed)),
        v_(halves(scratch + layout.v)),
        dk_(scratch + layout.dk),
        dv_(scratch + layout.dv),
        ds_(scratch + layout.score_gradients),
        rows_(scratch + layout.rows),
        gathered_(*call.pairs, halves(scratch + layout.gathered_p),
                  halves(scratch + layout.gathered_ds)) {
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
      call_.pairs->pack_b_transposed(all, words(transposed),
                                     round_up(all.n, kPairDepth) / 2 * kPairColumns);
      call_.pairs->pack_b(all, pairs, kPairDepth / 2 * row, kBlockB);
    };
    pack_rows(call_.args.q, panel.q, q_pairs(panel.number), k_row_);
    pack_rows(call_.args.dout, panel.dout, dout_pairs(panel.number), v_row_);
  }

  HWY_INLINE void load_tile(const KeyTile& tile, int64_t) const {
    const uint16_t* rows[kPairTileKeys];
    const int64_t count = tile.keys.end - tile.first_key;
    run_.find_rows(call_.args.v, tile, rows);
    call_.pairs->pack_a({rows, count, call_.problem.head_dim_v}, v_, kPairRows * v_depth_);
    run_.find_rows(call_.args.k, tile, rows);
    const PairRows keys{rows, count, call_.problem.head_dim};
    call_.pairs->pack_a(keys, k_, kPairRows * k_depth_);
    call_.pairs->pack_a_transposed(keys, k_transposed_, kPairRows * call_.tile_keys);
  }

  HWY_INLINE void scores(const BackwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, k_depth_, panel.q);
  }

  HWY_INLINE void probability_gradients(const BackwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile.in(ds_), v_, v_depth_, panel.dout);
  }

  HWY_INLINE void start_tile(const KeyTile& tile) {
    gathered_.start_tile(round_up(tile.keys.end - tile.first_key, kPairRows));
    started_ = false;
  }

  // Panels come in the order of their numbers. P and dS of the whole tile are there.
  HWY_INLINE void accumulate(const BackwardPanel& panel, const ScoreTile& tile, Turn turn) {
    start_panel(panel, tile);
    gathered_.round(panel, tile, gathered_.p(panel.number));
    gathered_.round(panel, tile.in(ds_), gathered_.ds(panel.number));
    const ScoreTile ds = tile.in(ds_);
    pack_pairs(panel, ds);
    clear_pairs_around(panel, ds);
    call_.pairs->multiply(
        pair_key_sum(call_, panel, ds, k_transposed_, k_row_, !turn.starts_chunk, panel.dq));
  }

  // Whether `differentiate` serves a panel.
  HWY_INLINE bool takes_chunks(const QueryPanel& panel) const {
    return fills_chunks(panel) && !call_.problem.dropout && !call_.problem.softcap;
  }

  // The same from the scores on, chunk by chunk: P and dS are rounded before they leave L1, while
  // the products of the next chunk are under way.
  HWY_INLINE void differentiate(const BackwardPanel& panel, const ScoreTile& tile, bool first) {
    start_panel(panel, tile);
    const int64_t begin = tile.begin / kChunkKeys * kChunkKeys;
    const int64_t end = round_up(tile.end, kChunkKeys);
    uint16_t* const p_to = gathered_.p(panel.number);
    uint16_t* const ds_to = gathered_.ds(panel.number);
    for (uint16_t* to : {p_to, ds_to}) gathered_.clear_outside(to, {begin, end});
    ScoreTile pairs = tile.in(ds_);
    pairs.begin = begin;
    pairs.end = end;
    pairs.column_step = call_.tile_keys / 2 * kLanes;
    const bool scales_late = run_.may_scale_late();
    for (int64_t at = begin; at < end; at += kChunkKeys) {
      const Chunk chunk = this->chunk(panel, tile, at),
                  next = this->chunk(panel, tile, at + kChunkKeys);
      if (at == begin) {
        for (const PairProduct& product : chunk.products) call_.pairs->multiply(product);
      }
      ScoreTile scores = chunk.scores;
      run_.finish_scores(panel, scores, scales_late);
      hide_rows_outside(scores);
      const int64_t row = at / kPairRows * kGatheredStep;
      call_.pairs->differentiate(
          {scores.scores, chunk.products[1].c, scales_late ? call_.scale_log2 : 1.0f, panel.lse,
           panel.delta, p_to + row, ds_to + row, kGatheredStep, words(pairs.at(at / 2, 0)),
           pairs.column_step},
          next.products, at + kChunkKeys < end ? 2 : 0);
    }
    call_.pairs->multiply(
        pair_key_sum(call_, panel, pairs, k_transposed_, k_row_, !first, panel.dq));
  }

  HWY_INLINE void finish_tile() {
    flush();
    if (started_) return;  // else no panel sees the tile
    std::fill_n(dk_, call_.tile_keys * k_row_, 0.0f);
    std::fill_n(dv_, call_.tile_keys * v_row_, 0.0f);
  }

  HWY_INLINE void store(const KeyTile& tile) const {
    store_rows(call_.args.dk, tile, dk_, k_row_, call_.scale);
    store_rows(call_.args.dv, tile, dv_, v_row_, call_.keep_scale);
  }

  // dQ, from its transpose.
  HWY_INLINE void store_queries(const BackwardPanel& panel) const {
    rows_of_blocks(panel.dq, k_row_, panel.num_lanes, rows_, k_row_);
    run_.store_queries(call_.args.dq, panel, rows_, k_row_, call_.scale);
  }

 private:
  // The keys from row `first` of a tile on; S and dP lie in the scores, in two buffers each.
  struct Chunk {
    ScoreTile scores;
    PairProduct products[2];  // S and dP
  };
  HWY_INLINE Chunk chunk(const BackwardPanel& panel, const ScoreTile& tile, int64_t first) const {
    const ScoreTile scores = chunk_of(tile, first);
    const ScoreTile dp = scores.in(scores.scores + 2 * kChunkKeys * kPanel);
    return {scores,
            {whole_product(k_ + first * k_depth_, k_depth_, panel.q, scores),
             whole_product(v_ + first * v_depth_, v_depth_, panel.dout, dp)}};
  }

  // Makes room for a panel's P and dS.
  HWY_INLINE void start_panel(const BackwardPanel& panel, const ScoreTile& tile) {
    if (!gathered_.has_room(panel.number)) flush();
    gathered_.add(panel.number, tile);
  }

  static uint16_t* halves(float* at) { return reinterpret_cast<uint16_t*>(at); }
  static uint32_t* words(float* at) { return reinterpret_cast<uint32_t*>(at); }

  // [panels][kPanel / 2][row]: those of neighbouring panels lie end to end.
  HWY_INLINE uint32_t* q_pairs(int64_t number) const {
    return words(buffers_.q_right) + number * kPanel / 2 * k_row_;
  }
  HWY_INLINE uint32_t* dout_pairs(int64_t number) const {
    return words(buffers_.dout_right) + number * kPanel / 2 * v_row_;
  }

  // dV += P^T dO, dK += dS^T Q, for the panels that were gathered.
  HWY_INLINE void flush() {
    if (gathered_.empty()) return;
    gathered_.for_each_run([&](const semantics::Range& rows, const semantics::Range& panels)
                               HWY_ATTR { add_rows(rows, panels); });
    started_ = true;
    gathered_.forget();
  }

  HWY_INLINE void add_rows(const semantics::Range& rows, const semantics::Range& panels) const {
    const auto add = [&](const uint16_t* left, const uint32_t* right, int64_t row,
                         float* sums) HWY_ATTR {
      const int64_t c_column_step = call_.tile_keys * kPairColumns;
      float* c = sums + rows.begin * kPairColumns;
      if (panels.empty()) {
        for (int64_t d = 0; d < row && !started_; d += kPairColumns) {
          std::fill_n(c + d / kPairColumns * c_column_step, (rows.end - rows.begin) * kPairColumns,
                      0.0f);
        }
        return;
      }
      call_.pairs->multiply({.a = left + rows.begin / kPairRows * kGatheredStep,
                             .a_row_step = kGatheredStep,
                             .b = right,
                             .b_depth_step = kPairDepth / 2 * row,
                             .b_column_step = kBlockB,
                             .c = c,
                             .c_column_step = c_column_step,
                             .rows = rows.end - rows.begin,
                             .columns = row,
                             .depth = (panels.end - panels.begin) * kPanel,
                             .accumulate = started_});
    };
    const int64_t first = panels.begin;
    add(gathered_.p(first), dout_pairs(first), v_row_, dv_);
    add(gathered_.ds(first), q_pairs(first), k_row_, dk_);
  }

  // Rounds the tile's rows, times factor, to dk or dv.
  HWY_INLINE void store_rows(const core::TensorView& to, const KeyTile& tile, const float* from,
                             int64_t row_size, float factor) const {
    for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
      for (int64_t d = 0; d < row_size; d += kPairColumns) {
        std::copy_n(from + d * call_.tile_keys + (key - tile.first_key) * kPairColumns,
                    kPairColumns, rows_ + d);
      }
      run_.store_key(rows_, factor, to, key);
    }
  }

  const BackwardCall& call_;
  const SequenceRun& run_;
  const BackwardBuffers& buffers_;
  const int64_t k_depth_;
  const int64_t v_depth_;
  const int64_t k_row_;
  const int64_t v_row_;
  // The tile, in blocks.
  uint16_t* const k_;
  uint16_t* const k_transposed_;
  uint16_t* const v_;
  float* const dk_;
  float* const dv_;
  float* const ds_;
  float* const rows_;  // [kPanel][k_row], or one row of v
  GatheredPanels gathered_;
  bool started_ = false;  // dk and dv hold something
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
