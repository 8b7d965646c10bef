// The forward on Hopper (sm_90a): one warp feeds tiles through the copy engine, warpgroups
// multiply.
//
// FlashAttention-3 (Shah et al., arXiv:2407.08608), algorithm 2. Each consumer warpgroup has 64
// rows and keeps a step's probabilities in registers, where they are the next product's left
// operand. While it makes probabilities of one step's scores, the products of the step before are
// under way; and warpgroups take turns, so that one multiplies while another is at its
// exponentials.
#pragma once

#include "cuda/device/producer_sm90.h"

namespace fa::cuda {

// ---- A consumer warpgroup. ----

template <KernelSpec kSpec>
class Consumer90 {
  using F = Forward90<kSpec>;

 public:
  __device__ Consumer90(const ForwardArgs& args, const Shared90<kSpec>& shared, int consumer)
      : args_(args), shared_(shared), consumer_(consumer) {}

  __device__ void run() {
    int tile = 0;
    for_each_tile(args_, [&](int index) {
      const Work work = work_of(args_, index);
      if (work.batch < args_.shape.batch) {
        attend(tile++);
      } else {
        clear_rows_past_the_end<kSpec.element>(args_, work, 1, threadIdx.x - F::kGroupThreads,
                                               F::kConsumers * F::kGroupThreads);
      }
    });
  }

 private:
  // Two warpgroups take turns; each barrier says whose turn it is.
  static constexpr bool kTakesTurns = F::kConsumers == 2 && kSpec.head_dim <= 128;
  __device__ static int turn(int consumer) { return 1 + consumer; }
  __device__ static int own_barrier(int consumer) { return 1 + F::kConsumers + consumer; }

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp_row() const { return threadIdx.x % F::kGroupThreads / 32 * 16; }

  __device__ void release(Barrier empty) const {
    if (lane() == 0) empty.arrive();
  }

  __device__ void attend(int tile) {
    shared_.q_full().wait(tile % 2);
    const Block& block = shared_.blocks[tile % 2];
    if (block.tile_row < block.sequence.seqlen_q) attend(block);
    shared_writes_fence();
    __syncwarp();
    release(shared_.q_empty());
  }

  __device__ void attend(const Block& block) {
    o_.clear();
    softmax_.clear();
    const int num_steps = block.steps.end - block.steps.begin;
    if (num_steps > 0) {
      if (kTakesTurns && consumer_ == 1 && num_steps > 1) {
        named_arrive(turn(0), 2 * F::kGroupThreads);
      }
      first_step(block);
#pragma unroll 1
      for (int step = 1; step < num_steps; ++step) {
        if (is_masked(block, block.steps.end - 1 - step)) {
          next_step<true>(block, step, num_steps);
        } else {
          next_step<false>(block, step, num_steps);
        }
      }
      last_products(num_steps - 1);
      count_ += num_steps;
    }
    store(block);
  }

  // s = q k^T
  __device__ void start_q_k(typename F::S& s, int stage) const {
#pragma unroll
    for (int step = 0; step < kSpec.head_dim / 16; ++step) {
      const int column = step / 4, within = step % 4 * 32;
      product<kSpec.element>(
          s, row_descriptor(shared_.q(consumer_) + column * F::kQBlockBytes + within),
          row_descriptor(shared_.k(stage) + column * F::kKeyBlockBytes + within), step > 0);
    }
    products_commit();
  }

  // o += p v
  __device__ void start_p_v(int stage) {
#pragma unroll
    for (int fragment = 0; fragment < F::kFragments; ++fragment) {
      product<kSpec.element>(
          o_, p_[fragment],
          column_descriptor<F::kKeyBlockBytes>(shared_.v(stage) + fragment * 16 * kBlockRowBytes));
    }
    products_commit();
  }

  template <bool kMasked>
  __device__ void to_probabilities(typename F::S& s, const Block& block, int step) {
    scores_to_probabilities<kSpec>(s, softmax_, args_, block,
                                   block.tile_row + consumer_ * F::kGroupRows + warp_row(),
                                   block.steps.end - 1 - step, kMasked, lane());
  }

