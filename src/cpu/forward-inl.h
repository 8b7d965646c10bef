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

#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

struct ForwardTile {
  semantics::Range keys;  // within the sequence
  int64_t first_key;      // of row 0; aligned to kTileKeys
  float* k;               // [kTileKeys][k_row]
  float* v;               // [kTileKeys][v_row]
  float* scores;          // [kTileKeys][kPanel]
};

// One task's view of the call.
class ForwardTaskRun {
 public:
  ForwardTaskRun(const ForwardCall& call, const ForwardTask& task, float* scratch)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        sequence_(core::sequence(call.args, call.problem, task.batch)),
        task_(task),
        k_row_(round_up(problem_.head_dim, kMaxLanes)),
        v_row_(round_up(problem_.head_dim_v, kMaxLanes)),
        layout_(ForwardScratch::layout(problem_, task.num_panels)),
        scratch_(scratch) {}

  HWY_INLINE void run() {
    semantics::Range keys{sequence_.seqlen_k, 0};
    for (int64_t p = 0; p < task_.num_panels; ++p) {
      panels_[p] = make_panel(p);
      load_queries(panels_[p]);
      keys.begin = std::min(keys.begin, panels_[p].keys.begin);
      keys.end = std::max(keys.end, panels_[p].keys.end);
    }
    for_each_tile(keys, [&](const ForwardTile& tile) HWY_ATTR {
      load_rows(args_.k, tile, k_row_, tile.k);
      load_rows(args_.v, tile, v_row_, tile.v);
      for (int64_t p = 0; p < task_.num_panels; ++p) attend(panels_[p], tile);
    });
    for (int64_t p = 0; p < task_.num_panels; ++p) store_outputs(panels_[p]);
    if (problem_.wants_s_dmask) write_s_dmask(keys);
  }

 private:
  HWY_INLINE Panel make_panel(int64_t p) const {
    const int64_t index = task_.first_panel + p;
    Panel panel{};
    panel.head = task_.head_kv * call_.group + index % call_.group;
    panel.first_query = index / call_.group * kPanel;
    panel.num_queries = std::min(kPanel, sequence_.seqlen_q - panel.first_query);
    // Ends grow with the query, and so do beginnings.
    const int64_t last_query = panel.first_query + panel.num_queries - 1;
    panel.keys = {visible_keys(panel.first_query).begin, visible_keys(last_query).end};
    panel.q = scratch_ + layout_.q + p * problem_.head_dim * kPanel;
    panel.o = scratch_ + layout_.o + p * v_row_ * kPanel;
    panel.running_max = scratch_ + layout_.running_max + p * kPanel;
    panel.running_sum = scratch_ + layout_.running_sum + p * kPanel;
    return panel;
  }

  HWY_INLINE semantics::Range visible_keys(int64_t query) const {
    return semantics::visible_keys(query, sequence_.seqlen_q, sequence_.seqlen_k, problem_.band);
  }

  // Tiles start at multiples of kTileKeys whatever the task, so that a query's sums are grouped
  // alike in every cut of the work.
  template <class Body>
  HWY_INLINE void for_each_tile(semantics::Range keys, Body&& body) const {
    for (int64_t first = keys.begin / kTileKeys * kTileKeys; first < keys.end; first += kTileKeys) {
      body(ForwardTile{
          {std::max<int64_t>(first, keys.begin), std::min<int64_t>(first + kTileKeys, keys.end)},
          first,
          scratch_ + layout_.k,
          scratch_ + layout_.v,
          scratch_ + layout_.scores});
    }
  }

  // panel.q = (q * scale * log2(e))^T; queries that only fill up the panel are zero.
  HWY_INLINE void load_queries(const Panel& panel) const {
    const core::Rows rows = core::query_rows(args_.q, sequence_);
    const int64_t depth = problem_.head_dim;
    float* HWY_RESTRICT buffer = scratch_ + layout_.scores;  // not in use yet
    const Float scale = hn::Set(kFloats, call_.scale_log2);
    const int64_t width = panel.vectors() * kLanes;
    for (int64_t query = 0; query < width; ++query) {
      float* HWY_RESTRICT column = panel.q + query;
      if (query >= panel.num_queries) {
        for (int64_t d = 0; d < depth; ++d) column[d * kPanel] = 0.0f;
        continue;
      }
      const int64_t at = rows.offset + (panel.first_query + query) * rows.row_stride +
                         panel.head * rows.head_stride;
      widen(args_.q, at, depth, buffer);
      for (int64_t d = 0; d < depth; d += kLanes) {
        hn::Store(hn::Mul(hn::Load(kFloats, buffer + d), scale), kFloats, buffer + d);
      }
      for (int64_t d = 0; d < depth; ++d) column[d * kPanel] = buffer[d];
    }
  }

