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
  // Rows asked for ahead of their use.
  static constexpr int64_t kRowsAhead = 16;

  // Of the first head.
  struct Row {
    const char* data;
    int64_t bytes;
    int64_t head_bytes;  // to the next head's row
  };

  const HeadRun& first_head() const { return *heads_[0]; }

  // S, P = softmax(S), O += P V for one tile. Keys before `end` follow.
  template <core::DataType kType>
  HWY_INLINE void attend(semantics::Range keys, int64_t end) {
    const int64_t count = keys.end - keys.begin;
    const int64_t next = std::min<int64_t>(keys.end + kRowsAhead, end);
    find_rows(call_.args.k, keys, rows_);
    find_rows(call_.args.v, keys, rows_ + count);
    find_rows(call_.args.k, {keys.end, next}, rows_ + 2 * count);
    const int64_t known = 2 * count + next - keys.end;

    const void* rows[Products::kKeys];
    for (int64_t key = 0; key < count; key += Products::kKeys) {
      for (int64_t h = 0; h < num_heads_; ++h) {
        ask_for(key + kRowsAhead, std::min(key + kRowsAhead + Products::kKeys, known), h);
        for (int64_t k = 0; k < Products::kKeys; ++k) {
          rows[k] = row_of(std::min(key + k, count - 1), h);
        }
        heads_[h]->products().template scores<kType>(heads_[h]->panel(), rows, key);
      }
    }
    for (int64_t h = 0; h < num_heads_; ++h) {
      heads_[h]->products().softmax(heads_[h]->panel(), keys);
    }
    const void* value_rows[Products::kValueKeys];
    for (int64_t key = 0; key < count; key += Products::kValueKeys) {
      const int64_t first = count + key;
      const int64_t rows_count = std::min(Products::kValueKeys, count - key);
      for (int64_t h = 0; h < num_heads_; ++h) {
        ask_for(first + kRowsAhead, std::min(first + kRowsAhead + Products::kValueKeys, known), h);
        for (int64_t k = 0; k < rows_count; ++k) value_rows[k] = row_of(first + k, h);
        heads_[h]->products().template values<kType>(heads_[h]->panel(), value_rows, rows_count,
                                                     key);
      }
    }
  }

  HWY_INLINE void find_rows(const core::TensorView& view, semantics::Range keys, Row* to) const {
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

  // Prefetches into L2: what is on its way would not fit into L1.
  HWY_INLINE void ask_for(int64_t begin, int64_t end, int64_t h) const {
    constexpr int64_t kCacheLine = 64;
    constexpr int kIntoL2 = 2;
    for (int64_t row = begin; row < end; ++row) {
      const char* data = row_of(row, h);
      const int64_t bytes = rows_[row].bytes;
      for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(data + at, 0, kIntoL2);
    }
  }

  const ForwardCall& call_;
  const int64_t num_heads_;
  ForwardTask tasks_[kMaxHeadsTogether];
  std::optional<HeadRun> heads_[kMaxHeadsTogether];
  // The tile's keys, its values, and keys of the next tile, in the order of their use.
  Row rows_[2 * kLongTileKeys + kRowsAhead];
};

template <class Products>
void forward_attend(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  if (!task.few_queries) return ForwardTaskRun<Products>(call, task, scratch).run();
  if constexpr (Products::kPairs) {
    if (call.row_pairs != nullptr) return FewQueriesRun<RowPairProducts>(call, task, scratch).run();
  }
  FewQueriesRun<RowProducts>(call, task, scratch).run();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
