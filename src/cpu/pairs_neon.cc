// Products of bfloat16 with Arm's BFMMLA, which multiplies 2 rows by 4 of depth by 2 columns.
// Compiled with flags of its own: nothing here may be inline and shared with other sources,
// standard headers included.
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/exp2_polynomial.h"
#include "cpu/pairs.h"

namespace fa::cpu {
namespace {

constexpr int64_t kLanes = 4;
static_assert(kPairColumns == kLanes && kPairStep == 4 && kRunOfA == 4);

inline __attribute__((always_inline)) bfloat16x8_t operand(const uint16_t* from) {
  return vreinterpretq_bf16_u16(vld1q_u16(from));
}
inline __attribute__((always_inline)) bfloat16x8_t operand(const uint32_t* from) {
  return vreinterpretq_bf16_u32(vld1q_u32(from));
}

// The halves of two vectors, the lower ones in one: two rows of a block of C become its 2 x 2 sums,
// and two of those rows.
struct Halves {
  float32x4_t lower, upper;
};
inline __attribute__((always_inline)) Halves halves(float32x4_t one, float32x4_t other) {
  const float64x2_t a = vreinterpretq_f64_f32(one), b = vreinterpretq_f64_f32(other);
  return {vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b))};
}

// Sums of 2 x 2 in half of the registers: kRowPairs by two for each of kBlocks of columns.
template <int kRowPairs, int kBlocks>
inline __attribute__((always_inline)) void multiply_tile(const PairProduct& p, int64_t row,
                                                         int64_t block) {
  constexpr int kPairsPerHalf = kNearRowsOfA / 2;
  float32x4_t sum[kRowPairs][2 * kBlocks];
  float* const c = p.c + row * kPairColumns + block * p.c_column_step;
#pragma GCC unroll 8
  for (int r = 0; r < kRowPairs; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kBlocks; ++v) {
      const float* at = c + 2 * r * kPairColumns + v * p.c_column_step;
      const float32x4_t none = vdupq_n_f32(0.0f);
      const Halves both =
          p.accumulate ? halves(vld1q_f32(at), vld1q_f32(at + kPairColumns)) : Halves{none, none};
      sum[r][2 * v] = both.lower;
      sum[r][2 * v + 1] = both.upper;
    }
  }
  const uint16_t* a = p.a + row / kPairRows * p.a_row_step + place_in_block_a(row % kPairRows, 0);
  const uint32_t* b = p.b + block * p.b_column_step;
  for (int64_t depth = 0; depth < p.depth; depth += kPairDepth) {
#pragma GCC unroll 8
    for (int64_t d = 0; d < kPairDepth; d += kPairStep) {
      bfloat16x8_t right[2 * kBlocks];
#pragma GCC unroll 4
      for (int v = 0; v < 2 * kBlocks; ++v) {
        right[v] = operand(b + v / 2 * p.b_column_step + d / 2 * kPairColumns + v % 2 * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRowPairs; ++r) {
        const bfloat16x8_t left = operand(a + r / kPairsPerHalf * kNearRowsOfA * kPairDepth +
                                          d * kNearRowsOfA + r % kPairsPerHalf * 2 * kRunOfA);
#pragma GCC unroll 4
        for (int v = 0; v < 2 * kBlocks; ++v) {
          sum[r][v] = vbfmmlaq_f32(sum[r][v], left, right[v]);
        }
      }
    }
    a += kBlockA;
    b += p.b_depth_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowPairs; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kBlocks; ++v) {
      float* at = c + 2 * r * kPairColumns + v * p.c_column_step;
      const Halves rows = halves(sum[r][2 * v], sum[r][2 * v + 1]);
      vst1q_f32(at, rows.lower);
      vst1q_f32(at + kPairColumns, rows.upper);
    }
  }
}

template <int kRowPairs, int kBlocks>
void multiply_strip(const PairProduct& p, int64_t block) {
  static_assert(kPairRows % (2 * kRowPairs) == 0);
  for (int64_t row = 0; row < p.rows; row += 2 * kRowPairs) {
    multiply_tile<kRowPairs, kBlocks>(p, row, block);
  }
}

void multiply(const PairProduct& p) {
  const int64_t blocks = p.columns / kPairColumns;
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) multiply_strip<4, 2>(p, block);
  if (block < blocks) multiply_strip<8, 1>(p, block);
}

// As in vector-inl.h.
inline __attribute__((always_inline)) float32x4_t exp2_of(float32x4_t x) {
  x = vmaxq_f32(x, vdupq_n_f32(-127.0f));  // NaN where x is
  const float32x4_t magic = vdupq_n_f32(kExp2Magic);
  const float32x4_t shifted = vaddq_f32(x, magic);
  const float32x4_t f = vsubq_f32(x, vsubq_f32(shifted, magic));
  float32x4_t p = vdupq_n_f32(kExp2Polynomial[0]);
#pragma GCC unroll 5
  for (int i = 1; i <= 5; ++i) p = vfmaq_f32(vdupq_n_f32(kExp2Polynomial[i]), p, f);
  return vmulq_f32(p, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23)));
}

