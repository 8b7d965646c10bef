// The forward's plan on a CUDA device.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"

namespace fa::cuda {

// `problem` is one that check_problem() takes on the device.
core::PlanPtr make_forward_plan(const core::AttentionProblem& problem, int device_index,
                                const Device& device);

}  // namespace fa::cuda
