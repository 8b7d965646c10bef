// The forward on Hopper (sm_90a): one warp feeds tiles through the copy engine, warpgroups
// multiply.
//
// FlashAttention-3 (Shah et al., arXiv:2407.08608), algorithm 2. Each consumer warpgroup has 64
// rows and keeps a step's probabilities in registers, where they are the next product's left
// operand. While it makes probabilities of one step's scores, the products of the step before are
// under way; and warpgroups take turns, so that one multiplies while another is at its
// exponentials.
#pragma once

#include "cuda/device/bulk_copy.h"
#include "cuda/device/forward_common.h"
#include "cuda/device/wgmma.h"

namespace fa::cuda {

struct CopyMaps {
  CopyMap q, k, v;
};

template <KernelSpec kSpec>
struct Forward90 {
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroupRows = 64;
  static constexpr int kConsumers = kSpec.tile_m / kGroupRows;
  static constexpr int kThreads = kSpec.num_warps * 32;
  static constexpr int kStages = kSm90Stages;
  // 65536 registers, in whole eighths: what the producer leaves, the consumers take.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static_assert(kThreads == (kConsumers + 1) * kGroupThreads &&
                kConsumers * kGroupRows == kSpec.tile_m);

  static constexpr int kQBlockBytes = kGroupRows * kBlockRowBytes;
  static constexpr int kKeyBlockBytes = kSpec.tile_n * kBlockRowBytes;
  static constexpr int kQBlocks = kSpec.head_dim / kBlockColumns;
  static constexpr int kVBlocks = kSpec.head_dim_v / kBlockColumns;
  static constexpr int kQGroupBytes = kQBlocks * kQBlockBytes;
  static constexpr int kKBytes = kQBlocks * kKeyBlockBytes;
  static constexpr int kVBytes = kVBlocks * kKeyBlockBytes;
  static_assert(forward_sm90_shared_bytes(kSpec) ==
                kSharedAlignment + kConsumers * kQGroupBytes + kStages * (kKBytes + kVBytes));

  using S = Accumulator<1, kSpec.tile_n / 8>;
  using O = Accumulator<1, kSpec.head_dim_v / 8>;
  // Probabilities as left operands: one fragment per 16 keys.
  static constexpr int kFragments = kSpec.tile_n / 16;
};

// Where everything lies in shared memory, and which barriers guard it.
template <KernelSpec kSpec>
struct Shared90 {
  using F = Forward90<kSpec>;
  SharedAddress tiles;     // q of each consumer, then stages of k, then of v
  SharedAddress barriers;  // of q, then full and empty ones of k and of v

  __device__ SharedAddress q(int consumer) const { return tiles + consumer * F::kQGroupBytes; }
  __device__ SharedAddress k(int stage) const { return q(F::kConsumers) + stage * F::kKBytes; }
  __device__ SharedAddress v(int stage) const { return k(F::kStages) + stage * F::kVBytes; }
  __device__ Barrier q_full() const { return {barriers}; }
  __device__ Barrier k_full(int stage) const { return {barriers + 8 * (1 + stage)}; }
  __device__ Barrier k_empty(int stage) const { return k_full(F::kStages + stage); }
  __device__ Barrier v_full(int stage) const { return k_full(2 * F::kStages + stage); }
  __device__ Barrier v_empty(int stage) const { return k_full(3 * F::kStages + stage); }
  static constexpr int kNumBarriers = 1 + 4 * F::kStages;

  __device__ void init() const {
    q_full().init(1);
    for (int stage = 0; stage < F::kStages; ++stage) {
      k_full(stage).init(1);
      v_full(stage).init(1);
      k_empty(stage).init(F::kConsumers * 4);  // one lane of each consumer warp
      v_empty(stage).init(F::kConsumers * 4);
    }
    barriers_fence();
  }
};

// The `count`th use of a ring of stages: which stage, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage;
  int parity;
  __device__ explicit Turn(int count) : stage(count % kStages), parity(count / kStages % 2) {}
};

// ---- The producer. ----

