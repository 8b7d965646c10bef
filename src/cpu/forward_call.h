// One forward call as the kernels see it: resolved once, read by every task.
#pragma once

#include <cstdint>
#include <vector>

#include "core/attention_args.h"
#include "core/problem.h"
#include "core/semantics.h"
#include "core/sequence.h"

namespace fa::cpu {

// Sizes that hold on every instruction set, so that scratch is booked without knowing which.
inline constexpr int64_t kMaxLanes = 16;   // fp32 in the widest vector
inline constexpr int64_t kMaxPanel = 64;   // queries of one panel
inline constexpr int64_t kTileKeys = 96;   // keys of one tile; divisible by every register tile
inline constexpr int64_t kMaxPanels = 16;  // panels that share each key tile

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Consecutive panels of one (batch, key head): panel p covers queries of head
// kv_head * group + p % group, so that neighbours read the same keys.
struct ForwardTask {
  int32_t batch;
  int32_t head_kv;
  int64_t first_panel;
  int64_t num_panels;
  double cost;  // query-key pairs, to start the heaviest first
};

struct ForwardCall {
  const core::AttentionArgs& args;
  const core::AttentionProblem& problem;
  float scale_log2;  // softmax_scale * log2(e): scores are kept in base 2
  int64_t group;     // query heads per key head
  int64_t panel;     // queries per panel on the instruction set that runs
  semantics::DropoutKey dropout_key;
  semantics::Word dropout_threshold;
};

// Where the scratch of one worker lies, in floats. Sized for the whole task.
struct ForwardScratch {
  int64_t q, o, running_max, running_sum, k, v, scores, total;
  static ForwardScratch layout(const core::AttentionProblem& problem, int64_t max_panels);
};

// As many panels as keep their queries and accumulators within a core's L2 cache.
int64_t panels_per_task(const core::AttentionProblem& problem, int64_t panel);

// Cuts a call into tasks, heaviest first. Depends on the problem and the lengths alone.
std::vector<ForwardTask> cut_forward(const ForwardCall& call, int64_t max_panels);

// Runs one task on one instruction set. scratch: ForwardScratch::total floats.
using ForwardKernel = void (*)(const ForwardCall& call, const ForwardTask& task, float* scratch);

struct InstructionSet {
  const char* name;     // "cpu:avx2"
  bool (*supported)();  // by this processor and operating system
  ForwardKernel forward;
  int64_t panel;
};

// Those that the kernels were compiled for, best first.
std::vector<InstructionSet> instruction_sets();

}  // namespace fa::cpu
