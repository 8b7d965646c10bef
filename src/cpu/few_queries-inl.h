// The forward for few queries: what counts is the memory's bandwidth. Rows of neighbouring key
// heads that lie end to end are read together, in the order of their addresses.
#if defined(FA_CPU_FEW_QUERIES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_FEW_QUERIES_INL_H_
#undef FA_CPU_FEW_QUERIES_INL_H_
#else
#define FA_CPU_FEW_QUERIES_INL_H_
#endif

#include <optional>

#include "cpu/forward-inl.h"
#include "cpu/row_pair_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Products: RowProducts, or RowPairProducts.
template <class Products>
class FewQueriesRun {
 public:
  FewQueriesRun(const ForwardCall& call, const ForwardTask& task, float* scratch)
      : call_(call), num_heads_(task.num_heads_kv) {
    const int64_t size = ForwardScratch::for_few_queries(call.problem).total;
    for (int64_t h = 0; h < num_heads_; ++h) {
      tasks_[h] = task;
      tasks_[h].head_kv += static_cast<int32_t>(h);
      heads_[h].emplace(call, tasks_[h], scratch + h * size);
    }
  }

  HWY_INLINE void run() {
    semantics::Range keys{};
    for (int64_t h = 0; h < num_heads_; ++h) keys = heads_[h]->start();
    Products::with_dtype(call_.args.k.dtype, [&](auto dtype) HWY_ATTR {
      first_head().run().for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
        // Equal parts of a tile.
        const int64_t part = call_.tile_keys / ceil_div(call_.tile_keys, kLongTileKeys);
        int64_t begin = tile.keys.begin;
        while (begin < tile.keys.end) {
          const int64_t end = std::min<int64_t>(round_up(begin + 1, part), tile.keys.end);
          this->template attend<dtype()>({begin, end}, keys.end);
          begin = end;
        }
      });
    });
    for (int64_t h = 0; h < num_heads_; ++h) heads_[h]->finish();
  }

 private:
  using HeadRun = ForwardTaskRun<Products>;
  // Rows of values that are added at once, head by head; fewer where those of all heads are long.
  static constexpr int64_t kFewValueKeys = 8;
  static constexpr int64_t kLongRows = 4096;  // bytes
  // Rows asked for ahead of their use: beyond those of values that are added at once, so many.
  static constexpr int64_t kRowsBeyond = 16;
  static constexpr int64_t kMaxRowsAhead = Products::kValueKeys + kRowsBeyond;

  const HeadRun& first_head() const { return *heads_[0]; }

  // S, P = softmax(S), O += P V for one tile. Keys before `end` follow.
  template <core::DataType kType>
  HWY_INLINE void attend(semantics::Range keys, int64_t end) {
    const int64_t count = keys.end - keys.begin;
    const int64_t next = std::min<int64_t>(keys.end + kMaxRowsAhead, end);
    find_rows(call_.args.k, keys, rows_);
    find_rows(call_.args.v, keys, rows_ + count);
    find_rows(call_.args.k, {keys.end, next}, rows_ + 2 * count);
    const HeadRow* known = rows_ + 2 * count + next - keys.end;
    const bool long_rows = num_heads_ * rows_[0].bytes > kLongRows;
    const int64_t value_keys = long_rows ? kFewValueKeys : Products::kValueKeys;
    RowsAhead ahead;
    ahead.start(std::min<const HeadRow*>(rows_ + value_keys + kRowsBeyond, known), known,
                num_heads_);

    const int64_t lanes = heads_[0]->panel().num_lanes;
    const int64_t k_lines = ceil_div(rows_[0].bytes, RowsAhead::kLine) * Products::kKeys;
    const int64_t k_step =
        RowsAhead::per_step(k_lines, Products::score_steps(lanes, call_.problem.head_dim));
    const void* rows[Products::kKeys];
    for (int64_t key = 0; key < count; key += Products::kKeys) {
      for (int64_t h = 0; h < num_heads_; ++h) {
        for (int64_t k = 0; k < Products::kKeys; ++k) {
          rows[k] = row_of(std::min(key + k, count - 1), h);
        }
        ahead.allow(k_lines, k_step);
        heads_[h]->products().template scores<kType>(heads_[h]->panel(), rows, key, ahead);
        ahead.finish();
      }
    }
    for (int64_t h = 0; h < num_heads_; ++h) {
      heads_[h]->products().softmax(heads_[h]->panel(), keys);
    }
    const int64_t v_lines = ceil_div(rows_[count].bytes, RowsAhead::kLine);
    const int64_t v_step =
        RowsAhead::per_step(v_lines, Products::value_steps(lanes, call_.problem.head_dim_v));
    const void* value_rows[Products::kValueKeys];
    for (int64_t key = 0; key < count; key += value_keys) {
      const int64_t rows_count = std::min(value_keys, count - key);
      for (int64_t h = 0; h < num_heads_; ++h) {
        for (int64_t k = 0; k < rows_count; ++k) value_rows[k] = row_of(count + key + k, h);
        ahead.allow(rows_count * v_lines, v_step);
        heads_[h]->products().template values<kType>(heads_[h]->panel(), value_rows, rows_count,
                                                     key, ahead);
        ahead.finish();
      }
    }
  }

  HWY_INLINE void find_rows(const core::TensorView& view, semantics::Range keys,
                            HeadRow* to) const {
    const core::Rows rows = core::key_rows(view, first_head().run().sequence());
    const int64_t element = core::byte_size(view.dtype);
    const int64_t bytes = view.shape[view.ndim - 1] * element;
    const int64_t head_bytes = view.strides[view.ndim - 2] * element;
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      const int64_t offset = first_head().run().key_offset(view, rows, key);
      to[key - keys.begin] = {view.as<const char>() + offset * element, bytes, head_bytes};
    }
  }

  HWY_INLINE const char* row_of(int64_t row, int64_t h) const {
    return rows_[row].data + h * rows_[row].head_bytes;
  }

  const ForwardCall& call_;
  const int64_t num_heads_;
  ForwardTask tasks_[kMaxHeadsTogether];
  std::optional<HeadRun> heads_[kMaxHeadsTogether];
  // The tile's keys, its values, and keys of the next tile, in the order of their use.
  HeadRow rows_[2 * kLongTileKeys + kMaxRowsAhead];
};

// Of all kernels, whatever their products for many queries.
template <class Products>
HWY_NOINLINE void attend_few_queries(const ForwardCall& call, const ForwardTask& task,
                                     float* scratch) {
  FewQueriesRun<Products>(call, task, scratch).run();
}

template <class Products>
void forward_attend(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  if (!task.few_queries) return ForwardTaskRun<Products>(call, task, scratch).run();
  if constexpr (Products::kPairs) {
    if (call.row_pairs != nullptr) return attend_few_queries<RowPairProducts>(call, task, scratch);
  }
  attend_few_queries<RowProducts>(call, task, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
