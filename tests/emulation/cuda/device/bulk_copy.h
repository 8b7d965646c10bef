// src/cuda/device/bulk_copy.h on an emulated GPU.
#pragma once

#include <array>

#include "cuda/device/kernel_args.h"
#include "cuda/device/ptx.h"
#include "stub/stub.h"

namespace fa::cuda {

struct Barrier {
  SharedAddress address;

  void init(int num_arrivals) const { emulated::make_barrier(address, num_arrivals); }
  void arrive() const { emulated::arrive_at(address, 0); }
  void arrive_and_expect(int bytes) const { emulated::arrive_at(address, bytes); }
  void wait(int parity) const {
    emulated::wait_until([this, parity] { return emulated::has_ended(address, parity); });
  }
};

inline void barriers_fence() {}

// Rows of 128 bytes, whose chunks of 16 are permuted by three bits of the row.
inline void copy_now(SharedAddress to, const stub::Map& map, const std::array<int64_t, 5>& first,
                     Barrier barrier) {
  for (uint32_t row = 0; row < map.box_rows; ++row) {
    for (int column = 0; column < 64; ++column) {
      const std::array<int64_t, 5> at{first[0] + column, first[1] + row, first[2], first[3],
                                      first[4]};
      Half element = 0;
      int64_t offset = at[0] * 2;
      bool exists = true;
      for (size_t i = 0; i < at.size(); ++i) {
        exists &= at[i] >= 0 && at[i] < static_cast<int64_t>(map.sizes[i]);
        if (i > 0) offset += at[i] * static_cast<int64_t>(map.strides[i - 1]);
      }
      if (exists) std::memcpy(&element, static_cast<const char*>(map.address) + offset, 2);
      const SharedAddress place = to + row * 128 + static_cast<Word>(column) * 2;
      std::memcpy(shared_at(place ^ (place >> 7 & 7) << 4), &element, 2);
    }
  }
  emulated::bytes_came(barrier.address, int64_t{map.box_rows} * 128);
}

// Of a box wholly outside the engine reads at the map's origin, which a map of rank 5 has before
// its tensor.
inline void copy(SharedAddress to, const TensorMap& map, uint32_t rank,
                 const std::array<int64_t, 5>& first, Barrier barrier) {
  stub::Map of_tensor;
  std::memcpy(&of_tensor, &map, sizeof(of_tensor));
  if (of_tensor.rank != rank) emulated::fail("a copy has another rank than its map");
  const int64_t extents[5] = {64, of_tensor.box_rows, 1, 1, 1};
  for (size_t i = 0; i < first.size(); ++i) {
    const bool is_inside =
        first[i] + extents[i] > 0 && first[i] < static_cast<int64_t>(of_tensor.sizes[i]);
    if (!is_inside && rank == 5) emulated::fail("a box wholly outside faults");
  }
  emulated::copy_later([=] { copy_now(to, of_tensor, first, barrier); });
}

inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row, int head,
                     int batch, Barrier barrier) {
  copy(to, map, 4, {column, row, head, batch, 0}, barrier);
}

inline void copy_ended_box(SharedAddress to, const TensorMap& map, int rows, int column, int row,
                           int num_rows, int head, int batch, Barrier barrier) {
  copy(to, map, 5, {column, rows - num_rows, row + num_rows, head, batch}, barrier);
}

inline void named_sync(int id, int num_threads) {
  emulated::sync(id, static_cast<unsigned>(num_threads));
}
inline void named_arrive(int id, int num_threads) {
  emulated::arrive(id, static_cast<unsigned>(num_threads));
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void leave_registers() {}

}  // namespace fa::cuda
