// The forward's plan where keys may be shared among blocks, on a CUDA device: over a KV cache, and
// for few queries.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"

namespace fa::cuda {

// Of a problem that check_sm80() takes and wants_split_plan().
core::PlanPtr make_split_plan(const core::AttentionProblem& problem, int device_index,
                              const Device& device);

}  // namespace fa::cuda
