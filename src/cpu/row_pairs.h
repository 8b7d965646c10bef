// Products for few queries in pairs of bfloat16, as AVX512-BF16 and Arm's BFDOT have them: rows of
// keys and values are multiplied where they lie, without widening. In sources with compiler flags
// of their own.
#pragma once

#include <cstdint>

#include "cpu/rows_ahead.h"

namespace fa::cpu {

inline constexpr int64_t kRowPairKeys = 4;  // rows of one product of scores
// Sums of a register tile of values.
#if defined(__aarch64__)
inline constexpr int64_t kRowPairSums = 64;
#else
inline constexpr int64_t kRowPairSums = 256;
#endif

// to[lane][0 .. kRowPairKeys) = scale * <q[lane], row>.
struct RowPairScores {
  const uint16_t* q;  // [lanes][q_row], zeros past n
  int64_t q_row;      // a multiple of 32
  int64_t lanes;
  const void* const* rows;  // kRowPairKeys of n elements
  int64_t n;                // a multiple of 16
  float scale;
  float* to;
  int64_t to_row;
  RowsAhead* ahead;
};

// o[lane] += sum of p[lane][i] rows[i] over i < count.
struct RowPairValues {
  const uint16_t* p;  // [lanes][p_row], a zero past an odd count
  int64_t p_row;
  int64_t lanes;
  const void* const* rows;  // of n elements
  int64_t count;
  int64_t n;  // a multiple of 16, at most 512
  float* o;   // [lanes][o_row]
  int64_t o_row;
  RowsAhead* ahead;
};

struct RowPairKernels {
  void (*scores)(const RowPairScores& product);
  void (*values)(const RowPairValues& product);
  // to = from, rounded to the nearest; n: a multiple of 16. They may start at one address.
  void (*round)(const float* from, int64_t n, uint16_t* to);
};

const RowPairKernels* avx512_row_pair_kernels();
const RowPairKernels* neon_row_pair_kernels();

}  // namespace fa::cpu
