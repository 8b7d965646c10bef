// Which kernels there are, and what this processor can run of them.
#include "cpu/call.h"
#include "cpu/targets.h"

#include <hwy/detect_targets.h>

namespace fa::cpu {
namespace {

#if HWY_ARCH_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2");
}
// F16C too, which came before AVX2; not every compiler knows how to ask for it.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_sse4() { return __builtin_cpu_supports("sse4.2"); }
#endif
bool always() { return true; }

#if FA_CPU_HAS_PAIRS
// A target's kernels with other products. Half of a core's L2 for the state of panels, of 1 MiB
// that servers with these instructions have at least: tiles are packed once per call, so that more
// panels to a task would save no copies.
template <int64_t kTarget>
void add_pairs(const char* name, bool (*supported)(), const PairKernels* pairs,
               const RowPairKernels* row_pairs, std::vector<InstructionSet>& list) {
  constexpr int64_t kPanelBytes = 512 * 1024;
  list.push_back({name, supported, pair_forward_kernels<kTarget>(),
                  pair_backward_kernels<kTarget>(), panel_size<kTarget>(), kPairTileKeys,
                  kPanelBytes, pairs});
  list.back().backward_tasks = 64;
  list.back().row_pairs = row_pairs;
}
#endif

#if FA_CPU_HAS_PAIRS && HWY_ARCH_X86
bool has_amx() { return has_avx512() && has_amx_bf16(); }
bool has_pairs() { return has_avx512() && has_avx512_bf16(); }

void add_avx512_bf16(std::vector<InstructionSet>& list) {
  add_pairs<HWY_AVX3>("cpu:avx512_bf16", has_pairs, avx512_pair_kernels(),
                      avx512_row_pair_kernels(), list);
}
#endif

template <int64_t kTarget, ForwardKernels (*kForward)() = forward_kernels<kTarget>>
void add_if_compiled(const char* name, bool (*supported)(), std::vector<InstructionSet>& list) {
  if constexpr ((HWY_TARGETS & kTarget) != 0) {
    list.push_back(
        {name, supported, kForward(), backward_kernels<kTarget>(), panel_size<kTarget>()});
    list.back().ceilings = ceiling_loops<kTarget>();
  }
}

#if HWY_ARCH_X86
void add_avx512_wide(std::vector<InstructionSet>& list) {
  add_if_compiled<HWY_AVX3, wide_forward_kernels<HWY_AVX3>>("cpu:avx512_wide", has_avx512, list);
}
#endif

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> list;
#if HWY_ARCH_X86
  const bool is_amd = __builtin_cpu_is("amd");
#endif
#if FA_CPU_HAS_PAIRS && HWY_ARCH_X86
  add_pairs<HWY_AVX3>("cpu:amx", has_amx, amx_pair_kernels(), nullptr, list);
  // The dot products run at the speed of two FMAs on Zen 4 (164 GFLOP/s against 94 of fp32 FMAs),
  // and slower than the FMAs on Sapphire Rapids (72 against 105).
  if (is_amd) add_avx512_bf16(list);
#endif
#if HWY_ARCH_X86
  // Forward, 16 threads of Sapphire Rapids on shared cores: 2 to 15% faster from 2048 keys on. Zen
  // 4: 3% slower.
  if (!is_amd) add_avx512_wide(list);
  add_if_compiled<HWY_AVX3>("cpu:avx512", has_avx512, list);
  if (is_amd) add_avx512_wide(list);
#endif
#if FA_CPU_HAS_PAIRS && HWY_ARCH_X86
  if (!is_amd) add_avx512_bf16(list);
#endif
#if HWY_ARCH_X86
  add_if_compiled<HWY_AVX2>("cpu:avx2", has_avx2, list);
  add_if_compiled<HWY_SSE4>("cpu:sse4", has_sse4, list);
#endif
#if FA_CPU_HAS_PAIRS && HWY_ARCH_ARM
  // BFMMLA has four times the multiply-adds of an FMA and starts as often on Neoverse N2 and V1, by
  // their schedules; not measured.
  add_pairs<HWY_NEON>("cpu:neon_bf16", has_neon_bf16, neon_pair_kernels(), neon_row_pair_kernels(),
                      list);
#endif
  add_if_compiled<HWY_NEON>("cpu:neon", always, list);
  add_if_compiled<HWY_EMU128>("cpu:baseline", always, list);
  add_if_compiled<HWY_SCALAR>("cpu:baseline", always, list);
  return list;
}

}  // namespace fa::cpu
