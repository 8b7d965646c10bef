// Products of 16x8x16 on the tensor cores through mma.sync, and how a warp's tile is made of them.
//
// Lane l holds of a 16x8 accumulator the rows l / 4 and l / 4 + 8, each at columns 2 (l % 4) and
// 2 (l % 4) + 1.
#pragma once

#include "cuda/device/element.h"
#include "cuda/device/shared_tile.h"

namespace fa::cuda {

// 8 deep, of fp16: half of what follows.
__device__ inline void multiply_add_8(float (&c)[4], Word a0, Word a1, Word b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <Element kElement>
__device__ inline void multiply_add(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
  if constexpr (kElement == Element::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (kIsTuring) {
    multiply_add_8(c, a[0], a[1], b0);
    multiply_add_8(c, a[2], a[3], b1);
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A warp's accumulator: 16 kTilesM rows, 8 kTilesN columns, fp32.
template <int kTilesM, int kTilesN>
struct Accumulator {
  float at[kTilesM][kTilesN][4];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] = 0.0f;
      }
    }
  }
};

// Of a 4x4 matrix whose column l lane l of four holds, gives it row l.
__device__ inline void transpose_quad(Word (&words)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      Word& low = words[i];
      Word& high = words[i + distance];
      const Word received = shuffle_xor(upper ? low : high, distance);
      if (upper) {
        low = received;
      } else {
        high = received;
      }
    }
  }
}

// s = q k^T over kDepth. Rows of q from q_row on are this warp's.
template <Element kElement, int kDepth, int kTilesM, int kTilesN, class QTile, class KTile>
__device__ inline void multiply_q_k(Accumulator<kTilesM, kTilesN>& s, QTile q, int q_row, KTile k,
                                    int lane) {
  s.clear();
  const SharedAddress q_lane = q.address(q_row + lane % 16, lane / 16);
  const SharedAddress k_lane = k.address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    Word a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      load_matrix_x4(a[m], QTile::advance(q_lane, 2 * step) + m * 16 * QTile::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      Word b[4];
      load_matrix_x4(b, KTile::advance(k_lane, 2 * step) + n * 8 * KTile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_add<kElement>(s.at[m][n], a[m], b[0], b[1]);
        multiply_add<kElement>(s.at[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// o += p v, where p becomes 16-bit as it is used; a step of 16 keys takes two column tiles of p,
// whose accumulator layout is that of the left operand.
template <Element kElement, int kTilesM, int kTilesN, int kTilesO, class VTile>
__device__ inline void multiply_p_v(Accumulator<kTilesM, kTilesO>& o,
                                    const Accumulator<kTilesM, kTilesN>& p, VTile v, int lane) {
  const SharedAddress v_lane = v.address(lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < kTilesN / 2; ++step) {
    Word a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&tile)[4] = p.at[m][2 * step + half];
        a[m][2 * half] = pack<kElement>(tile[0], tile[1]);
        a[m][2 * half + 1] = pack<kElement>(tile[2], tile[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTilesO; n += 2) {
      Word b[4];
      load_matrix_x4_transposed(b, VTile::advance(v_lane, n) + step * 16 * VTile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        multiply_add<kElement>(o.at[m][n], a[m], b[0], b[1]);
        multiply_add<kElement>(o.at[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace fa::cuda
