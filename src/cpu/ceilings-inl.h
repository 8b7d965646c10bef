// The loops whose speed is a ceiling. Included once per target.
#if defined(FA_CPU_CEILINGS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_CEILINGS_INL_H_
#undef FA_CPU_CEILINGS_INL_H_
#else
#define FA_CPU_CEILINGS_INL_H_
#endif

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Enough for two units of latency 4 or 5; with the two factors they leave room in 16 registers.
inline constexpr int kChains = 12;

// Register by register, so that nothing but the multiply-adds is measured.
double multiply_add_loop(int64_t repeats) {
  // Read from memory, for the compiler not to know them; the sums tend to 2.
  volatile float half = 0.5f, one = 1.0f;
  const Float factor = hn::Set(kFloats, half), addend = hn::Set(kFloats, one);
  Float sum[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sum[c] = hn::Set(kFloats, half);
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = hn::MulAdd(sum[c], factor, addend);
  }
  Float total = sum[0];
  for (int c = 1; c < kChains; ++c) total = hn::Add(total, sum[c]);
  volatile float sink = hn::GetLane(total);
  static_cast<void>(sink);
  return 2.0 * kChains * kLanes * static_cast<double>(repeats);
}

uint64_t read_loop(const void* memory, int64_t bytes) {
  const auto* words = static_cast<const uint32_t*>(memory);
  constexpr int kStreams = 4;
  Word sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = hn::Zero(kWords);
  const int64_t n = bytes / static_cast<int64_t>(sizeof(uint32_t));
  for (int64_t i = 0; i < n; i += kStreams * kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      sum[s] = hn::Xor(sum[s], hn::Load(kWords, words + i + s * kLanes));
    }
  }
  const Word all = hn::Xor(hn::Xor(sum[0], sum[1]), hn::Xor(sum[2], sum[3]));
  return hn::GetLane(all);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
