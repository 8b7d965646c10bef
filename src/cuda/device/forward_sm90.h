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
#include "cuda/device/store_sm90.h"

namespace fa::cuda {

// ---- A consumer warpgroup. ----

template <KernelSpec kSpec>
class Consumer90 {
  using F = Forward90<kSpec>;
  using Description = Tile<kSpec>;

 public:
  __device__ Consumer90(const ForwardArgs& args, const Shared90<kSpec>& shared, int consumer)
      : args_(args), shared_(shared), consumer_(consumer) {}

  __device__ void run() {
    // The first products are of nothing, and for nothing.
#pragma unroll
    for (int fragment = 0; fragment < F::kFragments; ++fragment) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "=r"(p_[fragment][i]));
    }
    if (kTakesTurns && consumer_ == 1) named_arrive(turn(0), 2 * F::kGroupThreads);
#pragma unroll 1
    for (int index = 0;; ++index) {
      shared_.q_full(consumer_, q_.stage).wait(q_.parity);
      const Description& tile = shared_.description(index);
      const bool is_end = tile.tile_row < 0;
      const KeySteps all = tile.steps, own = tile.own_steps[consumer_];
      const bool has_keys = own.begin < own.end;
      const int before = all.end - (has_keys ? own.end : all.begin);
      if (is_end || !has_keys || before > 1) finish();
      if (is_end) break;
      skip(before);
      if (has_keys) {
        attend(tile, own);
        unfinished_ = index;
        if (own.begin != all.begin) {
          finish();
          skip(own.begin - all.begin);
        }
      } else {
        release_queries();
        o_.clear();
        softmax_.clear();
        store(tile, softmax_);
      }
      q_.advance();
    }
    if (kTakesTurns && consumer_ == 0) named_sync(turn(0), 2 * F::kGroupThreads);
    if (kSpec.varlen && args_.sequences.cu_seqlens_q != nullptr) clear_past_the_end();
  }

 private:
  static constexpr int kTeamThreads = F::kConsumers * F::kGroupThreads;

  // Two warpgroups take turns; each barrier says whose turn it is.
  static constexpr bool kTakesTurns = F::kAllConsumers == 2 && kSpec.head_dim <= 128;
  __device__ static int turn(int consumer) { return 1 + consumer; }

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp_row() const {
    return consumer_ * F::kGroupRows + threadIdx.x % F::kGroupThreads / 32 * 16;
  }

  __device__ void release(Barrier empty) const {
    if (lane() == 0) empty.arrive();
  }

  // And of the descriptions of the tiles before, which each thread has read for itself.
  __device__ void release_queries() const { shared_.q_empty(consumer_, q_.stage).arrive(); }

  // Lets go of steps of keys that this warpgroup's rows do not see; of their values as well, unless
  // products of values before them are still to come.
  __device__ void skip(int num_steps) {
#pragma unroll 1
    for (; num_steps > 0; --num_steps) {
      if (kTakesTurns) {
        named_sync(turn(consumer_), 2 * F::kGroupThreads);
        named_arrive(turn(consumer_ ^ 1), 2 * F::kGroupThreads);
      }
      shared_.k_full(k_.stage).wait(k_.parity);
      release(shared_.k_empty(k_.stage));
      k_.advance();
      ++skipped_values_;
      if (unfinished_ < 0) release_skipped_values();
    }
  }

  __device__ void release_skipped_values() {
#pragma unroll 1
    for (; skipped_values_ > 0; --skipped_values_) {
      shared_.v_full(v_.stage).wait(v_.parity);
      release_values();
    }
  }

  __device__ void release_values() {
    release(shared_.v_empty(v_.stage));
    v_.advance();
  }

  __device__ void attend(const Description& tile, const KeySteps& own) {
    bool is_first = true;
#pragma unroll 1
    for (int key_step = own.end - 1; key_step >= own.begin; --key_step) {
      const bool is_masked = key_step < own.full_begin || key_step >= own.full_end;
      step(tile, key_step, is_masked, is_first, key_step == own.begin);
      is_first = false;
    }
  }

  // Scores and probabilities of a step of keys beside the output of the step before, which may be
  // the last of the tile before.
  __device__ void step(const Description& tile, int key_step, bool is_masked, bool is_first,
                       bool is_last) {
    typename F::S s;
    const bool has_products = !is_first || unfinished_ >= 0;
    shared_.k_full(k_.stage).wait(k_.parity);
    if (kTakesTurns) named_sync(turn(consumer_), 2 * F::kGroupThreads);
    products_fence();
    start_q_k(s);
    if (has_products) shared_.v_full(v_.stage).wait(v_.parity);
    products_fence();
    start_p_v();
    if (kTakesTurns) named_arrive(turn(consumer_ ^ 1), 2 * F::kGroupThreads);
    products_wait<1>();
    pin(s);
    release(shared_.k_empty(k_.stage));
    k_.advance();
    if (is_last) release_queries();
    const OnlineSoftmax<1> before = softmax_;
    if (is_first) softmax_.clear();
    scores_to_probabilities<kSpec>(s, softmax_, args_, tile, tile.tile_row + warp_row(), key_step,
                                   is_masked, lane());
    pin(s);
    // Two waits, so that they stay behind the branch, and the exponentials before it.
    if (is_first) {
      products_wait<0, 1>();
      pin(o_);
      if (has_products) {
        release_values();
        store(shared_.description(unfinished_), before);
        release_skipped_values();
      }
      o_.clear();
      pin(o_);
    } else {
      products_wait<0, 2>();
      pin(o_);
      release_values();
      softmax_.apply_rescale(o_);
    }
    keep_probabilities(s);
  }

  // The last products of a tile, where no other tile's scores are computed beside them.
  __device__ void finish() {
    if (unfinished_ < 0) return;
    shared_.v_full(v_.stage).wait(v_.parity);
    products_fence();
    start_p_v();
    products_wait<0>();
    pin(o_);
    release_values();
    store(shared_.description(unfinished_), softmax_);
    unfinished_ = -1;
  }

  // s = q k^T
  __device__ void start_q_k(typename F::S& s) const {
    const MatrixDescriptor q = row_descriptor(shared_.q(consumer_, q_.stage));
    const MatrixDescriptor k = row_descriptor(shared_.k(k_.stage));
#pragma unroll
    for (int step = 0; step < kSpec.head_dim / 16; ++step) {
      const int column = step / 4, within = step % 4 * 32;
      product<kSpec.element>(s, advance(q, column * F::kQBlockBytes + within),
                             advance(k, column * F::kKeyBlockBytes + within), step > 0);
    }
    products_commit();
  }

  // o += p v
  __device__ void start_p_v() {
    const MatrixDescriptor v = column_descriptor<F::kKeyBlockBytes>(shared_.v(v_.stage));
#pragma unroll
    for (int fragment = 0; fragment < F::kFragments; ++fragment) {
      product<kSpec.element>(o_, p_[fragment], advance(v, fragment * 16 * kBlockRowBytes));
    }
    products_commit();
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

  __device__ void store(const Description& tile, OnlineSoftmax<1> softmax) const {
    finish_softmax<kSpec>(softmax, args_, tile.head);
    store_rows<kSpec>(o_, softmax, args_, tile, tile.tile_row + warp_row(), lane());
  }

  // Rows behind the last varlen sequence, shared among all teams.
  __device__ void clear_past_the_end() const {
    const int count = args_.shape.num_heads * args_.schedule.num_tiles_m;
#pragma unroll 1
    for (int index = team_of_launch(threadIdx.x / kTeamThreads); index < count;
         index += num_teams<kSpec>()) {
      const Work work{args_.shape.batch, index % args_.shape.num_heads,
                      index / args_.shape.num_heads};
      clear_rows_past_the_end<kSpec.element>(args_, work, 1, threadIdx.x % kTeamThreads,
                                             kTeamThreads);
    }
  }

  const ForwardArgs& args_;
  const Shared90<kSpec>& shared_;
  const int consumer_;  // of the team
  Turn<F::kQStages> q_;
  Turn<F::kStages> k_, v_;
  int skipped_values_ = 0;
  int unfinished_ = -1;  // the tile whose last products have not been started
  typename F::O o_;
  OnlineSoftmax<1> softmax_;
  Word p_[F::kFragments][4];
};

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward90<kSpec>::kThreads, 1)
    forward_sm90(const __grid_constant__ ForwardArgs args,
                 const __grid_constant__ TensorMaps maps) {
  using F = Forward90<kSpec>;
  extern __shared__ unsigned char unaligned[];
  __shared__ typename Shared90<kSpec>::Of state[kSpec.teams];
  static_assert(sizeof(state) + sizeof(SequenceOrder) + kSm90SharedBytes <= 227 * 1024);
  // The consumers first: their warps are whole warpgroups, of which the producers may be a part.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int group = warp / (F::kGroupThreads / 32);
  const bool multiplies = group < F::kAllConsumers;
  const int team = kSpec.teams == 1 ? 0
                   : multiplies     ? group / F::kConsumers
                                    : warp % 4 / 2 % kSpec.teams;
  const Shared90<kSpec> shared{
      (shared_address(unaligned) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment +
          team * sm90_team_bytes(kSpec),
      &state[team]};
  __shared__ SequenceOrder order;
  const int first_feeding = F::kAllConsumers * F::kGroupThreads + team * F::kFeedingThreads;
  if (static_cast<int>(threadIdx.x) == first_feeding) shared.init();
  if constexpr (kSpec.varlen) order.sort(args);
  __syncthreads();
  if (!multiplies) {
    leave_registers<F::kProducerRegisters>();
    const int thread = threadIdx.x % F::kGroupThreads - team * F::kFeedingThreads;
    if (thread < Producer90<kSpec>::kThreads) Producer90<kSpec>(args, maps, shared).run();
    if (thread == 32) Scheduler90<kSpec>(args, shared, &order, team).run();
  } else {
    take_registers<F::kConsumerRegisters>();
    Consumer90<kSpec>(args, shared, group % F::kConsumers).run();
  }
}

}  // namespace fa::cuda
