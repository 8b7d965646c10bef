// Matrix products of bfloat16 pairs with fp32 sums, as AVX512-BF16 and AMX have them: each step
// multiplies two neighbours along the summed axis. Implemented without Highway, which has neither,
// in sources with compiler flags of their own.
//
// Matrices are cut into blocks of 1 KiB, a tile register of AMX each, whose 64-byte rows lie end to
// end: rows that are a power of two apart would collide in the L1 cache.
//   A: 16 rows x 32 of depth   B: 32 of depth x 16 columns, pairs   C: 16 rows x 16 columns, fp32
#pragma once

#include <cstdint>

namespace fa::cpu {

// What a product's dimensions are multiples of; buffers are filled up with zeros.
inline constexpr int64_t kPairRows = 16;     // of A and C
inline constexpr int64_t kPairColumns = 16;  // of B and C
inline constexpr int64_t kPairDepth = 32;    // the summed axis

// Elements of a block: bfloat16 of A, words of B, each the pair of elements 2r (its low half) and
// 2r + 1 of a column, and fp32 of C.
inline constexpr int64_t kBlockA = kPairRows * kPairDepth;
inline constexpr int64_t kBlockB = kPairDepth / 2 * kPairColumns;
inline constexpr int64_t kBlockC = kPairRows * kPairColumns;

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
  uint32_t* pairs;       // [kChunkKeys / 2][kPairColumns] of each block of columns
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

const PairKernels* avx512_pair_kernels();
const PairKernels* amx_pair_kernels();
// By this processor and operating system; the latter also grants the process its tile registers.
bool has_avx512_bf16();
bool has_amx_bf16();

}  // namespace fa::cpu
