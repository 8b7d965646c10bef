// Kernels that are ready to be launched: compiled or taken from the disk, and loaded, once each.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "core/status.h"
#include "cuda/device.h"
#include "cuda/kernel_id.h"
#include "cuda/nvrtc.h"

namespace fa::cuda {

// Of one launch; more are refused.
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

struct LoadedKernel {
  KernelId id;
  const Device* device;
  Function function = nullptr;
  int registers = 0;
  int local_bytes = 0;  // of a thread; spilled registers among them

  // On a device whose context is current. `arguments` point to the kernel's parameters.
  core::Status launch(int64_t num_blocks, void** arguments, void* stream) const;
};

// Its spec, registers and shared memory.
std::string describe_kernel(const LoadedKernel& kernel);

// The kernel on device number `index`; compiles it where nobody has yet. Any thread may ask.
core::Result<const LoadedKernel*> load_kernel(int index, const KernelId& id);

// A kernel that is found when it is first needed.
class LazyKernel {
 public:
  explicit LazyKernel(const KernelId& id) : id_(id) {}
  const KernelId& id() const { return id_; }
  const KernelSpec& spec() const { return id_.spec; }
  core::Result<const LoadedKernel*> get(int device_index) const {
    if (const LoadedKernel* known = kernel_.load(std::memory_order_acquire)) return known;
    const core::Result<const LoadedKernel*> kernel = load_kernel(device_index, id_);
    if (kernel.ok()) kernel_.store(kernel.value(), std::memory_order_release);
    return kernel;
  }

 private:
  const KernelId id_;
  mutable std::atomic<const LoadedKernel*> kernel_{nullptr};
};

// Compiles a kernel for an architecture, from nothing.
core::Result<CompiledKernel> compile_kernel(const KernelId& id, int compute_capability);

// What a kernel is stored under: all that its image depends on.
core::Result<std::string> cache_key(const KernelId& id, int compute_capability);

}  // namespace fa::cuda
