// Products of bfloat16 pairs with AVX512-BF16. Compiled with flags of its own: nothing here may be
// inline and shared with other sources, standard headers included.
#include <immintrin.h>

#include "cpu/pair_chunks.h"

namespace fa::cpu {
namespace {

constexpr int64_t kLanes = 16;

// GCC would load a vector anew for each product that uses it, and Zen 4 loads one per cycle.
inline __attribute__((always_inline)) __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

// Register tiles of kRows x kVectors accumulators, of 32 registers.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_tile(const PairProduct& p, int64_t row,
                                                         int64_t column_block) {
  __m512 sum[kRows][kVectors];
  float* c = p.c + row * kLanes + column_block * p.c_column_step;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = p.accumulate ? _mm512_loadu_ps(c + r * kLanes + v * p.c_column_step)
                               : _mm512_setzero_ps();
    }
  }
  const uint16_t* a = p.a + row / kPairRows * p.a_row_step + row % kPairRows * kPairDepth;
  const uint32_t* b = p.b + column_block * p.b_column_step;
  for (int64_t depth = 0; depth < p.depth; depth += kPairDepth) {
    for (int64_t d = 0; d < kPairDepth; d += 2) {
      __m512i right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = in_register(_mm512_loadu_si512(b + d / 2 * kLanes + v * p.b_column_step));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int pair;
        __builtin_memcpy(&pair, a + r * kPairDepth + d, sizeof pair);
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, reinterpret_cast<__m512bh>(right[v]));
        }
      }
    }
    a += kBlockA;
    b += p.b_depth_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(c + r * kLanes + v * p.c_column_step, sum[r][v]);
    }
  }
}

template <int kRows, int kVectors>
void multiply_strip(const PairProduct& p, int64_t column_block) {
  static_assert(kPairRows % kRows == 0);
  for (int64_t row = 0; row < p.rows; row += kRows) {
    multiply_tile<kRows, kVectors>(p, row, column_block);
  }
}

void multiply(const PairProduct& p) {
  const int64_t blocks = p.columns / kPairColumns;
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) multiply_strip<4, 4>(p, block);
  for (; block + 2 <= blocks; block += 2) multiply_strip<8, 2>(p, block);
  for (; block < blocks; ++block) multiply_strip<16, 1>(p, block);
}

void exponentiate(const PairProbabilities& chunk, const PairProduct* beside, int count) {
  for (int i = 0; i < count; ++i) multiply(beside[i]);
  ProbabilityRows rows(chunk);
  all_rows(rows);
}

void differentiate(const PairGradients& chunk, const PairProduct* beside, int count) {
  for (int i = 0; i < count; ++i) multiply(beside[i]);
  GradientRows rows(chunk);
  all_rows(rows);
}

// Elements [at, at + 32) of a row, zeros past its end.
inline __m512i load_row(const PairRows& from, int64_t row, int64_t at) {
  if (row >= from.count || from.rows[row] == nullptr || at >= from.n) return _mm512_setzero_si512();
  const int64_t left = from.n - at;
  const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  return _mm512_maskz_loadu_epi16(mask, from.rows[row] + at);
}

// Asks for the cache line of element `at` of a row: rows of a head lie far apart, which processors
// do not foresee.
inline void prefetch(const PairRows& from, int64_t row, int64_t at) {
  if (row < from.count && from.rows[row] != nullptr) {
    _mm_prefetch(reinterpret_cast<const char*>(from.rows[row] + at), _MM_HINT_T0);
  }
}
constexpr int64_t kRowsAhead = 8;

