// Operands of Hopper's products in shared memory, as the copy engine lays them out with its
// 128-byte swizzle: blocks of 64 columns, in which a row is 128 bytes and 8 rows are a period.
#pragma once

#include "cuda/device/ptx.h"

namespace fa::cuda {

using MatrixDescriptor = unsigned long long;

inline constexpr int kBlockRowBytes = 128;
inline constexpr int kPeriodBytes = 8 * kBlockRowBytes;

// Rows of k at `address`, 16 columns to be multiplied: 8-row periods one behind another.
__device__ inline MatrixDescriptor row_descriptor(SharedAddress address) {
  constexpr MatrixDescriptor kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<MatrixDescriptor>(kPeriodBytes / 16) << 32 |
         (address & 0x3FFFF) >> 4;
}

// 16 rows of v at `address`, to be multiplied from the left: kBlockBytes from one block of columns
// to the next.
template <int kBlockBytes>
__device__ inline MatrixDescriptor column_descriptor(SharedAddress address) {
  return row_descriptor(address) | static_cast<MatrixDescriptor>(kBlockBytes / 16) << 16;
}

// What lies `bytes` behind, a multiple of 16; addresses are of the low word, and do not overflow.
__device__ inline MatrixDescriptor advance(MatrixDescriptor descriptor, int bytes) {
  const Word low = static_cast<Word>(descriptor) + static_cast<Word>(bytes / 16);
  return (descriptor >> 32) << 32 | low;
}

}  // namespace fa::cuda
