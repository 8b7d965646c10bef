#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>

namespace fa::cpu {

void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
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
