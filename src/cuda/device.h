// A CUDA device: what it is, and its context on the calling thread.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "cuda/driver.h"

namespace fa::cuda {

struct DeviceProperties {
  std::string name;
  int compute_capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  int64_t l2_bytes = 0;
  int64_t max_shared_bytes = 0;  // of a block
};

struct Device {
  const Driver* driver;
  Context context;  // the primary one, which every framework uses
  DeviceProperties properties;
};

// Device number `index`, as the process counts them; looked up once.
core::Result<const Device*> device(int index);

// What a device of this compute capability has, as far as kernels depend on it; for choosing
// kernels without one.
DeviceProperties typical_properties(int compute_capability);

// Makes a device's context the calling thread's while it lives.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  const core::Status& status() const { return status_; }

 private:
  const Driver& driver_;
  Context previous_ = nullptr;
  bool changed_ = false;
  core::Status status_;
};

}  // namespace fa::cuda
