// The checks that validation is made of: one property of one tensor each.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "core/status.h"
#include "core/tensor_view.h"

namespace fa::core {

inline constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

// A tensor under the name that the caller knows it by.
struct Named {
  const char* name;
  const TensorView& view;
};

inline std::string strides_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) text += concat(d == 0 ? "" : ", ", view.strides[d]);
  return text + "]";
}

// *product = a * b; false on overflow. a, b >= 0.
inline bool multiply(int64_t a, int64_t b, int64_t* product) {
  constexpr int64_t kRoot = int64_t{1} << 31;  // below it no product overflows, and no division
  if ((a >= kRoot || b >= kRoot) && a != 0 && b > kMaxInt64 / a) return false;
  *product = a * b;
  return true;
}

inline bool add(int64_t a, int64_t b, int64_t* sum) {
  if (b > kMaxInt64 - a) return false;
  *sum = a + b;
  return true;
}

// ---- One tensor by itself. ----

inline Status check_present(Named tensor) {
  if (tensor.view.present()) return {};
  return invalid_argument(tensor.name, ": is missing, must be given");
}

inline Status check_rank(Named tensor, int rank, const char* layout) {
  if (tensor.view.ndim == rank) return {};
  return invalid_argument(tensor.name, ": has ", tensor.view.ndim, " dimensions (shape ",
                          shape_text(tensor.view), "), must have ", rank, ": ", layout);
}

inline Status check_dtype(Named tensor, DataType dtype) {
  if (tensor.view.dtype == dtype) return {};
  return invalid_argument(tensor.name, ": dtype is ", name(tensor.view.dtype), ", must be ",
                          name(dtype));
}

// For the options whose dtype is fp32 or q's.
inline Status check_float32_or(DataType dtype, Named tensor) {
  if (tensor.view.dtype == DataType::kFloat32 || tensor.view.dtype == dtype) return {};
  return invalid_argument(tensor.name, ": dtype is ", name(tensor.view.dtype),
                          ", must be float32 or q's ", name(dtype));
}

inline Status check_device(Named tensor, Device device) {
  if (tensor.view.device == device) return {};
  return invalid_argument(tensor.name, ": is on ", name(tensor.view.device),
                          ", must be on q's device, ", name(device));
}

// Sizes and strides are not negative, byte offsets fit in int64, and there is memory.
// The dtype is one with a size.
inline Status check_storage(Named tensor) {
  const TensorView& view = tensor.view;
  const int64_t element_bytes = byte_size(view.dtype);
  int64_t bytes = element_bytes;  // of the elements, empty dimensions counted as 1
  int64_t reach = 1;              // elements from the first to the last in memory
  bool fits = true;
  bool empty = false;
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t size = view.shape[d];
    if (size < 0) {
      return invalid_argument(tensor.name, ": dimension ", d, " has size ", size,
                              ", must be at least 0 (shape ", shape_text(view), ")");
    }
    empty = empty || size == 0;
    if (size <= 1) continue;
    if (view.strides[d] < 0) {
      return invalid_argument(tensor.name, ": dimension ", d, " has stride ", view.strides[d],
                              ", must be at least 0 (strides ", strides_text(view), ")");
    }
    int64_t step = 0;
    fits = fits && multiply(bytes, size, &bytes) && multiply(size - 1, view.strides[d], &step) &&
           add(reach, step, &reach);
  }
  if (!fits || !multiply(reach, element_bytes, &reach)) {
    return invalid_argument(tensor.name, ": shape ", shape_text(view), " with strides ",
                            strides_text(view), " spans more bytes than int64 can count");
  }
  if (empty) return {};
  if (view.data == nullptr) {
    return invalid_argument(tensor.name, ": data pointer is null, must point to the ",
                            shape_text(view), " elements");
  }
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(element_bytes) != 0) {
    return invalid_argument(tensor.name, ": data pointer ", view.data, " must be aligned to ",
                            element_bytes, " bytes, the size of ", name(view.dtype));
  }
  return {};
}

inline Status check_last_contiguous(Named tensor) {
  const int last = tensor.view.ndim - 1;
  if (last < 0 || tensor.view.shape[last] <= 1 || tensor.view.strides[last] == 1) return {};
  if (tensor.view.num_elements() == 0) return {};
  return invalid_argument(tensor.name, ": the last dimension has stride ",
                          tensor.view.strides[last], ", must be contiguous (stride 1; strides ",
                          strides_text(tensor.view), ")");
}

// An output in which two indices share an element would depend on the order of writes.
inline Status check_no_broadcast(Named output) {
  if (output.view.num_elements() == 0) return {};
  for (int d = 0; d < output.view.ndim; ++d) {
    if (output.view.shape[d] > 1 && output.view.strides[d] == 0) {
      return invalid_argument(output.name, ": dimension ", d,
                              " has stride 0, must not be broadcast, because it is written (shape ",
                              shape_text(output.view), ")");
    }
  }
  return {};
}

// What `tensor` calls `what` must be `expected`, which belongs to `owner` ("q's").
inline Status check_size(Named tensor, const char* what, int64_t actual, const char* owner,
                         int64_t expected) {
  if (actual == expected) return {};
  return invalid_argument(tensor.name, ": ", what, " is ", actual, ", must equal ", owner, " ",
                          expected, " (", tensor.name, " has shape ", shape_text(tensor.view), ")");
}

template <size_t kRank>
Status check_shape(Named tensor, const std::array<int64_t, kRank>& expected, const char* layout) {
  bool equal = tensor.view.ndim == static_cast<int>(kRank);
  for (size_t d = 0; equal && d < kRank; ++d) equal = tensor.view.shape[d] == expected[d];
  if (equal) return {};
  TensorView wanted;
  wanted.ndim = static_cast<int>(kRank);
  std::copy(expected.begin(), expected.end(), wanted.shape.begin());
  return invalid_argument(tensor.name, ": shape is ", shape_text(tensor.view), ", must be ",
                          shape_text(wanted), ", ", layout);
}

inline Status check_int32_vector(Named tensor, Device device) {
  FA_TRY(check_rank(tensor, 1, "one entry per sequence"));
  FA_TRY(check_dtype(tensor, DataType::kInt32));
  FA_TRY(check_device(tensor, device));
  FA_TRY(check_storage(tensor));
  return check_last_contiguous(tensor);
}

inline Status check_output(Named output, DataType dtype, Device device) {
  FA_TRY(check_dtype(output, dtype));
  FA_TRY(check_device(output, device));
  FA_TRY(check_storage(output));
  FA_TRY(check_last_contiguous(output));
  return check_no_broadcast(output);
}

}  // namespace fa::core