template <KernelSpec kSpec>
__device__ inline void produce(const ForwardArgs& args, const CopyMaps& maps, const Block& block,
                               const Shared90<kSpec>& shared) {
  using F = Forward90<kSpec>;
  const Sequence& it = block.sequence;
  const auto load = [&](const CopyMap& map, int num_blocks, SharedAddress to, Barrier full,
                        Barrier empty, int count, int step) {
    // The first round finds every stage empty.
    empty.wait(Turn<F::kStages>(count).parity ^ 1);
    full.arrive_and_expect(num_blocks * F::kKeyBlockBytes);
    for (int block_column = 0; block_column < num_blocks; ++block_column) {
      copy_box(to + block_column * F::kKeyBlockBytes, map, block_column * kBlockColumns,
               it.k_begin + step * kSpec.tile_n, block.kv_head, it.k_batch, full);
    }
  };
  const auto load_k = [&](int count) {
    const int stage = Turn<F::kStages>(count).stage;
    load(maps.k, F::kQBlocks, shared.k(stage), shared.k_full(stage), shared.k_empty(stage), count,
         block.steps.end - 1 - count);
  };
  const auto load_v = [&](int count) {
    const int stage = Turn<F::kStages>(count).stage;
    load(maps.v, F::kVBlocks, shared.v(stage), shared.v_full(stage), shared.v_empty(stage), count,
         block.steps.end - 1 - count);
  };

  const int num_steps = block.steps.end - block.steps.begin;
  if (num_steps == 0) return;
  shared.q_full().arrive_and_expect(F::kConsumers * F::kQGroupBytes);
  for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
    for (int block_column = 0; block_column < F::kQBlocks; ++block_column) {
      copy_box(shared.q(consumer) + block_column * F::kQBlockBytes, maps.q,
               block_column * kBlockColumns, it.q_begin + block.tile_row + consumer * F::kGroupRows,
               block.head, it.q_batch, shared.q_full());
    }
  }
  load_k(0);
  for (int count = 1; count < num_steps; ++count) {
    load_k(count);
    load_v(count - 1);
  }
  load_v(num_steps - 1);
}

// ---- A consumer warpgroup. ----

template <KernelSpec kSpec>
class Consumer90 {
  using F = Forward90<kSpec>;

 public:
  __device__ Consumer90(const ForwardArgs& args, const Block& block, const Shared90<kSpec>& shared,
                        int consumer)
      : args_(args), block_(block), shared_(shared), consumer_(consumer) {}

