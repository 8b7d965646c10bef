// src/cuda/device/ptx.h on an emulated GPU: what NVRTC knows without a header, and the instructions
// that forward_sm90 is made of.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/half.h"
#include "emulation/gpu.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// All fibers of a block are of one thread. What is `static` cannot be `extern` as well, as the
// launch's own shared memory is.
#define __shared__ constinit thread_local

namespace fa::cuda {

using std::max;
using std::min;
struct float2 {
  float x, y;
};

#define threadIdx ::fa::emulated::thread_index
#define blockIdx ::fa::emulated::block_index
#define gridDim ::fa::emulated::grid_size
#define blockDim ::fa::emulated::block_size

using Word = unsigned int;
using SharedAddress = unsigned int;
using Half = unsigned short;

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);
inline constexpr bool kIsTuring = false;

// ---- Of the language. ----

inline void __syncthreads() { emulated::sync(0, blockDim.x); }
inline void __syncwarp() { emulated::exchange(0); }
inline int __shfl_sync(Word, int value, int lane) {
  return static_cast<int>(emulated::exchange(static_cast<Word>(value))[lane]);
}
inline Word shuffle_xor(Word value, int mask) {
  return emulated::exchange(value)[(threadIdx.x % emulated::kWarp) ^ static_cast<unsigned>(mask)];
}
inline float shuffle_xor(float value, int mask) {
  return std::bit_cast<float>(shuffle_xor(std::bit_cast<Word>(value), mask));
}
inline float __uint_as_float(Word bits) { return std::bit_cast<float>(bits); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::exchange(*at, *at + value);
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected,
                                    unsigned long long value) {
  return std::exchange(*at, *at == expected ? value : *at);
}

// ---- Memory. ----

inline SharedAddress shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  return static_cast<SharedAddress>(byte - emulated::shared_memory()) + emulated::kSharedStart;
}
inline unsigned char* shared_at(SharedAddress address) {
  return emulated::shared_memory() + static_cast<int32_t>(address - emulated::kSharedStart);
}
inline void store_shared_16(SharedAddress to, const Word (&words)[4]) {
  std::memcpy(shared_at(to), words, sizeof(words));
}
inline void store_shared_4(SharedAddress to, Word word) {
  std::memcpy(shared_at(to), &word, sizeof(word));
}
inline void load_shared_16(Word (&words)[4], SharedAddress from) {
  std::memcpy(words, shared_at(from), sizeof(words));
}
inline void load_global_16(Word (&words)[4], const void* from) {
  std::memcpy(words, from, sizeof(words));
}
inline void store_global_16(void* to, const Word (&words)[4]) {
  std::memcpy(to, words, sizeof(words));
}

// forward_sm80's, which is not emulated.
void copy_async_16(SharedAddress to, const void* from, bool valid);
void copy_async_commit();
template <int kPending>
void copy_async_wait();
void load_matrix_x4(Word (&m)[4], SharedAddress row);
void load_matrix_x4_transposed(Word (&m)[4], SharedAddress row);

// ---- Conversions and arithmetic. ----

inline Word pack_bfloat16(float low, float high) {
  return Word{core::round_to<core::BFloat16>(high).bits} << 16 |
         core::round_to<core::BFloat16>(low).bits;
}
inline Word pack_float16(float low, float high) {
  return Word{core::round_to<core::Float16>(high).bits} << 16 |
         core::round_to<core::Float16>(low).bits;
}
inline float float_of_float16(Half bits) { return core::to_float(core::Float16{bits}); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float tanh_approx(float x) { return std::tanh(x); }

}  // namespace fa::cuda
