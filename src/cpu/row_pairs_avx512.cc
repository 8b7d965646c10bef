// Few queries in pairs of bfloat16 with AVX512-BF16. Compiled with flags of its own: nothing here
// may be inline and shared with other sources, standard headers included.
#include "cpu/row_pairs.h"

#include <immintrin.h>

namespace fa::cpu {
namespace {

constexpr int64_t kLanes = 16;  // sums of a vector
constexpr int64_t kPairs = 32;  // elements of a vector
constexpr int64_t kMaxDim = 512;

alignas(64) constexpr uint16_t kZeroRow[kMaxDim] = {};

inline __attribute__((always_inline)) __m512bh pairs(__m512i x) {
  return reinterpret_cast<__m512bh>(x);
}

// GCC would load a vector anew for each product that uses it, and Zen 4 loads one per cycle.
inline __attribute__((always_inline)) __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

// The first 16 elements of a row's rest where no more are left.
inline __attribute__((always_inline)) __m512i load(const uint16_t* row, bool half) {
  return half ? _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)))
              : _mm512_loadu_si512(row);
}

// Sums of lanes, by halves: a blend, a permutation of two vectors and a sum each, since pairs are
// multiplied on one of the two units that permute. First neighbours of a block, of two vectors.
inline __attribute__((always_inline)) __m512 add_lanes(__m512 a, __m512 b) {
  const __m512i others =
      _mm512_set_epi32(30, 15, 28, 13, 26, 11, 24, 9, 22, 7, 20, 5, 18, 3, 16, 1);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xAAAA, a, b), _mm512_permutex2var_ps(a, others, b));
}
// a0 + a2, a1 + a3, b0 + b2, b1 + b3 of each block.
inline __attribute__((always_inline)) __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, a, b), _mm512_shuffle_ps(a, b, 0x4E));
}
// Blocks a0 + a2, a1 + a3, b0 + b2, b1 + b3.
inline __attribute__((always_inline)) __m512 add_blocks(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
}

// Per block: the four vectors' sums over the lanes of that block.
inline __attribute__((always_inline)) __m512 sums_of_blocks(const __m512 (&x)[kRowPairKeys]) {
  return add_pairs(add_lanes(x[0], x[1]), add_lanes(x[2], x[3]));
}

template <int kBlock>
inline __attribute__((always_inline)) void store_block(__m512 x, float* to) {
  _mm_storeu_ps(to, _mm512_extractf32x4_ps(x, kBlock));
}

template <int kQueries>
inline __attribute__((always_inline)) void score_tile(const RowPairScores& s, int64_t lane) {
  const uint16_t* rows[kRowPairKeys];
  __m512 sum[kQueries][kRowPairKeys];
#pragma GCC unroll 4
  for (int k = 0; k < kRowPairKeys; ++k) {
    rows[k] = static_cast<const uint16_t*>(s.rows[k]);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) sum[i][k] = _mm512_setzero_ps();
  }
  const uint16_t* q = s.q + lane * s.q_row;
  auto lines = s.ahead->share<(kQueries >= 4)>((s.n + kPairs - 1) / kPairs);
  const auto step = [&](int64_t d, bool half) {
    lines.step(d / kPairs);
    __m512i key[kRowPairKeys];
#pragma GCC unroll 4
    for (int k = 0; k < kRowPairKeys; ++k) key[k] = in_register(load(rows[k] + d, half));
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      const __m512i query = in_register(_mm512_loadu_si512(q + i * s.q_row + d));
#pragma GCC unroll 4
      for (int k = 0; k < kRowPairKeys; ++k) {
        sum[i][k] = _mm512_dpbf16_ps(sum[i][k], pairs(query), pairs(key[k]));
      }
    }
  };
  int64_t d = 0;
  for (; d + kPairs <= s.n; d += kPairs) step(d, false);
  if (d < s.n) step(d, true);
  const __m512 scale = _mm512_set1_ps(s.scale);
  float* to = s.to + lane * s.to_row;
  if constexpr (kQueries == 1) {
    const __m512 sums = sums_of_blocks(sum[0]);
    const __m512 twice = add_blocks(sums, sums);
    store_block<0>(
        _mm512_mul_ps(_mm512_add_ps(twice, _mm512_shuffle_f32x4(twice, twice, 0xB1)), scale), to);
  } else {
#pragma GCC unroll 2
    for (int i = 0; i < kQueries; i += 2) {
      // Two blocks of each query, half a sum each.
      const __m512 halves = add_blocks(sums_of_blocks(sum[i]), sums_of_blocks(sum[i + 1]));
      const __m512 all =
          _mm512_mul_ps(_mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xB1)), scale);
      store_block<0>(all, to + i * s.to_row);
      store_block<2>(all, to + (i + 1) * s.to_row);
    }
  }
}