  __device__ void run() {
    o_.clear();
    softmax_.clear();
    const int num_steps = block_.steps.end - block_.steps.begin;
    if (num_steps > 0) {
      shared_.q_full().wait(0);
      if (kTakesTurns && consumer_ == 1 && num_steps > 1)
        named_arrive(turn(0), 2 * F::kGroupThreads);
      first_step();
#pragma unroll 1
      for (int count = 1; count < num_steps; ++count) {
        if (is_masked(block_, block_.steps.end - 1 - count)) {
          next_step<true>(count, num_steps);
        } else {
          next_step<false>(count, num_steps);
        }
      }
      last_products(num_steps - 1);
    }
    store();
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

  // s = q k^T
  __device__ void start_q_k(typename F::S& s, int stage) const {
#pragma unroll
    for (int step = 0; step < kSpec.head_dim / 16; ++step) {
      const int block_column = step / 4, within = step % 4 * 32;
      product<kSpec.element>(
          s, row_descriptor(shared_.q(consumer_) + block_column * F::kQBlockBytes + within),
          row_descriptor(shared_.k(stage) + block_column * F::kKeyBlockBytes + within), step > 0);
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
  __device__ void to_probabilities(typename F::S& s, int count) {
    scores_to_probabilities<kSpec>(s, softmax_, args_, block_,
                                   block_.tile_row + consumer_ * F::kGroupRows + warp_row(),
                                   block_.steps.end - 1 - count, kMasked, lane());
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

  __device__ void first_step() {
    typename F::S s;
    shared_.k_full(0).wait(0);
    products_fence();
    start_q_k(s, 0);
    products_wait<0>();
    pin(s);
    release(shared_.k_empty(0));
    to_probabilities<true>(s, 0);
    keep_probabilities(s);
    clear_values_past_the_end(0);
  }

  // Scores of step `count` beside the output of the one before.
  template <bool kMasked>
  __device__ void next_step(int count, int num_steps) {
    typename F::S s;
    const Turn<F::kStages> k(count), v(count - 1);
    shared_.k_full(k.stage).wait(k.parity);
    if (kTakesTurns) named_sync(turn(consumer_), 2 * F::kGroupThreads);
    products_fence();
    start_q_k(s, k.stage);
    shared_.v_full(v.stage).wait(v.parity);
    products_fence();
    start_p_v(v.stage);
    if (kTakesTurns && !(consumer_ == 1 && count == num_steps - 1)) {
      named_arrive(turn(consumer_ ^ 1), 2 * F::kGroupThreads);
    }
    products_wait<1>();
    pin(s);
    release(shared_.k_empty(k.stage));
    to_probabilities<kMasked>(s, count);
    pin(s);
    products_wait<0>();
    pin(o_);
    release(shared_.v_empty(v.stage));
    softmax_.apply_rescale(o_);
    keep_probabilities(s);
  }

  __device__ void last_products(int count) {
    const Turn<F::kStages> v(count);
    shared_.v_full(v.stage).wait(v.parity);
    products_fence();
    start_p_v(v.stage);
    products_wait<0>();
    pin(o_);
    release(shared_.v_empty(v.stage));
  }

  // The first step holds the sequence's last keys. Rows of v behind them are another sequence's, or
  // padding; their probabilities are 0, but 0 times NaN is not. Every warpgroup does it for itself.
  __device__ void clear_values_past_the_end(int stage) const {
    const int first = block_.sequence.seqlen_k - (block_.steps.end - 1) * kSpec.tile_n;
    if (args_.sequences.cu_seqlens_q == nullptr || first >= kSpec.tile_n) return;
    shared_.v_full(stage).wait(0);
    const Word zeros[4] = {0, 0, 0, 0};
    for (int at = threadIdx.x % F::kGroupThreads; at < (kSpec.tile_n - first) * F::kVBlocks * 8;
         at += F::kGroupThreads) {
      const int row = first + at / (F::kVBlocks * 8), chunk = at % (F::kVBlocks * 8);
      store_shared_16(
          shared_.v(stage) + chunk / 8 * F::kKeyBlockBytes + row * kBlockRowBytes + chunk % 8 * 16,
          zeros);
    }
    shared_writes_fence();
    named_sync(own_barrier(consumer_), F::kGroupThreads);
  }

  // Through the warpgroup's own q, which no product reads any more.
  __device__ void store() {
    const SharedTile<F::kGroupRows, kSpec.head_dim_v> tile{shared_.q(consumer_)};
    const int tile_row = block_.tile_row + consumer_ * F::kGroupRows;
    finish_rows<kSpec>(o_, softmax_, args_, block_, tile, tile_row, warp_row(), lane());
    named_sync(own_barrier(consumer_), F::kGroupThreads);
    store_tile<kSpec.loader, F::kGroupThreads>(
        tile, query_rows(args_.out, block_.sequence, block_.head), tile_row,
        block_.sequence.seqlen_q, args_.shape.head_dim_v, threadIdx.x % F::kGroupThreads);
  }

  const ForwardArgs& args_;
  const Block& block_;
  const Shared90<kSpec>& shared_;
  const int consumer_;
  typename F::O o_;
  OnlineSoftmax<1> softmax_;
  Word p_[F::kFragments][4];
};

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward90<kSpec>::kThreads, 1)
    forward_sm90(const __grid_constant__ ForwardArgs args, const __grid_constant__ CopyMaps maps) {
  using F = Forward90<kSpec>;
  extern __shared__ unsigned char unaligned[];
  __shared__ Block block;
  __shared__ unsigned long long barriers[Shared90<kSpec>::kNumBarriers];
  const Shared90<kSpec> shared{
      (shared_address(unaligned) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment,
      shared_address(barriers)};
  if (threadIdx.x == 0) shared.init();
  if (!begin_block<kSpec>(args, block, F::kThreads)) return;
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / F::kGroupThreads, 0);
  if (group == 0) {
    leave_registers<F::kProducerRegisters>();
    if (threadIdx.x == 0) produce<kSpec>(args, maps, block, shared);
  } else {
    take_registers<F::kConsumerRegisters>();
    Consumer90<kSpec>(args, block, shared, group - 1).run();
  }
}

}  // namespace fa::cuda
