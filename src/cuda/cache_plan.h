// The plan of the forward over a KV cache on a CUDA device.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"

namespace fa::cuda {

// Of a problem that check_sm80() takes.
core::PlanPtr make_cache_plan(const core::AttentionProblem& problem, int device_index,
                              const Device& device);

}  // namespace fa::cuda
