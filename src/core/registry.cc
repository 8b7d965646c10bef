#include "core/registry.h"

#include <vector>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "reference/reference.h"

namespace fa::core {

std::span<const Implementation> implementations(DeviceType device_type) {
  static const std::vector<Implementation> cpu_list = [] {
    std::vector<Implementation> list = cpu::implementations();
    list.push_back(reference::implementation());
    return list;
  }();
  static const std::vector<Implementation> cuda_list = cuda::implementations();
  if (device_type == DeviceType::kCpu) return cpu_list;
  if (device_type == DeviceType::kCuda) return cuda_list;
  return {};
}

}  // namespace fa::core
