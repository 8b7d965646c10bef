// Compiling without a device: for machines that are prepared ahead, and for tests.
#pragma once

#include <vector>

#include "core/status.h"
#include "cuda/kernel_id.h"

namespace fa::cuda {

struct CompileReport {
  int registers = 0;
  int spilled_bytes = 0;    // stored to and loaded from local memory
  bool serialised = false;  // ptxas ran wgmma one after another
};

// Every kernel that a device of this compute capability can be asked for.
std::vector<KernelId> kernels_for(int compute_capability);

// Compiles a kernel and puts it into the cache.
core::Result<CompileReport> precompile(const KernelId& id, int compute_capability);

}  // namespace fa::cuda
