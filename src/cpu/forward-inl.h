// The forward of one task: FlashAttention's loop (Dao et al., 2022) with keys outside and query
// panels inside, so that one copy of a key tile serves many panels.
#if defined(FA_CPU_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_FORWARD_INL_H_
#undef FA_CPU_FORWARD_INL_H_
#else
#define FA_CPU_FORWARD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// A panel and its state of the online softmax, one lane per query.
struct ForwardPanel : QueryPanel {
  bool started;        // o, running_max and running_sum hold something
  float* q;            // Q^T: [depth][kPanel], times scale * log2(e)
  float* o;            // [kPanel][value_row], not yet divided by the sum
  float* running_max;  // [kPanel], of scores in base 2
  float* running_sum;  // [kPanel]
};

// The subtrahend of scores: their maximum, or 0 while there is none.
HWY_INLINE Float finite_maximum(Float maximum) {
  return hn::IfThenElse(hn::Eq(maximum, hn::Set(kFloats, kMinusInfinity)), hn::Zero(kFloats),
                        maximum);
}

// Multiplies the accumulators of queries whose maximum rose.
HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction,
                        int64_t value_row) {
  for (int64_t query = 0; query < panel.num_queries; ++query) {
    if (correction[query] == 1.0f) continue;
    const Float factor = hn::Set(kFloats, correction[query]);
    float* HWY_RESTRICT o = panel.o + query * value_row;
    for (int64_t d = 0; d < value_row; d += kLanes) {
      hn::Store(hn::Mul(hn::Load(kFloats, o + d), factor), kFloats, o + d);
    }
  }
}

// One step of the online softmax (Milakov and Gimelshein, 2018): turns the scores into
// exp2(s - max), updates maximum and sum, and rescales what was accumulated.
HWY_INLINE void online_softmax(ForwardPanel& panel, const ScoreTile& tile, int64_t value_row) {
  alignas(64) float correction[kPanel];
  bool any_rose = false;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* HWY_RESTRICT column = tile.scores + v * kLanes;
    const Float none = hn::Set(kFloats, kMinusInfinity);
    const Float old_max = panel.started ? hn::Load(kFloats, panel.running_max + v * kLanes) : none;
    Float max0 = old_max, max1 = none;
    int64_t row = tile.begin;
    for (; row + 2 <= tile.end; row += 2) {
      max0 = hn::Max(max0, hn::Load(kFloats, column + row * kPanel));
      max1 = hn::Max(max1, hn::Load(kFloats, column + (row + 1) * kPanel));
    }
    if (row < tile.end) max0 = hn::Max(max0, hn::Load(kFloats, column + row * kPanel));
    const Float new_max = hn::Max(max0, max1);
    const Float subtrahend = finite_maximum(new_max);

    Float sum0 = hn::Zero(kFloats), sum1 = hn::Zero(kFloats);
    const auto probability = [&](int64_t at) HWY_ATTR {
      const Float p = exp2(hn::Sub(hn::Load(kFloats, column + at * kPanel), subtrahend));
      hn::Store(p, kFloats, column + at * kPanel);
      return p;
    };
    for (row = tile.begin; row + 2 <= tile.end; row += 2) {
      sum0 = hn::Add(sum0, probability(row));
      sum1 = hn::Add(sum1, probability(row + 1));
    }
    if (row < tile.end) sum0 = hn::Add(sum0, probability(row));
    Float sum = hn::Add(sum0, sum1);

    hn::Store(new_max, kFloats, panel.running_max + v * kLanes);
    if (panel.started) {
      const Float factor = exp2(hn::Sub(old_max, subtrahend));
      hn::Store(factor, kFloats, correction + v * kLanes);
      any_rose = any_rose || !hn::AllTrue(kFloats, hn::Eq(old_max, new_max));
      sum = hn::MulAdd(hn::Load(kFloats, panel.running_sum + v * kLanes), factor, sum);
    }
    hn::Store(sum, kFloats, panel.running_sum + v * kLanes);
  }
  if (any_rose) rescale(panel, correction, value_row);
}

class ForwardTaskRun {
 public:
  ForwardTaskRun(const AttentionCall& call, const ForwardTask& task, float* scratch)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        run_(call, task.batch, task.head_kv),
        task_(task),
        k_row_(round_up(problem_.head_dim, kMaxLanes)),
        v_row_(round_up(problem_.head_dim_v, kMaxLanes)) {
    const ForwardScratch layout = ForwardScratch::layout(problem_, task.num_panels);
    k_ = scratch + layout.k;
    v_ = scratch + layout.v;
    scores_ = scratch + layout.scores;
    for (int64_t p = 0; p < task.num_panels; ++p) {
      panels_[p] = {run_.panel(task.first_panel + p),
                    false,
                    scratch + layout.q + p * problem_.head_dim * kPanel,
                    scratch + layout.o + p * v_row_ * kPanel,
                    scratch + layout.running_max + p * kPanel,
                    scratch + layout.running_sum + p * kPanel};
    }
  }

