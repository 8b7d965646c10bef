// A launch of a forward kernel that takes whole tiles: Hopper's, or one of the sm_80 family's.
#pragma once

#include "core/implementation.h"
#include "cuda/device.h"
#include "cuda/device/kernel_args.h"
#include "cuda/kernels.h"

namespace fa::cuda {

class ForwardLaunch {
 public:
  // `kernel` is one that the heuristics choose for `problem` on the device; `otherwise` serves
  // calls whose tensors Hopper's copy engine cannot be told of, where `kernel` is Hopper's.
  ForwardLaunch(const core::AttentionProblem& problem, int device_index, const Device& device,
                const KernelId& kernel, const KernelId& otherwise);

  // Of the counter of ScheduleArgs, which may be missing, and is where all tiles run at once:
  // lending 8 bytes costs a framework's allocator 1 to 5 us.
  int64_t workspace_bytes() const { return counts_tiles_ ? sizeof(unsigned long long) : 0; }

  // The kernel that runs a call, which has such memory or not.
  core::Result<const LoadedKernel*> kernel_for(const core::AttentionArgs& args,
                                               bool has_workspace) const;

  // Runs it. `q` lies where `launch_args` has it, which are forward_args() for its spec, and what a
  // cache adds to them; the schedule is completed.
  core::Status run(const LoadedKernel& kernel, const core::TensorView& q,
                   const core::AttentionArgs& args, ForwardArgs& launch_args, void* workspace,
                   const core::Stream& stream) const;

  std::string describe() const;

 private:
  const core::AttentionProblem problem_;
  const int device_index_;
  const Device& device_;
  const bool uses_maps_;
  const LazyKernel counting_;
  const bool counts_tiles_;
  const LazyKernel kernel_;
  const LazyKernel otherwise_;
};

}  // namespace fa::cuda
