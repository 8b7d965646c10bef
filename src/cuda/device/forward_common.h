// What the forward kernels for 16-bit elements share: what a block computes, what lies between the
// two products, and what becomes of the result.
#pragma once

#include "cuda/device/copy.h"
#include "cuda/device/score.h"
#include "cuda/device/softmax.h"

namespace fa::cuda {

// One tile of rows of one head, as all threads of a block see it. It lies in shared memory, because
// the accumulators leave few registers for it.
struct Block {
  Sequence sequence;
  KeySteps steps;
  int head;
  int kv_head;
  int tile_row;
};

// Tile `index` of the schedule, which may lie behind its sequence's last row.
template <KernelSpec kSpec>
__device__ inline Block block_of(const ForwardArgs& args, int index) {
  const Work work = work_of(args, index);
  const Sequence it = sequence_of(args, work.batch);
  const int tile_row = work.tile * kSpec.tile_m;
  const int last_row = min(tile_row + kSpec.tile_m, it.seqlen_q) - 1;
  return {it, key_steps<kSpec.tile_n>(args, it, tile_row, last_row), work.head,
          work.head / args.shape.heads_per_kv, tile_row};
}

__device__ inline bool is_masked(const Block& block, int step) {
  return step < block.steps.full_begin || step >= block.steps.full_end;
}

// Log2 of what a score of 1 is worth inside 2^x.
template <KernelSpec kSpec>
__device__ inline float scale_log2(const ForwardArgs& args) {
  return kSpec.score == Score::kGeneral ? 1.0f : args.score.scale_log2;
}

// Scores to probabilities: what lies between the two products. `first_row` is the warp's.
template <KernelSpec kSpec, int kTilesM, int kTilesN>
__device__ inline void scores_to_probabilities(Accumulator<kTilesM, kTilesN>& s,
                                               OnlineSoftmax<kTilesM>& softmax,
                                               const ForwardArgs& args, const Block& block,
                                               int first_row, int step, bool masked, int lane) {
  const int first_key = step * kSpec.tile_n;
  if constexpr (kSpec.score == Score::kGeneral) {
    const GeneralScore<kSpec.element> score(args, block.sequence, block.head);
    apply_general_score(s, score, block.sequence, first_row, first_key, lane);
  } else if constexpr (kSpec.score == Score::kSoftcap) {
    apply_softcap(s, args.score.scale);
  }
  if (masked) apply_mask(s, args, block.sequence, first_row, first_key, lane);
  softmax.update(s, scale_log2<kSpec>(args));
  if constexpr (kSpec.dropout) {
    const Index batch_head =
        static_cast<Index>(block.sequence.batch) * args.shape.num_heads + block.head;
    apply_dropout(s, args.dropout, batch_head, first_row, first_key, lane);
  }
}

// A warp's rows, normalised, into a tile in shared memory, and their log-sum-exp. `warp_row` is the
// warp's first row within the tile, `tile_row` the tile's within the sequence.
template <KernelSpec kSpec, int kTilesM, int kTilesO, class Tile>
__device__ inline void finish_rows(const Accumulator<kTilesM, kTilesO>& o,
                                   OnlineSoftmax<kTilesM>& softmax, const ForwardArgs& args,
                                   const Block& block, Tile tile, int tile_row, int warp_row,
                                   int lane) {
  const Sequence& sequence = block.sequence;
  const bool has_sink = args.score.sink_element != BiasElement::kNone;
  softmax.finish(scale_log2<kSpec>(args), has_sink,
                 has_sink ? load_sink<kSpec.element>(args.score, block.head) : 0.0f);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + lane / 4 + half * 8;
      const float factor = softmax.sum[m][half] * (kSpec.dropout ? args.dropout.keep_scale : 1.0f);
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
        store_shared_4(
            tile.address(row, n) + lane % 4 * 4,
            pack<kSpec.element>(o.at[m][n][2 * half] * factor, o.at[m][n][2 * half + 1] * factor));
      }
      if (args.lse != nullptr && lane % 4 == 0 && tile_row + row < sequence.seqlen_q) {
        args.lse[sequence.q_batch * args.lse_batch_stride + block.head * args.lse_head_stride +
                 (sequence.q_begin + tile_row + row) * args.lse_row_stride] = softmax.max[m][half];
      }
    }
  }
}

}  // namespace fa::cuda
