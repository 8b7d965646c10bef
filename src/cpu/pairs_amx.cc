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

// Tile registers have constant names: accumulators 0 to 3, operands 4 to 7.

// Two blocks of rows and two of columns of a product: the fewest loads per product of tiles.
struct Quad {
  const PairProduct* product;
  int64_t row = 0;
  int64_t column = 0;

  // On to the next quad of the products up to `end`, rows first; false where there is none.
  inline __attribute__((always_inline)) bool advance(const PairProduct* end) {
    row += 2;
    if ((row + 2) * kPairRows <= product->rows) return true;
    row = 0;
    column += 2;
    if ((column + 2) * kPairColumns <= product->columns) return true;
    column = 0;
    return ++product < end;
  }
};

inline __attribute__((always_inline)) void load_operands(const PairProduct& p, const uint16_t* a,
                                                         const uint32_t* b) {
  _tile_loadd(4, a, kStride);
  _tile_loadd(5, a + p.a_row_step, kStride);
  _tile_loadd(6, b, kStride);
  _tile_loadd(7, b + p.b_column_step, kStride);
}

inline __attribute__((always_inline)) void load_first_operands(const Quad& quad) {
  const PairProduct& p = *quad.product;
  load_operands(p, p.a + quad.row * p.a_row_step, p.b + quad.column * p.b_column_step);
}

// The first operands are loaded, and in the end those of `next`, where there is one: before the
// stores, which wait for the sums. The blocks of A for the next step, or for the next two rows, are
// asked for ahead: A comes from L2, and a busy neighbour on the core leaves no room to wait for it.
// Calls between(), which may do something else, twice for each block of depth.
template <class Between>
inline __attribute__((always_inline)) void multiply_quad(const Quad& quad, const Quad* next,
                                                         Between&& between) {
  const PairProduct& p = *quad.product;
  float* c0 = p.c + quad.row * kBlockC + quad.column * p.c_column_step;
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
  const uint16_t* a = p.a + quad.row * p.a_row_step;
  const uint32_t* b = p.b + quad.column * p.b_column_step;
  for (int64_t left = p.depth - kPairDepth; left >= 0; left -= kPairDepth) {
    a = left > 0 ? a + kBlockA : p.a + (quad.row + 2) * p.a_row_step;
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
    if (left > 0) load_operands(p, a, b);
  }
  if (next != nullptr) load_first_operands(*next);
  _tile_stored(0, c0, kStride);
  _tile_stored(1, c1, kStride);
  _tile_stored(2, c0 + kBlockC, kStride);
  _tile_stored(3, c1 + kBlockC, kStride);
}

// All quads of the products, each of which has one.
template <class Between>
inline __attribute__((always_inline)) void multiply_quads(const PairProduct* products, int count,
                                                          Between&& between) {
  Quad quad{products};
  load_first_operands(quad);
  for (bool more = true; more;) {
    Quad next = quad;
    more = next.advance(products + count);
    multiply_quad(quad, more ? &next : nullptr, between);
    quad = next;
  }
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
  if (rows >= 2 && columns >= 2) multiply_quads(&p, 1, [] {});
  if (rows % 2 != 0) {
    for (int64_t column = 0; column < columns; ++column) multiply_1x1(p, rows - 1, column);
  }
  if (columns % 2 != 0) {
    for (int64_t row = 0; row < rows / 2 * 2; ++row) multiply_1x1(p, row, columns - 1);
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
  multiply_quads(
      products, count, [&]() __attribute__((always_inline)) { spread(); });
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
