// The forward's plan on a CUDA device.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"
#include "cuda/device/kernel_args.h"
#include "cuda/kernel_id.h"

namespace fa::cuda {

TensorArgs tensor_args(const core::TensorView& view);

// All that a kernel of `spec` is to know of a call but the number of its blocks.
ForwardArgs forward_args(const core::AttentionProblem& problem, const core::AttentionArgs& args,
                         const KernelSpec& spec);

// Blocks of a launch with one for each tile. Varlen: one batch entry more, for the rows behind the
// last sequence.
int64_t num_blocks(const core::AttentionProblem& problem, const ScheduleArgs& schedule);

// `kernel` is one that the heuristics choose for `problem` on the device; `otherwise` serves calls
// whose tensors Hopper's copy engine cannot be told of, where `kernel` is Hopper's.
core::PlanPtr make_forward_plan(const core::AttentionProblem& problem, int device_index,
                                const Device& device, const KernelId& kernel,
                                const KernelId& otherwise);

}  // namespace fa::cuda
