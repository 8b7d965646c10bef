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

#include "cpu/products-inl.h"
#include "cpu/sequence-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Products: FloatProducts, PairProducts or, where queries are few, RowProducts.
template <class Products>
class ForwardTaskRun {
 public:
  ForwardTaskRun(const ForwardCall& call, const ForwardTask& task, float* scratch)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        run_(call, task.batch, task.head_kv),
        task_(task),
        v_row_(round_up(problem_.head_dim_v, kMaxLanes)),
        layout_(Products::kFewQueries
                    ? ForwardScratch::for_few_queries(problem_)
                    : ForwardScratch::layout(problem_, task.num_panels, call.tile_keys)),
        products_(call, run_, layout_, scratch),
        scores_(scratch + layout_.scores),
        rows_(scratch + layout_.rows) {
    const PartialResults own{scratch + layout_.o, scratch + layout_.running_max,
                             scratch + layout_.running_sum};
    const int64_t q_size = round_up(problem_.head_dim, kMaxLanes) * kPanel;
    for (int64_t p = 0; p < task.num_panels; ++p) {
      ForwardPanel& panel = panels_[p];
      const QueryPanel queries = run_.panel(task.first_panel + p);
      panel = call.num_splits > 1 ? forward_panel(queries, call.partials, slot(p, task.split))
                                  : forward_panel(queries, own, p);
      panel.q = scratch + layout_.q + p * q_size;
      if (Products::kPairs) panel.o = own.o + p * kPanel * v_row_;
    }
  }

