#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>

#include "core/arithmetic.h"

namespace fa::cpu {
namespace {

// From here on malloc of glibc maps memory anew for each request.
[[maybe_unused]] constexpr int64_t kMappedAnew = int64_t{32} << 20;

// Of a tensor; 0 where its elements do not lie end to end.
[[maybe_unused]] int64_t bytes_without_gaps(const core::TensorView& tensor) {
  if (!tensor.present()) return 0;
  const int64_t elements = tensor.num_elements();
  int64_t last = 0;
  for (int d = 0; d < tensor.ndim; ++d) last += (tensor.shape[d] - 1) * tensor.strides[d];
  return last + 1 == elements ? elements * core::byte_size(tensor.dtype) : 0;
}

}  // namespace

void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

void bring_in_pages(const core::TensorView& output, core::Parallel& parallel) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  const int64_t bytes = bytes_without_gaps(output);
  if (bytes < kMappedAnew) return;
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(output.data));
  const int64_t before = core::round_up(address, kHugePageBytes) - address;
  const int64_t pages = (bytes - before) / kHugePageBytes;
  char* const first = output.as<char>() + before;
  prefer_huge_pages(first, pages * kHugePageBytes);
  core::parallel_for(parallel, pages, parallel.num_workers(), [&](int64_t page, int) {
    madvise(first + page * kHugePageBytes, kHugePageBytes, MADV_POPULATE_WRITE);
  });
#else
  static_cast<void>(output), static_cast<void>(parallel);
#endif
}

bool give_pages_back_lazily(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
  const int64_t whole = bytes / kHugePageBytes * kHugePageBytes;
  return madvise(memory, static_cast<size_t>(whole), MADV_FREE) == 0;
#else
  static_cast<void>(memory), static_cast<void>(bytes);
  return false;
#endif
}

}  // namespace fa::cpu
