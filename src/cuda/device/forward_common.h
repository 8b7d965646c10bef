// What the forward kernels for 16-bit elements share: what a block computes, what lies between the
// two products, and what becomes of the result.
#pragma once

#include "cuda/device/copy.h"
#include "cuda/device/score.h"
#include "cuda/device/softmax.h"

namespace fa::cuda {

// One tile of rows of one head, or of a group of heads packed, as all threads of a block see it. It
// lies in shared memory, because the accumulators leave few registers for it.
struct Block {
  Sequence sequence;
  KeySteps steps;
  int head;  // the first
  int kv_head;
  int tile_row;
  int num_rows;  // of all tiles of the head or group
  int split;     // which part of the keys
};

// Tile `index` of the schedule, which may lie behind its sequence's last row.
template <KernelSpec kSpec>
__device__ inline Block block_of(const ForwardArgs& args, int index) {
  const int split = kSpec.packs ? index / args.splits.num_tiles : 0;
  const Work work = work_of(args, kSpec.packs ? index % args.splits.num_tiles : index);
  const Sequence it = sequence_of(args, work.batch);
  const int group = args.shape.heads_per_kv;
  const TileRows<kSpec.packs> rows{0, group};
  const int num_rows = it.seqlen_q * (kSpec.packs ? group : 1);
  const int tile_row = work.tile * kSpec.tile_m;
  const int last_row = min(tile_row + kSpec.tile_m, num_rows) - 1;
  KeySteps steps =
      key_steps<kSpec.tile_n>(args, it, rows.query_of(tile_row), rows.query_of(last_row));
  if constexpr (kSpec.packs) steps = steps_of_split(steps, split, args.splits.num_splits);
  const int head = kSpec.packs ? work.head * group : work.head;
  return {it, steps, head, head / group, tile_row, num_rows, split};
}

template <KernelSpec kSpec>
__device__ inline TileRows<kSpec.packs> rows_of(const ForwardArgs& args, const Block& block) {
  return {block.head, args.shape.heads_per_kv};
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
  const TileRows<kSpec.packs> rows = rows_of<kSpec>(args, block);
  if constexpr (kSpec.score == Score::kGeneral) {
    const auto score_of = [&](int row) {
      return GeneralScore<kSpec.element>(args, block.sequence, rows.head_of(row));
    };
    apply_general_score<kSpec.element>(s, score_of, args.score, block.sequence, rows, first_row,
                                       first_key, lane);
  } else if constexpr (kSpec.score == Score::kSoftcap) {
    apply_softcap(s, args.score.scale);
  }
  if (masked) apply_mask(s, args, block.sequence, rows, first_row, first_key, lane);
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
  const TileRows<kSpec.packs> rows = rows_of<kSpec>(args, block);
  const auto row_of = [&](int m, int half) {
    return tile_row + warp_row + m * 16 + lane / 4 + half * 8;
  };
  softmax.finish(scale_log2<kSpec>(args), args.score.sink_element != BiasElement::kNone,
                 [&](int m, int half) {
                   return load_sink<kSpec.element>(args.score, rows.head_of(row_of(m, half)));
                 });
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(m, half);
      const float factor = softmax.sum[m][half] * (kSpec.dropout ? args.dropout.keep_scale : 1.0f);
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
        store_shared_4(
            tile.address(row - tile_row, n) + lane % 4 * 4,
            pack<kSpec.element>(o.at[m][n][2 * half] * factor, o.at[m][n][2 * half + 1] * factor));
      }
      if (args.lse != nullptr && lane % 4 == 0 && row < block.num_rows) {
        args.lse[sequence.q_batch * args.lse_batch_stride +
                 rows.head_of(row) * args.lse_head_stride +
                 (sequence.q_begin + rows.query_of(row)) * args.lse_row_stride] =
            softmax.max[m][half];
      }
    }
  }
}

// A warp's rows of one split, normalised, to where combine_splits finds them.
template <KernelSpec kSpec, int kTilesM, int kTilesO>
__device__ inline void store_split(const Accumulator<kTilesM, kTilesO>& o,
                                   OnlineSoftmax<kTilesM>& softmax, const ForwardArgs& args,
                                   const Block& block, int warp_row, int lane) {
  const TileRows<kSpec.packs> rows = rows_of<kSpec>(args, block);
  softmax.finish(scale_log2<kSpec>(args), false, [](int, int) { return 0.0f; });
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.tile_row + warp_row + m * 16 + lane / 4 + half * 8;
      if (row >= block.num_rows) continue;
      const Index at =
          split_row(args, block.split, block.sequence.batch, rows.head_of(row), rows.query_of(row));
      float* to = args.splits.o + at * args.splits.row_elements + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
        if (n * 8 >= args.splits.row_elements) break;
        *reinterpret_cast<float2*>(to + n * 8) = {o.at[m][n][2 * half] * softmax.sum[m][half],
                                                  o.at[m][n][2 * half + 1] * softmax.sum[m][half]};
      }
      const float lse = softmax.max[m][half];
      if (lane % 4 == 0) args.splits.lse[at] = lse == kInfinity ? -kInfinity : lse;
    }
  }
}

}  // namespace fa::cuda