  HWY_INLINE void run() {
    semantics::Range keys{run_.sequence().seqlen_k, 0};
    for (int64_t p = 0; p < task_.num_panels; ++p) {
      run_.load_transposed(args_.q, panels_[p], call_.scale_log2, scores_, panels_[p].q);
      keys.begin = std::min(keys.begin, panels_[p].keys.begin);
      keys.end = std::max(keys.end, panels_[p].keys.end);
    }
    run_.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
      run_.load_rows(args_.k, tile, k_row_, k_);
      run_.load_rows(args_.v, tile, v_row_, v_);
      for (int64_t p = 0; p < task_.num_panels; ++p) attend(panels_[p], tile);
    });
    for (int64_t p = 0; p < task_.num_panels; ++p) store_outputs(panels_[p]);
    if (problem_.wants_s_dmask) write_s_dmask(keys);
  }

 private:
  // S, P = softmax(S), O += P V for one panel and one tile.
  HWY_INLINE void attend(ForwardPanel& panel, const KeyTile& keys) const {
    const ScoreTile tile = run_.score_tile(panel, keys, scores_);
    if (tile.begin >= tile.end) return;
    run_.compute_scores(panel.q, k_, k_row_, panel, tile);
    online_softmax(panel, tile, v_row_);
    if (problem_.dropout) apply_dropout(call_, panel, tile, task_.batch);
    const int64_t value_vectors = (problem_.head_dim_v + kLanes - 1) / kLanes;
    value_product(scores_, panel.num_queries, v_, v_row_, value_vectors, run_.keys_of(panel, tile),
                  panel.started, panel.o);
    panel.started = true;
  }

  HWY_INLINE float sink_log2(int64_t head) const {
    const core::TensorView& sink = args_.learnable_sink;
    return core::load_element(sink, head * sink.strides[0]) * static_cast<float>(semantics::kLog2e);
  }

  // out = O / sum, lse = ln(sum) + max, each query's row.
  HWY_INLINE void store_outputs(const ForwardPanel& panel) const {
    const float keep = 1.0f / (1.0f - static_cast<float>(args_.dropout_p));
    for (int64_t query = 0; query < panel.num_queries; ++query) {
      float maximum = panel.started ? panel.running_max[query] : kMinusInfinity;
      float sum = panel.started ? panel.running_sum[query] : 0.0f;
      float correction = 1.0f;
      if (problem_.sink) {  // one more term of the denominator, without a value
        const float sink = sink_log2(panel.head);
        const float joint = std::max({maximum, sink, std::numeric_limits<float>::lowest()});
        correction = std::exp2(maximum - joint);
        sum = sum * correction + std::exp2(sink - joint);
        maximum = joint;
      }
      const int64_t at = run_.query_offset(args_.out, panel.head, panel.first_query + query);
      const bool none = !panel.started || sum == 0.0f;
      float* o = panel.o + query * v_row_;
      if (none) std::fill_n(o, v_row_, 0.0f);
      run_.narrow(o, none ? 0.0f : keep * correction / sum, args_.out, at);
      if (problem_.wants_lse) {
        const float lse = sum == 0.0f
                              ? -kMinusInfinity
                              : maximum * static_cast<float>(semantics::kLn2) + std::log(sum);
        *run_.lse_at(panel.head, panel.first_query + query) = lse;
      }
    }
  }

  // exp(s - max s), negative where dropped: a second pass, once the maxima are known. For tests.
  HWY_INLINE void write_s_dmask(semantics::Range keys) const {
    run_.for_each_tile(keys, [&](const KeyTile& key_tile) HWY_ATTR {
      run_.load_rows(args_.k, key_tile, k_row_, k_);
      for (int64_t p = 0; p < task_.num_panels; ++p) {
        const ForwardPanel& panel = panels_[p];
        const ScoreTile tile = run_.score_tile(panel, key_tile, scores_);
        if (tile.begin >= tile.end) continue;
        run_.compute_scores(panel.q, k_, k_row_, panel, tile);
        transform_scores(panel, tile, [&](Float s, int64_t, int64_t v) HWY_ATTR {
          const Float maximum = hn::Load(kFloats, panel.running_max + v * kLanes);
          return exp2(hn::Sub(s, finite_maximum(maximum)));
        });
        if (problem_.dropout) negate_dropped(panel, tile);
        copy_s_dmask(panel, tile);
      }
    });
  }

  HWY_INLINE void negate_dropped(const QueryPanel& panel, const ScoreTile& tile) const {
    for_each_dropout_mask(call_, panel, tile, task_.batch,
                          [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
                            float* at = tile.scores + row * kPanel + v * kLanes;
                            const Float p = hn::Load(kFloats, at);
                            hn::Store(hn::IfThenElse(kept, p, hn::Neg(p)), kFloats, at);
                          });
  }

  HWY_INLINE void copy_s_dmask(const QueryPanel& panel, const ScoreTile& tile) const {
    const core::TensorView& to = args_.s_dmask;
    for (int64_t query = 0; query < panel.num_queries; ++query) {
      const int64_t row_offset = task_.batch * to.strides[0] + panel.head * to.strides[1] +
                                 (panel.first_query + query) * to.strides[2];
      for (int64_t row = tile.begin; row < tile.end; ++row) {
        core::store_element(to, row_offset + (tile.first_key + row) * to.strides[3],
                            tile.scores[row * kPanel + query]);
      }
    }
  }

  const AttentionCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const SequenceRun run_;
  const ForwardTask& task_;
  const int64_t k_row_;
  const int64_t v_row_;
  float* k_;       // [kTileKeys][k_row]
  float* v_;       // [kTileKeys][v_row]
  float* scores_;  // [kTileKeys][kPanel]
  ForwardPanel panels_[kMaxPanels];
};

void forward_task(const AttentionCall& call, const ForwardTask& task, float* scratch) {
  ForwardTaskRun(call, task, scratch).run();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
