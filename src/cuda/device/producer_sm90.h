// What feeds Hopper's forward through the copy engine.
#pragma once

#include "cuda/device/schedule_sm90.h"

namespace fa::cuda {

// One thread, which finds and describes a team's next tile while the producer still loads this
// one. On an H100 at head_dim 128, with the producer's thread doing both, sequences of 512 tokens
// ran at 387 TFLOP/s for 444.
template <KernelSpec kSpec>
class Scheduler90 {
  using F = Forward90<kSpec>;

 public:
  __device__ Scheduler90(const ForwardArgs& args, const Shared90<kSpec>& shared,
                         const SequenceOrder* order, int team)
      : args_(args), shared_(shared), schedule_(args, order, team_of_launch(team)) {}

  __device__ void run() {
    bool exists = true;
#pragma unroll 1
    for (int index = 0; exists; ++index) {
      shared_.tile_wanted().wait(index % 2 ^ 1);
      Work work;
      exists = schedule_.next(work);
      if (exists) {
        describe(work, shared_.description(index));
      } else {
        shared_.description(index).tile_row = -1;
      }
      shared_.tile_described().arrive();
    }
  }

 private:
  // Writes first and reads again what it needs: registers are short.
  __device__ void describe(const Work& work, Tile<kSpec>& tile) const {
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

  const ForwardArgs& args_;
  const Shared90<kSpec>& shared_;
  Schedule<kSpec> schedule_;
};

// One thread; of pages a warp, whose lanes look up and load one box each. The first does the rest.
template <KernelSpec kSpec>
class Producer90 {
  using F = Forward90<kSpec>;

 public:
  static constexpr int kThreads = F::kLooksUpPages ? 32 : 1;

  __device__ Producer90(const ForwardArgs& args, const TensorMaps& maps,
                        const Shared90<kSpec>& shared)
      : args_(args), maps_(maps), shared_(shared) {}

  __device__ void run() {
#pragma unroll 1
    for (int index = 0;; ++index) {
      shared_.tile_described().wait(index % 2);
      // No lane may still wait when the first asks for the next tile.
      if constexpr (F::kLooksUpPages) __syncwarp();
      const Tile<kSpec>& tile = shared_.description(index);
      if (tile.tile_row < 0) break;
      feed(tile);
      q_.advance();
    }
    if (!is_first()) return;
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
      shared_.q_empty(consumer, q_.stage).wait(q_.parity ^ 1);
      shared_.q_full(consumer, q_.stage).arrive();
    }
  }

 private:
  // The steps for which the loads of a tile last at least as long as it takes to find the next;
  // the later that is, the evener do blocks share the last tiles.
  static constexpr int kStepsToFind = 2;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static bool is_first() { return !F::kLooksUpPages || lane() == 0; }

  __device__ void feed(const Tile<kSpec>& tile) {
    const int begin = tile.steps.begin;
    int step = tile.steps.end - 1;
    const int last_but_few = max(min(step, begin + kStepsToFind), begin);
    if (step >= begin) load_k(tile, step);
#pragma unroll 1
    for (int consumer = 0; consumer < F::kConsumers; ++consumer) {
      if (is_first()) load_q(tile, consumer);
    }
    if (step < begin && is_first()) shared_.tile_wanted().arrive();
#pragma unroll 1
    for (; step >= begin; --step) {
      if (step == last_but_few && is_first()) shared_.tile_wanted().arrive();
      if (step > begin) load_k(tile, step - 1);
      load_v(tile, step, step == begin);
    }
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
    v_box_ = k_box_;
    if constexpr (F::kLooksUpPages) k_box_ = box_of(tile.sequence, step);
    load<false>(tile, step, k_box_, F::kQBlocks, shared_.k(k_.stage), shared_.k_full(k_.stage),
                shared_.k_empty(k_.stage), k_.parity);
    k_.advance();
  }

  // Of the step before the last one of keys, or, `is_last`, of that one.
  __device__ void load_v(const Tile<kSpec>& tile, int step, bool is_last) {
    load<true>(tile, step, is_last ? k_box_ : v_box_, F::kVBlocks, shared_.v(v_.stage),
               shared_.v_full(v_.stage), shared_.v_empty(v_.stage), v_.parity);
    v_.advance();
  }

  // The lane's box of a step: of one page. Without pages there is one, of the whole step.
  __device__ KeyPlace box_of(const Sequence& sequence, int step) const {
    const int key = step * kSpec.tile_n + lane() * args_.pages.box_rows;
    if (args_.pages.block_table == nullptr) return {sequence.k_batch, sequence.k_begin + key};
    return paged_place(args_.pages, sequence, min(key, sequence.seqlen_k - 1));
  }

  template <bool kOfV>
  __device__ void load(const Tile<kSpec>& tile, int step, KeyPlace box, int num_columns,
                       SharedAddress to, Barrier full, Barrier empty, int parity) const {
    const Sequence& it = tile.sequence;
    const int first = step * kSpec.tile_n;
    empty.wait(parity ^ 1);  // the first round finds every stage empty
    if (is_first()) full.arrive_and_expect(num_columns * F::kKeyBlockBytes);
    if constexpr (F::kLooksUpPages) {
      __syncwarp();
      const int row = lane() * args_.pages.box_rows;
      if (row >= kSpec.tile_n) return;
      load_columns<kOfV>(to + row * kBlockRowBytes, num_columns, box,
                         min(it.seqlen_k - first - row, args_.pages.box_rows), tile.kv_head, full);
    } else {
      load_columns<kOfV>(to, num_columns, {it.k_batch, it.k_begin + first}, it.seqlen_k - first,
                         tile.kv_head, full);
    }
  }

  // The sequence has `num_rows` rows from the box's first on. Values behind them must be zero,
  // since their probabilities are, but 0 times NaN is not; keys need not be read.
  template <bool kOfV>
  __device__ void load_columns(SharedAddress to, int num_columns, KeyPlace box, int num_rows,
                               int kv_head, Barrier full) const {
    for (int block = 0; block < num_columns; ++block, to += F::kKeyBlockBytes) {
      const int column = block * kBlockColumns;
      const TensorMap& map = kOfV ? maps_.v : maps_.k;
      const bool is_outside = num_rows <= 0 || (kOfV && column >= args_.shape.head_dim_v);
      if (F::kLooksUpPages && is_outside) {
        copy_box(to, maps_.k, column, maps_.key_rows, kv_head, box.batch, full);
      } else if constexpr (kOfV ? kSpec.varlen : keys_end(kSpec)) {
        copy_ended_box(to, map, maps_.key_rows, column, box.row, num_rows, kv_head, box.batch,
                       full);
      } else {
        copy_box(to, map, column, box.row, kv_head, box.batch, full);
      }
    }
  }

  const ForwardArgs& args_;
  const TensorMaps& maps_;
  const Shared90<kSpec>& shared_;
  Turn<F::kQStages> q_;
  Turn<F::kStages> k_, v_;
  KeyPlace k_box_{}, v_box_{};  // pages: of the last step of keys, and of the one before
};

}  // namespace fa::cuda
