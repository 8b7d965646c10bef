// Products of bfloat16 pairs on AMX tile registers. Compiled with flags of its own: nothing here
// may be inline and shared with other sources, standard headers included.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/pairs.h"

namespace fa::cpu {
namespace {

// A tile register holds 16 rows of 64 bytes: 16 x 16 fp32, or 16 x 32 bfloat16.
constexpr int64_t kTile = 16;

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

// Tile registers have constant names: accumulators 0 to 3, A 4 and 5, B 6 and 7.

// 32 x 32 of C.
inline __attribute__((always_inline)) void multiply_2x2(const PairProduct& p, int64_t row,
                                                        int64_t column) {
  const int64_t a_bytes = p.a_row * 2, b_bytes = p.b_row * 4, c_bytes = p.c_row * 4;
  float* c0 = p.c + row * p.c_row + column;
  float* c1 = c0 + kTile * p.c_row;
  if (p.accumulate) {
    _tile_loadd(0, c0, c_bytes);
    _tile_loadd(1, c0 + kTile, c_bytes);
    _tile_loadd(2, c1, c_bytes);
    _tile_loadd(3, c1 + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a = p.a + row * p.a_row;
  const uint32_t* b = p.b + column;
  for (int64_t d = 0; d < p.depth; d += kPairDepth) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile * p.a_row, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += kPairDepth;
    b += kPairDepth / 2 * p.b_row;
  }
  _tile_stored(0, c0, c_bytes);
  _tile_stored(1, c0 + kTile, c_bytes);
  _tile_stored(2, c1, c_bytes);
  _tile_stored(3, c1 + kTile, c_bytes);
}

// 16 x 64 of C: each tile of A, which comes from farther away, is used four times.
inline __attribute__((always_inline)) void multiply_1x4(const PairProduct& p, int64_t row,
                                                        int64_t column) {
  const int64_t a_bytes = p.a_row * 2, b_bytes = p.b_row * 4, c_bytes = p.c_row * 4;
  float* c = p.c + row * p.c_row + column;
  if (p.accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTile, c_bytes);
    _tile_loadd(2, c + 2 * kTile, c_bytes);
    _tile_loadd(3, c + 3 * kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a = p.a + row * p.a_row;
  const uint32_t* b = p.b + column;
  for (int64_t d = 0; d < p.depth; d += kPairDepth) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, b + 2 * kTile, b_bytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, b + 3 * kTile, b_bytes);
    _tile_dpbf16ps(3, 4, 6);
    a += kPairDepth;
    b += kPairDepth / 2 * p.b_row;
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  _tile_stored(2, c + 2 * kTile, c_bytes);
  _tile_stored(3, c + 3 * kTile, c_bytes);
}

// 16 x 16 of C: what is left over.
inline void multiply_1x1(const PairProduct& p, int64_t row, int64_t column) {
  float* c = p.c + row * p.c_row + column;
  if (p.accumulate) {
    _tile_loadd(0, c, p.c_row * 4);
  } else {
    _tile_zero(0);
  }
  for (int64_t d = 0; d < p.depth; d += kPairDepth) {
    _tile_loadd(4, p.a + row * p.a_row + d, p.a_row * 2);
    _tile_loadd(6, p.b + d / 2 * p.b_row + column, p.b_row * 4);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, p.c_row * 4);
}

void multiply(const PairProduct& p) {
  int64_t column = 0;
  for (; column + 4 * kTile <= p.columns; column += 4 * kTile) {
    for (int64_t row = 0; row < p.rows; row += kTile) multiply_1x4(p, row, column);
  }
  for (; column + 2 * kTile <= p.columns; column += 2 * kTile) {
    int64_t row = 0;
    for (; row + 2 * kTile <= p.rows; row += 2 * kTile) multiply_2x2(p, row, column);
    for (; row < p.rows; row += kTile) {
      multiply_1x1(p, row, column);
      multiply_1x1(p, row, column + kTile);
    }
  }
  for (; column < p.columns; column += kTile) {
    for (int64_t row = 0; row < p.rows; row += kTile) multiply_1x1(p, row, column);
  }
}

// The operating system saves tile registers only for processes that asked for them.
bool request_tiles() {
  constexpr int64_t kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int64_t kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool processor_has_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (edx & kAmxBf16) && (edx & kAmxTile);
}

}  // namespace

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

bool has_amx_bf16() {
  static const bool has = has_avx512_bf16() && processor_has_amx() && request_tiles();
  return has;
}

const PairKernels* amx_pair_kernels() {
  static const PairKernels* const avx512 = avx512_pair_kernels();
  static const PairKernels kernels{begin,
                                   end,
                                   multiply,
                                   avx512->pack_transposed,
                                   avx512->transpose,
                                   avx512->pack,
                                   avx512->round_rows};
  return &kernels;
}

}  // namespace fa::cpu
