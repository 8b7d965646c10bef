// The forward on mma.sync and cp.async: compute capability 8.0 and everything newer.
//
// FlashAttention-2 (Dao, arXiv:2307.08691), algorithm 1: a block of warps takes tile_m queries, of
// which each warp has its own rows, and visits the keys tile_n at a time, from the last it sees to
// the first. Values are on their way while scores are computed, the next keys during softmax.
#pragma once

#include "cuda/device/copy.h"
#include "cuda/device/score.h"
#include "cuda/device/softmax.h"

namespace fa::cuda {

// What all threads of a block agree on. It lies in shared memory, because the accumulators leave few
// registers for it.
struct Block {
  Sequence sequence;
  KeySteps steps;
  int head;
  int kv_head;
  int tile_row;
};

template <KernelSpec kSpec>
struct Forward80 {
  static constexpr int kThreads = kSpec.num_warps * 32;
  static constexpr int kWarpRows = kSpec.tile_m / kSpec.num_warps;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kSpec.tile_n / 8;
  static constexpr int kTilesO = kSpec.head_dim_v / 8;
  static_assert(kWarpRows % 16 == 0 && kSpec.head_dim_v <= kSpec.head_dim);

  using QTile = SharedTile<kSpec.tile_m, kSpec.head_dim>;
  using KTile = SharedTile<kSpec.tile_n, kSpec.head_dim>;
  using VTile = SharedTile<kSpec.tile_n, kSpec.head_dim_v>;
  using OTile = SharedTile<kSpec.tile_m, kSpec.head_dim_v>;  // in the place of q's
  static_assert(forward_sm80_shared_bytes(kSpec) == QTile::kBytes + KTile::kBytes + VTile::kBytes &&
                OTile::kBytes <= QTile::kBytes);

  using S = Accumulator<kTilesM, kTilesN>;
  using O = Accumulator<kTilesM, kTilesO>;
};

// Scores to probabilities: what lies between the two products. `first_row` is the warp's.
template <KernelSpec kSpec>
__device__ inline void scores_to_probabilities(typename Forward80<kSpec>::S& s,
                                               typename Forward80<kSpec>::O& o,
                                               OnlineSoftmax<Forward80<kSpec>::kTilesM>& softmax,
                                               const ForwardArgs& args, const Block& block,
                                               int first_row, int step, int lane) {
  const int first_key = step * kSpec.tile_n;
  if constexpr (kSpec.score == Score::kGeneral) {
    const GeneralScore<kSpec.element> score(args, block.sequence, block.head);
    apply_general_score(s, score, block.sequence, first_row, first_key, lane);
  } else if constexpr (kSpec.score == Score::kSoftcap) {
    apply_softcap(s, args.score.scale);
  }
  if (step < block.steps.full_begin || step >= block.steps.full_end) {
    apply_mask(s, args, block.sequence, first_row, first_key, lane);
  }
  softmax.update(s, o, kSpec.score == Score::kGeneral ? 1.0f : args.score.scale_log2);
  if constexpr (kSpec.dropout) {
    const Index batch_head =
        static_cast<Index>(block.sequence.batch) * args.shape.num_heads + block.head;
    apply_dropout(s, args.dropout, batch_head, first_row, first_key, lane);
  }
}

// The rows' log-sum-exp and, through shared memory, their output.
template <KernelSpec kSpec>
__device__ inline void store_rows(typename Forward80<kSpec>::O& o,
                                  OnlineSoftmax<Forward80<kSpec>::kTilesM>& softmax,
                                  const ForwardArgs& args, const Block& block,
                                  SharedAddress shared) {
  using F = Forward80<kSpec>;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * F::kWarpRows;
  const Sequence& sequence = block.sequence;
  const bool has_sink = args.score.sink_element != BiasElement::kNone;
  softmax.finish(kSpec.score == Score::kGeneral ? 1.0f : args.score.scale_log2, has_sink,
                 has_sink ? load_sink<kSpec.element>(args.score, block.head) : 0.0f);
  const typename F::OTile tile{shared};
#pragma unroll
  for (int m = 0; m < F::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + lane / 4 + half * 8;
      const float factor = softmax.sum[m][half] * (kSpec.dropout ? args.dropout.keep_scale : 1.0f);
#pragma unroll
      for (int n = 0; n < F::kTilesO; ++n) {
        store_shared_4(tile.address(row, n) + lane % 4 * 4,
                       pack<kSpec.element>(o.at[m][n][2 * half] * factor,
                                           o.at[m][n][2 * half + 1] * factor));
      }
      if (args.lse != nullptr && lane % 4 == 0 && block.tile_row + row < sequence.seqlen_q) {
        args.lse[sequence.q_batch * args.lse_batch_stride + block.head * args.lse_head_stride +
                 (sequence.q_begin + block.tile_row + row) * args.lse_row_stride] =
            softmax.max[m][half];
      }
    }
  }
  __syncthreads();
  store_tile<kSpec.loader, F::kThreads>(tile, query_rows(args.out, sequence, block.head),
                                        block.tile_row, sequence.seqlen_q, args.shape.head_dim_v,
                                        threadIdx.x);
}

