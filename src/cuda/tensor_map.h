// What Hopper's copy engine needs to know of a tensor.
#pragma once

#include "core/status.h"
#include "core/tensor_view.h"
#include "cuda/driver.h"

namespace fa::cuda {

// Whether the copy engine can be told of the tensor, which has vector rows: it is neither empty nor
// broadcast, and, for a map that `ends`, an entry's rows fit before it in the address space.
bool has_tensor_map(const core::TensorView& view, bool ends);

// For boxes of `rows` rows and 64 columns of a 16-bit tensor [batch, row, head, d] or
// [row, head, d], at coordinates (d, row, head, batch); what lies outside the tensor reads as zero.
// A map that `ends` is for copy_ended_box(): at (d, a, b, head, batch) it has row a + b - n of the
// n rows, where a < n and b <= n, so that its origin lies n rows before the tensor.
core::Status make_tensor_map(const Driver& driver, const core::TensorView& view, int rows,
                             bool ends, TensorMap& map);

}  // namespace fa::cuda
