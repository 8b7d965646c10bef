// The backward of one (batch, key head): FlashAttention-2's loop (Dao, 2023), key tiles outside and
// query panels inside, the probabilities recomputed from lse.
//
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)
//   dV = P^T dO        dK = dS^T Q   dQ = dS K
//
// S, P, dP and dS are transposed as in the forward, [key][query].
#if defined(FA_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_BACKWARD_INL_H_
#undef FA_CPU_BACKWARD_INL_H_
#else
#define FA_CPU_BACKWARD_INL_H_
#endif

#include <algorithm>

#include "cpu/gradient_products-inl.h"
#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Products: FloatGradientProducts or PairGradientProducts.
template <class Products>
class BackwardTaskRun {
 public:
  BackwardTaskRun(const BackwardCall& call, int64_t batch, int64_t head_kv, float* scratch)
      : call_(call),
        problem_(call.problem),
        run_(call, batch, head_kv),
        batch_(batch),
        k_row_(round_up(problem_.head_dim, kMaxLanes)),
        layout_(BackwardScratch::layout(problem_, call.tile_keys, Products::kPairs,
                                        {call.own_lanes, call.num_chunks})),
        buffers_(call.owns_panels() ? layout_.panels.at(scratch) : call.buffers),
        products_(call, run_, buffers_, layout_, scratch),
        scales_late_(run_.may_scale_late()),
        p_(scratch + layout_.probabilities),
        ds_(scratch + layout_.score_gradients),
        derivatives_(problem_.softcap ? scratch + layout_.softcap_derivatives : nullptr) {
    num_panels_ = call.panels_per_head_kv(run_.sequence());
    first_panel_ = call.first_panel[batch] + head_kv * num_panels_;
  }

