// d attn_bias = dS, summed along the dimensions that the bias was broadcast along. A pass of its
// own that recomputes dS, so that each element is summed by one task, in a fixed order.
#if defined(FA_CPU_BIAS_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_BIAS_GRADIENT_INL_H_
#undef FA_CPU_BIAS_GRADIENT_INL_H_
#else
#define FA_CPU_BIAS_GRADIENT_INL_H_
#endif

#include "core/element.h"
#include "cpu/backward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

template <class Products>
class BiasGradientRun {
  using TaskRun = BackwardTaskRun<Products>;

 public:
  BiasGradientRun(const BackwardCall& call, const BackwardTask& task, float* scratch)
      : call_(call), to_(call.args.d_attn_bias), task_(task), scratch_(scratch) {
    const BackwardScratch layout = BackwardScratch::layout(
        call.problem, call.tile_keys, Products::kPairs, {call.own_lanes, call.num_chunks});
    sums_ = scratch + layout.bias_sums;
    key_sums_ = sums_ + call.tile_keys * kPanel;
    query_sums_ = key_sums_ + call.tile_keys;
  }

  HWY_INLINE void run() {
    const core::AttentionProblem& problem = call_.problem;
    const bool per_query = bias_extent(to_, 2) > 1;
    const bool per_key = bias_extent(to_, 1) > 1;
    const int64_t num_blocks = ceil_div(problem.seqlen_q, kPanel);
    const int64_t num_tiles = ceil_div(problem.seqlen_k, call_.tile_keys);
    const semantics::Range one{task_.first, task_.first + 1};
    const semantics::Range tiles = per_key ? one : semantics::Range{0, num_tiles};
    const semantics::Range blocks = per_query && !per_key ? one : semantics::Range{0, num_blocks};
    std::fill_n(key_sums_, call_.tile_keys, 0.0f);
    std::fill_n(query_sums_, kPanel, 0.0f);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        sum_tile(block, tile);
        if (per_query && per_key) {
          store_tile(block, tile);
        } else {
          reduce_tile();
        }
      }
    }
    if (per_query && per_key) return;
    if (per_key) {
      for (int64_t row = 0; row < call_.tile_keys; ++row) {
        store(0, tiles.begin * call_.tile_keys + row, key_sums_[row]);
      }
    } else if (per_query) {
      for (int64_t i = 0; i < kPanel; ++i) store(blocks.begin * kPanel + i, 0, query_sums_[i]);
    } else {
      float total = 0.0f;
      for (int64_t i = 0; i < kPanel; ++i) total += query_sums_[i];
      store(0, 0, total);
    }
  }

 private:
  // sums_ = dS of one block of queries and one tile of keys, over all (batch, head) of this bias.
  HWY_INLINE void sum_tile(int64_t block, int64_t tile) const {
    const core::AttentionProblem& problem = call_.problem;
    std::fill_n(sums_, call_.tile_keys * kPanel, 0.0f);
    const auto range = [](bool own, int64_t index, int64_t count) HWY_ATTR {
      return own ? semantics::Range{index, index + 1} : semantics::Range{0, count};
    };
    const auto batches = range(bias_extent(to_, 4) > 1, task_.batch, problem.batch);
    const auto heads = range(bias_extent(to_, 3) > 1, task_.head_kv, problem.num_heads);
    for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        TaskRun run(call_, batch, head / call_.group, scratch_);
        const int64_t index = block * call_.group + head % call_.group;
        const KeyTile keys{
            {tile * call_.tile_keys,
             std::min<int64_t>((tile + 1) * call_.tile_keys, run.run().sequence().seqlen_k)},
            tile * call_.tile_keys};
        if (index < run.num_panels() && !keys.keys.empty()) add(run, run.panel(index), keys);
      }
    }
  }

  HWY_INLINE void add(TaskRun& run, const BackwardPanel& panel, const KeyTile& keys) const {
    const ScoreTile tile = run.run().score_tile(panel, keys, run.scores());
    if (tile.begin >= tile.end) return;
    run.load_tile(keys);
    run.compute_gradients(panel, tile, false);
    for (int64_t row = tile.begin; row < tile.end; ++row) {
      for (int64_t i = 0; i < panel.num_lanes; ++i) {
        sums_[row * kPanel + i] += tile.in(run.score_gradients()).at_lane(row, i);
      }
    }
  }

  HWY_INLINE void store_tile(int64_t block, int64_t tile) const {
    for (int64_t i = 0; i < kPanel; ++i) {
      for (int64_t row = 0; row < call_.tile_keys; ++row) {
        store(block * kPanel + i, tile * call_.tile_keys + row, sums_[row * kPanel + i]);
      }
    }
  }

  HWY_INLINE void reduce_tile() const {
    for (int64_t row = 0; row < call_.tile_keys; ++row) {
      for (int64_t i = 0; i < kPanel; ++i) {
        key_sums_[row] += sums_[row * kPanel + i];
        query_sums_[i] += sums_[row * kPanel + i];
      }
    }
  }

  // Where the position lies within the bias.
  HWY_INLINE void store(int64_t query, int64_t key, float value) const {
    if (query >= bias_extent(to_, 2) || key >= bias_extent(to_, 1)) return;
    const int64_t offset = task_.batch * bias_stride(to_, 4) + task_.head_kv * bias_stride(to_, 3) +
                           query * bias_stride(to_, 2) + key * bias_stride(to_, 1);
    core::store_element(to_, offset, value);
  }

  const BackwardCall& call_;
  const core::TensorView& to_;
  const BackwardTask& task_;
  float* const scratch_;
  float* sums_;        // [tile_keys][kPanel]
  float* key_sums_;    // [tile_keys]
  float* query_sums_;  // [kPanel]
};

template <class Products>
void backward_differentiate_bias(const BackwardCall& call, const BackwardTask& task,
                                 float* scratch) {
  BiasGradientRun<Products>(call, task, scratch).run();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
