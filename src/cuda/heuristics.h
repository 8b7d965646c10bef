// Which kernel runs a problem on a device, and how its work is ordered. Every constant that was
// measured is here.
#pragma once

#include <vector>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/device.h"
#include "cuda/kernel_id.h"

namespace fa::cuda {

// What decides on a kernel and is known only when a call comes.
struct CallTraits {
  bool aligned = true;         // all rows of q, k, v and out start at multiples of 16 bytes
  bool positive_scale = true;  // softmax_scale > 0
};

// Why no kernel of the sm_80 family takes the problem, or ok.
core::Status check_problem(const core::AttentionProblem& problem,
                           const DeviceProperties& properties);

// The kernel for a problem that check_problem() takes.
KernelId choose_forward(const core::AttentionProblem& problem, const CallTraits& traits,
                        const DeviceProperties& properties);

// The kernel that writes S_dmask.
KernelId choose_s_dmask(const core::AttentionProblem& problem);

// Heads whose blocks take turns; see ScheduleArgs. Divides num_heads.
int heads_per_group(const core::AttentionProblem& problem, const DeviceProperties& properties);

// Every kernel that choose_forward() and choose_s_dmask() can give on a device.
std::vector<KernelId> reachable_kernels(const DeviceProperties& properties);

}  // namespace fa::cuda