  // All keys of the task's panels, or one part of them.
  HWY_INLINE void run() {
    const semantics::Range keys = start();
    run_.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
      products_.load_keys(tile, task_.num_panels);
      products_.load_values(tile);
      for (int64_t p = 0; p < task_.num_panels; ++p) attend(p, tile);
    });
    finish();
    if (problem_.wants_s_dmask) write_s_dmask(keys);
  }

  // Loads the queries and tells the keys that the task has to do with.
  HWY_INLINE semantics::Range start() {
    semantics::Range keys{run_.sequence().seqlen_k, 0};
    for (int64_t p = 0; p < task_.num_panels; ++p) {
      products_.load_queries(panels_[p]);
      keys.begin = std::min(keys.begin, panels_[p].keys.begin);
      keys.end = std::max(keys.end, panels_[p].keys.end);
    }
    return part_of(keys);
  }

  // What was accumulated becomes outputs, or a part to combine.
  HWY_INLINE void finish() {
    for (int64_t p = 0; p < task_.num_panels; ++p) {
      ForwardPanel& panel = panels_[p];
      if (!panel.started) {
        std::fill_n(panel.running_max, panel.num_lanes, kMinusInfinity);
        std::fill_n(panel.running_sum, panel.num_lanes, 0.0f);
      }
      if constexpr (Products::kPairs) {
        float* rows = call_.num_splits > 1
                          ? call_.partials.o + slot(p, task_.split) * kPanel * v_row_
                          : rows_;
        if (panel.started) products_.store_rows(panel, rows);
        panel.o = rows;
      }
      if (call_.num_splits == 1) store_outputs(panel);
    }
  }

  // Of a task with one panel.
  ForwardPanel& panel() { return panels_[0]; }
  const Products& products() const { return products_; }
  const SequenceRun& run() const { return run_; }

  // Joins the parts of each panel, in their order, in the first one.
  HWY_INLINE void combine() {
    for (int64_t p = 0; p < task_.num_panels; ++p) {
      ForwardPanel& panel = panels_[p];
      for (int64_t split = 1; split < call_.num_splits; ++split) {
        const ForwardPanel part = forward_panel(panel, call_.partials, slot(p, split));
        for (int64_t lane = 0; lane < panel.num_lanes; ++lane) join(panel, part, lane);
      }
      store_outputs(panel);
    }
  }

 private:
  HWY_INLINE ForwardPanel forward_panel(const QueryPanel& panel, const PartialResults& results,
                                        int64_t slot) const {
    return {panel,
            false,
            nullptr,
            results.o + slot * kPanel * v_row_,
            results.running_max + slot * kPanel,
            results.running_sum + slot * kPanel};
  }

  // Where the results of a split of panel p lie.
  HWY_INLINE int64_t slot(int64_t p, int64_t split) const {
    const int64_t number = call_.first_panel[task_.batch] +
                           task_.head_kv * call_.panels_per_head_kv(run_.sequence()) +
                           task_.first_panel + p;
    return number * call_.num_splits + split;
  }

  // The task's split of `keys`, in whole tiles.
  HWY_INLINE semantics::Range part_of(semantics::Range keys) const {
    if (call_.num_splits == 1 || keys.empty()) return keys;
    const int64_t first = keys.begin / call_.tile_keys;
    const int64_t tiles = (keys.end - 1) / call_.tile_keys + 1 - first;
    const auto boundary = [&](int64_t split) HWY_ATTR {
      return (first + split * tiles / call_.num_splits) * call_.tile_keys;
    };
    return {std::max<int64_t>(keys.begin, boundary(task_.split)),
            std::min<int64_t>(keys.end, boundary(task_.split + 1))};
  }

  // One lane of `part`, whose keys follow, into `panel`.
  HWY_INLINE void join(const ForwardPanel& panel, const ForwardPanel& part, int64_t lane) const {
    float& maximum = panel.running_max[lane];
    float& sum = panel.running_sum[lane];
    const float other = part.running_max[lane];
    if (other == kMinusInfinity) return;  // no visible key, and o undefined
    float* HWY_RESTRICT o = panel.o + lane * v_row_;
    const float* HWY_RESTRICT other_o = part.o + lane * v_row_;
    if (maximum == kMinusInfinity) {
      std::copy_n(other_o, v_row_, o);
      maximum = other;
      sum = part.running_sum[lane];
      return;
    }
    const float joint = std::max(maximum, other);
    const float mine = std::exp2(maximum - joint), others = std::exp2(other - joint);
    for (int64_t d = 0; d < v_row_; d += kLanes) {
      const Float scaled = hn::Mul(hn::Load(kFloats, o + d), hn::Set(kFloats, mine));
      hn::Store(hn::MulAdd(hn::Load(kFloats, other_o + d), hn::Set(kFloats, others), scaled),
                kFloats, o + d);
    }
    sum = sum * mine + part.running_sum[lane] * others;
    maximum = joint;
  }

  // S, P = softmax(S), O += P V for one panel and one tile.
  HWY_INLINE void attend(int64_t p, const KeyTile& keys) {
    ForwardPanel& panel = panels_[p];
    const ScoreTile tile = run_.score_tile(panel, keys, scores_);
    if (tile.begin >= tile.end) return;
    if constexpr (Products::kPairs) {
      const ForwardPanel* next = p + 1 < task_.num_panels ? &panel + 1 : nullptr;
      const ScoreTile next_tile = next ? run_.score_tile(*next, keys, scores_) : ScoreTile{};
      if (next_tile.begin >= next_tile.end) next = nullptr;
      products_.attend(panel, tile, task_.batch, next, next_tile);
    } else {
      const auto rescale = [&](const float* correction)
                               HWY_ATTR { products_.rescale(panel, correction); };
      compute_scores(panel, tile);
      online_softmax(panel, tile, rows_of(panel, tile, run_), rescale);
      if (problem_.dropout) apply_dropout(call_, panel, tile, task_.batch);
      products_.values(panel, tile);
      panel.started = true;
    }
  }

  // The rows of each column of scores whose probabilities are read: those that a register tile of
  // O += P V sees.
  HWY_INLINE static auto rows_of(const ForwardPanel& panel, const ScoreTile& tile,
                                 const SequenceRun& run) {
    return [keys_of = run.keys_of(panel, tile)](int64_t v) HWY_ATTR {
      constexpr int64_t kRows = Products::kQueries;
      return keys_of(v * kLanes / kRows * kRows, round_up((v + 1) * kLanes, kRows));
    };
  }

  HWY_INLINE void compute_scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    products_.scores(panel, tile);
    run_.finish_scores(panel, tile, false);
  }

  HWY_INLINE float sink_log2(int64_t head) const {
    const core::TensorView& sink = args_.learnable_sink;
    return core::load_element(sink, head * sink.strides[0]) * static_cast<float>(semantics::kLog2e);
  }

  // out = O / sum, lse = ln(sum) + max, each lane's row.
  HWY_INLINE void store_outputs(const ForwardPanel& panel) const {
    const float keep = 1.0f / (1.0f - static_cast<float>(args_.dropout_p));
    panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
      float maximum = panel.running_max[lane];
      float sum = panel.running_sum[lane];
      float correction = 1.0f;
      const bool none = sum == 0.0f;
      if (problem_.sink) {  // one more term of the denominator, without a value
        const float sink = sink_log2(head);
        const float joint = std::max({maximum, sink, std::numeric_limits<float>::lowest()});
        correction = std::exp2(maximum - joint);
        sum = sum * correction + std::exp2(sink - joint);
        maximum = joint;
      }
      float* o = panel.o + lane * v_row_;
      if (none) std::fill_n(o, v_row_, 0.0f);
      const int64_t at = run_.query_offset(args_.out, head, query);
      run_.narrow(o, none ? 0.0f : keep * correction / sum, args_.out, at);
      if (problem_.wants_lse) {
        const float no_term = problem_.sink ? kMinusInfinity : -kMinusInfinity;
        *run_.lse_at(head, query) =
            sum == 0.0f ? no_term : maximum * static_cast<float>(semantics::kLn2) + std::log(sum);
      }
    });
  }

  // exp(s - max s), negative where dropped: a second pass, once the maxima are known. For tests.
  HWY_INLINE void write_s_dmask(semantics::Range keys) {
    run_.for_each_tile(keys, [&](const KeyTile& key_tile) HWY_ATTR {
      products_.load_keys(key_tile, task_.num_panels);
      for (int64_t p = 0; p < task_.num_panels; ++p) {
        const ForwardPanel& panel = panels_[p];
        const ScoreTile tile = run_.score_tile(panel, key_tile, scores_);
        if (tile.begin >= tile.end) continue;
        compute_scores(panel, tile);
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
                            float* at = tile.at(row, v);
                            const Float p = hn::Load(kFloats, at);
                            hn::Store(hn::IfThenElse(kept, p, hn::Neg(p)), kFloats, at);
                          });
  }

  HWY_INLINE void copy_s_dmask(const QueryPanel& panel, const ScoreTile& tile) const {
    const core::TensorView& to = args_.s_dmask;
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      const int64_t row_offset = task_.batch * to.strides[0] + panel.head(lane) * to.strides[1] +
                                 panel.query(lane) * to.strides[2];
      for (int64_t row = tile.begin; row < tile.end; ++row) {
        core::store_element(to, row_offset + (tile.first_key + row) * to.strides[3],
                            tile.at_lane(row, lane));
      }
    }
  }

  const ForwardCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const SequenceRun run_;
  const ForwardTask& task_;
  const int64_t v_row_;
  const ForwardScratch layout_;
  Products products_;
  float* const scores_;  // [tile_keys][kPanel]
  float* const rows_;    // O of one panel, where the products keep O^T: [kPanel][v_row]
  ForwardPanel panels_[kMaxPanels];
};

// Whatever the products, the parts to combine are rows of fp32.
void forward_combine(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  ForwardTaskRun<FloatProducts>(call, task, scratch).combine();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
