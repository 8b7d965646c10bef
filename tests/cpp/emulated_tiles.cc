// The kernels of src/cpu/pairs_amx.cc on tile registers that are emulated, for machines without
// them. Compiled with their flags.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Tile {
  unsigned char rows[16][64];
};
thread_local Tile tiles[8];

void load_tile(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tiles[tile].rows[row], static_cast<const char*>(from) + row * stride, 64);
  }
}

void store_tile(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].rows[row], 64);
  }
}

float half_of(const Tile& tile, int row, int column) {
  uint16_t half;
  std::memcpy(&half, tile.rows[row] + 2 * column, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// c += a b, pairs of bfloat16 along the summed axis.
void multiply_tiles(int c, int a, int b) {
  for (int row = 0; row < 16; ++row) {
    float sums[16];
    std::memcpy(sums, tiles[c].rows[row], sizeof sums);
    for (int pair = 0; pair < 16; ++pair) {
      for (int column = 0; column < 16; ++column) {
        for (int half = 0; half < 2; ++half) {
          sums[column] +=
              half_of(tiles[a], row, 2 * pair + half) * half_of(tiles[b], pair, 2 * column + half);
        }
      }
    }
    std::memcpy(tiles[c].rows[row], sums, sizeof sums);
  }
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_tile(tile, to, stride)
#define _tile_zero(tile) tiles[tile] = {}
#define _tile_dpbf16ps(c, a, b) multiply_tiles(c, a, b)
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
// Beside those of the library.
#define amx_pair_kernels emulated_pair_kernels
#define has_amx_bf16 emulated_has_amx_bf16
#define has_avx512_bf16 emulated_has_avx512_bf16

#include "cpu/pairs_amx.cc"