// One tile of rows of one head of one sequence.
template <KernelSpec kSpec>
__device__ inline void attend_tile(const ForwardArgs& args, const Block& block,
                                   SharedAddress shared) {
  using F = Forward80<kSpec>;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * F::kWarpRows;
  const typename F::QTile q_tile{shared};
  const typename F::KTile k_tile{shared + F::QTile::kBytes};
  const typename F::VTile v_tile{shared + F::QTile::kBytes + F::KTile::kBytes};
  const auto load_keys = [&](auto tile, const TensorArgs& tensor, int step, int columns) {
    load_tile<kSpec.element, kSpec.loader, F::kThreads>(
        tile, step * kSpec.tile_n, block.sequence.seqlen_k, columns, threadIdx.x,
        key_rows<kSpec.loader>(args, tensor, block.sequence, block.kv_head));
    copy_async_commit();
  };

  typename F::O o;
  OnlineSoftmax<F::kTilesM> softmax;
  o.clear();
  softmax.clear();
  int step = block.steps.end - 1;
  if (step >= block.steps.begin) {
    load_tile<kSpec.element, kSpec.loader, F::kThreads>(
        q_tile, block.tile_row, block.sequence.seqlen_q, args.shape.head_dim, threadIdx.x,
        query_rows(args.q, block.sequence, block.head));
    load_keys(k_tile, args.k, step, args.shape.head_dim);
  }
#pragma unroll 1
  for (; step >= block.steps.begin; --step) {
    copy_async_wait<0>();
    __syncthreads();  // q and k have arrived, and everybody is done with the last v
    load_keys(v_tile, args.v, step, args.shape.head_dim_v);
    typename F::S s;
    multiply_q_k<kSpec.element, kSpec.head_dim>(s, q_tile, warp_row, k_tile, lane);
    copy_async_wait<0>();
    __syncthreads();  // v has arrived, and everybody is done with k
    if (step > block.steps.begin) load_keys(k_tile, args.k, step - 1, args.shape.head_dim);
    scores_to_probabilities<kSpec>(s, o, softmax, args, block, block.tile_row + warp_row, step,
                                   lane);
    multiply_p_v<kSpec.element>(o, s, v_tile, lane);
  }
  __syncthreads();  // out takes the place of q
  store_rows<kSpec>(o, softmax, args, block, shared);
}

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward80<kSpec>::kThreads)
    forward_sm80(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Block block;
  const Work work = work_of(args, blockIdx.x);
  if (work.batch >= args.shape.batch) {
    clear_rows_past_the_end<kSpec.element>(args, work, Forward80<kSpec>::kThreads);
    return;
  }
  if (threadIdx.x == 0) {
    const Sequence it = sequence_of(args, work.batch);
    const int tile_row = work.tile * kSpec.tile_m;
    const int last_row = min(tile_row + kSpec.tile_m, it.seqlen_q) - 1;
    block = {it, key_steps<kSpec.tile_n>(args, it, tile_row, last_row), work.head,
             work.head / args.shape.heads_per_kv, tile_row};
  }
  __syncthreads();
  if (block.tile_row < block.sequence.seqlen_q) {
    attend_tile<kSpec>(args, block, shared_address(shared));
  }
}

}  // namespace fa::cuda
