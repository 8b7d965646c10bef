// Attention on NVIDIA GPUs, with kernels that are compiled at run time.
#pragma once

#include <vector>

#include "core/implementation.h"

namespace fa::cuda {

// Best first; each refuses where the machine has no driver, no NVRTC, or an older device.
std::vector<core::Implementation> implementations();

}  // namespace fa::cuda
