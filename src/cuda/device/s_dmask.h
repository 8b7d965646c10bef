// S_dmask, which tests ask for: exp(s_ij - max_j s_ij), negative where dropout drops, 0 where
// masked or beyond the sequence. A warp per row, straight from the definition.
#pragma once

#include "cuda/device/forward_fp32.h"

namespace fa::cuda {

template <KernelSpec kSpec>
struct SDmaskRow {
  static constexpr Element kElement = kSpec.element;
  const ForwardArgs& args;
  const Sequence& sequence;
  int head;
  int row;

  __device__ float score(const GeneralScore<kElement>& general, int key) const {
    const Index q = sequence.q_batch * args.q.batch_stride +
                    (sequence.q_begin + row) * args.q.row_stride + head * args.q.head_stride;
    const Index k = key_offset(args, args.k, sequence, head / args.shape.heads_per_kv, key);
    float sum = 0.0f;
#pragma unroll 1
    for (int d = 0; d < args.shape.head_dim; ++d) {
      sum = fmaf(load_element<kElement>(args.q.data, q + d),
                 load_element<kElement>(args.k.data, k + d), sum);
    }
    return general(sum, row, key);
  }
};

template <KernelSpec kSpec>
__global__ void __launch_bounds__(kSpec.num_warps * 32)
    s_dmask(const __grid_constant__ ForwardArgs args, const SDmaskArgs to) {
  constexpr Element kElement = kSpec.element;
  const int lane = threadIdx.x % 32;
  const Index index = static_cast<Index>(blockIdx.x) * kSpec.num_warps + threadIdx.x / 32;
  const int row = static_cast<int>(index % to.rows);
  const int head = static_cast<int>(index / to.rows % args.shape.num_heads);
  const Index batch = index / to.rows / args.shape.num_heads;
  if (batch >= args.shape.batch) return;
  const Sequence sequence = sequence_of(args, static_cast<int>(batch));
  const GeneralScore<kElement> general(args, sequence, head);
  const SDmaskRow<kSpec> it{args, sequence, head, row};
  semantics::Range visible{0, 0};
  if (row < sequence.seqlen_q) visible = visible_keys(args, sequence, row);
  float highest = -kInfinity;
#pragma unroll 1
  for (int key = static_cast<int>(visible.begin) + lane; key < visible.end; key += 32) {
    highest = fmaxf(highest, it.score(general, key));
  }
  for (int mask = 1; mask < 32; mask *= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
  const Index at = batch * to.batch_stride + head * to.head_stride + row * to.row_stride;
#pragma unroll 1
  for (int key = lane; key < to.keys; key += 32) {
    float value = 0.0f;
    if (key >= visible.begin && key < visible.end && highest > -kInfinity) {
      value = exp2f((it.score(general, key) - highest) * (kLog2e / GeneralScore<kElement>::kUnit));
      const Index batch_head = batch * args.shape.num_heads + head;
      const bool keeps =
          semantics::dropout_keeps(args.dropout.key, args.dropout.threshold, batch_head, row, key);
      if (!keeps) value = -value;
    }
    store_element<kElement>(to.data, at + key, value);
  }
}

}  // namespace fa::cuda
