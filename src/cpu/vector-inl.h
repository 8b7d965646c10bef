// Vector vocabulary: loads that widen, stores that narrow, exp2, tanh. Included once per target.
#if defined(FA_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_VECTOR_INL_H_
#undef FA_CPU_VECTOR_INL_H_
#else
#define FA_CPU_VECTOR_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "core/tensor_view.h"
#include "cpu/exp2_polynomial.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Never wider than kMaxLanes; every vector below holds fp32.
using FloatTag = hn::CappedTag<float, 16>;
using Float = hn::Vec<FloatTag>;
using IntTag = hn::RebindToSigned<FloatTag>;
using WordTag = hn::RebindToUnsigned<FloatTag>;
using Word = hn::Vec<WordTag>;
using HalfTag = hn::Rebind<uint16_t, FloatTag>;
inline constexpr FloatTag kFloats{};
inline constexpr IntTag kInts{};
inline constexpr WordTag kWords{};
inline constexpr HalfTag kHalves{};
inline constexpr int64_t kLanes = HWY_MIN(16, HWY_LANES(float));

inline constexpr float kMinusInfinity = -__builtin_inff();

// A loaded vector that stays in its register: GCC would load it anew for each product that uses it,
// and Zen 4 loads no more than one 512-bit vector per cycle (92 against 115 GFLOP/s).
HWY_INLINE Float in_register(Float x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSE4
  asm("" : "+v"(x.raw));
#endif
  return x;
}

// first, first + 1, ... by lanes. Highway's Iota goes through memory, element by element.
HWY_INLINE hn::Vec<IntTag> lanes_from(int32_t first) {
  alignas(64) static constexpr int32_t kNumbers[kMaxLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                              8, 9, 10, 11, 12, 13, 14, 15};
  return hn::Add(hn::Load(kInts, kNumbers), hn::Set(kInts, first));
}

// max(low, x), NaN where x is: Highway's Max leaves that to the instruction set, and only x86's
// takes the second operand.
HWY_INLINE Float at_least(float low, Float x) {
#if !HWY_ARCH_X86 || HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
  return hn::IfThenElse(hn::Lt(x, hn::Set(kFloats, low)), hn::Set(kFloats, low), x);
#else
  return hn::Max(hn::Set(kFloats, low), x);
#endif
}

// 2^x, relative error under 2e-7; 0 for x <= -127, -inf included; NaN for NaN. x < 128.
HWY_INLINE Float exp2(Float x) {
  const Float magic = hn::Set(kFloats, kExp2Magic);
  x = at_least(-127.0f, x);
  const Float shifted = hn::Add(x, magic);
  const Float f = hn::Sub(x, hn::Sub(shifted, magic));
  const Float power = hn::BitCast(kFloats, hn::ShiftLeft<23>(hn::BitCast(kWords, shifted)));
  Float p = hn::Set(kFloats, kExp2Polynomial[0]);
  p = hn::MulAdd(p, f, hn::Set(kFloats, kExp2Polynomial[1]));
  p = hn::MulAdd(p, f, hn::Set(kFloats, kExp2Polynomial[2]));
  p = hn::MulAdd(p, f, hn::Set(kFloats, kExp2Polynomial[3]));
  p = hn::MulAdd(p, f, hn::Set(kFloats, kExp2Polynomial[4]));
  p = hn::MulAdd(p, f, hn::Set(kFloats, kExp2Polynomial[5]));
  return hn::Mul(p, power);
}

// Relative error under 3e-7: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
HWY_INLINE Float tanh(Float x) {
  const Float magnitude = hn::Min(hn::Abs(x), hn::Set(kFloats, 10.0f));
  const Float e = exp2(hn::Mul(magnitude, hn::Set(kFloats, 2.8853900817779268f)));
  const Float one = hn::Set(kFloats, 1.0f);
  const Float large = hn::Sub(one, hn::Div(hn::Set(kFloats, 2.0f), hn::Add(e, one)));
  const Float z = hn::Mul(x, x);
  Float p = hn::Set(kFloats, -0.005704962182790041f);
  p = hn::MulAdd(p, z, hn::Set(kFloats, 0.02063906565308571f));
  p = hn::MulAdd(p, z, hn::Set(kFloats, -0.05373970791697502f));
  p = hn::MulAdd(p, z, hn::Set(kFloats, 0.13331441581249237f));
  p = hn::MulAdd(p, z, hn::Set(kFloats, -0.3333328068256378f));
  const Float small = hn::MulAdd(hn::Mul(p, z), x, x);
  const auto is_small = hn::Lt(hn::Abs(x), hn::Set(kFloats, 0.625f));
  const Float result = hn::IfThenElse(is_small, small, hn::CopySign(large, x));
  return hn::IfThenElse(hn::IsNaN(x), x, result);
}

