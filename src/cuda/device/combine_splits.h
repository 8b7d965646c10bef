// Joins what the splits of a tile's keys have left: out = sum_s w_s o_s / sum_s w_s with
// w_s = exp(lse_s). Always in the same order, so that results repeat bit for bit.
#pragma once

#include "cuda/device/score.h"

namespace fa::cuda {

// A row as one of its `num_warps` warps sees it, which has every num_warps-th split from `warp` on.
struct SplitRow {
  static constexpr int kMaxColumns = 256 / 32;  // of a lane
  const SplitArgs& splits;
  Index row;
  int warp;
  int num_warps;
  int lane;
  float o[kMaxColumns] = {};
  float sum = 0.0f;

  __device__ float lse(int split) const { return splits.lse[row + split * splits.num_rows]; }

  // Over all splits.
  __device__ float highest_lse() const {
    float highest = -kInfinity;
#pragma unroll 4
    for (int split = lane; split < splits.num_splits; split += 32) {
      highest = fmaxf(highest, lse(split));
    }
    for (int mask = 1; mask < 32; mask *= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
    return highest;
  }

  // sum += w, o += w o_s, where w = exp(lse_s - highest).
  __device__ void add_splits(float highest) {
#pragma unroll 4
    for (int split = warp; split < splits.num_splits; split += num_warps) {
      const float weight = expf(lse(split) - highest);
      const Index at = (row + split * splits.num_rows) * splits.row_elements;
      sum += weight;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) {
        const int column = c * 32 + lane;
        if (column < splits.row_elements) o[c] = fmaf(weight, splits.o[at + column], o[c]);
      }
    }
  }

  // Joins the row's warps in the first of them. `shared` is the block's: of each warp o, then sum.
  __device__ void join_warps(float* shared, int block_warp) {
    constexpr int kFloats = kMaxColumns * 32 + 1;
    float* own = shared + block_warp * kFloats;
    if (warp > 0) {
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) own[c * 32 + lane] = o[c];
      own[kFloats - 1] = sum;
    }
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < num_warps; ++other) {
      const float* from = own + other * kFloats;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) o[c] += from[c * 32 + lane];
      sum += from[kFloats - 1];
    }
  }
};

template <KernelSpec kSpec>
__device__ inline void store_row(const ForwardArgs& args, const SplitRow& it,
                                 const Sequence& sequence, int head, int query, float highest) {
  const bool empty = highest == -kInfinity;
  const Index row = sequence.q_begin + query;
  const Index out = sequence.q_batch * args.out.batch_stride + row * args.out.row_stride +
                    head * args.out.head_stride;
#pragma unroll
  for (int c = 0; c < SplitRow::kMaxColumns; ++c) {
    const int column = c * 32 + it.lane;
    if (column < args.shape.head_dim_v) {
      store_element<kSpec.element>(args.out.data, out + column, empty ? 0.0f : it.o[c] / it.sum);
    }
  }
  if (args.lse != nullptr && it.lane == 0) {
    args.lse[sequence.q_batch * args.lse_batch_stride + head * args.lse_head_stride +
             row * args.lse_row_stride] =
        empty ? empty_lse(args.score.sink_element != BiasElement::kNone) : highest + logf(it.sum);
  }
}

// `warps_per_row` divides the block's.
template <KernelSpec kSpec>
__global__ void __launch_bounds__(kSpec.num_warps * 32)
    combine_splits(const __grid_constant__ ForwardArgs args, int warps_per_row) {
  __shared__ float shared[kSpec.num_warps * (SplitRow::kMaxColumns * 32 + 1)];
  const int block_warp = threadIdx.x / 32;
  const Index row = static_cast<Index>(blockIdx.x) * (kSpec.num_warps / warps_per_row) +
                    block_warp / warps_per_row;
  const int query = static_cast<int>(row % args.shape.seqlen_q);
  const int head = static_cast<int>(row / args.shape.seqlen_q % args.shape.num_heads);
  const int batch = static_cast<int>(row / args.shape.seqlen_q / args.shape.num_heads);
  Sequence sequence{};
  if (batch < args.shape.batch) sequence = sequence_of(args, batch);
  const bool exists = query < sequence.seqlen_q;
  SplitRow it{args.splits, row, block_warp % warps_per_row, warps_per_row,
              static_cast<int>(threadIdx.x % 32)};
  float highest = -kInfinity;
  if (exists) {
    highest = it.highest_lse();
    if (args.score.sink_element != BiasElement::kNone) {
      const float sink = load_sink<kSpec.element>(args.score, head);
      highest = fmaxf(highest, sink);
      if (it.warp == 0) it.sum = expf(sink - highest);
    }
    if (highest > -kInfinity) it.add_splits(highest);
  }
  it.join_warps(shared, block_warp);
  if (exists && it.warp == 0) store_row<kSpec>(args, it, sequence, head, query, highest);
}

}  // namespace fa::cuda
