// The instructions that C++ has no words for, one function each.
#pragma once

namespace fa::cuda {

using Word = unsigned int;
using SharedAddress = unsigned int;  // of the shared window, in bytes

using Half = unsigned short;

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Turing, 7.5, copies in the foreground, multiplies 8 deep, and converts one number at a time.
#ifdef FA_AS_TURING  // a test's, on newer devices
inline constexpr bool kIsTuring = true;
#else
inline constexpr bool kIsTuring = __CUDA_ARCH__ < 800;
#endif

// ---- Copies. ----

__device__ inline void store_shared_16(SharedAddress to, const Word (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ inline void store_shared_4(SharedAddress to, Word word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ inline void load_shared_16(Word (&words)[4], SharedAddress from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

__device__ inline void load_global_16(Word (&words)[4], const void* from) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from)
               : "memory");
}

__device__ inline void store_global_16(void* to, const Word (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// 16 bytes from global to shared memory, in the background; zeros where `valid` is false.
__device__ inline void copy_async_16(SharedAddress to, const void* from, bool valid) {
  if constexpr (kIsTuring) {
    Word words[4] = {};
    if (valid) load_global_16(words, from);
    store_shared_16(to, words);
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }
}

__device__ inline void copy_async_commit() {
  if constexpr (!kIsTuring) asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the newest kPending groups of this thread have arrived.
template <int kPending>
__device__ inline void copy_async_wait() {
  if constexpr (!kIsTuring) asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices of 8x8 16-bit elements, one row's address per lane. ----

__device__ inline void load_matrix_x4(Word (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_matrix_x4_transposed(Word (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// ---- Conversions, to nearest even; `low` into the low half of a word. ----

__device__ inline Word pack_bfloat16(float low, float high) {
  Word packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline Word pack_float16(float low, float high) {
  Word packed;
  if constexpr (kIsTuring) {
    asm("{ .reg .f16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; "
        "mov.b32 %0, {low, high}; }"
        : "=r"(packed)
        : "f"(low), "f"(high));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

__device__ inline float float_of_float16(Half bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// ---- Arithmetic. ----

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh to an absolute error of 2e-7; the instruction tanh.approx is off by 5e-4.
__device__ inline float tanh_approx(float x) {
  constexpr float kTwoLog2e = 2.8853900817779268f;
  return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(x * kTwoLog2e));
}

__device__ inline Word shuffle_xor(Word value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

}  // namespace fa::cuda
