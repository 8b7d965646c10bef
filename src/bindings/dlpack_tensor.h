// Tensors as DLPack and as the C interface describe them.
#pragma once

#include <dlpack/dlpack.h>
#include <flash_attn/flash_attn.h>

#include <cstddef>

namespace fa::bindings {

// A DLTensor is handed on as the fa_tensor that it is, field for field.
static_assert(sizeof(fa_tensor) == sizeof(DLTensor) && alignof(fa_tensor) == alignof(DLTensor));
static_assert(offsetof(fa_tensor, data) == offsetof(DLTensor, data));
static_assert(offsetof(fa_tensor, device_type) == offsetof(DLTensor, device.device_type));
static_assert(offsetof(fa_tensor, device_id) == offsetof(DLTensor, device.device_id));
static_assert(offsetof(fa_tensor, ndim) == offsetof(DLTensor, ndim));
static_assert(offsetof(fa_tensor, dtype_code) == offsetof(DLTensor, dtype.code));
static_assert(offsetof(fa_tensor, dtype_bits) == offsetof(DLTensor, dtype.bits));
static_assert(offsetof(fa_tensor, dtype_lanes) == offsetof(DLTensor, dtype.lanes));
static_assert(offsetof(fa_tensor, shape) == offsetof(DLTensor, shape));
static_assert(offsetof(fa_tensor, strides) == offsetof(DLTensor, strides));
static_assert(offsetof(fa_tensor, byte_offset) == offsetof(DLTensor, byte_offset));
static_assert(int{FA_CPU} == int{kDLCPU} && int{FA_CUDA} == int{kDLCUDA});
static_assert(int{FA_INT} == int{kDLInt} && int{FA_UINT} == int{kDLUInt});
static_assert(int{FA_FLOAT} == int{kDLFloat} && int{FA_BFLOAT} == int{kDLBfloat});
static_assert(int{FA_BOOL} == int{kDLBool});

inline const fa_tensor* as_fa_tensor(const DLTensor* tensor) {
  return reinterpret_cast<const fa_tensor*>(tensor);
}

}  // namespace fa::bindings
