// Which tiles a team of Hopper's forward takes, one after another. Numbers of teams run over all
// blocks before a block's second, so that few tiles have a multiprocessor each.
#pragma once

#include "cuda/device/tile_sm90.h"

namespace fa::cuda {

__device__ inline int team_of_launch(int team) {
  return static_cast<int>(team * gridDim.x + blockIdx.x);
}
template <KernelSpec kSpec>
__device__ inline int num_teams() {
  return kSpec.teams * static_cast<int>(gridDim.x);
}

template <bool kFirst, class First, class Second>
struct Choose {
  using Type = First;
};
template <class First, class Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// The sequences of a launch, those with most keys first, so that the tiles that run last are short;
// in their own order where there are more than kMax.
struct SequenceOrder {
  static constexpr int kMax = 128;
  unsigned short keys[kMax];
  unsigned char batch_at[kMax];

  __device__ static bool sorts(const ForwardArgs& args) { return args.shape.batch <= kMax; }

  // All threads of a block, of which there are kMax at least.
  __device__ void sort(const ForwardArgs& args) {
    const int batch = threadIdx.x, num_batches = args.shape.batch;
    const bool is_one = batch < num_batches;
    if (!sorts(args)) return;
    if (is_one) keys[batch] = min(sequence_of(args, batch).seqlen_k, 0xFFFF);
    __syncthreads();
    if (!is_one) return;
    const int own = keys[batch];
    int place = 0;
#pragma unroll 8
    for (int other = 0; other < num_batches; ++other) {
      place += keys[other] > own || (keys[other] == own && other < batch);
    }
    batch_at[place] = batch;
  }

  __device__ int at(const ForwardArgs& args, int place) const {
    return sorts(args) ? batch_at[place] : place;
  }
};

// Of a launch whose sequences are as long as each other: a team takes every num_teams()-th tile, or
// pair of tiles.
template <KernelSpec kSpec>
class FixedSchedule {
 public:
  __device__ FixedSchedule(const ForwardArgs& args, const SequenceOrder*, int team)
      : args_(args), index_(team) {}

  // False: there are no more.
  __device__ bool next(Work& work) {
    if (index_ >= args_.schedule.num_blocks) return false;
    work = work_of(args_, index_);
    bool is_second = true;
    if (args_.schedule.paired != 0) {
      const int from_start = args_.schedule.num_tiles_m - 1 - work.tile;
      const int from_end = (args_.shape.seqlen_q - 1) / kSpec.tile_m - from_start;
      is_second = is_second_ || from_start == from_end;
      work.tile = is_second ? from_start : from_end;
    }
    is_second_ = !is_second;
    if (is_second) index_ += num_teams<kSpec>();
    return true;
  }

 private:
  const ForwardArgs& args_;
  int index_;
  bool is_second_ = false;
};

// Of varlen sequences, and of others whose tiles cost unlike much: tiles are numbered, and
// whichever team is free takes the next. A few heads of a sequence go together, for the teams to
// share their keys in L2, last rows first.
template <KernelSpec kSpec>
class DynamicSchedule {
 public:
  __device__ DynamicSchedule(const ForwardArgs& args, const SequenceOrder* order, int team)
      : args_(args), order_(order), first_index_(team) {}

  __device__ bool next(Work& work) {
    const int index = first_index_ >= 0 ? first_index_ : take();
    first_index_ = -1;
#pragma unroll 1
    for (; place_ < args_.shape.batch; ++place_) {
      const int batch = order_->at(args_, place_);
      const int tiles = (sequence_of(args_, batch).seqlen_q + kSpec.tile_m - 1) / kSpec.tile_m;
      const int within = index - first_;
      if (within < tiles * args_.shape.num_heads) {
        const int log2 = args_.schedule.log2_heads_together;
        const unsigned run = static_cast<unsigned>(within) >> log2;  // a tile of these heads
        const unsigned group = run / static_cast<unsigned>(tiles);
        const int tile = static_cast<int>(run - group * tiles);
        work = {batch, within - static_cast<int>((run - group) << log2), tiles - 1 - tile};
        return true;
      }
      first_ += tiles * args_.shape.num_heads;
    }
    // Of each team that had a tile one number has no tile, so that as many are taken as there are
    // tiles.
    const bool is_last = index == first_ - 1 + num_teams<kSpec>();
    if (is_last && args_.schedule.counter != nullptr) *args_.schedule.counter = 0;
    return false;
  }

 private:
  using Counter = unsigned long long;
  static constexpr int kNone = 0x7FFFFFFF;

  // The number of a tile, behind those that teams start with. Where the counter does not count for
  // this launch yet, the first team to find that out makes it count.
  __device__ int take() const {
    const ScheduleArgs& schedule = args_.schedule;
    if (schedule.counter == nullptr) return kNone;
    Counter taken = atomicAdd(schedule.counter, 1ull);
#pragma unroll 1
    while ((taken ^ schedule.ticket) >> kTileBits != 0) {
      const Counter now = *static_cast<volatile Counter*>(schedule.counter);
      if ((now ^ schedule.ticket) >> kTileBits == 0) {
        taken = atomicAdd(schedule.counter, 1ull);
      } else if (atomicCAS(schedule.counter, now, schedule.ticket + num_teams<kSpec>() + 1) ==
                 now) {
        return num_teams<kSpec>();
      }
    }
    return static_cast<int>(taken & ((1u << kTileBits) - 1));
  }

  const ForwardArgs& args_;
  const SequenceOrder* order_;
  int first_index_;  // negative: taken
  int place_ = 0;    // of a sequence
  int first_ = 0;    // the number of its first tile
};

template <KernelSpec kSpec>
using Schedule = Choose<kSpec.varlen, DynamicSchedule<kSpec>, FixedSchedule<kSpec>>::Type;

}  // namespace fa::cuda
