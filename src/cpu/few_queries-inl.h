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
#include "cpu/row_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

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
    dispatch_dtype(call_.args.k.dtype, [&](auto dtype) HWY_ATTR {
      first_head().run().for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
        int64_t begin = tile.keys.begin;
        while (begin < tile.keys.end) {
          const int64_t end = std::min<int64_t>(round_up(begin + 1, kLongTileKeys), tile.keys.end);
          attend<dtype()>({begin, end}, keys.end);
          begin = end;
        }
      });
    });
    for (int64_t h = 0; h < num_heads_; ++h) heads_[h]->finish();
  }

 private:
  using HeadRun = ForwardTaskRun<RowProducts>;
  // Rows asked for ahead of their use, and keys whose values are added to O at once.
  static constexpr int64_t kRowsAhead = 16;
  static constexpr int64_t kValueKeys = 24;
  static constexpr int64_t kMaxRows = kLongTileKeys + kRowsAhead;

  const HeadRun& first_head() const { return *heads_[0]; }

  // S, P = softmax(S), O += P V for one tile. Keys before `end` follow.
  template <core::DataType kType>
  HWY_INLINE void attend(semantics::Range keys, int64_t end) {
    const int64_t count = keys.end - keys.begin;
    find_rows(call_.args.k, keys.begin, keys.end, k_rows_);
    find_rows(call_.args.v, keys.begin, keys.end, v_rows_);
    const int64_t k_step = head_bytes(call_.args.k), v_step = head_bytes(call_.args.v);
    for (int64_t key = 0; key < count; key += RowProducts::kKeys) {
      for (int64_t h = 0; h < num_heads_; ++h) {
        for (int64_t k = key + kRowsAhead; k < key + kRowsAhead + RowProducts::kKeys; ++k) {
          if (k < count) prefetch(call_.args.k, k_rows_[k] + h * k_step);
          if (k >= count && k - count < count) {
            prefetch(call_.args.v, v_rows_[k - count] + h * v_step);
          }
        }
        const void* rows[RowProducts::kKeys];
        for (int64_t k = 0; k < RowProducts::kKeys; ++k) {
          rows[k] = k_rows_[std::min(key + k, count - 1)] + h * k_step;
        }
        heads_[h]->products().template scores<kType>(heads_[h]->panel(), rows, key);
      }
    }
    for (int64_t h = 0; h < num_heads_; ++h) {
      heads_[h]->products().softmax(heads_[h]->panel(), keys);
    }
    const int64_t next = std::min<int64_t>(keys.end + kRowsAhead, end);
    find_rows(call_.args.k, keys.end, next, k_rows_);
    for (int64_t key = 0; key < count; key += kValueKeys) {
      const int64_t rows_count = std::min(kValueKeys, count - key);
      for (int64_t h = 0; h < num_heads_; ++h) {
        for (int64_t k = key + kRowsAhead; k < key + kRowsAhead + kValueKeys; ++k) {
          if (k < count) prefetch(call_.args.v, v_rows_[k] + h * v_step);
          if (k >= count && k - count < next - keys.end) {
            prefetch(call_.args.k, k_rows_[k - count] + h * k_step);
          }
        }
        const void* rows[kValueKeys];
        for (int64_t k = 0; k < rows_count; ++k) rows[k] = v_rows_[key + k] + h * v_step;
        heads_[h]->products().template values<kType>(heads_[h]->panel(), rows, rows_count, key);
      }
    }
  }

  // Of the first head, for keys [begin, end).
  HWY_INLINE void find_rows(const core::TensorView& view, int64_t begin, int64_t end,
                            const char** to) const {
    const core::Rows rows = core::key_rows(view, first_head().run().sequence());
    for (int64_t key = begin; key < end; ++key) {
      to[key - begin] = view.as<const char>() + first_head().run().key_offset(view, rows, key) *
                                                    core::byte_size(view.dtype);
    }
  }

  static int64_t head_bytes(const core::TensorView& view) {
    return view.strides[view.ndim - 2] * core::byte_size(view.dtype);
  }

  // Into L2: what is on its way would not fit into L1.
  HWY_INLINE static void prefetch(const core::TensorView& view, const char* row) {
    constexpr int64_t kCacheLine = 64;
    constexpr int kIntoL2 = 2;
    const int64_t bytes = view.shape[view.ndim - 1] * core::byte_size(view.dtype);
    for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(row + at, 0, kIntoL2);
  }

  const ForwardCall& call_;
  const int64_t num_heads_;
  ForwardTask tasks_[kMaxHeadsTogether];
  std::optional<HeadRun> heads_[kMaxHeadsTogether];
  const char* k_rows_[kMaxRows];
  const char* v_rows_[kMaxRows];
};

template <class Products>
void forward_attend(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  if (task.few_queries) {
    FewQueriesRun(call, task, scratch).run();
  } else {
    ForwardTaskRun<Products>(call, task, scratch).run();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