// ---- 16-bit types ----

HWY_INLINE Float widen_bfloat16(hn::Vec<HalfTag> bits) {
  return hn::BitCast(kFloats, hn::ShiftLeft<16>(hn::PromoteTo(kWords, bits)));
}

HWY_INLINE Float widen_float16(hn::Vec<HalfTag> bits) {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON  // the processor converts
  const hn::Rebind<hwy::float16_t, FloatTag> tag;
  return hn::PromoteTo(kFloats, hn::BitCast(tag, bits));
#else
  // Exponent and mantissa moved into place are the value times 2^-112, subnormals included.
  const Word wide = hn::PromoteTo(kWords, bits);
  const Word shifted = hn::ShiftLeft<13>(hn::And(wide, hn::Set(kWords, 0x7FFFu)));
  const Word finite =
      hn::BitCast(kWords, hn::Mul(hn::BitCast(kFloats, shifted), hn::Set(kFloats, 0x1p112f)));
  const Word special = hn::Or(shifted, hn::Set(kWords, 0x7F800000u));
  const auto is_special = hn::Gt(hn::BitCast(kInts, shifted), hn::Set(kInts, 0x0F7FFFFF));
  const Word magnitude = hn::IfThenElse(hn::RebindMask(kWords, is_special), special, finite);
  const Word sign = hn::ShiftLeft<16>(hn::And(wide, hn::Set(kWords, 0x8000u)));
  return hn::BitCast(kFloats, hn::Or(magnitude, sign));
#endif
}

// Values are below 2^16.
HWY_INLINE hn::Vec<HalfTag> low_halves(Word words) {
  return hn::DemoteTo(kHalves, hn::BitCast(kInts, words));
}

HWY_INLINE hn::Vec<HalfTag> narrow_bfloat16(Float x) {
  const Word bits = hn::BitCast(kWords, x);
  const Word odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(kWords, 1u));
  const Word rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(kWords, 0x7FFFu)), odd));
  const auto nan = hn::RebindMask(kWords, hn::IsNaN(x));
  return low_halves(hn::IfThenElse(nan, hn::Set(kWords, 0x7FC0u), rounded));
}

HWY_INLINE hn::Vec<HalfTag> narrow_float16(Float x) {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
  const hn::Rebind<hwy::float16_t, FloatTag> tag;
  return hn::BitCast(kHalves, hn::DemoteTo(tag, x));
#else
  const Word bits = hn::BitCast(kWords, x);
  const Word sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(kWords, 0x8000u));
  const Float magnitude = hn::Abs(x);
  const Word m = hn::BitCast(kWords, magnitude);
  // Rebias the exponent and round to nearest even.
  const Word odd = hn::And(hn::ShiftRight<13>(m), hn::Set(kWords, 1u));
  const Word normal = hn::ShiftRight<13>(hn::Add(hn::Add(m, hn::Set(kWords, 0xC8000FFFu)), odd));
  // Below 2^-14, adding 1/2 rounds at the subnormals' granularity, 2^-24.
  const Word subnormal = hn::Sub(hn::BitCast(kWords, hn::Add(magnitude, hn::Set(kFloats, 0.5f))),
                                 hn::Set(kWords, 0x3F000000u));
  const auto words = [](auto mask) HWY_ATTR { return hn::RebindMask(kWords, mask); };
  Word result =
      hn::IfThenElse(words(hn::Lt(magnitude, hn::Set(kFloats, 0x1p-14f))), subnormal, normal);
  result = hn::IfThenElse(words(hn::Ge(magnitude, hn::Set(kFloats, 65520.0f))),
                          hn::Set(kWords, 0x7C00u), result);
  result = hn::IfThenElse(words(hn::IsNaN(x)), hn::Set(kWords, 0x7E00u), result);
  return low_halves(hn::Or(result, sign));
#endif
}

// Both rounded to bfloat16, half a unit up, in the low and the high half of each word. For numbers
// that are not negative.
HWY_INLINE Word pair_of_bfloat16(Float low, Float high) {
  const Word half = hn::Set(kWords, 0x8000u);
  const Word low_bits = hn::ShiftRight<16>(hn::Add(hn::BitCast(kWords, low), half));
  const Word high_bits = hn::Add(hn::BitCast(kWords, high), half);
  return hn::Or(hn::And(high_bits, hn::Set(kWords, 0xFFFF0000u)), low_bits);
}

// ---- Rows of any dtype ----

template <core::DataType kType>
HWY_INLINE Float load_widened(const void* row, int64_t index) {
  if constexpr (kType == core::DataType::kFloat32) {
    return hn::LoadU(kFloats, static_cast<const float*>(row) + index);
  } else {
    const auto bits = hn::LoadU(kHalves, static_cast<const uint16_t*>(row) + index);
    return kType == core::DataType::kBFloat16 ? widen_bfloat16(bits) : widen_float16(bits);
  }
}

