// Where one sequence of a batch lies, for the dense, varlen and paged layouts alike.
//
// Reads cu_seqlens, seqused_k and block_table through their data pointers: on the host, for tensors
// on the CPU that have passed validate_forward().
#pragma once

#include <cstdint>

#include "core/attention_args.h"
#include "core/problem.h"

namespace fa::core {

// Row r of the sequence's queries is row `q_begin + r` of q and out, in their entry `batch` where
// they have a batch dimension. Keys alike, by `k_begin` and `k_batch`. With pages, key r is where
// paged_row() puts number `k_begin + r`.
struct Sequence {
  int64_t batch;
  int64_t q_begin;
  int64_t seqlen_q;
  int64_t k_batch;
  int64_t k_begin;
  int64_t seqlen_k;  // keys in use: with seqused_k, or what is cached and appended
};

inline Sequence sequence(const AttentionArgs& args, const AttentionProblem& problem,
                         int64_t batch) {
  if (problem.layout == Layout::kDense) {
    return {batch, 0, problem.seqlen_q, batch, 0, problem.seqlen_k};
  }
  if (problem.layout == Layout::kCache) {
    const auto entry = [batch](const TensorView& vector, int64_t otherwise) -> int64_t {
      return vector.present() ? vector.as<const int32_t>()[batch] : otherwise;
    };
    const int64_t leftpad = entry(args.cache_leftpad, 0);
    return {batch,
            0,
            problem.seqlen_q,
            entry(args.cache_batch_idx, batch),
            leftpad,
            entry(args.cache_seqlens, 0) + problem.seqlen_new - leftpad};
  }
  const int32_t* cu_seqlens_q = args.cu_seqlens_q.as<const int32_t>();
  const int32_t* cu_seqlens_k = args.cu_seqlens_k.as<const int32_t>();
  Sequence result{batch,
                  cu_seqlens_q[batch],
                  cu_seqlens_q[batch + 1] - cu_seqlens_q[batch],
                  batch,
                  problem.page_size > 0 ? 0 : cu_seqlens_k[batch],
                  cu_seqlens_k[batch + 1] - cu_seqlens_k[batch]};
  if (args.seqused_k.present()) result.seqlen_k = args.seqused_k.as<const int32_t>()[batch];
  return result;
}

// Element (row, head, d) lies at `offset + row * row_stride + head * head_stride + d`, in elements.
struct Rows {
  int64_t offset;
  int64_t row_stride;
  int64_t head_stride;
};

// The rows of a tensor of rank 4 from row `begin` of its entry `index` on (dense: the batch; paged:
// the page), or of a tensor of rank 3 from row `begin` on.
inline Rows rows_from(const TensorView& view, int64_t index, int64_t begin) {
  if (view.ndim == 4) {
    return {index * view.strides[0] + begin * view.strides[1], view.strides[1], view.strides[2]};
  }
  return {begin * view.strides[0], view.strides[0], view.strides[1]};
}

inline Rows query_rows(const TensorView& q_or_out, const Sequence& sequence) {
  return rows_from(q_or_out, sequence.batch, sequence.q_begin);
}

// Not for paged k and v.
inline Rows key_rows(const TensorView& k_or_v, const Sequence& sequence) {
  return rows_from(k_or_v, sequence.k_batch, sequence.k_begin);
}

struct PagedRow {
  int64_t page;  // index into the first dimension of k and v
  int64_t row;   // within the page
};

// Where block_table puts key j of a sequence.
inline PagedRow paged_row(const TensorView& block_table, int64_t page_size, int64_t batch,
                          int64_t j) {
  const int32_t* pages = block_table.as<const int32_t>() + batch * block_table.strides[0];
  return {pages[j / page_size], j % page_size};
}

}  // namespace fa::core
