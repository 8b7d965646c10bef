// Vector arithmetic on chunks of scores, two keys at a time, so that products can be put between.
// For the sources with AVX-512 flags of their own: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include "cpu/pairs.h"

namespace fa::cpu {
namespace {

constexpr int64_t kVectorLanes = 16;
constexpr int kChunkVectors = kChunkLanes / kVectorLanes;

// Keeps GCC from putting the additions of many steps off to the last, with all terms spilled.
inline __attribute__((always_inline)) void add_now(__m512& sum, __m512 term) {
  sum = _mm512_add_ps(sum, term);
  asm volatile("" : "+v"(sum));
}

// 2^x, relative error under 2e-7; 0 for -inf; NaN for NaN. Minimax polynomial on [0, 1) whose
// constant term is 1, so that 2^0 is exactly 1.
inline __attribute__((always_inline)) __m512 exp2_of(__m512 x) {
  constexpr int kMinusFloor = 0x09;  // x - floor(x), without exceptions
  const __m512 f = _mm512_reduce_ps(x, kMinusFloor);
  __m512 p = _mm512_set1_ps(0.0018671302823349833f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009017029777169228f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05579991266131401f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24016444385051727f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931512951850891f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Both rounded to bfloat16, halves away from zero, in the low and the high half of each word.
inline __attribute__((always_inline)) __m512i pair_of(__m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low_bits = _mm512_add_epi32(_mm512_castps_si512(low), half);
  const __m512i high_bits = _mm512_add_epi32(_mm512_castps_si512(high), half);
  // The bytes of the low halves, from the high half of their word.
  constexpr __mmask64 kLowHalves = 0x3333333333333333;
  const __m512i from = _mm512_set4_epi32(0x0F0E0F0E, 0x0B0A0B0A, 0x07060706, 0x03020302);
  return _mm512_mask_shuffle_epi8(high_bits, kLowHalves, low_bits, from);
}

// Words of a column of pairs, after which the next chunk's begin.
constexpr int64_t kChunkPairs = kChunkKeys / 2 * kVectorLanes;

// A cache line that the next chunk writes: a store that finds it in L2 alone takes four times as
// long, and the next ones wait for it.
inline __attribute__((always_inline)) void ask_for(const void* line) {
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T0);
}

// PairProbabilities, two keys at a time.
class ProbabilityRows {
 public:
  explicit ProbabilityRows(const PairProbabilities& chunk)
      : chunk_(chunk), scale_(_mm512_set1_ps(chunk.scale)) {
#pragma GCC unroll 4
    for (int v = 0; v < kChunkVectors; ++v) {
      maximum_[v] = _mm512_loadu_ps(chunk.maximum + v * kVectorLanes);
      sum_[v] = _mm512_loadu_ps(chunk.sum + v * kVectorLanes);
    }
  }

  // Rows `row` and `row` + 1.
  inline __attribute__((always_inline)) void two_rows(int64_t row) {
    if (chunk_.ahead != nullptr)
      ask_for_lines<2 * kAheadPerRow>(chunk_.ahead + row * kAheadPerRow * 64);
#pragma GCC unroll 4
    for (int v = 0; v < kChunkVectors; ++v) {
      const float* scores = chunk_.scores + v * kChunkColumn + row * kVectorLanes;
      const __m512 even = probability(scores, v);
      const __m512 odd = probability(scores + kVectorLanes, v);
      add_now(sum_[v], _mm512_add_ps(even, odd));
      uint32_t* pairs = chunk_.pairs + v * chunk_.column_step + row / 2 * kVectorLanes;
      _mm512_storeu_si512(pairs, pair_of(even, odd));
    }
  }

  inline __attribute__((always_inline)) void finish() {
#pragma GCC unroll 4
    for (int v = 0; v < kChunkVectors; ++v) {
      _mm512_storeu_ps(chunk_.sum + v * kVectorLanes, sum_[v]);
    }
  }

 private:
  static constexpr int kAheadPerRow = kChunkAhead / 64 / kChunkKeys;  // cache lines

  template <int kLines>
  static inline __attribute__((always_inline)) void ask_for_lines(const char* at) {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
  }

  inline __attribute__((always_inline)) __m512 probability(const float* scores, int v) {
    const __m512 s = _mm512_loadu_ps(scores);
    return exp2_of(_mm512_fmsub_ps(s, scale_, maximum_[v]));
  }

  const PairProbabilities chunk_;
  const __m512 scale_;
  __m512 maximum_[kChunkVectors];
  __m512 sum_[kChunkVectors];
};

// PairGradients, two keys at a time.
class GradientRows {
 public:
  explicit GradientRows(const PairGradients& chunk)
      : chunk_(chunk), scale_(_mm512_set1_ps(chunk.scale)) {
#pragma GCC unroll 4
    for (int v = 0; v < kChunkVectors; ++v) {
      lse_[v] = _mm512_loadu_ps(chunk.lse + v * kVectorLanes);
      delta_[v] = _mm512_loadu_ps(chunk.delta + v * kVectorLanes);
    }
  }

  // Rows `row` and `row` + 1.
  inline __attribute__((always_inline)) void two_rows(int64_t row) {
    const int64_t at = row / kPairRows * chunk_.row_step + row % kPairRows * kPairDepth;
#pragma GCC unroll 2
    for (int v = 0; v < kChunkVectors; v += 2) {
      __m512 p[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        gradient(row + r, v, p[r][0], ds[r][0]);
        gradient(row + r, v + 1, p[r][1], ds[r][1]);
        const int64_t to = at + v / 2 * kBlockA + r * kPairDepth;
        store_rounded(p[r][0], p[r][1], chunk_.p + to);
        store_rounded(ds[r][0], ds[r][1], chunk_.ds + to);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        uint32_t* pairs = chunk_.ds_pairs + (v + i) * chunk_.column_step + row / 2 * kVectorLanes;
        _mm512_storeu_si512(pairs, pair_of(ds[0][i], ds[1][i]));
        ask_for(pairs + kChunkPairs);
      }
    }
  }

  void finish() {}

 private:
  inline __attribute__((always_inline)) void gradient(int64_t row, int v, __m512& p, __m512& ds) {
    const int64_t at = v * kChunkColumn + row * kVectorLanes;
    p = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(chunk_.scores + at), scale_, lse_[v]));
    // dP of a masked key is undefined.
    const __mmask16 some = _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(chunk_.dp + at), delta_[v]);
    ds = _mm512_maskz_mul_ps(some, p, difference);
  }

  static inline __attribute__((always_inline)) void store_rounded(__m512 low, __m512 high,
                                                                  uint16_t* to) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }

  const PairGradients chunk_;
  const __m512 scale_;
  __m512 lse_[kChunkVectors];
  __m512 delta_[kChunkVectors];
};

template <class Rows>
inline __attribute__((always_inline)) void all_rows(Rows& rows) {
  for (int64_t row = 0; row < kChunkKeys; row += 2) rows.two_rows(row);
  rows.finish();
}

}  // namespace
}  // namespace fa::cpu
