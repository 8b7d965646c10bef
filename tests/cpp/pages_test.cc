// The pages of tensors that are about to be written.
#include <gtest/gtest.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/pages.h"

namespace fa::cpu {
namespace {

// Memory that the system has just mapped.
class Mapping {
 public:
  explicit Mapping(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)),
        memory_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(memory_, bytes_); }

  char* data() const { return static_cast<char*>(memory_); }

  // Bytes in pages that are there.
  int64_t resident() const {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> pages((bytes_ + page - 1) / page);
    EXPECT_EQ(mincore(memory_, bytes_, pages.data()), 0);
    int64_t count = 0;
    for (unsigned char p : pages) count += p & 1;
    return count * static_cast<int64_t>(page);
  }

 private:
  size_t bytes_;
  void* memory_;
};

// [rows, 1024] of fp32.
core::TensorView rows_of(const Mapping& memory, int64_t rows, int64_t row_stride) {
  core::TensorView view;
  view.data = memory.data();
  view.dtype = core::DataType::kFloat32;
  view.ndim = 2;
  view.shape = {rows, 1024};
  view.strides = {row_stride, 1};
  return view;
}

constexpr int64_t kBytes = int64_t{80} << 20;
constexpr int64_t kRows = kBytes / 4096;

TEST(Pages, a_large_output_is_brought_in_and_keeps_its_values) {
  const Mapping memory(kBytes);
  memory.data()[0] = 1;
  memory.data()[kBytes / 2 + 1] = 2;
  memory.data()[kBytes - 1] = 3;
  bring_in_pages(rows_of(memory, kRows, 1024), default_parallel());
#if defined(MADV_POPULATE_WRITE) && !defined(FA_EMULATED)
  // An old system refuses, which a probe tells.
  if (madvise(memory.data(), kHugePageBytes, MADV_POPULATE_WRITE) == 0) {
    EXPECT_GE(memory.resident(), kBytes - 2 * kHugePageBytes);
  }
#endif
  EXPECT_EQ(memory.data()[0], 1);
  EXPECT_EQ(memory.data()[kBytes / 2 + 1], 2);
  EXPECT_EQ(memory.data()[kBytes - 1], 3);
}

TEST(Pages, small_outputs_and_those_with_gaps_are_left_alone) {
  const Mapping memory(kBytes);
  const int64_t before = memory.resident();
  bring_in_pages(rows_of(memory, kRows / 4, 1024), default_parallel());
  bring_in_pages(rows_of(memory, kRows / 2, 2048), default_parallel());
  bring_in_pages({}, default_parallel());
  EXPECT_EQ(memory.resident(), before);
}

}  // namespace
}  // namespace fa::cpu
#endif
