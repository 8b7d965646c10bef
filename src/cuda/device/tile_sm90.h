// Where the tiles of Hopper's forward lie in shared memory, and the barriers that guard them.
#pragma once

#include "cuda/device/bulk_copy.h"
#include "cuda/device/forward_common.h"
#include "cuda/device/wgmma.h"

namespace fa::cuda {

template <KernelSpec kSpec>
struct Forward90 {
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroupRows = 64;
  static constexpr int kConsumers = kSpec.tile_m / kGroupRows;  // of a team
  static constexpr int kAllConsumers = kSpec.teams * kConsumers;
  static constexpr int kThreads = kSpec.num_warps * 32;
  static constexpr int kStages = sm90_stages(kSpec);
  static constexpr int kQStages = sm90_q_stages(kSpec);
  // Of a thread, in whole eighths. What the producer leaves, the consumers take: more than a block
  // starts with would be waited for without end.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr bool kLooksUpPages = kSpec.loader == Loader::kPagedVector;
  static constexpr int kProducerRegisters = kAllConsumers > 2 ? 32 : kLooksUpPages ? 40 : 24;
  static constexpr int kConsumerRegisters = kAllConsumers == 4   ? 112
                                            : kAllConsumers == 3 ? 160
                                            : kLooksUpPages      ? 232
                                                                 : 240;
  static_assert(kProducerRegisters + kAllConsumers * kConsumerRegisters <=
                (kAllConsumers + 1) * kRegisters);
  static_assert(kThreads == (kAllConsumers + 1) * kGroupThreads);
  // Of the warpgroup that feeds: a warp loads, a thread of the next finds tiles.
  static constexpr int kFeedingThreads = 64;
  static_assert(kSpec.teams * kFeedingThreads <= kGroupThreads);
  static_assert(kConsumers * kGroupRows == kSpec.tile_m);

  static constexpr int kQBlockBytes = kGroupRows * kBlockRowBytes;
  static constexpr int kKeyBlockBytes = kSpec.tile_n * kBlockRowBytes;
  static constexpr int kQBlocks = kSpec.head_dim / kBlockColumns;
  static constexpr int kVBlocks = kSpec.head_dim_v / kBlockColumns;
  static constexpr int kQGroupBytes = kQBlocks * kQBlockBytes;
  static constexpr int kKBytes = kQBlocks * kKeyBlockBytes;
  static constexpr int kVBytes = kVBlocks * kKeyBlockBytes;
  static_assert(sm90_team_bytes(kSpec) ==
                kQStages * kConsumers * kQGroupBytes + kStages * (kKBytes + kVBytes));

  using S = Accumulator<1, kSpec.tile_n / 8>;
  using O = Accumulator<1, kSpec.head_dim_v / 8>;
  // Probabilities as left operands: one fragment per 16 keys.
  static constexpr int kFragments = kSpec.tile_n / 16;
};

// A tile of rows of one head, as the scheduler tells it to the producer and the consumers. Each of
// those has 64 rows, and keys of its own that these see.
template <KernelSpec kSpec>
struct Tile : Block {  // tile_row is negative where there are no more tiles
  KeySteps own_steps[Forward90<kSpec>::kConsumers];
};

// Where everything of a team lies in shared memory, and which barriers guard it.
template <KernelSpec kSpec>
struct Shared90 {
  using F = Forward90<kSpec>;
  static constexpr int kNumBarriers = 2 * F::kConsumers * F::kQStages + 4 * F::kStages + 2;
  // A consumer stores a tile while it is at the next, the producer is up to two tiles ahead, and
  // the next one is described.
  static constexpr int kNumTiles = kSpec.teams > 1 ? 6 : 8;

  struct Of {
    unsigned long long barriers[kNumBarriers];  // of k, of v, of q, each full and empty
    Tile<kSpec> descriptions[kNumTiles];        // of tiles, by turns
  };

  SharedAddress tiles;  // stages of q of each consumer, then of k, then of v
  Of* state;

  __device__ SharedAddress barriers() const { return shared_address(state->barriers); }

  __device__ Tile<kSpec>& description(int index) const {
    return state->descriptions[index % kNumTiles];
  }
  __device__ SharedAddress q(int consumer, int stage) const {
    return tiles + (stage * F::kConsumers + consumer) * F::kQGroupBytes;
  }
  __device__ SharedAddress k(int stage) const { return q(0, F::kQStages) + stage * F::kKBytes; }
  __device__ SharedAddress v(int stage) const { return k(F::kStages) + stage * F::kVBytes; }
  __device__ Barrier k_full(int stage) const { return {barriers() + 8 * stage}; }
  __device__ Barrier k_empty(int stage) const { return k_full(F::kStages + stage); }
  __device__ Barrier v_full(int stage) const { return k_full(2 * F::kStages + stage); }
  __device__ Barrier v_empty(int stage) const { return k_full(3 * F::kStages + stage); }
  // Full: and the tile's description is filled in.
  __device__ Barrier q_full(int consumer, int stage) const {
    return k_full(4 * F::kStages + stage * F::kConsumers + consumer);
  }
  __device__ Barrier q_empty(int consumer, int stage) const {
    return q_full(consumer, F::kQStages + stage);
  }

  // The next tile is to be described; it is.
  __device__ Barrier tile_wanted() const { return {barriers() + 8 * (kNumBarriers - 2)}; }
  __device__ Barrier tile_described() const { return {barriers() + 8 * (kNumBarriers - 1)}; }

  __device__ void init() const {
    constexpr int kGroupWarps = F::kGroupThreads / 32;  // of k and v a lane of each arrives
    for (int stage = 0; stage < F::kStages; ++stage) {
      k_full(stage).init(1);
      v_full(stage).init(1);
      k_empty(stage).init(F::kConsumers * kGroupWarps);
      v_empty(stage).init(F::kConsumers * kGroupWarps);
    }
    for (int stage = 0; stage < F::kQStages; ++stage) {
      for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
        q_full(consumer, stage).init(1);
        q_empty(consumer, stage).init(F::kGroupThreads);
      }
    }
    tile_wanted().init(1);
    tile_described().init(1);
    barriers_fence();
  }
};

// Where one is in a ring of stages: which stage, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage = 0;
  int parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace fa::cuda
