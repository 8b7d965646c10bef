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
#include <cmath>

#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// A panel and what phase `prepare` left of it.
struct BackwardPanel : QueryPanel {
  float* q;
  float* dout;
  float* lse;
  float* delta;
  float* dq;  // of chunk 0; the others follow
};

class BackwardTaskRun {
 public:
  BackwardTaskRun(const BackwardCall& call, int64_t batch, int64_t head_kv, float* scratch)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        run_(call, batch, head_kv),
        batch_(batch),
        k_row_(round_up(problem_.head_dim, kMaxLanes)),
        v_row_(round_up(problem_.head_dim_v, kMaxLanes)) {
    const BackwardScratch layout = BackwardScratch::layout(problem_, call.tile_keys);
    q_ = scratch + layout.q;
    dout_ = scratch + layout.dout;
    k_ = scratch + layout.k;
    v_ = scratch + layout.v;
    dk_ = scratch + layout.dk;
    dv_ = scratch + layout.dv;
    p_ = scratch + layout.probabilities;
    ds_ = scratch + layout.score_gradients;
    derivatives_ = problem_.softcap ? scratch + layout.softcap_derivatives : nullptr;
    num_panels_ = call.panels_per_head_kv(run_.sequence());
    first_panel_ = call.first_panel[batch] + head_kv * num_panels_;
  }

  // Packs what every key tile will read of a panel.
  HWY_INLINE void prepare(int64_t index) const {
    const BackwardPanel panel = this->panel(index);
    run_.load_transposed(args_.q, panel, call_.scale_log2, p_, panel.q);
    run_.load_transposed(args_.dout, panel, 1.0f, p_, panel.dout);
    for (int64_t i = 0; i < kPanel; ++i) {
      panel.lse[i] = -kMinusInfinity;
      panel.delta[i] = 0.0f;
      if (i >= panel.num_lanes) continue;
      const float lse = *run_.lse_at(panel.head(i), panel.query(i));
      // A row without visible keys has +inf, or -inf from a sink that is; its P is 0 either way.
      if (lse != kMinusInfinity) panel.lse[i] = lse * static_cast<float>(semantics::kLog2e);
      run_.load_query(args_.out, panel, i, q_);
      run_.load_query(args_.dout, panel, i, dout_);
      panel.delta[i] = dot(q_, dout_, problem_.head_dim_v);
    }
  }

