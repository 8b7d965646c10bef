// The plans of the CPU: how a call is cut into tasks, and where its workspace goes.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/implementation.h"
#include "cpu/call.h"

namespace fa::cpu {

core::PlanPtr make_forward_plan(const core::AttentionProblem& problem, const InstructionSet& set);
core::PlanPtr make_backward_plan(const core::AttentionProblem& problem, const InstructionSet& set);

AttentionCall make_call(const core::AttentionArgs& args, const core::AttentionProblem& problem,
                        const InstructionSet& set, int64_t tile_keys, bool may_pack);

// The most panels that the call's sequences can be cut into; each may end in one partly empty.
inline int64_t max_panels(const core::AttentionProblem& problem, int64_t panel, bool packs_group) {
  return packs_group ? problem.batch * problem.num_heads_kv
                     : (problem.total_q / panel + problem.batch) * problem.num_heads;
}

// Zeroes rows [begin, end) of one entry of a tensor.
inline void clear_rows(const core::TensorView& tensor, int64_t index, int64_t begin, int64_t end) {
  const core::Rows rows = core::rows_from(tensor, index, 0);
  const int64_t heads = tensor.shape[tensor.ndim - 2];
  const int64_t element_bytes = core::byte_size(tensor.dtype);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = rows.offset + row * rows.row_stride + head * rows.head_stride;
      std::memset(tensor.as<char>() + at * element_bytes, 0,
                  tensor.shape[tensor.ndim - 1] * element_bytes);
    }
  }
}

// How many threads `flops` of work are worth: below about 20 us each, another one costs more than
// it brings.
inline int useful_workers(double flops, int num_workers) {
  constexpr double kFlopsPerWorker = 2e6;
  return static_cast<int>(
      std::min(1.0 + flops / kFlopsPerWorker, static_cast<double>(num_workers)));
}

}  // namespace fa::cpu
