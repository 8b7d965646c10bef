#include "cuda/host_values.h"

#include "cuda/device.h"

namespace fa::cuda {
namespace {

using core::AttentionArgs;
using core::TensorView;

constexpr TensorView AttentionArgs::*kValues[] = {
    &AttentionArgs::cu_seqlens_q,  &AttentionArgs::cu_seqlens_k,  &AttentionArgs::seqused_k,
    &AttentionArgs::block_table,   &AttentionArgs::cache_seqlens, &AttentionArgs::cache_batch_idx,
    &AttentionArgs::cache_leftpad,
};

// Elements from the first to the last in memory.
int64_t reach(const TensorView& view) {
  if (view.num_elements() == 0) return 0;
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return last + 1;
}

}  // namespace

core::Status HostValues::read(AttentionArgs& args, void* stream) {
  const core::Result<const Device*> found = device(args.q.device.index);
  if (!found.ok()) return found.status();
  const Driver& driver = *found.value()->driver;
  const auto handle = static_cast<StreamHandle>(stream);
  const CurrentContext current(*found.value());
  FA_TRY(current.status());
  int capturing = 0;
  FA_TRY(driver.check(driver.is_capturing(handle, &capturing), "cuStreamIsCapturing"));
  if (capturing != 0) {
    return core::unsupported(
        "FLASH_ATTENTION_CHECK: lengths and pages cannot be read while a CUDA graph is captured; "
        "unset it for the capture");
  }
  for (TensorView AttentionArgs::*field : kValues) {
    TensorView& view = args.*field;
    const int64_t count = view.present() ? reach(view) : 0;
    if (count == 0) continue;
    std::vector<int32_t>& values = values_.emplace_back(static_cast<size_t>(count));
    FA_TRY(driver.check(driver.copy_to_host(values.data(), reinterpret_cast<uintptr_t>(view.data),
                                            static_cast<size_t>(count) * sizeof(int32_t), handle),
                        "cuMemcpyDtoHAsync"));
    view.data = values.data();
  }
  FA_TRY(driver.check(driver.synchronize(handle), "cuStreamSynchronize"));
  args.values_are_on_host = true;
  return {};
}

}  // namespace fa::cuda
