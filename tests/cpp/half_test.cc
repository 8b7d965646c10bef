#include "core/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "testing.h"

namespace fa::core {
namespace {

constexpr int kPatterns = 65536;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The value of a pattern by the definition of the format: (-1)^s 2^(e - bias) (1 + f / 2^m).
double by_definition(int bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double fraction = std::ldexp(bits & ((1 << mantissa_bits) - 1), -mantissa_bits);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0.0 ? sign * kInfinity : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kExponentBits = 5, kMantissaBits = 10;
};
template <>
struct Format<BFloat16> {
  static constexpr int kExponentBits = 8, kMantissaBits = 7;
};

template <class T>
class Half : public ::testing::Test {
 protected:
  static T pattern(int bits) { return T{static_cast<uint16_t>(bits)}; }
  static int rounded(double value) { return round_to<T>(value).bits; }
  static constexpr int kInfinityBits = ((1 << Format<T>::kExponentBits) - 1)
                                       << Format<T>::kMantissaBits;
};
using Formats = ::testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(Half, Formats);

TYPED_TEST(Half, widening_gives_the_defined_value_of_every_pattern) {
  for (int bits = 0; bits < kPatterns; ++bits) {
    const double expected =
        by_definition(bits, Format<TypeParam>::kExponentBits, Format<TypeParam>::kMantissaBits);
    const float value = to_float(this->pattern(bits));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value)) << bits;
    } else {
      EXPECT_EQ(value, expected) << bits;
      EXPECT_EQ(std::signbit(value), std::signbit(expected)) << bits;
    }
  }
}

TYPED_TEST(Half, every_pattern_survives_widening_and_narrowing) {
  for (int bits = 0; bits < kPatterns; ++bits) {
    const float value = to_float(this->pattern(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(round_to<TypeParam>(value)))) << bits;
      EXPECT_EQ(this->rounded(value) & 0x8000, bits & 0x8000) << bits;
    } else {
      EXPECT_EQ(this->rounded(value), bits);
    }
  }
}

// Between each finite pattern and the next: the midpoint goes to the even one, what lies a hair to
// either side of it to the nearer one. The hair is far below fp32, so that rounding twice shows.
TYPED_TEST(Half, narrowing_rounds_once_to_nearest_even) {
  for (int bits = 0; bits < this->kInfinityBits; ++bits) {
    const double low =
        by_definition(bits, Format<TypeParam>::kExponentBits, Format<TypeParam>::kMantissaBits);
    // Past the greatest finite value the next would be where infinity stands.
    const double step = bits + 1 == this->kInfinityBits ? low - to_float(this->pattern(bits - 1))
                                                        : to_float(this->pattern(bits + 1)) - low;
    const double middle = low + step / 2;
    EXPECT_EQ(this->rounded(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(this->rounded(std::nextafter(middle, 0.0)), bits);
    EXPECT_EQ(this->rounded(std::nextafter(middle, kInfinity)), bits + 1);
    EXPECT_EQ(this->rounded(-std::nextafter(middle, kInfinity)), (bits + 1) | 0x8000);
  }
}

TYPED_TEST(Half, narrowing_overflows_to_infinity) {
  for (double value : {1e39, 1e300, kInfinity}) {
    EXPECT_EQ(this->rounded(value), this->kInfinityBits);
    EXPECT_EQ(this->rounded(-value), this->kInfinityBits | 0x8000);
  }
}

TYPED_TEST(Half, narrowing_underflows_to_signed_zero) {
  for (double value : {1e-60, 1e-300, 5e-324, 0.0}) {
    EXPECT_EQ(this->rounded(value), 0);
    EXPECT_EQ(this->rounded(-value), 0x8000);
  }
}

TYPED_TEST(Half, narrowing_keeps_nan) {
  // The payload of the last is all in bits that the narrow type lacks.
  for (uint64_t bits : {0x7FF8000000000000u, 0xFFF8000000000000u, 0x7FF0000000000001u}) {
    EXPECT_TRUE(std::isnan(to_float(round_to<TypeParam>(std::bit_cast<double>(bits)))));
  }
}

TEST(half, known_patterns) {
  EXPECT_EQ(round_to<Float16>(1.0).bits, 0x3C00);
  EXPECT_EQ(round_to<Float16>(65504.0).bits, 0x7BFF);
  EXPECT_EQ(round_to<Float16>(65519.999).bits, 0x7BFF);
  EXPECT_EQ(round_to<Float16>(65520.0).bits, 0x7C00);
  EXPECT_EQ(round_to<Float16>(0x1p-24).bits, 0x0001);
  EXPECT_EQ(round_to<Float16>(0x1p-25).bits, 0x0000);
  EXPECT_EQ(round_to<Float16>(0x1p-14).bits, 0x0400);
  EXPECT_EQ(round_to<BFloat16>(1.0).bits, 0x3F80);
  EXPECT_EQ(round_to<BFloat16>(-3.140625).bits, 0xC049);
}

// Canaries are what the tests of all backends trust.
TEST(testing_tensor, notices_writes_past_either_end) {
  fa::testing::Tensor tensor(DataType::kBFloat16, {3, 5}, {7, 1});
  EXPECT_TRUE(tensor.canaries_intact());
  tensor.poison();
  EXPECT_TRUE(tensor.canaries_intact());
  auto* bytes = tensor.view().as<unsigned char>();
  bytes[tensor.bytes()] ^= 1;
  EXPECT_FALSE(tensor.canaries_intact());
  bytes[tensor.bytes()] ^= 1;
  bytes[-1] ^= 1;
  EXPECT_FALSE(tensor.canaries_intact());
}

TEST(testing_tensor, normalised_error_compares_infinities_and_nan_by_position) {
  fa::testing::Tensor tensor(DataType::kFloat32, {3});
  const std::vector<double> bound{2.0, 2.0, 2.0};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> values{1.0, kInfinity, nan};
  tensor.fill([&](int64_t index) { return values[index]; });
  const std::vector<double> close{1.5, kInfinity, nan};
  const std::vector<double> finite{1.0, 7.0, nan};
  const std::vector<double> negative{1.0, -kInfinity, nan};
  EXPECT_EQ(fa::testing::normalised_error(tensor, close.data(), bound.data()), 0.25);
  EXPECT_EQ(fa::testing::normalised_error(tensor, finite.data(), bound.data()), kInfinity);
  EXPECT_EQ(fa::testing::normalised_error(tensor, negative.data(), bound.data()), kInfinity);
}

}  // namespace
}  // namespace fa::core
