// The forward's plan where keys may be shared among blocks, on a CUDA device: over a KV cache, and
// for few queries.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"
#include "cuda/heuristics.h"

namespace fa::cuda {

// Of a problem that wants_split_plan(), and what the heuristics choose for it. `otherwise` serves
// calls whose tensors Hopper's copy engine cannot be told of, where the choice is Hopper's kernel.
core::PlanPtr make_split_plan(const core::AttentionProblem& problem, int device_index,
                              const Device& device, const SplitChoice& choice,
                              const KernelId& otherwise);

}  // namespace fa::cuda
