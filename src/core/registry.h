#pragma once

#include <span>

#include "core/implementation.h"

namespace fa::core {

// The implementations for a device, best first. This is the one place that names the backends.
std::span<const Implementation> implementations(DeviceType device_type);

}  // namespace fa::core
