// Compiles the forward once per instruction set; the processor is asked at run time.
#include "cpu/forward_call.h"
#include "cpu/targets.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cc"
#include <hwy/foreach_target.h>

#include "cpu/forward-inl.h"

#if HWY_ONCE
namespace fa::cpu {
namespace {

#if HWY_ARCH_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
bool has_sse4() { return __builtin_cpu_supports("sse4.2"); }
#endif
bool always() { return true; }

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> list;
#if HWY_TARGETS & HWY_AVX3
  list.push_back({"cpu:avx512", has_avx512, N_AVX3::forward_task, N_AVX3::kPanel});
#endif
#if HWY_TARGETS & HWY_AVX2
  list.push_back({"cpu:avx2", has_avx2, N_AVX2::forward_task, N_AVX2::kPanel});
#endif
#if HWY_TARGETS & HWY_SSE4
  list.push_back({"cpu:sse4", has_sse4, N_SSE4::forward_task, N_SSE4::kPanel});
#endif
#if HWY_TARGETS & HWY_NEON
  list.push_back({"cpu:neon", always, N_NEON::forward_task, N_NEON::kPanel});
#endif
#if HWY_TARGETS & HWY_EMU128
  list.push_back({"cpu:baseline", always, N_EMU128::forward_task, N_EMU128::kPanel});
#endif
#if HWY_TARGETS & HWY_SCALAR
  list.push_back({"cpu:baseline", always, N_SCALAR::forward_task, N_SCALAR::kPanel});
#endif
  return list;
}

}  // namespace fa::cpu
#endif  // HWY_ONCE
