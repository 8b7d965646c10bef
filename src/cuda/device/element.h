// 16-bit and 32-bit floating-point elements as bits: conversion, and loads one at a time.
#pragma once

#include "cuda/device/kernel_spec.h"
#include "cuda/device/ptx.h"

namespace fa::cuda {

using Half = unsigned short;

// Two fp32 as two 16-bit elements in a word, `low` in its low half; rounded to nearest even.
template <Element kElement>
__device__ inline Word pack(float low, float high) {
  Word packed;
  if constexpr (kElement == Element::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else if constexpr (kIsTuring) {
    asm("{ .reg .f16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; "
        "mov.b32 %0, {low, high}; }"
        : "=r"(packed)
        : "f"(low), "f"(high));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <Element kElement>
__device__ inline float to_float(Half bits) {
  if constexpr (kElement == Element::kBFloat16) {
    return __uint_as_float(static_cast<Word>(bits) << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
}

template <Element kElement>
inline constexpr int kElementBytes = kElement == Element::kFloat32 ? 4 : 2;

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
