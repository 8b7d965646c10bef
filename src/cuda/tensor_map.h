// What Hopper's copy engine needs to know of a tensor.
#pragma once

#include "core/status.h"
#include "core/tensor_view.h"
#include "cuda/driver.h"

namespace fa::cuda {

// Whether the copy engine can be told of the tensor, which has vector rows: it is neither empty nor
// broadcast.
bool has_tensor_map(const core::TensorView& view);

// For boxes of `rows` rows and 64 columns of a 16-bit tensor [batch, row, head, d] or
// [row, head, d], at coordinates (d, row, head, batch); what lies outside the tensor reads as zero.
core::Status make_tensor_map(const Driver& driver, const core::TensorView& view, int rows,
                             TensorMap& map);

}  // namespace fa::cuda