  // Packs what every key tile will read of a panel.
  HWY_INLINE void prepare(int64_t index) {
    const BackwardPanel panel = this->panel(index);
    products_.pack(panel);
    std::fill(panel.lse + panel.num_lanes, panel.lse + kPanel, -kMinusInfinity);
    std::fill(panel.delta + panel.num_lanes, panel.delta + kPanel, 0.0f);
    panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
      const float lse = *run_.lse_at(head, query);
      // A row without visible keys has +inf, or -inf from a sink that is; its P is 0 either way.
      panel.lse[lane] =
          lse == kMinusInfinity ? -kMinusInfinity : lse * static_cast<float>(semantics::kLog2e);
    });
    run_.multiply_queries(panel, panel.delta);
  }

  // dK and dV of a chunk of keys, and its share of dQ.
  HWY_INLINE void differentiate(int64_t chunk) {
    const semantics::Range keys = keys_of_chunk(chunk);
    if (chunk == 0) {
      for (int64_t p = 0; p < num_panels_; ++p) {
        const BackwardPanel panel = this->panel(p);
        if (!sees(panel, keys)) std::fill_n(panel.dq, kPanel * k_row_, 0.0f);
      }
    }
    run_.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
      products_.load_tile(tile, num_panels_);
      products_.start_tile(tile);
      const int64_t last = last_panel(tile);
      for (int64_t p = 0; p <= last; ++p) {
        const BackwardPanel panel = this->panel(p, chunk);
        accumulate(panel, tile,
                   {std::max(panel.keys.begin, keys.begin) >= tile.first_key,
                    std::min(panel.keys.end, keys.end) <= tile.keys.end,
                    panel.keys.end <= tile.keys.end, p == last});
      }
      products_.finish_tile();
      products_.store(tile);
    });
    if (Products::kAddsShares || !call_.owns_panels() || chunk == 0) return;
    for (int64_t p = 0; p < num_panels_; ++p) {
      if (sees(run_.panel(p), keys)) add_share(panel(p), panel(p, chunk).dq);
    }
  }

  // dq = scale * the chunks' shares, in their order.
  HWY_INLINE void finish(int64_t index) const {
    const BackwardPanel panel = this->panel(index);
    for (int64_t chunk = 1; chunk < call_.num_chunks && !call_.owns_panels(); ++chunk) {
      if (sees(panel, keys_of_chunk(chunk))) add_share(panel, this->panel(index, chunk).dq);
    }
    products_.store_queries(panel);
  }

  // Leaves P, masked by dropout, in p_ and dS, before softcap's derivative, in ds_. The tile's keys
  // and values are loaded.
  // Where `clips`, those that no product reads are left out.
  HWY_INLINE void compute_gradients(const BackwardPanel& panel, const ScoreTile& tile,
                                    bool clips) const {
    products_.scores(panel, tile);
    run_.finish_scores(panel, tile, scales_late_, derivatives_);
    products_.probability_gradients(panel, tile);
    if (problem_.dropout) {
      const Float keep = hn::Set(kFloats, call_.keep_scale);
      for_each_dropout_mask(
          call_, panel, tile, batch_, [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
            gradient_of_vector(panel, tile, row, v, [&](Float& p, Float& dp) HWY_ATTR {
              dp = hn::IfThenElseZero(kept, hn::Mul(dp, keep));
              return hn::IfThenElseZero(kept, p);
            });
          });
    } else {
      const auto vectors_of = run_.vectors_of(panel, tile);
      for (int64_t row = tile.begin; row < tile.end; ++row) {
        const semantics::Range vectors =
            clips ? vectors_of(row) : semantics::Range{0, panel.vectors()};
        for (int64_t v = vectors.begin; v < vectors.end; ++v) {
          gradient_of_vector(panel, tile, row, v, [](Float& p, Float&) HWY_ATTR { return p; });
        }
      }
    }
  }

  HWY_INLINE void load_tile(const KeyTile& tile) { products_.load_tile(tile, num_panels_); }

  HWY_INLINE BackwardPanel panel(int64_t index, int64_t chunk = 0) const {
    const bool own = call_.owns_panels();
    const int64_t number = own ? index : first_panel_ + index;
    const int64_t slots =
        own ? OwnPanels{call_.own_lanes, call_.num_chunks}.dq_slots() : call_.num_chunks;
    const int64_t slot = own ? std::min<int64_t>(chunk, 1) : chunk;
    float* const dq = buffers_.dq + number * slots * kPanel * k_row_;
    float* const chunk_dq = dq + slot * kPanel * k_row_;
    return {run_.panel(index),
            number,
            buffers_.q + number * kPanel * Products::packed_size(problem_.head_dim),
            buffers_.dout + number * kPanel * Products::packed_size(problem_.head_dim_v),
            call_.lse + (first_panel_ + index) * kPanel,
            call_.delta + (first_panel_ + index) * kPanel,
            chunk_dq,
            own ? dq : chunk_dq};
  }

  const SequenceRun& run() const { return run_; }
  float* scores() const { return p_; }
  float* score_gradients() const { return ds_; }
  int64_t num_panels() const { return num_panels_; }

 private:
  // Adds a chunk's share to dQ.
  HWY_INLINE void add_share(const BackwardPanel& panel, const float* HWY_RESTRICT share) const {
    // Pairs leave blocks of whole vectors of queries.
    const int64_t lanes = Products::kPairs ? panel.vectors() * kLanes : panel.num_lanes;
    for (int64_t i = 0; i < lanes * k_row_; i += kLanes) {
      hn::Store(hn::Add(hn::Load(kFloats, panel.dq + i), hn::Load(kFloats, share + i)), kFloats,
                panel.dq + i);
    }
  }

  HWY_INLINE semantics::Range keys_of_chunk(int64_t chunk) const {
    return cpu::keys_of_chunk(chunk, call_.num_chunks, run_.sequence().seqlen_k, call_.tile_keys);
  }

  static bool sees(const QueryPanel& panel, semantics::Range keys) {
    return std::max(panel.keys.begin, keys.begin) < std::min(panel.keys.end, keys.end);
  }

  // The last panel that sees any of the tile; -1 where none does.
  HWY_INLINE int64_t last_panel(const KeyTile& tile) const {
    int64_t p = num_panels_ - 1;
    while (p >= 0 && !sees(run_.panel(p), tile.keys)) --p;
    return p;
  }

  // p = exp2(s - lse), ds = p (dp - delta). drop(p, dp) masks dp and returns the masked p.
  template <class Drop>
  HWY_INLINE void gradient_of_vector(const BackwardPanel& panel, const ScoreTile& tile, int64_t row,
                                     int64_t v, Drop&& drop) const {
    float* p_at = tile.at(row, v);
    float* ds_at = tile.in(ds_).at(row, v);
    const Float lse = hn::Load(kFloats, panel.lse + v * kLanes);
    const Float s = hn::Load(kFloats, p_at);
    Float p;
    if (scales_late_) {
      p = exp2(hn::MulSub(s, hn::Set(kFloats, call_.scale_log2), lse));
    } else {
      p = exp2(hn::Sub(s, lse));
    }
    Float dp = hn::Load(kFloats, ds_at);
    const Float dropped = drop(p, dp);
    const Float ds = hn::Mul(p, hn::Sub(dp, hn::Load(kFloats, panel.delta + v * kLanes)));
    // dP of a masked key is undefined.
    const auto none = hn::Eq(p, hn::Zero(kFloats));
    hn::Store(hn::IfThenZeroElse(none, ds), kFloats, ds_at);
    hn::Store(dropped, kFloats, p_at);
  }

  // One panel's contribution to dK and dV of the tile, and the tile's to dQ of the panel.
  HWY_INLINE void accumulate(const BackwardPanel& panel, const KeyTile& keys, Turn turn) {
    const ScoreTile tile = run_.score_tile(panel, keys, p_);
    if (tile.begin >= tile.end) return;
    if constexpr (Products::kPairs) {
      if (products_.takes_chunks(panel)) {
        return products_.differentiate(panel, tile, turn.starts_chunk);
      }
    }
    compute_gradients(panel, tile, !Products::kPairs && derivatives_ == nullptr);
    if (derivatives_ != nullptr) apply_derivatives(panel, tile);
    products_.accumulate(panel, tile, turn);
  }

  HWY_INLINE void apply_derivatives(const BackwardPanel& panel, const ScoreTile& tile) const {
    transform_scores(panel, tile.in(ds_), [&](Float ds, int64_t row, int64_t v) HWY_ATTR {
      const Float derivative = hn::Load(kFloats, tile.in(derivatives_).at(row, v));
      const auto none = hn::Eq(ds, hn::Zero(kFloats));
      return hn::IfThenZeroElse(none, hn::Mul(ds, derivative));
    });
  }

  const BackwardCall& call_;
  const core::AttentionProblem& problem_;
  const SequenceRun run_;
  const int64_t batch_;
  const int64_t k_row_;
  const BackwardScratch layout_;
  const BackwardBuffers buffers_;
  Products products_;
  const bool scales_late_;    // P applies the scale that the products left out
  float* const p_;            // [tile_keys][kPanel]
  float* const ds_;           // [tile_keys][kPanel]
  float* const derivatives_;  // of softcap: [tile_keys][kPanel]; null without
  int64_t num_panels_;        // of this (batch, key head)
  int64_t first_panel_;       // their number in the call
};

template <class Products>
void backward_prepare(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  BackwardTaskRun<Products> run(call, task.batch, task.head_kv, scratch);
  for (int64_t p = task.first; p < task.first + task.count; ++p) run.prepare(p);
}

template <class Products>
void backward_differentiate(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  BackwardTaskRun<Products>(call, task.batch, task.head_kv, scratch).differentiate(task.first);
}

template <class Products>
void backward_finish(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  BackwardTaskRun<Products> run(call, task.batch, task.head_kv, scratch);
  for (int64_t p = task.first; p < task.first + task.count; ++p) run.finish(p);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
