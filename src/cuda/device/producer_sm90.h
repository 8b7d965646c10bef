// What feeds Hopper's forward through the copy engine.
#pragma once

#include "cuda/device/schedule_sm90.h"

namespace fa::cuda {

struct CopyMaps {
  CopyMap q, k, v;
};

// One thread.
template <KernelSpec kSpec>
class Producer90 {
  using F = Forward90<kSpec>;

 public:
  __device__ Producer90(const ForwardArgs& args, const CopyMaps& maps,
                        const Shared90<kSpec>& shared)
      : args_(args), maps_(maps), shared_(shared) {}

  __device__ void run() {
    Schedule<kSpec> schedule(args_);
    Work work;
#pragma unroll 1
    while (schedule.next(work)) {
      describe(work);
      feed(shared_.description(index_));
      q_.advance();
      ++index_;
    }
    shared_.description(index_).tile_row = -1;
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
      shared_.q_empty(consumer, q_.stage).wait(q_.parity ^ 1);
      shared_.q_full(consumer, q_.stage).arrive();
    }
  }

 private:
  // Writes first and reads again what it needs: registers are short.
  __device__ void describe(const Work& work) const {
    Tile<kSpec>& tile = shared_.description(index_);
    tile.sequence = sequence_of(args_, work.batch);
    tile.head = work.head;
    tile.kv_head = work.head / args_.shape.heads_per_kv;
    tile.tile_row = work.tile * kSpec.tile_m;
    tile.num_rows = tile.sequence.seqlen_q;
    tile.split = 0;
    tile.steps = {0, 0, 0, 0};
#pragma unroll 1
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
      asm volatile("" ::: "memory");
      const int row = tile.tile_row + consumer * F::kGroupRows;
      const int last_row = min(row + F::kGroupRows, tile.sequence.seqlen_q) - 1;
      KeySteps own{0, 0, 0, 0};
      if (row <= last_row) own = key_steps<kSpec.tile_n>(args_, tile.sequence, row, last_row);
      tile.own_steps[consumer] = own;
      if (own.begin == own.end) continue;
      const bool is_first = tile.steps.end == 0;
      tile.steps.begin = is_first ? own.begin : min(tile.steps.begin, own.begin);
      tile.steps.end = max(tile.steps.end, own.end);
    }
    asm volatile("" ::: "memory");
  }

  __device__ void feed(const Tile<kSpec>& tile) {
    int step = tile.steps.end - 1;
    const bool has_keys = step >= tile.steps.begin;
    if (has_keys) load_k(tile, step);
#pragma unroll 1
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) load_q(tile, consumer);
    if (!has_keys) return;
#pragma unroll 1
    for (; step > tile.steps.begin; --step) {
      load_k(tile, step - 1);
      load_v(tile, step);
    }
    load_v(tile, step);
  }

  __device__ void load_q(const Tile<kSpec>& tile, int consumer) const {
    const Sequence& it = tile.sequence;
    const Barrier full = shared_.q_full(consumer, q_.stage);
    shared_.q_empty(consumer, q_.stage).wait(q_.parity ^ 1);
    full.arrive_and_expect(F::kQGroupBytes);
    for (int column = 0; column < F::kQBlocks; ++column) {
      copy_box(shared_.q(consumer, q_.stage) + column * F::kQBlockBytes, maps_.q,
               column * kBlockColumns, it.q_begin + tile.tile_row + consumer * F::kGroupRows,
               tile.head, it.q_batch, full);
    }
  }

  __device__ void load_k(const Tile<kSpec>& tile, int step) {
    load(tile, step, maps_.k, F::kQBlocks, shared_.k(k_.stage), shared_.k_full(k_.stage),
         shared_.k_empty(k_.stage), k_.parity);
    k_.advance();
  }

  __device__ void load_v(const Tile<kSpec>& tile, int step) {
    load(tile, step, maps_.v, F::kVBlocks, shared_.v(v_.stage), shared_.v_full(v_.stage),
         shared_.v_empty(v_.stage), v_.parity);
    v_.advance();
  }

  __device__ void load(const Tile<kSpec>& tile, int step, const CopyMap& map, int num_columns,
                       SharedAddress to, Barrier full, Barrier empty, int parity) const {
    const int row = tile.sequence.k_begin + step * kSpec.tile_n;
    empty.wait(parity ^ 1);  // the first round finds every stage empty
    full.arrive_and_expect(num_columns * F::kKeyBlockBytes);
    for (int column = 0; column < num_columns; ++column) {
      copy_box(to + column * F::kKeyBlockBytes, map, column * kBlockColumns, row, tile.kv_head,
               tile.sequence.k_batch, full);
    }
  }

  const ForwardArgs& args_;
  const CopyMaps& maps_;
  const Shared90<kSpec>& shared_;
  int index_ = 0;  // of the tile
  Turn<F::kQStages> q_;
  Turn<F::kStages> k_, v_;
};

}  // namespace fa::cuda
