// Hopper's copy engine, and the barriers in shared memory that it and the threads wait at.
#pragma once

#include "cuda/device/kernel_args.h"
#include "cuda/device/ptx.h"

namespace fa::cuda {

// A barrier of 8 bytes. A phase ends when as many threads have arrived as it was made for, and all
// bytes that were announced; phases are told apart by their parity, from 0.
struct Barrier {
  SharedAddress address;

  __device__ void init(int num_arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(num_arrivals)
                 : "memory");
  }
  __device__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }
  __device__ void arrive_and_expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
  }
  // Until the phase of this parity has ended.
  __device__ void wait(int parity) const {
    int done;
    do {
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; "
          "selp.b32 %0, 1, 0, done; }"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    } while (done == 0);
  }
};

// Makes initialised barriers visible to the copy engine.
__device__ inline void barriers_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The box at (column, row, head, batch) of a tensor into shared memory; what lies outside the
// tensor becomes zero. `barrier` hears of the bytes.
__device__ inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row,
                                int head, int batch, Barrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier.address), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same of a tensor of `rows` rows an entry, but only the box's first `num_rows` rows, 1 at
// least: what is behind them becomes zero as well. The map has the rows twice: row a + b - rows
// lies at (a, b), and where b is the end of what is wanted, there a ends, too. A box that is wholly
// outside would fault, for the engine reads at the map's origin then, before the tensor.
__device__ inline void copy_ended_box(SharedAddress to, const TensorMap& map, int rows, int column,
                                      int row, int num_rows, int head, int batch, Barrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier.address), "r"(column), "r"(rows - num_rows), "r"(row + num_rows),
      "r"(head), "r"(batch)
      : "memory");
}

// ---- Named barriers, among whole warps. ----

__device__ inline void named_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
__device__ inline void named_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ---- Registers per thread, which a warpgroup gives to another. ----

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fa::cuda