// Both rounded to the nearest, one after the other.
inline __attribute__((always_inline)) uint16x8_t rounded(float32x4_t one, float32x4_t other) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(one), other));
}

// Columns of 4 rows: two whole ones to a vector.
struct Columns {
  uint16x8_t first, last;
};
inline __attribute__((always_inline)) Columns columns_of(uint16x8_t rows01, uint16x8_t rows23) {
  const uint16x8_t rows02 = vzip1q_u16(rows01, rows23), rows13 = vzip2q_u16(rows01, rows23);
  return {vzip1q_u16(rows02, rows13), vzip2q_u16(rows02, rows13)};
}

// Four rows of a block of B.
inline __attribute__((always_inline)) void store_step(const float32x4_t (&rows)[kPairStep],
                                                      uint32_t* to) {
  const Columns columns = columns_of(rounded(rows[0], rows[1]), rounded(rows[2], rows[3]));
  vst1q_u32(to, vreinterpretq_u32_u16(columns.first));
  vst1q_u32(to + kLanes, vreinterpretq_u32_u16(columns.last));
}

void exponentiate(const PairProbabilities& chunk, const PairProduct* beside, int count) {
  constexpr int64_t kBlocks = kChunkLanes / kPairColumns;
  constexpr int64_t kLine = 64;
  for (int i = 0; i < count; ++i) multiply(beside[i]);
  for (int64_t v = 0; v < kBlocks; ++v) {
    for (int64_t i = 0; chunk.ahead != nullptr && i < kChunkAhead / kBlocks; i += kLine) {
      __builtin_prefetch(chunk.ahead + v * (kChunkAhead / kBlocks) + i, 0, 2);
    }
    const float32x4_t minus_maximum = vnegq_f32(vld1q_f32(chunk.maximum + v * kLanes));
    const float* scores = chunk.scores + v * kChunkColumn;
    uint32_t* pairs = chunk.pairs + v * chunk.column_step;
    float32x4_t even = vld1q_f32(chunk.sum + v * kLanes), odd = vdupq_n_f32(0.0f);
    for (int64_t row = 0; row < kChunkKeys; row += kPairStep) {
      float32x4_t p[kPairStep];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPairStep; ++i) {
        const float32x4_t s = vld1q_f32(scores + (row + i) * kLanes);
        p[i] = exp2_of(vfmaq_n_f32(minus_maximum, s, chunk.scale));
      }
      even = vaddq_f32(even, vaddq_f32(p[0], p[2]));
      odd = vaddq_f32(odd, vaddq_f32(p[1], p[3]));
      store_step(p, pairs + row / 2 * kPairColumns);
    }
    vst1q_f32(chunk.sum + v * kLanes, vaddq_f32(even, odd));
  }
}

void differentiate(const PairGradients& chunk, const PairProduct* beside, int count) {
  for (int i = 0; i < count; ++i) multiply(beside[i]);
  for (int64_t lane = 0; lane < kChunkLanes; lane += kLanes) {
    const float32x4_t minus_lse = vnegq_f32(vld1q_f32(chunk.lse + lane));
    const float32x4_t delta = vld1q_f32(chunk.delta + lane);
    const int64_t column = lane / kLanes * kChunkColumn;
    uint32_t* pairs = chunk.ds_pairs + lane / kLanes * chunk.column_step;
    for (int64_t row = 0; row < kChunkKeys; row += kPairStep) {
      float32x4_t p[kPairStep], ds[kPairStep];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPairStep; ++i) {
        const int64_t at = column + (row + i) * kLanes;
        p[i] = exp2_of(vfmaq_n_f32(minus_lse, vld1q_f32(chunk.scores + at), chunk.scale));
        // dP of a masked key is undefined.
        const uint32x4_t none = vceqzq_f32(p[i]);
        const float32x4_t product = vmulq_f32(p[i], vsubq_f32(vld1q_f32(chunk.dp + at), delta));
        ds[i] = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(product), none));
      }
      const int64_t to = row / kPairRows * chunk.row_step + lane / kPairDepth * kBlockA +
                         place_in_block_a(row % kPairRows, lane % kPairDepth);
#pragma GCC unroll 2
      for (int64_t i = 0; i < kPairStep; i += 2) {
        vst1q_u16(chunk.p + to + i * kRunOfA, rounded(p[i], p[i + 1]));
        vst1q_u16(chunk.ds + to + i * kRunOfA, rounded(ds[i], ds[i + 1]));
      }
      store_step(ds, pairs + row / 2 * kPairColumns);
    }
  }
}

// Elements [at, at + 8) of a row, zeros past its end.
inline __attribute__((always_inline)) uint16x8_t load_row(const PairRows& from, int64_t row,
                                                          int64_t at) {
  if (row >= from.count || from.rows[row] == nullptr || at >= from.n) return vdupq_n_u16(0);
  if (at + 8 <= from.n) return vld1q_u16(from.rows[row] + at);
  uint16_t rest[8] = {};
  __builtin_memcpy(rest, from.rows[row] + at, (from.n - at) * sizeof(uint16_t));
  return vld1q_u16(rest);
}

