// 16-bit and 32-bit floating-point elements as bits: conversion, and loads one at a time.
#pragma once

#include "cuda/device/kernel_spec.h"
#include "cuda/device/ptx.h"

namespace fa::cuda {

// Two fp32 as two 16-bit elements in a word.
template <Element kElement>
__device__ inline Word pack(float low, float high) {
  return kElement == Element::kBFloat16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}

template <Element kElement>
__device__ inline float to_float(Half bits) {
  if constexpr (kElement == Element::kBFloat16) {
    return __uint_as_float(static_cast<Word>(bits) << 16);
  } else {
    return float_of_float16(bits);
  }
}

// data[index] as fp32.
template <Element kElement>
__device__ inline float load_element(const void* data, long long index) {
  if constexpr (kElement == Element::kFloat32) {
    return static_cast<const float*>(data)[index];
  } else {
    return to_float<kElement>(static_cast<const Half*>(data)[index]);
  }
}

template <Element kElement>
__device__ inline void store_element(void* data, long long index, float value) {
  if constexpr (kElement == Element::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<Half*>(data)[index] = static_cast<Half>(pack<kElement>(value, 0.0f));
  }
}

}  // namespace fa::cuda
