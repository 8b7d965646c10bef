// The plans of the CPU: how a call is cut into tasks, and where its workspace goes.
#pragma once

#include <algorithm>
#include <vector>

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

// Heaviest first, so that no long task starts last. The order changes no result.
template <class Task>
void sort_by_cost(std::vector<Task>& tasks) {
  const auto heavier = [](const Task& a, const Task& b) { return a.cost > b.cost; };
  if (!std::is_sorted(tasks.begin(), tasks.end(), heavier)) {
    std::stable_sort(tasks.begin(), tasks.end(), heavier);
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
