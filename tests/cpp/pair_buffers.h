// Buffers of random bfloat16 and fp32 for the kernels in pairs.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/cpp/testing.h"

namespace fa::cpu {

// From a cache line on.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : storage(count + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (64 - address % 64) % 64 / sizeof(T);
    size = count;
  }
  Buffer(Buffer&&) = default;  // the elements stay where they are
  Buffer& operator=(Buffer&&) = default;
  std::vector<T> storage;
  T* data;
  int64_t size;
};

inline Buffer<uint16_t> halves(int64_t count, uint64_t seed) {
  Buffer<uint16_t> buffer(count);
  testing::Random random(seed);
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(random.normal());
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    buffer.data[i] = static_cast<uint16_t>(bits >> 16);
  }
  return buffer;
}

inline Buffer<float> floats(int64_t count, uint64_t seed) {
  Buffer<float> buffer(count);
  testing::Random random(seed);
  for (int64_t i = 0; i < count; ++i) buffer.data[i] = static_cast<float>(random.normal());
  return buffer;
}

}  // namespace fa::cpu
