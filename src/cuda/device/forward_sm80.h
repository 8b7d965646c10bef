// The forward on mma.sync and cp.async: compute capability 8.0 and everything newer.
//
// FlashAttention-2 (Dao, arXiv:2307.08691), algorithm 1: a block of warps takes tile_m queries, of
// which each warp has its own rows, and visits the keys tile_n at a time, from the last it sees to
// the first. Values are on their way while scores are computed, the next keys during softmax; with
// more stages than one, those of later steps as well.
#pragma once

#include "cuda/device/forward_common.h"

namespace fa::cuda {

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
  static constexpr int kStages = kSpec.stages;
  static_assert(forward_sm80_shared_bytes(kSpec) ==
                    QTile::kBytes + kStages * (KTile::kBytes + VTile::kBytes) &&
                OTile::kBytes <= QTile::kBytes);

  using S = Accumulator<kTilesM, kTilesN>;
  using O = Accumulator<kTilesM, kTilesO>;
};

// One tile of rows of one sequence.
template <KernelSpec kSpec>
__device__ inline void attend_tile(const ForwardArgs& args, const Block& block,
                                   SharedAddress shared) {
  using F = Forward80<kSpec>;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * F::kWarpRows;
  const typename F::QTile q_tile{shared};
  // What a step's keys and values lie in.
  const auto k_tile = [&](int step) {
    return typename F::KTile{shared + F::QTile::kBytes + step % F::kStages * F::KTile::kBytes};
  };
  const auto v_tile = [&](int step) {
    return typename F::VTile{shared + F::QTile::kBytes + F::kStages * F::KTile::kBytes +
                             step % F::kStages * F::VTile::kBytes};
  };
  // One group of copies, empty before the first step.
  const auto load_keys = [&](auto tile, const TensorArgs& tensor, int step, int columns) {
    if (step >= block.steps.begin) {
      load_tile<kSpec.element, kSpec.loader, F::kThreads>(
          tile, step * kSpec.tile_n, block.sequence.seqlen_k, columns, threadIdx.x,
          key_rows<kSpec.loader>(args, tensor, block.sequence, block.kv_head));
    }
    copy_async_commit();
  };
  const auto load_k = [&](int step) { load_keys(k_tile(step), args.k, step, args.shape.head_dim); };
  const auto load_v = [&](int step) {
    load_keys(v_tile(step), args.v, step, args.shape.head_dim_v);
  };
  constexpr int kAhead = F::kStages - 1;  // steps that are under way behind the current one

  const bool idle = kSpec.packs && block.tile_row + warp_row >= block.num_rows;
  typename F::O o;
  OnlineSoftmax<F::kTilesM> softmax;
  o.clear();
  softmax.clear();
  int step = block.steps.end - 1;
  if (step >= block.steps.begin) {
    load_tile<kSpec.element, kSpec.loader, F::kThreads>(
        q_tile, block.tile_row, block.num_rows, args.shape.head_dim, threadIdx.x,
        tile_rows<kSpec.packs>(args, args.q, block.sequence, block.head));
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      load_k(step - ahead);
      load_v(step - ahead);
    }
    load_k(step - kAhead);
  }
#pragma unroll 1
  for (; step >= block.steps.begin; --step) {
    copy_async_wait<2 * kAhead>();
    __syncthreads();  // q and k have arrived, and everybody is done with the last v
    load_v(step - kAhead);
    typename F::S s;
    if (!idle) {
      multiply_q_k<kSpec.element, kSpec.head_dim>(s, q_tile, warp_row, k_tile(step), lane);
    }
    copy_async_wait<2 * kAhead>();
    __syncthreads();  // v has arrived, and everybody is done with k
    load_k(step - F::kStages);
    if (idle) continue;
    scores_to_probabilities<kSpec>(s, softmax, args, block, block.tile_row + warp_row, step,
                                   is_masked(block, step), lane);
    softmax.apply_rescale(o);
    multiply_p_v<kSpec.element>(o, s, v_tile(step), lane);
  }
  if constexpr (kSpec.packs) {
    if (args.splits.num_splits > 1) {
      return store_split<kSpec>(o, softmax, args, block, warp_row, lane);
    }
  }
  __syncthreads();  // out takes the place of q
  const typename F::OTile o_tile{shared};
  finish_rows<kSpec>(o, softmax, args, block, o_tile, block.tile_row, warp_row, lane);
  __syncthreads();
  store_tile<kSpec.loader, F::kThreads>(
      o_tile, tile_rows<kSpec.packs>(args, args.out, block.sequence, block.head), block.tile_row,
      block.num_rows, args.shape.head_dim_v, threadIdx.x);
}

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward80<kSpec>::kThreads)
    forward_sm80(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Block block;
  const int tile = kSpec.packs ? blockIdx.x % args.splits.num_tiles : blockIdx.x;
  const Work work = work_of(args, tile);
  if (work.batch >= args.shape.batch) {
    if (tile == blockIdx.x) {
      clear_rows_past_the_end<kSpec.element>(args, work, kSpec.packs ? args.shape.heads_per_kv : 1,
                                             threadIdx.x, Forward80<kSpec>::kThreads);
    }
    return;
  }
  if (threadIdx.x == 0) block = block_of<kSpec>(args, blockIdx.x);
  __syncthreads();
  if (block.tile_row < block.num_rows) {
    attend_tile<kSpec>(args, block, shared_address(shared));
  }
}

}  // namespace fa::cuda
