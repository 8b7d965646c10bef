// The kernels' source, which the library carries along. The build writes the definition.
#pragma once

#include <span>

namespace fa::cuda {

struct DeviceSource {
  const char* name;  // as it is included: "cuda/device/mma.h"
  const char* text;
};

std::span<const DeviceSource> device_sources();

}  // namespace fa::cuda