  // dK and dV of a chunk of keys, and its share of dQ.
  HWY_INLINE void differentiate(int64_t chunk) const {
    const int64_t seqlen_k = run_.sequence().seqlen_k;
    const int64_t num_tiles = (seqlen_k + call_.tile_keys - 1) / call_.tile_keys;
    const semantics::Range keys{
        chunk * num_tiles / call_.num_chunks * call_.tile_keys,
        std::min((chunk + 1) * num_tiles / call_.num_chunks * call_.tile_keys, seqlen_k)};
    for (int64_t p = 0; p < num_panels_; ++p) {
      std::fill_n(panel(p).dq + chunk * kPanel * k_row_, kPanel * k_row_, 0.0f);
    }
    run_.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
      run_.load_rows(args_.k, tile, k_row_, k_);
      run_.load_rows(args_.v, tile, v_row_, v_);
      std::fill_n(dk_, call_.tile_keys * k_row_, 0.0f);
      std::fill_n(dv_, call_.tile_keys * v_row_, 0.0f);
      for (int64_t p = 0; p < num_panels_; ++p) accumulate(panel(p), tile, chunk);
      const float keep = 1.0f / (1.0f - static_cast<float>(args_.dropout_p));
      run_.store_rows(args_.dk, tile, dk_, k_row_, static_cast<float>(core::softmax_scale(args_)));
      run_.store_rows(args_.dv, tile, dv_, v_row_, keep);
    });
  }

  // dq = scale * the chunks' shares, in their order.
  HWY_INLINE void finish(int64_t index) const {
    const BackwardPanel panel = this->panel(index);
    const int64_t size = panel.num_lanes * k_row_;
    for (int64_t chunk = 1; chunk < call_.num_chunks; ++chunk) {
      const float* HWY_RESTRICT share = panel.dq + chunk * kPanel * k_row_;
      for (int64_t i = 0; i < size; i += kLanes) {
        hn::Store(hn::Add(hn::Load(kFloats, panel.dq + i), hn::Load(kFloats, share + i)), kFloats,
                  panel.dq + i);
      }
    }
    run_.store_queries(args_.dq, panel, panel.dq, k_row_,
                       static_cast<float>(core::softmax_scale(args_)));
  }

  // Leaves P, masked by dropout, in p_ and dS, before softcap's derivative, in ds_. k_ and v_ hold
  // the tile.
  HWY_INLINE void compute_gradients(const BackwardPanel& panel, const ScoreTile& tile) const {
    score_product(panel.q, panel.vectors(), k_, k_row_, problem_.head_dim,
                  run_.keys_of(panel, tile), p_);
    run_.finish_scores(panel, tile, derivatives_);
    score_product(panel.dout, panel.vectors(), v_, v_row_, problem_.head_dim_v,
                  run_.keys_of(panel, tile), ds_);
    if (problem_.dropout) {
      const Float keep = hn::Set(kFloats, 1.0f / (1.0f - static_cast<float>(args_.dropout_p)));
      for_each_dropout_mask(call_, panel, tile, batch_,
                            [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
                              gradient_of_vector(panel, row, v, [&](Float& p, Float& dp) HWY_ATTR {
                                dp = hn::IfThenElseZero(kept, hn::Mul(dp, keep));
                                return hn::IfThenElseZero(kept, p);
                              });
                            });
    } else {
      for (int64_t row = tile.begin; row < tile.end; ++row) {
        for (int64_t v = 0; v < panel.vectors(); ++v) {
          gradient_of_vector(panel, row, v, [](Float& p, Float&) HWY_ATTR { return p; });
        }
      }
    }
  }

  HWY_INLINE void load_keys(const KeyTile& tile) const {
    run_.load_rows(args_.k, tile, k_row_, k_);
    run_.load_rows(args_.v, tile, v_row_, v_);
  }

  HWY_INLINE BackwardPanel panel(int64_t index) const {
    const int64_t number = first_panel_ + index;
    const BackwardBuffers& buffers = call_.buffers;
    return {run_.panel(index),
            buffers.q + number * kPanel * problem_.head_dim,
            buffers.dout + number * kPanel * problem_.head_dim_v,
            buffers.lse + number * kPanel,
            buffers.delta + number * kPanel,
            buffers.dq + number * call_.num_chunks * kPanel * k_row_};
  }

  const SequenceRun& run() const { return run_; }
  float* scores() const { return p_; }
  float* score_gradients() const { return ds_; }
  int64_t num_panels() const { return num_panels_; }

 private:
  HWY_INLINE static float dot(const float* a, const float* b, int64_t n) {
    Float sum = hn::Zero(kFloats);  // rows are filled up with zeros
    for (int64_t i = 0; i < n; i += kLanes) {
      sum = hn::MulAdd(hn::Load(kFloats, a + i), hn::Load(kFloats, b + i), sum);
    }
    return hn::GetLane(hn::SumOfLanes(kFloats, sum));
  }

  // p = exp2(s - lse), ds = p (dp - delta). drop(p, dp) masks dp and returns the masked p.
  template <class Drop>
  HWY_INLINE void gradient_of_vector(const BackwardPanel& panel, int64_t row, int64_t v,
                                     Drop&& drop) const {
    float* p_at = p_ + row * kPanel + v * kLanes;
    float* ds_at = ds_ + row * kPanel + v * kLanes;
    Float p = exp2(hn::Sub(hn::Load(kFloats, p_at), hn::Load(kFloats, panel.lse + v * kLanes)));
    Float dp = hn::Load(kFloats, ds_at);
    const Float dropped = drop(p, dp);
    const Float ds = hn::Mul(p, hn::Sub(dp, hn::Load(kFloats, panel.delta + v * kLanes)));
    // dP of a masked key is undefined.
    const auto none = hn::Eq(p, hn::Zero(kFloats));
    hn::Store(hn::IfThenZeroElse(none, ds), kFloats, ds_at);
    hn::Store(dropped, kFloats, p_at);
  }

  // One panel's contribution to dK and dV of the tile, and the tile's to dQ of the panel.
  HWY_INLINE void accumulate(const BackwardPanel& panel, const KeyTile& keys, int64_t chunk) const {
    const ScoreTile tile = run_.score_tile(panel, keys, p_);
    if (tile.begin >= tile.end) return;
    compute_gradients(panel, tile);
    if (derivatives_ != nullptr) apply_derivatives(panel, tile);
    for (int64_t i = 0; i < panel.num_lanes; ++i) {
      run_.load_query(args_.q, panel, i, q_ + i * k_row_);
      run_.load_query(args_.dout, panel, i, dout_ + i * v_row_);
    }
    const auto queries_of = run_.queries_of(panel, tile);
    const int64_t k_vectors = (problem_.head_dim + kLanes - 1) / kLanes;
    const int64_t v_vectors = (problem_.head_dim_v + kLanes - 1) / kLanes;
    key_product(p_, dout_, v_row_, v_vectors, tile.begin, tile.end, queries_of, dv_);
    key_product(ds_, q_, k_row_, k_vectors, tile.begin, tile.end, queries_of, dk_);
    value_product(ds_, panel.num_lanes, k_, k_row_, k_vectors, run_.keys_of(panel, tile), true,
                  panel.dq + chunk * kPanel * k_row_);
  }

  HWY_INLINE void apply_derivatives(const BackwardPanel& panel, const ScoreTile& tile) const {
    transform_scores(panel, {ds_, tile.first_key, tile.begin, tile.end},
                     [&](Float ds, int64_t row, int64_t v) HWY_ATTR {
                       const int64_t at = row * kPanel + v * kLanes;
                       const auto none = hn::Eq(ds, hn::Zero(kFloats));
                       return hn::IfThenZeroElse(none,
                                                 hn::Mul(ds, hn::Load(kFloats, derivatives_ + at)));
                     });
  }

  const BackwardCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const SequenceRun run_;
  const int64_t batch_;
  const int64_t k_row_;
  const int64_t v_row_;
  int64_t num_panels_;   // of this (batch, key head)
  int64_t first_panel_;  // their number in the call
  float* q_;             // Q and dO of a panel, not transposed: [kPanel][k_row], [kPanel][v_row]
  float* dout_;
  float* k_;  // the tile: [tile_keys][k_row], [tile_keys][v_row]
  float* v_;
  float* dk_;
  float* dv_;
  float* p_;            // [tile_keys][kPanel]
  float* ds_;           // [tile_keys][kPanel]
  float* derivatives_;  // of softcap: [tile_keys][kPanel]; null without
};

void backward_prepare(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  const BackwardTaskRun run(call, task.batch, task.head_kv, scratch);
  for (int64_t p = task.first; p < task.first + task.count; ++p) run.prepare(p);
}

void backward_differentiate(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  BackwardTaskRun(call, task.batch, task.head_kv, scratch).differentiate(task.first);
}

void backward_finish(const BackwardCall& call, const BackwardTask& task, float* scratch) {
  const BackwardTaskRun run(call, task.batch, task.head_kv, scratch);
  for (int64_t p = task.first; p < task.first + task.count; ++p) run.finish(p);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
