// src/cuda/device/wgmma.h on an emulated GPU: each thread computes its own elements.
#pragma once

#include "cuda/device/matrix_descriptor.h"
#include "cuda/device/mma.h"

namespace fa::cuda {

inline void products_fence() {}
inline void products_commit() { emulated::end_group(); }
template <int kPending, int kPlace = 0>
void products_wait() {
  emulated::wait_for_groups(kPending);
}
template <int kTilesN>
void pin(Accumulator<1, kTilesN>&) {}

// Element (row, column) of what a descriptor describes, where a row of it is 128 bytes or a part of
// them.
template <Element kElement>
float element_at(MatrixDescriptor matrix, int row, int column) {
  const auto field = [&](int bit) { return static_cast<Word>(matrix >> bit & 0x3FFF) << 4; };
  const SharedAddress place = field(0) + static_cast<Word>(column / kBlockColumns) * field(16) +
                              static_cast<Word>(row / 8) * field(32) +
                              static_cast<Word>(row % 8 * kBlockRowBytes) +
                              static_cast<Word>(column % kBlockColumns * 2);
  Half bits;
  std::memcpy(&bits, shared_at(place ^ (place >> 7 & 7) << 4), sizeof(bits));
  return to_float<kElement>(bits);
}

// c += a b, for the thread's two rows of a, [2][16], and b(k, n).
template <int kTilesN, class B>
void add_products(Accumulator<1, kTilesN>& c, const float (&a)[2][16], B&& b) {
  const int lane = static_cast<int>(threadIdx.x % emulated::kWarp);
  for (int n = 0; n < kTilesN; ++n) {
    for (int e = 0; e < 2; ++e) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float factor = b(k, n * 8 + lane % 4 * 2 + e);
        for (int half = 0; half < 2; ++half) sums[half] += a[half][k] * factor;
      }
      for (int half = 0; half < 2; ++half) c.at[0][n][2 * half + e] += sums[half];
    }
  }
}

template <Element kElement, int kTilesN>
void product(Accumulator<1, kTilesN>& c, MatrixDescriptor a, MatrixDescriptor b, int add) {
  emulated::multiply([&c, a, b, add] {
    const int row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
      for (int half = 0; half < 2; ++half) {
        rows[half][k] = element_at<kElement>(a, row + 8 * half, k);
      }
    }
    if (add == 0) c.clear();
    add_products(c, rows, [&](int k, int n) { return element_at<kElement>(b, n, k); });
  });
}

// Lane 4 r + i holds of the rows r and r + 8 the columns 2 i, 2 i + 1 and 8 further on.
template <Element kElement, int kTilesN>
void product(Accumulator<1, kTilesN>& c, const Word (&a)[4], MatrixDescriptor b) {
  emulated::multiply([&c, &a, b] {
    float rows[2][16];
    for (int i = 0; i < 4; ++i) {
      const uint32_t* lanes = emulated::exchange(a[i]) + threadIdx.x % 32 / 4 * 4;
      for (int word = 0; word < 4; ++word) {
        for (int half = 0; half < 2; ++half) {
          rows[i % 2][i / 2 * 8 + word * 2 + half] =
              to_float<kElement>(static_cast<Half>(lanes[word] >> 16 * half));
        }
      }
    }
    add_products(c, rows, [&](int k, int n) { return element_at<kElement>(b, k, n); });
  });
}

}  // namespace fa::cuda
