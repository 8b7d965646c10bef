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
  static constexpr int kNumBarriers = 2 + 4 * F::kStages;

  SharedAddress tiles;     // q of each consumer, then stages of k, then of v
  SharedAddress barriers;  // of q, of k, of v, each full and empty
  Block* blocks;           // of this tile and the next, by turns

  __device__ SharedAddress q(int consumer) const { return tiles + consumer * F::kQGroupBytes; }
  __device__ SharedAddress k(int stage) const { return q(F::kConsumers) + stage * F::kKBytes; }
  __device__ SharedAddress v(int stage) const { return k(F::kStages) + stage * F::kVBytes; }
  __device__ Barrier q_full() const { return {barriers}; }  // and the block is filled in
  __device__ Barrier q_empty() const { return {barriers + 8}; }
  __device__ Barrier k_full(int stage) const { return {barriers + 8 * (2 + stage)}; }
  __device__ Barrier k_empty(int stage) const { return k_full(F::kStages + stage); }
  __device__ Barrier v_full(int stage) const { return k_full(2 * F::kStages + stage); }
  __device__ Barrier v_empty(int stage) const { return k_full(3 * F::kStages + stage); }

  __device__ void init() const {
    constexpr int kConsumerWarps = F::kConsumers * 4;  // a lane of each arrives
    q_full().init(1);
    q_empty().init(kConsumerWarps);
    for (int stage = 0; stage < F::kStages; ++stage) {
      k_full(stage).init(1);
      v_full(stage).init(1);
      k_empty(stage).init(kConsumerWarps);
      v_empty(stage).init(kConsumerWarps);
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

// Calls body(index) for each tile that this block takes.
template <class Body>
__device__ inline void for_each_tile(const ForwardArgs& args, Body&& body) {
#pragma unroll 1
  for (int index = blockIdx.x; index < args.schedule.num_blocks; index += gridDim.x) body(index);
}

// ---- The producer: one thread. ----

template <KernelSpec kSpec>
class Producer90 {
  using F = Forward90<kSpec>;

 public:
  __device__ Producer90(const ForwardArgs& args, const CopyMaps& maps,
                        const Shared90<kSpec>& shared)
      : args_(args), maps_(maps), shared_(shared) {}

  __device__ void run() {
    int tile = 0;
    for_each_tile(args_, [&](int index) {
      if (work_of(args_, index).batch < args_.shape.batch) feed(tile++, index);
    });
  }

 private:
  __device__ void feed(int tile, int index) {
    // The consumers are done with the tile before the last, whose place this is.
    Block& block = shared_.blocks[tile % 2];
    block = block_of<kSpec>(args_, index);
    const int num_steps =
        block.tile_row < block.sequence.seqlen_q ? block.steps.end - block.steps.begin : 0;
    if (num_steps > 0) load_k(block, 0);  // while the consumers finish the tile before
    shared_.q_empty().wait(tile % 2 ^ 1);
    if (num_steps == 0) {
      shared_.q_full().arrive();
      return;
    }
    load_q(block);
#pragma unroll 1
    for (int step = 1; step < num_steps; ++step) {
      load_k(block, step);
      load_v(block, step - 1);
    }
    load_v(block, num_steps - 1);
    count_ += num_steps;
  }

  __device__ void load_q(const Block& block) const {
    const Sequence& it = block.sequence;
    shared_.q_full().arrive_and_expect(F::kConsumers * F::kQGroupBytes);
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
      for (int column = 0; column < F::kQBlocks; ++column) {
        copy_box(shared_.q(consumer) + column * F::kQBlockBytes, maps_.q, column * kBlockColumns,
                 it.q_begin + block.tile_row + consumer * F::kGroupRows, block.head, it.q_batch,
                 shared_.q_full());
      }
    }
  }

  __device__ void load_k(const Block& block, int step) const {
    const Turn<F::kStages> turn(count_ + step);
    load(block, step, maps_.k, F::kQBlocks, shared_.k(turn.stage), shared_.k_full(turn.stage),
         shared_.k_empty(turn.stage), turn.parity);
  }

  __device__ void load_v(const Block& block, int step) const {
    const Turn<F::kStages> turn(count_ + step);
    load(block, step, maps_.v, F::kVBlocks, shared_.v(turn.stage), shared_.v_full(turn.stage),
         shared_.v_empty(turn.stage), turn.parity);
  }

  __device__ void load(const Block& block, int step, const CopyMap& map, int num_columns,
                       SharedAddress to, Barrier full, Barrier empty, int parity) const {
    const int row = block.sequence.k_begin + (block.steps.end - 1 - step) * kSpec.tile_n;
    empty.wait(parity ^ 1);  // the first round finds every stage empty
    full.arrive_and_expect(num_columns * F::kKeyBlockBytes);
    for (int column = 0; column < num_columns; ++column) {
      copy_box(to + column * F::kKeyBlockBytes, map, column * kBlockColumns, row, block.kv_head,
               block.sequence.k_batch, full);
    }
  }

  const ForwardArgs& args_;
  const CopyMaps& maps_;
  const Shared90<kSpec>& shared_;
  int count_ = 0;  // steps of the tiles before
};

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
        clear_rows_past_the_end<kSpec.element>(args_, work, threadIdx.x - F::kGroupThreads,
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
