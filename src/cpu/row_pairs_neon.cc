// Few queries in pairs of bfloat16 with Arm's BFDOT. Compiled with flags of its own: nothing here
// may be inline and shared with other sources, standard headers included.
#include "cpu/row_pairs.h"

#include <arm_neon.h>

namespace fa::cpu {
namespace {

constexpr int64_t kLanes = 4;     // sums of a vector
constexpr int64_t kElements = 8;  // of a vector
constexpr int64_t kStep = 32;     // elements between two looks at what lies ahead
constexpr int64_t kMaxDim = 512;

alignas(64) constexpr uint16_t kZeroRow[kMaxDim] = {};

inline __attribute__((always_inline)) bfloat16x8_t load(const uint16_t* from) {
  return vreinterpretq_bf16_u16(vld1q_u16(from));
}

template <int kQueries>
inline __attribute__((always_inline)) void score_tile(const RowPairScores& s, int64_t lane) {
  const uint16_t* rows[kRowPairKeys];
  float32x4_t sum[kQueries][kRowPairKeys];
#pragma GCC unroll 4
  for (int k = 0; k < kRowPairKeys; ++k) {
    rows[k] = static_cast<const uint16_t*>(s.rows[k]);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) sum[i][k] = vdupq_n_f32(0.0f);
  }
  const uint16_t* q = s.q + lane * s.q_row;
  auto lines = s.ahead->share<(kQueries >= 4)>((s.n + kStep - 1) / kStep);
  for (int64_t first = 0; first < s.n; first += kStep) {
    lines.step(first / kStep);
    const int64_t end = first + kStep < s.n ? first + kStep : s.n;
    for (int64_t d = first; d < end; d += kElements) {
      bfloat16x8_t key[kRowPairKeys];
#pragma GCC unroll 4
      for (int k = 0; k < kRowPairKeys; ++k) key[k] = load(rows[k] + d);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        const bfloat16x8_t query = load(q + i * s.q_row + d);
#pragma GCC unroll 4
        for (int k = 0; k < kRowPairKeys; ++k) sum[i][k] = vbfdotq_f32(sum[i][k], query, key[k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
    const float32x4_t all =
        vpaddq_f32(vpaddq_f32(sum[i][0], sum[i][1]), vpaddq_f32(sum[i][2], sum[i][3]));
    vst1q_f32(s.to + (lane + i) * s.to_row, vmulq_n_f32(all, s.scale));
  }
}

void scores(const RowPairScores& s) {
  int64_t lane = 0;
  for (; lane + 4 <= s.lanes; lane += 4) score_tile<4>(s, lane);
  for (; lane + 2 <= s.lanes; lane += 2) score_tile<2>(s, lane);
  for (; lane < s.lanes; ++lane) score_tile<1>(s, lane);
}

// kVectors: of kLanes sums each, an even number.
template <int kQueries, int kVectors>
inline __attribute__((always_inline)) void value_tile(const RowPairValues& s, int64_t lane,
                                                      int64_t d) {
  float* o = s.o + lane * s.o_row + d;
  float32x4_t sum[kQueries][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[i][v] = vld1q_f32(o + i * s.o_row + v * kLanes);
  }
  const uint16_t* p = s.p + lane * s.p_row;
  auto lines = s.ahead->share<(kQueries >= 4)>((s.count + 1) / 2);
  for (int64_t row = 0; row < s.count; row += 2) {
    lines.step(row / 2);
    const auto* even = static_cast<const uint16_t*>(s.rows[row]) + d;
    const auto* odd =
        row + 1 < s.count ? static_cast<const uint16_t*>(s.rows[row + 1]) + d : kZeroRow;
    bfloat16x8_t weights[kQueries];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      uint32_t pair;
      __builtin_memcpy(&pair, p + i * s.p_row + row, sizeof pair);
      weights[i] = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += 2) {  // element d of one row beside that of the next
      const uint16x8_t one = vld1q_u16(even + v * kLanes), other = vld1q_u16(odd + v * kLanes);
      const bfloat16x8_t low = vreinterpretq_bf16_u16(vzip1q_u16(one, other));
      const bfloat16x8_t high = vreinterpretq_bf16_u16(vzip2q_u16(one, other));
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        sum[i][v] = vbfdotq_f32(sum[i][v], weights[i], low);
        sum[i][v + 1] = vbfdotq_f32(sum[i][v + 1], weights[i], high);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) vst1q_f32(o + i * s.o_row + v * kLanes, sum[i][v]);
  }
}

template <int kQueries, int kVectors>
void value_tiles(const RowPairValues& s, int64_t lane) {
  static_assert(kQueries * kVectors * kLanes <= kRowPairSums);
  int64_t d = 0;
  for (; d + kVectors * kLanes <= s.n; d += kVectors * kLanes) {
    value_tile<kQueries, kVectors>(s, lane, d);
  }
  if constexpr (kVectors > 4) {
    for (; d < s.n; d += 4 * kLanes) value_tile<kQueries, 4>(s, lane, d);
  }
}

void values(const RowPairValues& s) {
  int64_t lane = 0;
  for (; lane + 4 <= s.lanes; lane += 4) value_tiles<4, 4>(s, lane);
  for (; lane + 2 <= s.lanes; lane += 2) value_tiles<2, 8>(s, lane);
  for (; lane < s.lanes; ++lane) value_tiles<1, 16>(s, lane);
}

void round(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += kElements) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(from + i));
    vst1q_u16(to + i,
              vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(low, vld1q_f32(from + i + kLanes))));
  }
}

constexpr RowPairKernels kKernels{scores, values, round};

}  // namespace

const RowPairKernels* neon_row_pair_kernels() { return &kKernels; }

}  // namespace fa::cpu
