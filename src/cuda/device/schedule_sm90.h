// Which tiles a block of Hopper's forward takes, one after another.
#pragma once

#include "cuda/device/tile_sm90.h"

namespace fa::cuda {

template <bool kFirst, class First, class Second>
struct Choose {
  using Type = First;
};
template <class First, class Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// Of a launch whose sequences are as long as each other, or that has a block per tile.
template <KernelSpec kSpec>
class FixedSchedule {
 public:
  __device__ explicit FixedSchedule(const ForwardArgs& args) : args_(args), index_(blockIdx.x) {}

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
    if (is_second) index_ += gridDim.x;
    return true;
  }

 private:
  const ForwardArgs& args_;
  int index_;
  bool is_second_ = false;
};

// Of varlen sequences: tiles are numbered from the first sequence's longest on, heads first, and
// whichever block is free takes the next.
template <KernelSpec kSpec>
class DynamicSchedule {
 public:
  __device__ explicit DynamicSchedule(const ForwardArgs& args) : args_(args), next_(blockIdx.x) {}

  __device__ bool next(Work& work) {
    const int index = next_;
    if (index == kNone) return false;
    // Asked for now, needed when this tile has been loaded.
    next_ = args_.schedule.counter == nullptr
                ? kNone
                : static_cast<int>(atomicAdd(args_.schedule.counter, 1u) + gridDim.x);
#pragma unroll 1
    for (; batch_ < args_.shape.batch; ++batch_) {
      const int tiles = (sequence_of(args_, batch_).seqlen_q + kSpec.tile_m - 1) / kSpec.tile_m;
      const int within = index - first_;
      if (within < tiles * args_.shape.num_heads) {
        work = {batch_, within % args_.shape.num_heads, tiles - 1 - within / args_.shape.num_heads};
        return true;
      }
      first_ += tiles * args_.shape.num_heads;
    }
    return false;
  }

 private:
  static constexpr int kNone = 0x7FFFFFFF;
  const ForwardArgs& args_;
  int next_;
  int batch_ = 0;
  int first_ = 0;  // the number of the first tile of batch_
};

template <KernelSpec kSpec>
using Schedule = Choose<kSpec.varlen, DynamicSchedule<kSpec>, FixedSchedule<kSpec>>::Type;

}  // namespace fa::cuda