// Rows of words to columns of words.
inline void transpose_words(__m512i (&m)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // rows i, i + 4, ... hold columns i, i + 4, ... of four rows each
    t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    m[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    m[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

void pack_b_transposed(const PairRows& from, uint32_t* to, int64_t column_step) {
  for (int64_t i = 0; i < from.count; i += kLanes) {
    for (int64_t at = 0; at < from.n; at += kPairDepth) {
      __m512i m[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) {
        m[r] = load_row(from, i + r, at);
        prefetch(from, i + kLanes + r, at);
      }
      transpose_words(m);
      uint32_t* block = to + i / kPairColumns * column_step + at / kPairDepth * kBlockB;
#pragma GCC unroll 16
      for (int64_t w = 0; w < kLanes; ++w) _mm512_storeu_si512(block + w * kLanes, m[w]);
    }
  }
}

void pack_a(const PairRows& from, uint16_t* to, int64_t row_step) {
  const int64_t count = (from.count + kPairRows - 1) / kPairRows * kPairRows;
  for (int64_t row = 0; row < count; ++row) {
    uint16_t* first = to + row / kPairRows * row_step + row % kPairRows * kPairDepth;
    for (int64_t at = 0; at < from.n; at += kPairDepth) {
      prefetch(from, row + kRowsAhead, at);
      _mm512_storeu_si512(first + at / kPairDepth * kBlockA, load_row(from, row, at));
    }
  }
}

// Elements [at, at + 16) of rows 2r and 2r + 1, paired.
inline __m512i load_pairs(const PairRows& from, int64_t row, int64_t at) {
  const auto half = [&](int64_t r) {
    if (r >= from.count || from.rows[r] == nullptr || at >= from.n) return _mm512_setzero_si512();
    const int64_t left = from.n - at;
    const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1 << left) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.rows[r] + at));
  };
  return _mm512_or_si512(half(row), _mm512_slli_epi32(half(row + 1), 16));
}

void pack_a_transposed(const PairRows& from, uint16_t* to, int64_t row_step) {
  for (int64_t i = 0; i < from.count; i += kPairDepth) {
    for (int64_t at = 0; at < from.n; at += kLanes) {
      __m512i m[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) {
        m[r] = load_pairs(from, i + 2 * r, at);
        // Two blocks to a cache line: each asks for half of the rows.
        prefetch(from, i + kPairDepth + at % kPairDepth + r, at);
      }
      transpose_words(m);
      uint16_t* block = to + at / kPairRows * row_step + i / kPairDepth * kBlockA;
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLanes; ++c) _mm512_storeu_si512(block + c * kPairDepth, m[c]);
    }
  }
}

void pack_b(const PairRows& from, uint32_t* to, int64_t depth_step, int64_t column_step) {
  const int64_t count = (from.count + kPairDepth - 1) / kPairDepth * kPairDepth;
  for (int64_t row = 0; row < count; row += 2) {
    uint32_t* first = to + row / kPairDepth * depth_step + row % kPairDepth / 2 * kLanes;
    for (int64_t at = 0; at < from.n; at += kLanes) {
      prefetch(from, row + kRowsAhead + at / kLanes % 2, at);
      _mm512_storeu_si512(first + at / kPairColumns * column_step, load_pairs(from, row, at));
    }
  }
}

void round_to_a(const float* from, int64_t column_step, int64_t begin, int64_t end, int64_t columns,
                int64_t all_columns, uint16_t* to, int64_t row_step) {
  for (int64_t row = begin; row < end; ++row) {
    uint16_t* first = to + row / kPairRows * row_step + row % kPairRows * kPairDepth;
    for (int64_t c = 0; c < all_columns; c += kPairDepth) {
      const auto load = [&](int64_t at) {
        return at < columns
                   ? _mm512_loadu_ps(from + at / kPairColumns * column_step + row * kPairColumns)
                   : _mm512_setzero_ps();
      };
      const __m512bh both = _mm512_cvtne2ps_pbh(load(c + kLanes), load(c));
      _mm512_storeu_si512(first + c / kPairDepth * kBlockA, reinterpret_cast<__m512i>(both));
    }
  }
}

void nothing() {}

constexpr PairKernels kKernels{nothing,           nothing,   multiply,          exponentiate,
                               differentiate,     pack_a,    pack_a_transposed, pack_b,
                               pack_b_transposed, round_to_a};

}  // namespace

const PairKernels* avx512_pair_kernels() { return &kKernels; }

}  // namespace fa::cpu