  __device__ void keep_probabilities(const typename F::S& s) {
#pragma unroll
    for (int fragment = 0; fragment < F::kFragments; ++fragment) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&tile)[4] = s.at[0][2 * fragment + half];
        p_[fragment][2 * half] = pack<kSpec.element>(tile[0], tile[1]);
        p_[fragment][2 * half + 1] = pack<kSpec.element>(tile[2], tile[3]);
      }
    }
  }

  __device__ void first_step(const Block& block) {
    typename F::S s;
    const Turn<F::kStages> at(count_);
    shared_.k_full(at.stage).wait(at.parity);
    products_fence();
    start_q_k(s, at.stage);
    products_wait<0>();
    pin(s);
    release(shared_.k_empty(at.stage));
    to_probabilities<true>(s, block, 0);
    keep_probabilities(s);
    clear_values_past_the_end(block, at);
  }

  // Scores of step `step` beside the output of the one before.
  template <bool kMasked>
  __device__ void next_step(const Block& block, int step, int num_steps) {
    typename F::S s;
    const Turn<F::kStages> k(count_ + step), v(count_ + step - 1);
    shared_.k_full(k.stage).wait(k.parity);
    if (kTakesTurns) named_sync(turn(consumer_), 2 * F::kGroupThreads);
    products_fence();
    start_q_k(s, k.stage);
    shared_.v_full(v.stage).wait(v.parity);
    products_fence();
    start_p_v(v.stage);
    if (kTakesTurns && !(consumer_ == 1 && step == num_steps - 1)) {
      named_arrive(turn(consumer_ ^ 1), 2 * F::kGroupThreads);
    }
    products_wait<1>();
    pin(s);
    release(shared_.k_empty(k.stage));
    to_probabilities<kMasked>(s, block, step);
    pin(s);
    products_wait<0>();
    pin(o_);
    release(shared_.v_empty(v.stage));
    softmax_.apply_rescale(o_);
    keep_probabilities(s);
  }

  __device__ void last_products(int step) {
    const Turn<F::kStages> v(count_ + step);
    shared_.v_full(v.stage).wait(v.parity);
    products_fence();
    start_p_v(v.stage);
    products_wait<0>();
    pin(o_);
    release(shared_.v_empty(v.stage));
  }

  // The first step holds the sequence's last keys. Rows of v behind them are another sequence's, or
  // padding; their probabilities are 0, but 0 times NaN is not. Every warpgroup does it for itself.
  __device__ void clear_values_past_the_end(const Block& block, Turn<F::kStages> at) const {
    const int first = block.sequence.seqlen_k - (block.steps.end - 1) * kSpec.tile_n;
    if (args_.sequences.cu_seqlens_q == nullptr || first >= kSpec.tile_n) return;
    shared_.v_full(at.stage).wait(at.parity);
    const Word zeros[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x % F::kGroupThreads; i < (kSpec.tile_n - first) * F::kVBlocks * 8;
         i += F::kGroupThreads) {
      const int row = first + i / (F::kVBlocks * 8), chunk = i % (F::kVBlocks * 8);
      store_shared_16(shared_.v(at.stage) + chunk / 8 * F::kKeyBlockBytes + row * kBlockRowBytes +
                          chunk % 8 * 16,
                      zeros);
    }
    shared_writes_fence();
    named_sync(own_barrier(consumer_), F::kGroupThreads);
  }

  // Through the warpgroup's own q, which no product reads any more.
  __device__ void store(const Block& block) {
    const SharedTile<F::kGroupRows, kSpec.head_dim_v> tile{shared_.q(consumer_)};
    const int tile_row = block.tile_row + consumer_ * F::kGroupRows;
    named_sync(own_barrier(consumer_), F::kGroupThreads);
    finish_rows<kSpec>(o_, softmax_, args_, block, tile, tile_row, warp_row(), lane());
    named_sync(own_barrier(consumer_), F::kGroupThreads);
    store_tile<kSpec.loader, F::kGroupThreads>(
        tile, query_rows(args_.out, block.sequence, block.head), tile_row, block.sequence.seqlen_q,
        args_.shape.head_dim_v, threadIdx.x % F::kGroupThreads);
  }

  const ForwardArgs& args_;
  const Shared90<kSpec>& shared_;
  const int consumer_;
  int count_ = 0;  // steps of the tiles before
  typename F::O o_;
  OnlineSoftmax<1> softmax_;
  Word p_[F::kFragments][4];
};

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward90<kSpec>::kThreads, 1)
    forward_sm90(const __grid_constant__ ForwardArgs args, const __grid_constant__ CopyMaps maps) {
  using F = Forward90<kSpec>;
  extern __shared__ unsigned char unaligned[];
  __shared__ Block blocks[2];
  __shared__ unsigned long long barriers[Shared90<kSpec>::kNumBarriers];
  const Shared90<kSpec> shared{
      (shared_address(unaligned) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment,
      shared_address(barriers), blocks};
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / F::kGroupThreads, 0);
  if (group == 0) {
    leave_registers<F::kProducerRegisters>();
    if (threadIdx.x == 0) Producer90<kSpec>(args, maps, shared).run();
  } else {
    take_registers<F::kConsumerRegisters>();
    Consumer90<kSpec>(args, shared, group - 1).run();
  }
}

}  // namespace fa::cuda
