// Joins what the splits of a tile's keys have left: out = sum_s w_s o_s / sum_s w_s with
// w_s = exp(lse_s), in the order of the splits. A warp per row.
#pragma once

#include "cuda/device/score.h"

namespace fa::cuda {

template <KernelSpec kSpec>
struct SplitRow {
  static constexpr int kMaxColumns = 256 / 32;  // of a lane
  const ForwardArgs& args;
  Index first;  // the row of split 0

  __device__ float lse(int split) const {
    return args.splits.lse[first + split * args.splits.num_rows];
  }

  // Over all splits.
  __device__ float highest_lse(int lane) const {
    float highest = -kInfinity;
    for (int split = lane; split < args.splits.num_splits; split += 32) {
      highest = fmaxf(highest, lse(split));
    }
    for (int mask = 1; mask < 32; mask *= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
    return highest;
  }

  // sum += w, o += w o_s, where w = exp(lse_s - highest).
  __device__ void add(float (&o)[kMaxColumns], float& sum, float highest, int lane) const {
    const int elements = args.splits.row_elements;
#pragma unroll 4
    for (int split = 0; split < args.splits.num_splits; ++split) {
      const float weight = expf(lse(split) - highest);
      sum += weight;
      const float* from = args.splits.o + (first + split * args.splits.num_rows) * elements + lane;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) {
        if (c * 32 + lane < elements) o[c] = fmaf(weight, from[c * 32], o[c]);
      }
    }
  }
};

template <KernelSpec kSpec>
__global__ void __launch_bounds__(kSpec.num_warps * 32)
    combine_splits(const __grid_constant__ ForwardArgs args) {
  constexpr Element kElement = kSpec.element;
  const int lane = threadIdx.x % 32;
  const Index index = static_cast<Index>(blockIdx.x) * kSpec.num_warps + threadIdx.x / 32;
  if (index >= args.splits.num_rows) return;
  const int row = static_cast<int>(index % args.shape.seqlen_q);
  const int head = static_cast<int>(index / args.shape.seqlen_q % args.shape.num_heads);
  const Index batch = index / args.shape.seqlen_q / args.shape.num_heads;
  const SplitRow<kSpec> it{args, index};
  const bool has_sink = args.score.sink_element != BiasElement::kNone;
  const float sink = has_sink ? load_sink<kElement>(args.score, head) : -kInfinity;
  const float highest = fmaxf(it.highest_lse(lane), sink);
  const bool empty = highest == -kInfinity;
  float o[SplitRow<kSpec>::kMaxColumns] = {};
  float sum = has_sink ? expf(sink - highest) : 0.0f;
  if (!empty) it.add(o, sum, highest, lane);
  const Index out =
      batch * args.out.batch_stride + row * args.out.row_stride + head * args.out.head_stride;
#pragma unroll
  for (int c = 0; c < SplitRow<kSpec>::kMaxColumns; ++c) {
    const int column = c * 32 + lane;
    if (column < args.shape.head_dim_v) {
      store_element<kElement>(args.out.data, out + column, empty ? 0.0f : o[c] / sum);
    }
  }
  if (args.lse != nullptr && lane == 0) {
    args.lse[batch * args.lse_batch_stride + head * args.lse_head_stride +
             row * args.lse_row_stride] = empty ? kInfinity : highest + logf(sum);
  }
}

}  // namespace fa::cuda
