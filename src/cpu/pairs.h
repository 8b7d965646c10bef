// Matrix products of bfloat16 with fp32 sums, by instructions that multiply neighbours along the
// summed axis: pairs, as AVX512-BF16 and AMX have them, or four, as Arm's BFMMLA does. Implemented
// without Highway, which has none of them, in sources with compiler flags of their own.
//
// Matrices are cut into blocks, whose parts lie end to end: rows that are a power of two apart
// would collide in the L1 cache. On x86 a block is a tile register of AMX, of 16 rows of 64 bytes:
//   A: 16 rows x 32 of depth   B: 16 pairs of depth x 16 columns   C: 16 rows x 16 columns, fp32
// On Arm the instruction's operands lie end to end, 2 rows or 2 columns of 4 each:
//   A: 2 x [8 steps of depth][8 rows][4]   B: [8 steps of depth][4 columns][4]   C: 16 x 4, fp32
#pragma once

#include <cstdint>

namespace fa::cpu {

// What a product's dimensions are multiples of; buffers are filled up with zeros.
inline constexpr int64_t kPairRows = 16;   // of A and C
inline constexpr int64_t kPairDepth = 32;  // the summed axis
#if defined(__aarch64__)
inline constexpr int64_t kPairColumns = 4;  // of B and C: as many as a vector holds sums
inline constexpr int64_t kPairStep = 4;     // of depth that lie side by side in B
inline constexpr int64_t kRunOfA = 4;       // and in A
inline constexpr int64_t kNearRowsOfA = 8;
#else
inline constexpr int64_t kPairColumns = 16;
inline constexpr int64_t kPairStep = 2;
inline constexpr int64_t kRunOfA = kPairDepth;
inline constexpr int64_t kNearRowsOfA = 1;  // whose runs lie side by side
#endif

// Elements of a block: bfloat16 of A, words of B, each the pair of elements 2r (its low half) and
// 2r + 1 of a column, and fp32 of C.
inline constexpr int64_t kBlockA = kPairRows * kPairDepth;
inline constexpr int64_t kBlockB = kPairDepth / 2 * kPairColumns;
inline constexpr int64_t kBlockC = kPairRows * kPairColumns;

// Where a run of A starts within its block. Always inlined: sources with other compiler flags must
// share no code.
inline __attribute__((always_inline)) constexpr int64_t place_in_block_a(int64_t row,
                                                                         int64_t depth) {
  return row / kNearRowsOfA * kNearRowsOfA * kPairDepth + depth * kNearRowsOfA +
         row % kNearRowsOfA * kRunOfA;
}

// C = A B, or += A B. Blocks of A lie end to end along the depth, those of C along the rows; the
// steps, in elements, lead to the next block of rows, of depth or of columns.
struct PairProduct {
  const uint16_t* a;
  int64_t a_row_step;
  const uint32_t* b;
  int64_t b_depth_step;
  int64_t b_column_step;
  float* c;
  int64_t c_column_step;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  bool accumulate;
};

// Rows of n bfloat16 elements each, wherever they lie; a null row is all zeros.
struct PairRows {
  const uint16_t* const* rows;
  int64_t count;
  int64_t n;
};

// Keys whose scores of a panel are in work at once, as two chunks: the scores of the next one are
// multiplied while vector units turn those of this one into what is multiplied then. 8 KiB of fp32
// each, [kChunkLanes / kPairColumns] blocks of columns of kChunkKeys rows, so that they stay in L1.
inline constexpr int64_t kChunkKeys = 32;
inline constexpr int64_t kChunkLanes = 64;
inline constexpr int64_t kChunkColumn = kChunkKeys * kPairColumns;

// p = exp2(s * scale - maximum) of a whole chunk, as pairs of keys, and sum += what it sums to.
struct PairProbabilities {
  const float* scores;
  float scale;
  const float* maximum;  // [kChunkLanes], finite
  float* sum;            // [kChunkLanes]
  uint32_t* pairs;       // blocks of B: [kChunkKeys][kPairColumns] of each block of columns
  int64_t column_step;   // words
  const char* ahead;     // kChunkAhead bytes to be had in L2 soon, or null
};
// Half a tile of keys and values of head_dim 128 for 16 chunks, those of two panels.
inline constexpr int64_t kChunkAhead = 4096;

// p = exp2(s * scale - lse) and ds = p (dp - delta) of a whole chunk.
struct PairGradients {
  const float* scores;
  const float* dp;
  float scale;
  const float* lse;    // [kChunkLanes]
  const float* delta;  // [kChunkLanes]
  // Both as blocks of A, [kChunkKeys][kChunkLanes], and ds as pairs of keys.
  uint16_t* p;
  uint16_t* ds;
  int64_t row_step;
  uint32_t* ds_pairs;
  int64_t column_step;
};

inline constexpr int64_t kBesideRows = 2 * kPairRows;
inline constexpr int64_t kBesideColumns = 2 * kPairColumns;

struct PairKernels {
  // Around a task's products, on the thread that runs them.
  void (*begin)();
  void (*end)();
  void (*multiply)(const PairProduct& product);
  // What becomes of a chunk, and beside it `count` products whose rows and columns are multiples of
  // kBesideRows and kBesideColumns, and none of which reads what another one writes.
  void (*exponentiate)(const PairProbabilities& chunk, const PairProduct* beside, int count);
  void (*differentiate)(const PairGradients& chunk, const PairProduct* beside, int count);
  // A = the rows.
  void (*pack_a)(const PairRows& from, uint16_t* to, int64_t row_step);
  // A = the rows' transpose.
  void (*pack_a_transposed)(const PairRows& from, uint16_t* to, int64_t row_step);
  // B = the rows.
  void (*pack_b)(const PairRows& from, uint32_t* to, int64_t depth_step, int64_t column_step);
  // B = the rows' transpose.
  void (*pack_b_transposed)(const PairRows& from, uint32_t* to, int64_t column_step);
  // A[begin .. end) = those rows of a matrix in blocks of C, rounded, of which columns past
  // `columns` count as zeros. columns: a multiple of kPairColumns; all_columns: of kPairDepth.
  void (*round_to_a)(const float* from, int64_t column_step, int64_t begin, int64_t end,
                     int64_t columns, int64_t all_columns, uint16_t* to, int64_t row_step);
};

// By this processor and operating system; the latter also grants the process its tile registers.
bool has_avx512_bf16();
bool has_amx_bf16();
bool has_neon_bf16();
const PairKernels* avx512_pair_kernels();
const PairKernels* amx_pair_kernels();
const PairKernels* neon_pair_kernels();

}  // namespace fa::cpu
