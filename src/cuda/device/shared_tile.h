// A tile of 16-bit elements in shared memory, swizzled so that neither a copy nor ldmatrix meets a
// bank conflict.
#pragma once

#include "cuda/device/ptx.h"

namespace fa::cuda {

// kRows x kColumns, row-major, the 16-byte chunks of a row permuted. A chunk's number is XORed with
// bits of its row: three bits where a row fills whole lines of 128 bytes, two where it begins at
// either half of one. XOR touches address bits 4 to 6 only, so that the address of a chunk that is
// a constant number of chunks away is one XOR and one addition away.
template <int kRows, int kColumns>
struct SharedTile {
  static_assert(kColumns % 32 == 0);
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr bool kWholeLines = kRowBytes % 128 == 0;
  static constexpr int kGroupChunks = kWholeLines ? 8 : 4;  // chunks that are permuted among them
  static constexpr int kGroupBytes = kGroupChunks * 16;
  static constexpr int kGroups = kRowBytes / kGroupBytes;

  SharedAddress base;

  __device__ static constexpr int swizzle(int row) { return kWholeLines ? row % 8 : row / 2 % 4; }

  // Of chunk `chunk` (16 bytes) of `row`; the base is a multiple of 128.
  __device__ SharedAddress address(int row, int chunk) const {
    return base + row * kRowBytes + chunk / kGroupChunks * kGroupBytes +
           ((chunk % kGroupChunks) ^ swizzle(row)) * 16;
  }

  // The chunk `distance` behind the one at `address`, which is one of the first group's; `distance`
  // is a constant, and shares no bit with the number of the chunk at `address`.
  __device__ static SharedAddress advance(SharedAddress address, int distance) {
    return (address ^ (distance % kGroupChunks * 16)) + distance / kGroupChunks * kGroupBytes;
  }
};

}  // namespace fa::cuda