constexpr int64_t up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Eight elements of two rows: four of each, and the next four.
struct TwoRows {
  uint16x8_t first, last;
};
inline __attribute__((always_inline)) TwoRows two_rows(const PairRows& from, int64_t row,
                                                       int64_t at) {
  const uint64x2_t one = vreinterpretq_u64_u16(load_row(from, row, at));
  const uint64x2_t other = vreinterpretq_u64_u16(load_row(from, row + 1, at));
  return {vreinterpretq_u16_u64(vzip1q_u64(one, other)),
          vreinterpretq_u16_u64(vzip2q_u64(one, other))};
}

void pack_a(const PairRows& from, uint16_t* to, int64_t row_step) {
  for (int64_t row = 0; row < up_to(from.count, kPairRows); row += 2) {
    for (int64_t at = 0; at < up_to(from.n, kPairDepth); at += 8) {
      const TwoRows rows = two_rows(from, row, at);
      uint16_t* place = to + row / kPairRows * row_step + at / kPairDepth * kBlockA +
                        place_in_block_a(row % kPairRows, at % kPairDepth);
      vst1q_u16(place, rows.first);
      vst1q_u16(place + kPairStep * kNearRowsOfA, rows.last);
    }
  }
}

void pack_b_transposed(const PairRows& from, uint32_t* to, int64_t column_step) {
  for (int64_t row = 0; row < up_to(from.count, kPairColumns); row += 2) {
    for (int64_t at = 0; at < up_to(from.n, kPairDepth); at += 8) {
      const TwoRows rows = two_rows(from, row, at);
      uint32_t* place = to + row / kPairColumns * column_step + at / kPairDepth * kBlockB +
                        at % kPairDepth / 2 * kPairColumns + row % kPairColumns / 2 * kLanes;
      vst1q_u32(place, vreinterpretq_u32_u16(rows.first));
      vst1q_u32(place + kPairStep / 2 * kPairColumns, vreinterpretq_u32_u16(rows.last));
    }
  }
}

// Columns [at, at + 8) of four rows, two whole ones to a vector.
struct EightColumns {
  uint16x8_t two[4];
};
inline __attribute__((always_inline)) EightColumns eight_columns(const PairRows& from, int64_t row,
                                                                 int64_t at) {
  uint16x8_t rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = load_row(from, row + i, at);
  const uint16x8_t low02 = vzip1q_u16(rows[0], rows[2]), low13 = vzip1q_u16(rows[1], rows[3]);
  const uint16x8_t high02 = vzip2q_u16(rows[0], rows[2]), high13 = vzip2q_u16(rows[1], rows[3]);
  return {{vzip1q_u16(low02, low13), vzip2q_u16(low02, low13), vzip1q_u16(high02, high13),
           vzip2q_u16(high02, high13)}};
}

void pack_a_transposed(const PairRows& from, uint16_t* to, int64_t row_step) {
  for (int64_t row = 0; row < up_to(from.count, kPairDepth); row += kPairStep) {
    for (int64_t at = 0; at < up_to(from.n, kPairRows); at += 8) {
      const EightColumns columns = eight_columns(from, row, at);
      uint16_t* place = to + at / kPairRows * row_step + row / kPairDepth * kBlockA +
                        place_in_block_a(at % kPairRows, row % kPairDepth);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) vst1q_u16(place + i * 2 * kRunOfA, columns.two[i]);
    }
  }
}

void pack_b(const PairRows& from, uint32_t* to, int64_t depth_step, int64_t column_step) {
  for (int64_t row = 0; row < up_to(from.count, kPairDepth); row += kPairStep) {
    for (int64_t at = 0; at < up_to(from.n, 16); at += 8) {
      const EightColumns columns = eight_columns(from, row, at);
      uint32_t* place = to + row / kPairDepth * depth_step + at / kPairColumns * column_step +
                        row % kPairDepth / 2 * kPairColumns;
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        vst1q_u32(place + i / 2 * column_step + i % 2 * kLanes,
                  vreinterpretq_u32_u16(columns.two[i]));
      }
    }
  }
}

void round_to_a(const float* from, int64_t column_step, int64_t begin, int64_t end, int64_t columns,
                int64_t all_columns, uint16_t* to, int64_t row_step) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < all_columns; c += kLanes) {
      const float32x4_t x =
          c < columns ? vld1q_f32(from + c / kPairColumns * column_step + row * kPairColumns)
                      : vdupq_n_f32(0.0f);
      vst1_u16(to + row / kPairRows * row_step + c / kPairDepth * kBlockA +
                   place_in_block_a(row % kPairRows, c % kPairDepth),
               vreinterpret_u16_bf16(vcvt_bf16_f32(x)));
    }
  }
}

void nothing() {}

constexpr PairKernels kKernels{nothing,           nothing,   multiply,          exponentiate,
                               differentiate,     pack_a,    pack_a_transposed, pack_b,
                               pack_b_transposed, round_to_a};

}  // namespace

bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kHasBfloat16 = 1ul << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kHasBfloat16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

const PairKernels* neon_pair_kernels() { return &kKernels; }

}  // namespace fa::cpu