  HWY_INLINE static void widen(const core::TensorView& from, int64_t offset, int64_t n, float* to) {
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      widen_row<dtype()>(from.as<const char>() + offset * core::byte_size(dtype()), n, to);
    });
  }

  // Copies the tile's rows of k or v, widened, from wherever the layout keeps them.
  HWY_INLINE void load_rows(const core::TensorView& from, const ForwardTile& tile, int64_t row_size,
                            float* HWY_RESTRICT to) const {
    const int64_t n = from.shape[from.ndim - 1];
    const core::Rows rows = core::key_rows(from, sequence_);
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
        int64_t offset = rows.offset + key * rows.row_stride;
        if (problem_.page_size > 0) {
          const core::PagedRow at =
              core::paged_row(args_.block_table, problem_.page_size, task_.batch, key);
          offset = at.page * from.strides[0] + at.row * from.strides[1];
        }
        offset += task_.head_kv * rows.head_stride;
        widen_row<dtype()>(from.as<const char>() + offset * core::byte_size(dtype()), n,
                           to + (key - tile.first_key) * row_size);
      }
    });
  }

  // The panel's share of the tile; empty where it sees none of it.
  HWY_INLINE ScoreTile score_tile(const Panel& panel, const ForwardTile& tile) const {
    return {tile.scores, tile.first_key,
            std::max(panel.keys.begin, tile.keys.begin) - tile.first_key,
            std::min(panel.keys.end, tile.keys.end) - tile.first_key};
  }

  // The rows of the tile that the panel's queries in [first, last) see, for the products to clip.
  HWY_INLINE auto keys_of(const Panel& panel, const ScoreTile& tile) const {
    const bool clips = crosses_band(panel, tile);
    return [this, &panel, &tile, clips](int64_t first, int64_t last) HWY_ATTR {
      if (!clips) return semantics::Range{tile.begin, tile.end};
      const int64_t last_query = std::min(last, panel.num_queries) - 1;
      return semantics::Range{
          std::max<int64_t>(tile.begin,
                            visible_keys(panel.first_query + first).begin - tile.first_key),
          std::min<int64_t>(tile.end,
                            visible_keys(panel.first_query + last_query).end - tile.first_key)};
    };
  }

  // S = Q K^T, transformed and masked.
  HWY_INLINE void compute_scores(const Panel& panel, const ForwardTile& tile,
                                 const ScoreTile& scores) const {
    score_product(panel.q, panel.vectors(), tile.k, k_row_, problem_.head_dim,
                  keys_of(panel, scores), tile.scores);
    if (problem_.softcap) apply_softcap(panel, scores, args_.softcap);
    if (problem_.alibi) {
      apply_alibi(panel, scores, alibi_slope(panel.head), sequence_.seqlen_k - sequence_.seqlen_q);
    }
    if (problem_.bias != core::BiasKind::kNone) apply_bias(panel, scores, bias(panel.head));
    if (crosses_band(panel, scores)) {
      apply_band(panel, scores, sequence_.seqlen_q, sequence_.seqlen_k, problem_.band);
    }
  }

  // S, P = softmax(S), O += P V for one panel and one tile.
  HWY_INLINE void attend(Panel& panel, const ForwardTile& tile) const {
    const ScoreTile scores = score_tile(panel, tile);
    if (scores.begin >= scores.end) return;
    compute_scores(panel, tile, scores);
    online_softmax(panel, scores, v_row_);
    if (problem_.dropout) apply_dropout(call_, panel, scores, task_.batch);
    const int64_t value_vectors = (problem_.head_dim_v + kLanes - 1) / kLanes;
    value_product(tile.scores, panel.num_queries, tile.v, v_row_, value_vectors,
                  keys_of(panel, scores), panel.started, panel.o);
    panel.started = true;
  }

  // Whether a key of the tile is hidden from a query of the panel.
  HWY_INLINE bool crosses_band(const Panel& panel, const ScoreTile& tile) const {
    if (problem_.band.unbounded()) return false;
    const semantics::Range first = visible_keys(panel.first_query);
    const semantics::Range last = visible_keys(panel.first_query + panel.num_queries - 1);
    return tile.first_key + tile.end > first.end || tile.first_key + tile.begin < last.begin;
  }

  HWY_INLINE float alibi_slope(int64_t head) const {
    const core::TensorView& slopes = args_.alibi_slopes;
    const float* at = slopes.as<const float>();
    return slopes.ndim == 1 ? at[head * slopes.strides[0]]
                            : at[task_.batch * slopes.strides[0] + head * slopes.strides[1]];
  }

  // The bias's strides, aligned from the right; a dimension of 1 is broadcast.
  HWY_INLINE Bias bias(int64_t head) const {
    const core::TensorView& view = args_.attn_bias;
    const auto stride = [&](int from_right) -> int64_t {
      const int d = view.ndim - from_right;
      return d < 0 || view.shape[d] == 1 ? 0 : view.strides[d];
    };
    return {&view, task_.batch * stride(4) + head * stride(3), stride(2), stride(1),
            problem_.bias == core::BiasKind::kBoolean};
  }

  HWY_INLINE float sink_log2(int64_t head) const {
    const core::TensorView& sink = args_.learnable_sink;
    return core::load_element(sink, head * sink.strides[0]) * static_cast<float>(semantics::kLog2e);
  }

  // out = O / sum, lse = ln(sum) + max, each query's row.
  HWY_INLINE void store_outputs(const Panel& panel) const {
    const core::Rows rows = core::query_rows(args_.out, sequence_);
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
      const int64_t at = rows.offset + (panel.first_query + query) * rows.row_stride +
                         panel.head * rows.head_stride;
      const bool none = !panel.started || sum == 0.0f;
      store_row(at, panel.o + query * v_row_, none ? 0.0f : keep * correction / sum, none);
      if (problem_.wants_lse) {
        const float lse = sum == 0.0f
                              ? -kMinusInfinity
                              : maximum * static_cast<float>(semantics::kLn2) + std::log(sum);
        *lse_at(panel.head, panel.first_query + query) = lse;
      }
    }
  }

  HWY_INLINE void store_row(int64_t offset, float* HWY_RESTRICT o, float factor, bool none) const {
    if (none) std::fill_n(o, v_row_, 0.0f);
    dispatch_dtype(args_.out.dtype, [&](auto dtype) HWY_ATTR {
      narrow_row<dtype()>(o, hn::Set(kFloats, factor), problem_.head_dim_v,
                          args_.out.as<char>() + offset * core::byte_size(dtype()));
    });
  }

  HWY_INLINE float* lse_at(int64_t head, int64_t query) const {
    const core::TensorView& lse = args_.lse;
    if (problem_.layout == core::Layout::kVarlen) {
      return lse.as<float>() + head * lse.strides[0] + (sequence_.q_begin + query) * lse.strides[1];
    }
    return lse.as<float>() + task_.batch * lse.strides[0] + head * lse.strides[1] +
           query * lse.strides[2];
  }

  // exp(s - max s), negative where dropped: a second pass, once the maxima are known. For tests.
  HWY_INLINE void write_s_dmask(semantics::Range keys) const {
    for_each_tile(keys, [&](const ForwardTile& tile) HWY_ATTR {
      load_rows(args_.k, tile, k_row_, tile.k);
      for (int64_t p = 0; p < task_.num_panels; ++p) {
        const Panel& panel = panels_[p];
        const ScoreTile scores = score_tile(panel, tile);
        if (scores.begin >= scores.end) continue;
        compute_scores(panel, tile, scores);
        transform_scores(panel, scores, [&](Float s, int64_t, int64_t v) HWY_ATTR {
          const Float maximum = hn::Load(kFloats, panel.running_max + v * kLanes);
          return exp2(hn::Sub(s, finite_maximum(maximum)));
        });
        if (problem_.dropout) negate_dropped(panel, scores);
        copy_s_dmask(panel, scores);
      }
    });
  }

  HWY_INLINE void negate_dropped(const Panel& panel, const ScoreTile& tile) const {
    for_each_dropout_mask(call_, panel, tile, task_.batch,
                          [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
                            float* at = tile.scores + row * kPanel + v * kLanes;
                            const Float p = hn::Load(kFloats, at);
                            hn::Store(hn::IfThenElse(kept, p, hn::Neg(p)), kFloats, at);
                          });
  }

  HWY_INLINE void copy_s_dmask(const Panel& panel, const ScoreTile& tile) const {
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

  const ForwardCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const core::Sequence sequence_;
  const ForwardTask& task_;
  const int64_t k_row_;
  const int64_t v_row_;
  const ForwardScratch layout_;
  float* const scratch_;
  Panel panels_[kMaxPanels];
};

void forward_task(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  ForwardTaskRun(call, task, scratch).run();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
