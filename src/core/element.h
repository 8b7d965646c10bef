// Single elements of floating-point tensors, by offset; for what is too rare to be vectorised.
#pragma once

#include "core/half.h"
#include "core/tensor_view.h"

namespace fa::core {

inline float load_element(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DataType::kFloat16:
      return to_float(view.as<const Float16>()[offset]);
    case DataType::kBFloat16:
      return to_float(view.as<const BFloat16>()[offset]);
    default:
      return view.as<const float>()[offset];
  }
}

inline void store_element(const TensorView& view, int64_t offset, float value) {
  switch (view.dtype) {
    case DataType::kFloat16:
      view.as<Float16>()[offset] = round_to<Float16>(value);
      break;
    case DataType::kBFloat16:
      view.as<BFloat16>()[offset] = round_to<BFloat16>(value);
      break;
    default:
      view.as<float>()[offset] = value;
  }
}

}  // namespace fa::core