template <core::DataType kType>
HWY_INLINE void store_narrowed(Float x, void* row, int64_t index) {
  if constexpr (kType == core::DataType::kFloat32) {
    hn::StoreU(x, kFloats, static_cast<float*>(row) + index);
  } else {
    const auto bits = kType == core::DataType::kBFloat16 ? narrow_bfloat16(x) : narrow_float16(x);
    hn::StoreU(bits, kHalves, static_cast<uint16_t*>(row) + index);
  }
}

// Calls body with the dtype as a compile-time value.
template <class Body>
HWY_INLINE void dispatch_dtype(core::DataType dtype, Body&& body) {
  using core::DataType;
  if (dtype == DataType::kFloat32) {
    body(std::integral_constant<DataType, DataType::kFloat32>{});
  } else if (dtype == DataType::kBFloat16) {
    body(std::integral_constant<DataType, DataType::kBFloat16>{});
  } else {
    body(std::integral_constant<DataType, DataType::kFloat16>{});
  }
}

// to[0 .. n) = from[0 .. n) in fp32, and zeros up to a whole vector.
template <core::DataType kType>
HWY_INLINE void widen_row(const void* from, int64_t n, float* HWY_RESTRICT to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    hn::Store(load_widened<kType>(from, i), kFloats, to + i);
  }
  if (i < n) {
    constexpr int64_t kBytes = core::byte_size(kType);
    alignas(64) char rest[kMaxLanes * kBytes] = {};
    std::memcpy(rest, static_cast<const char*>(from) + i * kBytes, (n - i) * kBytes);
    hn::Store(load_widened<kType>(rest, 0), kFloats, to + i);
  }
}

// sum of a[i] * b[i] over n.
template <core::DataType kType>
HWY_INLINE float inner_product(const char* a, const char* b, int64_t n) {
  constexpr int64_t kBytes = core::byte_size(kType);
  Float sum = hn::Zero(kFloats);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    sum = hn::MulAdd(load_widened<kType>(a, i), load_widened<kType>(b, i), sum);
  }
  if (i < n) {
    alignas(64) float rest_a[kMaxLanes], rest_b[kMaxLanes];
    widen_row<kType>(a + i * kBytes, n - i, rest_a);
    widen_row<kType>(b + i * kBytes, n - i, rest_b);
    sum = hn::MulAdd(hn::Load(kFloats, rest_a), hn::Load(kFloats, rest_b), sum);
  }
  return hn::GetLane(hn::SumOfLanes(kFloats, sum));
}

// to[0 .. n) = from[0 .. n) * factor, rounded to the type.
template <core::DataType kType>
HWY_INLINE void narrow_row(const float* HWY_RESTRICT from, Float factor, int64_t n, void* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_narrowed<kType>(hn::Mul(hn::Load(kFloats, from + i), factor), to, i);
  }
  if (i < n) {
    constexpr int64_t kBytes = core::byte_size(kType);
    alignas(64) char rest[kMaxLanes * kBytes];
    store_narrowed<kType>(hn::Mul(hn::Load(kFloats, from + i), factor), rest, 0);
    std::memcpy(static_cast<char*>(to) + i * kBytes, rest, (n - i) * kBytes);
  }
}

// to[d * to_row + i] = from[i * from_row + d] * factor, for 4 rows i and d in [0, n).
HWY_INLINE void transpose_4_rows(const float* HWY_RESTRICT from, int64_t from_row, int64_t n,
                                 float factor, float* HWY_RESTRICT to, int64_t to_row) {
  int64_t d = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> four;
  const hn::FixedTag<uint64_t, 2> pairs;
  const auto scale = hn::Set(four, factor);
  for (; d + 4 <= n; d += 4) {
    const auto row0 = hn::LoadU(four, from + d);
    const auto row1 = hn::LoadU(four, from + from_row + d);
    const auto row2 = hn::LoadU(four, from + 2 * from_row + d);
    const auto row3 = hn::LoadU(four, from + 3 * from_row + d);
    const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(four, row0, row1));
    const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(four, row2, row3));
    const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(four, row0, row1));
    const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(four, row2, row3));
    const auto store = [&](auto column, int64_t at) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::BitCast(four, column), scale), four, to + (d + at) * to_row);
    };
    store(hn::InterleaveLower(pairs, low01, low23), 0);
    store(hn::InterleaveUpper(pairs, low01, low23), 1);
    store(hn::InterleaveLower(pairs, high01, high23), 2);
    store(hn::InterleaveUpper(pairs, high01, high23), 3);
  }
#endif
  for (; d < n; ++d) {
    for (int64_t i = 0; i < 4; ++i) to[d * to_row + i] = from[i * from_row + d] * factor;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
