// Products of bfloat16 pairs on AMX tile registers. Compiled with flags of its own: nothing here
// may be inline and shared with other sources, standard headers included.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/pair_chunks.h"

namespace fa::cpu {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

void begin() { _tile_loadconfig(&kConfig); }
void end() { _tile_release(); }

// Blocks lie end to end, 64 bytes a row.
constexpr int64_t kStride = 64;

// Asks for half a block.
inline __attribute__((always_inline)) void ask_for_half(const uint16_t* block, int half) {
  constexpr int kLines = 8;
  const char* lines = reinterpret_cast<const char*>(block) + half * kLines * 64;
#pragma GCC unroll 8
  for (int i = 0; i < kLines; ++i) ask_for(lines + i * 64);
}

// Tile registers have constant names: accumulators 0 to 3, operands 4 to 7. Loads come as early as
// the registers allow: two threads on a core leave too few for the processor to rename.

// Two blocks of rows and two of columns: the fewest loads per product. The blocks of A for the next
// step, or for the next two rows, are asked for ahead: A comes from L2, and a busy neighbour on the
// core leaves no room to wait for it. Calls between(), which may do something else, twice for each
// block of depth.
template <class Between>
inline __attribute__((always_inline)) void multiply_2x2(const PairProduct& p, int64_t row,
                                                        int64_t column, Between&& between) {
  float* c0 = p.c + row * kBlockC + column * p.c_column_step;
  float* c1 = c0 + p.c_column_step;
  if (p.accumulate) {
    _tile_loadd(0, c0, kStride);
    _tile_loadd(1, c1, kStride);
    _tile_loadd(2, c0 + kBlockC, kStride);
    _tile_loadd(3, c1 + kBlockC, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a = p.a + row * p.a_row_step;
  const uint32_t* b = p.b + column * p.b_column_step;
  for (int64_t d = 0; d < p.depth; d += kPairDepth) {
    _tile_loadd(4, a, kStride);
    _tile_loadd(5, a + p.a_row_step, kStride);
    _tile_loadd(6, b, kStride);
    _tile_loadd(7, b + p.b_column_step, kStride);
    a = d + kPairDepth < p.depth ? a + kBlockA : p.a + (row + 2) * p.a_row_step;
    b += p.b_depth_step;
    _tile_dpbf16ps(0, 4, 6);
    ask_for_half(a, 0);
    _tile_dpbf16ps(1, 4, 7);
    ask_for_half(a, 1);
    between();
    _tile_dpbf16ps(2, 5, 6);
    ask_for_half(a + p.a_row_step, 0);
    _tile_dpbf16ps(3, 5, 7);
    ask_for_half(a + p.a_row_step, 1);
    between();
  }
  _tile_stored(0, c0, kStride);
  _tile_stored(1, c1, kStride);
  _tile_stored(2, c0 + kBlockC, kStride);
  _tile_stored(3, c1 + kBlockC, kStride);
}

// One block of each: what is left over.
inline void multiply_1x1(const PairProduct& p, int64_t row, int64_t column) {
  float* c = p.c + row * kBlockC + column * p.c_column_step;
  if (p.accumulate) {
    _tile_loadd(0, c, kStride);
  } else {
    _tile_zero(0);
  }
  for (int64_t d = 0; d < p.depth; d += kPairDepth) {
    _tile_loadd(4, p.a + row * p.a_row_step + d / kPairDepth * kBlockA, kStride);
    _tile_loadd(6, p.b + column * p.b_column_step + d / kPairDepth * p.b_depth_step, kStride);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, kStride);
}

void multiply(const PairProduct& p) {
  const int64_t rows = p.rows / kPairRows, columns = p.columns / kPairColumns;
  int64_t column = 0;
  for (; column + 2 <= columns; column += 2) {
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) multiply_2x2(p, row, column, [] {});
    for (; row < rows; ++row) {
      multiply_1x1(p, row, column);
      multiply_1x1(p, row, column + 1);
    }
  }
  for (; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) multiply_1x1(p, row, column);
  }
}

// Spreads the rows of a chunk evenly among `slots` calls.
template <class Rows>
class Spread {
 public:
  Spread(Rows& rows, int64_t slots) : rows_(rows), step_(kChunkKeys * kOne / slots) {}
  inline __attribute__((always_inline)) void operator()() {
    due_ += step_;
    for (; (row_ + 2) * kOne <= due_; row_ += 2) rows_.two_rows(row_);
  }
  inline __attribute__((always_inline)) void finish() {
    for (; row_ < kChunkKeys; row_ += 2) rows_.two_rows(row_);
    rows_.finish();
  }

 private:
  static constexpr int64_t kOne = 1 << 16;
  Rows& rows_;
  const int64_t step_;
  int64_t due_ = 0;
  int64_t row_ = 0;
};

// The tile unit multiplies while vector units do the rows: program order brings both within the
// processor's reach.
template <class Rows>
inline __attribute__((always_inline)) void multiply_beside(const PairProduct* products, int count,
                                                           Rows& rows) {
  int64_t slots = 0;
  for (int i = 0; i < count; ++i) {
    const PairProduct& p = products[i];
    slots += p.rows / kBesideRows * (p.columns / kBesideColumns) * 2 * (p.depth / kPairDepth);
  }
  if (slots == 0) {
    all_rows(rows);
    return;
  }
  Spread spread(rows, slots);
  int64_t row = 0, column = 0;
  for (const PairProduct* p = products; p < products + count;) {
    multiply_2x2(
        *p, row, column, [&]() __attribute__((always_inline)) { spread(); });
    row += 2;
    if (row * kPairRows < p->rows) continue;
    row = 0;
    column += 2;
    if (column * kPairColumns < p->columns) continue;
    column = 0;
    ++p;
  }
  spread.finish();
}

void exponentiate(const PairProbabilities& chunk, const PairProduct* beside, int count) {
  ProbabilityRows rows(chunk);
  multiply_beside(beside, count, rows);
}

void differentiate(const PairGradients& chunk, const PairProduct* beside, int count) {
  GradientRows rows(chunk);
  multiply_beside(beside, count, rows);
}

// The operating system saves tile registers only for processes that asked for them.
bool request_tiles() {
  constexpr int64_t kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int64_t kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

bool has_amx_bf16() {
  static const bool has = has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
                          __builtin_cpu_supports("amx-bf16") && request_tiles();
  return has;
}

const PairKernels* amx_pair_kernels() {
  static const PairKernels* const avx512 = avx512_pair_kernels();
  static const PairKernels kernels{begin,
                                   end,
                                   multiply,
                                   exponentiate,
                                   differentiate,
                                   avx512->pack_a,
                                   avx512->pack_a_transposed,
                                   avx512->pack_b,
                                   avx512->pack_b_transposed,
                                   avx512->round_to_a};
  return &kernels;
}

}  // namespace fa::cpu
