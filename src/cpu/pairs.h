// Matrix products of bfloat16 pairs with fp32 sums, as AVX512-BF16 and AMX have them: each step
// multiplies two neighbours along the summed axis. Implemented without Highway, which has neither,
// in sources with compiler flags of their own.
#pragma once

#include <cstdint>

namespace fa::cpu {

// What a product's dimensions are multiples of; buffers are filled up with zeros.
inline constexpr int64_t kPairRows = 16;     // of A and C
inline constexpr int64_t kPairColumns = 16;  // of B and C
inline constexpr int64_t kPairDepth = 32;    // the summed axis

// C[rows][columns] = A B, or += A B. A: [rows][a_row], bfloat16. B: [depth / 2][b_row], each word
// the pair of elements 2r (its low half) and 2r + 1 of a column.
struct PairProduct {
  const uint16_t* a;
  int64_t a_row;
  const uint32_t* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
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

struct PairKernels {
  // Around a task's products, on the thread that runs them.
  void (*begin)();
  void (*end)();
  void (*multiply)(const PairProduct& product);
  // B of the rows' transpose: to[w][i] = (rows[i][2w], rows[i][2w + 1]), for w up to n filled up to
  // kPairDepth and i up to count filled up to kPairColumns.
  void (*pack_transposed)(const PairRows& from, uint32_t* to, int64_t to_row);
  // A of the rows' transpose: to[c][i] = rows[i][c], for c up to n filled up to kPairRows and i up
  // to count filled up to kPairDepth.
  void (*transpose)(const PairRows& from, uint16_t* to, int64_t to_row);
  // B of the rows: to[r][c] = (rows[2r][c], rows[2r + 1][c]), for r up to count filled up to
  // kPairDepth and c up to n filled up to kPairColumns.
  void (*pack)(const PairRows& from, uint32_t* to, int64_t to_row);
  // to[r][0 .. columns) = from[r][...] rounded, and zeros up to to_columns; columns are multiples
  // of kPairColumns, to_columns of twice that.
  void (*round_rows)(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                     int64_t to_columns, uint16_t* to, int64_t to_row);
};

const PairKernels* avx512_pair_kernels();
const PairKernels* amx_pair_kernels();
// By this processor and operating system; the latter also grants the process its tile registers.
bool has_avx512_bf16();
bool has_amx_bf16();

}  // namespace fa::cpu
