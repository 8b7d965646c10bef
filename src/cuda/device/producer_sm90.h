// What feeds Hopper's forward: where its tiles lie in shared memory, the barriers that guard them,
// and the producer that fills them through the copy engine.
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

}  // namespace fa::cuda