void scores(const RowPairScores& s) {
  int64_t lane = 0;
  for (; lane + 4 <= s.lanes; lane += 4) score_tile<4>(s, lane);
  for (; lane + 2 <= s.lanes; lane += 2) score_tile<2>(s, lane);
  for (; lane < s.lanes; ++lane) score_tile<1>(s, lane);
}

// Element d of one row beside that of the next: the first 16 of 32 columns, and the last.
struct Interleaved {
  __m512i low, high;
};
inline __attribute__((always_inline)) Interleaved interleave(__m512i even, __m512i odd) {
  const __m512i numbers =
      _mm512_set_epi32(0x002F000F, 0x002E000E, 0x002D000D, 0x002C000C, 0x002B000B, 0x002A000A,
                       0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                       0x00230003, 0x00220002, 0x00210001, 0x00200000);
  const __m512i behind = _mm512_add_epi32(numbers, _mm512_set1_epi32(0x00100010));
  return {_mm512_permutex2var_epi16(even, numbers, odd),
          _mm512_permutex2var_epi16(even, behind, odd)};
}

// kVectors: of 16 sums each; an odd one only where no more columns are left.
template <int kQueries, int kVectors>
inline __attribute__((always_inline)) void value_tile(const RowPairValues& s, int64_t lane,
                                                      int64_t d) {
  float* o = s.o + lane * s.o_row + d;
  __m512 sum[kQueries][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_loadu_ps(o + i * s.o_row + v * kLanes);
  }
  const uint16_t* p = s.p + lane * s.p_row;
  auto lines = s.ahead->share<(kQueries >= 4)>((s.count + 1) / 2);
  for (int64_t row = 0; row < s.count; row += 2) {
    lines.step(row / 2);
    const auto* even = static_cast<const uint16_t*>(s.rows[row]) + d;
    const auto* odd =
        row + 1 < s.count ? static_cast<const uint16_t*>(s.rows[row + 1]) + d : kZeroRow;
    __m512i value[kVectors + 1];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += 2) {
      const bool half = v + 1 == kVectors;
      const Interleaved both =
          interleave(load(even + v * kLanes, half), load(odd + v * kLanes, half));
      value[v] = in_register(both.low);
      if (!half) value[v + 1] = in_register(both.high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      int pair;
      __builtin_memcpy(&pair, p + i * s.p_row + row, sizeof pair);
      const __m512bh weights = pairs(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], weights, pairs(value[v]));
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(o + i * s.o_row + v * kLanes, sum[i][v]);
  }
}

template <int kQueries, int kVectors>
void value_tiles(const RowPairValues& s, int64_t lane) {
  int64_t d = 0;
  for (; d + kVectors * kLanes <= s.n; d += kVectors * kLanes) {
    value_tile<kQueries, kVectors>(s, lane, d);
  }
  if constexpr (kVectors > 2) {
    for (; d + kPairs <= s.n; d += kPairs) value_tile<kQueries, 2>(s, lane, d);
  }
  if (d < s.n) value_tile<kQueries, 1>(s, lane, d);
}

void values(const RowPairValues& s) {
  int64_t lane = 0;
  for (; lane + 8 <= s.lanes; lane += 8) value_tiles<8, 2>(s, lane);
  for (; lane + 4 <= s.lanes; lane += 4) value_tiles<4, 4>(s, lane);
  for (; lane + 2 <= s.lanes; lane += 2) value_tiles<2, 8>(s, lane);
  for (; lane < s.lanes; ++lane) value_tiles<1, 8>(s, lane);
}

void round(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<__m256i>(rounded));
  }
}

constexpr RowPairKernels kKernels{scores, values, round};

}  // namespace

const RowPairKernels* avx512_row_pair_kernels() { return &kKernels; }

}  // namespace fa::cpu
