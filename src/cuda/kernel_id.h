// One kernel as it is compiled, cached and launched: its function template and its spec.
#pragma once

#include <string>

#include "cuda/device/kernel_spec.h"

namespace fa::cuda {

enum class Family : int {
  kForward80,
  kForward32,
  kSDmask,
  kForward90,
  kUpdateCache,
  kCombineSplits
};

struct KernelId {
  Family family = Family::kForward80;
  KernelSpec spec;
  bool operator==(const KernelId&) const = default;
};

// "forward_sm80", also the name of the header under cuda/device.
const char* name(Family family);

// "forward_sm80 bfloat16 head_dim 128 tile 128x64, 4 warps"
std::string to_string(const KernelId& id);

// What NVRTC is asked for: fa::cuda::forward_sm80<fa::cuda::KernelSpec{...}>.
std::string expression(const KernelId& id);

int threads(const KernelId& id);
int dynamic_shared_bytes(const KernelId& id);

// Which architecture a kernel is compiled for on a device of this compute capability: "sm_80".
std::string arch(const KernelId& id, int compute_capability);

}  // namespace fa::cuda
