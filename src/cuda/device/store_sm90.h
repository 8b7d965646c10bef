// What becomes of the output of Hopper's forward.
#pragma once

#include "cuda/device/tile_sm90.h"

namespace fa::cuda {

// A warp's log-sum-exp and the factors of its rows: `max` and `sum` afterwards.
template <KernelSpec kSpec>
__device__ inline void finish_softmax(OnlineSoftmax<1>& softmax, const ForwardArgs& args,
                                      int head) {
  const bool has_sink = args.score.sink_element != BiasElement::kNone;
  softmax.finish(scale_log2<kSpec>(args), has_sink,
                 [&](int, int) { return load_sink<kSpec.element>(args.score, head); });
}

// A warp's 16 rows from registers to global memory: lanes exchange until each has 8 neighbouring
// columns. Shared memory is not needed, so that the next tile's loads need not wait for it.
template <KernelSpec kSpec, int kTilesO>
__device__ inline void store_rows(const Accumulator<1, kTilesO>& o, const OnlineSoftmax<1>& softmax,
                                  const ForwardArgs& args, const Tile<kSpec>& tile, int first_row,
                                  int lane) {
  const StridedRows rows = query_rows(args.out, tile.sequence, tile.head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + half * 8;
    const bool exists = row < tile.sequence.seqlen_q;
    const float factor = softmax.sum[0][half] * (kSpec.dropout ? args.dropout.keep_scale : 1.0f);
    Half* to = rows.first(row) + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kTilesO; n += 4) {
      Word words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&at)[4] = o.at[0][n + i];
        words[i] = pack<kSpec.element>(at[2 * half] * factor, at[2 * half + 1] * factor);
      }
      transpose_quad(words, lane);
      if (exists && n * 8 + lane % 4 * 8 < args.shape.head_dim_v)
        store_global_16(to + n * 8, words);
    }
    if (args.lse != nullptr && lane % 4 == 0 && exists) {
      args.lse[tile.sequence.q_batch * args.lse_batch_stride + tile.head * args.lse_head_stride +
               (tile.sequence.q_begin + row) * args.lse_row_stride] = softmax.max[0][half];
    }
  }
}

}  // namespace fa::cuda
