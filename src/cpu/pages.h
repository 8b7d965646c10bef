// What a large allocation may ask of the system; nothing where it has no such thing.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/tensor_view.h"

namespace fa::cpu {

inline constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// Has memory from a multiple of kHugePageBytes on lie in pages of that size.
void prefer_huge_pages(void* memory, int64_t bytes);

// Has a large tensor's pages there before all threads write to it: allocators map such tensors anew
// for each call, rows of all heads share a page, and threads that wait for one page wait in turn.
// What is in the tensor stays.
void bring_in_pages(const core::TensorView& output, core::Parallel& parallel);

// Lets the system take the memory's whole pages, and what is in them, once it wants them; until
// then writing to them costs nothing. False where that cannot be.
bool give_pages_back_lazily(void* memory, int64_t bytes);

}  // namespace fa::cpu
