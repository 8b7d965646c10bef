// The vector vocabulary of src/cpu, on every instruction set of this machine.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/half.h"
#include "cpu/call.h"
#include "cpu/targets.h"

namespace fa::cpu {
template <int64_t kTarget>
void check_target();
}

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/cpp/vector_test.cc"
#include <hwy/foreach_target.h>

#include "cpu/microkernel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

template <class Function>
HWY_INLINE float apply(Function&& function, float x) {
  alignas(64) float lanes[kLanes];
  hn::Store(function(hn::Set(kFloats, x)), kFloats, lanes);
  return lanes[kLanes - 1];
}

void check_exp2() {
  const auto f = [](Float x) HWY_ATTR { return exp2(x); };
  EXPECT_EQ(apply(f, 0.0f), 1.0f);
  EXPECT_EQ(apply(f, kMinusInfinity), 0.0f);
  EXPECT_EQ(apply(f, -1000.0f), 0.0f);
  EXPECT_TRUE(std::isnan(apply(f, std::numeric_limits<float>::quiet_NaN())));
  double worst = 0;
  for (float x = -126.0f; x < 126.0f; x += 0.00731f) {
    const double want = std::exp2(static_cast<double>(x));
    worst = std::max(worst, std::abs(apply(f, x) - want) / want);
  }
  EXPECT_LT(worst, 2e-7);
}

void check_tanh() {
  const auto f = [](Float x) HWY_ATTR { return tanh(x); };
  EXPECT_EQ(apply(f, 0.0f), 0.0f);
  EXPECT_EQ(apply(f, std::numeric_limits<float>::infinity()), 1.0f);
  EXPECT_EQ(apply(f, kMinusInfinity), -1.0f);
  EXPECT_TRUE(std::isnan(apply(f, std::numeric_limits<float>::quiet_NaN())));
  double worst = 0;
  for (float x = -12.0f; x < 12.0f; x += 0.000713f) {
    const double want = std::tanh(static_cast<double>(x));
    if (want != 0) worst = std::max(worst, std::abs((apply(f, x) - want) / want));
  }
  EXPECT_LT(worst, 3e-7);
}

template <core::DataType kType, class Half>
void check_half() {
  alignas(64) uint16_t halves[kMaxLanes] = {};
  alignas(64) float floats[kMaxLanes] = {};
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    halves[0] = static_cast<uint16_t>(bits);
    hn::Store(load_widened<kType>(halves, 0), kFloats, floats);
    const float want = core::to_float(Half{static_cast<uint16_t>(bits)});
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(floats[0])) << bits;
      continue;
    }
    ASSERT_EQ(std::bit_cast<uint32_t>(floats[0]), std::bit_cast<uint32_t>(want)) << bits;
  }
  // Neighbours of every half and of every midpoint between two of them.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float at = core::to_float(Half{static_cast<uint16_t>(bits)});
    const float next = core::to_float(Half{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((static_cast<double>(at) + next) / 2);
    for (float x : {at, middle, std::nextafterf(middle, at), std::nextafterf(middle, next)}) {
      store_narrowed<kType>(hn::Set(kFloats, x), halves, 0);
      const Half want = core::round_to<Half>(x);
      if (std::isnan(x)) {
        EXPECT_TRUE(std::isnan(core::to_float(Half{halves[0]})));
      } else {
        ASSERT_EQ(halves[0], want.bits) << x;
      }
    }
  }
}

void check_rows() {
  for (int64_t n = 1; n <= 40; ++n) {
    std::vector<float> from(n);
    for (int64_t i = 0; i < n; ++i) from[i] = static_cast<float>(i + 1);
    alignas(64) float row[64];
    std::fill_n(row, 64, -7.0f);
    widen_row<core::DataType::kFloat32>(from.data(), n, row);
    for (int64_t i = 0; i < round_up(n, kLanes); ++i) EXPECT_EQ(row[i], i < n ? from[i] : 0.0f);
    for (int64_t i = round_up(n, kLanes); i < 64; ++i) EXPECT_EQ(row[i], -7.0f);
    std::vector<float> to(n + 1, -7.0f);
    narrow_row<core::DataType::kFloat32>(row, hn::Set(kFloats, 2.0f), n, to.data());
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(to[i], 2 * from[i]);
    EXPECT_EQ(to[n], -7.0f);
  }
}

void check_all() {
  check_exp2();
  check_tanh();
  check_half<core::DataType::kFloat16, core::Float16>();
  check_half<core::DataType::kBFloat16, core::BFloat16>();
  check_rows();
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();

namespace fa::cpu {

template <>
void check_target<HWY_TARGET>() {
  HWY_NAMESPACE::check_all();
}

}  // namespace fa::cpu

#if HWY_ONCE
namespace fa::cpu {
namespace {

bool runs_here(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (name == set.name) return set.supported();
  }
  return false;
}

template <int64_t kTarget>
int check(const char* name) {
  if constexpr ((HWY_TARGETS & kTarget) != 0) {
    if (runs_here(name)) {
      SCOPED_TRACE(name);
      check_target<kTarget>();
      return 1;
    }
  }
  return 0;
}

TEST(Vector, functions_meet_their_bounds_on_each_instruction_set) {
  const int checked = check<HWY_AVX3>("cpu:avx512") + check<HWY_AVX2>("cpu:avx2") +
                      check<HWY_SSE4>("cpu:sse4") + check<HWY_NEON>("cpu:neon") +
                      check<HWY_EMU128>("cpu:baseline") + check<HWY_SCALAR>("cpu:baseline");
  EXPECT_GT(checked, 0);
}

}  // namespace
}  // namespace fa::cpu
#endif  // HWY_ONCE
