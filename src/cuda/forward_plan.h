// The forward's plan on a CUDA device.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"
#include "cuda/kernel_id.h"

namespace fa::cuda {

// `kernel` is one that the heuristics choose for `problem` on the device; `otherwise` serves calls
// whose tensors Hopper's copy engine cannot be told of, where `kernel` is Hopper's.
core::PlanPtr make_forward_plan(const core::AttentionProblem& problem, int device_index,
                                const Device& device, const KernelId& kernel,
                                const KernelId& otherwise);

}  // namespace fa::cuda
