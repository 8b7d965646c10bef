// fp16 and bf16 as bits, and their conversions, exact or correctly rounded on any compiler.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace fa::core {

struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of an fp32
  uint16_t bits;
};

static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559);

namespace half_detail {

inline constexpr int kDoubleMantissaBits = 52;
inline constexpr int kDoubleBias = 1023;
inline constexpr uint64_t kDoubleSignificandMask = (uint64_t{1} << kDoubleMantissaBits) - 1;

// `value / 2^shift`, ties to even. shift >= 1.
constexpr uint64_t shift_right_to_nearest_even(uint64_t value, int shift) {
  if (shift > 63) return 0;
  const uint64_t quotient = value >> shift;
  const uint64_t rest = value & ((uint64_t{1} << shift) - 1);
  const uint64_t half = uint64_t{1} << (shift - 1);
  return quotient + (rest > half || (rest == half && (quotient & 1) != 0) ? 1 : 0);
}

// Rounds once, to nearest even; overflow gives infinity, a NaN stays a (quiet) NaN.
template <int kExponentBits, int kMantissaBits>
constexpr uint16_t narrow(double value) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint16_t kInfinity = ((1 << kExponentBits) - 1) << kMantissaBits;
  constexpr int kDropped = kDoubleMantissaBits - kMantissaBits;
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 63 << 15);
  const int exponent = static_cast<int>(bits >> kDoubleMantissaBits & 0x7FF);
  const uint64_t fraction = bits & kDoubleSignificandMask;
  if (exponent == 0x7FF) {
    const uint64_t quiet = uint64_t{1} << (kMantissaBits - 1);
    const uint64_t payload = fraction == 0 ? 0 : (fraction >> kDropped | quiet);
    return static_cast<uint16_t>(sign | kInfinity | payload);
  }
  const int target = exponent - kDoubleBias + kBias;  // biased exponent in the narrow type
  if (target >= (1 << kExponentBits) - 1) return sign | kInfinity;
  if (target <= 0) {  // subnormal: the leading one becomes a bit of the fraction
    const uint64_t significand = exponent == 0 ? 0 : fraction | uint64_t{1} << kDoubleMantissaBits;
    const uint64_t rounded = shift_right_to_nearest_even(significand, kDropped + 1 - target);
    return static_cast<uint16_t>(sign | rounded);
  }
  // A carry out of the fraction moves into the exponent, up to infinity, as it should.
  const uint64_t joined = static_cast<uint64_t>(target) << kDoubleMantissaBits | fraction;
  return static_cast<uint16_t>(sign | shift_right_to_nearest_even(joined, kDropped));
}

}  // namespace half_detail

constexpr float to_float(float value) { return value; }

constexpr float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

constexpr float to_float(Float16 value) {
  constexpr float kSmallestSubnormal = 1.0f / (1 << 24);
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 0x1Fu;
  const uint32_t fraction = value.bits & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * kSmallestSubnormal;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t widened = exponent == 0x1Fu ? 0xFFu : exponent - 15 + 127;
  return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

// Rounds `value`, once, to T. An fp32 argument converts to double exactly.
template <class T>
constexpr T round_to(double value);

template <>
constexpr float round_to<float>(double value) {
  return static_cast<float>(value);
}

template <>
constexpr Float16 round_to<Float16>(double value) {
  return {half_detail::narrow<5, 10>(value)};
}

template <>
constexpr BFloat16 round_to<BFloat16>(double value) {
  return {half_detail::narrow<8, 7>(value)};
}

}  // namespace fa::core
