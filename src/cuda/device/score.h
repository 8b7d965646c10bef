// From q k^T to the scores inside 2^x: scale, softcap, ALiBi, attn_bias; and the mask.
#pragma once

#include "cuda/device/element.h"
#include "cuda/device/mma.h"
#include "cuda/device/sequence.h"

namespace fa::cuda {

inline constexpr float kLog2e = static_cast<float>(semantics::kLog2e);
inline constexpr float kLn2 = static_cast<float>(semantics::kLn2);

// What the general score of one head needs; score(qk, i, j) is the score times kUnit. 16-bit
// kernels put it inside 2^x; fp32 ones inside e^x, which saves a rounding.
template <Element kElement>
struct GeneralScore {
  static constexpr float kUnit = kElement == Element::kFloat32 ? 1.0f : kLog2e;

  const ScoreArgs& args;
  int shift;    // position of row 0 among the keys: seqlen_k - seqlen_q
  float slope;  // times kUnit; 0: no ALiBi
  Index bias_offset;

  __device__ GeneralScore(const ForwardArgs& all, const Sequence& sequence, int head)
      : args(all.score), shift(sequence.seqlen_k - sequence.seqlen_q) {
    slope = args.alibi_slopes == nullptr
                ? 0.0f
                : args.alibi_slopes[sequence.batch * args.alibi_batch_stride + head] * kUnit;
    bias_offset = sequence.batch * args.bias_batch_stride + head * args.bias_head_stride;
  }

  // Scale and softcap.
  __device__ float scaled(float qk) const {
    const float s = qk * args.scale;
    if (args.softcap == 0.0f) return s * kUnit;
    if constexpr (kElement == Element::kFloat32) {
      return args.softcap * tanhf(s / args.softcap);
    } else {
      return args.softcap * kUnit * tanh_approx(s * (1.0f / args.softcap));
    }
  }

  __device__ float alibi(int i, int j) const {
    const int distance = i + shift - j;
    return slope * static_cast<float>(distance < 0 ? distance : -distance);
  }

  // Only for rows and keys of the sequence.
  __device__ float bias(int i, int j) const {
    const Index at = bias_offset + i * args.bias_row_stride + j * args.bias_key_stride;
    switch (args.bias_element) {
      case BiasElement::kOwn:
        return load_element<kElement>(args.bias, at) * kUnit;
      case BiasElement::kFloat32:
        return static_cast<const float*>(args.bias)[at] * kUnit;
      case BiasElement::kBoolean:
        return static_cast<const unsigned char*>(args.bias)[at] != 0 ? 0.0f : -kInfinity;
      default:
        return 0.0f;
    }
  }

  __device__ float operator()(float qk, int i, int j) const {
    float s = scaled(qk);
    if (slope != 0.0f) s += alibi(i, j);
    if (args.bias_element != BiasElement::kNone) s += bias(i, j);
    return s;
  }
};

// Calls body(value, row, key) for each element of a warp's accumulator, whose first row and key are
// given.
template <int kTilesM, int kTilesN, class Body>
__device__ inline void for_each_score(Accumulator<kTilesM, kTilesN>& s, int first_row,
                                      int first_key, int lane, Body&& body) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        body(s.at[m][n][e], first_row + m * 16 + lane / 4 + e / 2 * 8,
             first_key + n * 8 + lane % 4 * 2 + e % 2);
      }
    }
  }
}

// attn_bias at two neighbouring keys, the first of which lies at an even address among pairs.
template <Element kElement, BiasElement kBias>
__device__ inline float2 load_bias_pair(const void* bias, Index at) {
  if constexpr (kBias == BiasElement::kBoolean) {
    const auto keeps =
        *reinterpret_cast<const unsigned short*>(static_cast<const unsigned char*>(bias) + at);
    return {keeps % 256 != 0 ? 0.0f : -kInfinity, keeps / 256 != 0 ? 0.0f : -kInfinity};
  } else if constexpr (kBias == BiasElement::kFloat32) {
    return *reinterpret_cast<const float2*>(static_cast<const float*>(bias) + at);
  } else {
    const Word words = *reinterpret_cast<const Word*>(static_cast<const Half*>(bias) + at);
    return {to_float<kElement>(static_cast<Half>(words)),
            to_float<kElement>(static_cast<Half>(words >> 16))};
  }
}

template <Element kElement, BiasElement kBias>
__device__ inline float load_bias(const void* bias, Index at) {
  if constexpr (kBias == BiasElement::kBoolean) {
    return static_cast<const unsigned char*>(bias)[at] != 0 ? 0.0f : -kInfinity;
  } else {
    constexpr bool kIsFloat = kBias == BiasElement::kFloat32;
    return load_element < kIsFloat ? Element::kFloat32 : kElement > (bias, at);
  }
}

// How the keys of a step lie in the memory of attn_bias.
struct BiasKeys {
  Index stride;
  int last;  // of the sequence, counted from the lane's first; what lies behind it is not read
};

// Adds a row's bias to the scores of the lane's keys, of which the first has the bias at `at`.
template <Element kElement, BiasElement kBias, bool kPairs, int kTilesN>
__device__ inline void add_row_bias(float (&s)[kTilesN][4], int half, const void* bias, Index at,
                                    BiasKeys keys) {
  constexpr float kUnit = GeneralScore<kElement>::kUnit;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    float2 value;
    if constexpr (kPairs) {
      value = load_bias_pair<kElement, kBias>(bias, at + n * 8);
    } else {
      value.x = load_bias<kElement, kBias>(bias, at + min(n * 8, keys.last) * keys.stride);
      value.y = load_bias<kElement, kBias>(bias, at + min(n * 8 + 1, keys.last) * keys.stride);
    }
    s[n][2 * half] += value.x * kUnit;
    s[n][2 * half + 1] += value.y * kUnit;
  }
}

// Calls body(kind, in_pairs) with attn_bias's kind, and whether its keys may be read two at a time,
// as types.
template <BiasElement kBias, bool kPairs>
struct BiasLoad {
  static constexpr BiasElement kKind = kBias;
  static constexpr bool kInPairs = kPairs;
};

template <class Body>
__device__ inline void with_bias_load(BiasElement kind, bool in_pairs, Body&& body) {
  const auto with = [&]<BiasElement kKind>() {
    in_pairs ? body(BiasLoad<kKind, true>{}) : body(BiasLoad<kKind, false>{});
  };
  switch (kind) {
    case BiasElement::kOwn:
      return with.template operator()<BiasElement::kOwn>();
    case BiasElement::kFloat32:
      return with.template operator()<BiasElement::kFloat32>();
    case BiasElement::kBoolean:
      return with.template operator()<BiasElement::kBoolean>();
    case BiasElement::kNone:
      break;
  }
}

template <int kTilesM, int kTilesN, class Scale>
__device__ inline void scale_scores(Accumulator<kTilesM, kTilesN>& s, Scale&& scale) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.at[m][n][e] = scale(s.at[m][n][e]);
    }
  }
}

// Calls body(m, half, row, score) for each row of a lane; `score_of(row)` is the GeneralScore of a
// row's head, which is the same for all unless heads are packed.
template <int kTilesM, bool kPacks, class ScoreOf, class Body>
__device__ inline void for_each_row(ScoreOf&& score_of, int first_row, int lane, Body&& body) {
  const auto any = score_of(first_row);
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + lane / 4 + half * 8;
      if constexpr (kPacks) {
        body(m, half, row, score_of(row));
      } else {
        body(m, half, row, any);
      }
    }
  }
}

template <Element kElement, int kTilesM, int kTilesN, bool kPacks, class ScoreOf>
__device__ inline void apply_general_score(Accumulator<kTilesM, kTilesN>& s, ScoreOf&& score_of,
                                           const ScoreArgs& args, const Sequence& sequence,
                                           TileRows<kPacks> rows, int first_row, int first_key,
                                           int lane) {
  constexpr float kUnit = GeneralScore<kElement>::kUnit;
  if (args.softcap == 0.0f) {
    scale_scores(s, [factor = args.scale * kUnit](float qk) { return qk * factor; });
  } else {
    scale_scores(s, [inner = args.scale / args.softcap, outer = args.softcap * kUnit](float qk) {
      return outer * tanh_approx(qk * inner);
    });
  }
  const int lane_key = first_key + lane % 4 * 2;
  if (args.alibi_slopes != nullptr) {
    for_each_row<kTilesM, kPacks>(
        score_of, first_row, lane, [&](int m, int half, int row, const auto& score) {
          const auto distance = static_cast<float>(rows.query_of(row) + score.shift - lane_key);
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              s.at[m][n][2 * half + e] -=
                  score.slope * fabsf(distance - static_cast<float>(n * 8 + e));
            }
          }
        });
  }
  if (args.bias_element == BiasElement::kNone) return;
  const BiasKeys keys{args.bias_key_stride, sequence.seqlen_k - 1 - lane_key};
  const bool in_pairs = args.bias_has_pairs != 0 && first_key + kTilesN * 8 <= sequence.seqlen_k;
  with_bias_load(args.bias_element, in_pairs, [&](auto load) {
    using Load = decltype(load);
    for_each_row<kTilesM, kPacks>(
        score_of, first_row, lane, [&](int m, int half, int row, const auto& score) {
          const int i = min(rows.query_of(row), sequence.seqlen_q - 1);
          const Index at =
              score.bias_offset + i * args.bias_row_stride + lane_key * args.bias_key_stride;
          add_row_bias<kElement, Load::kKind, Load::kInPairs>(s.at[m], half, args.bias, at, keys);
        });
  });
}

template <int kTilesM, int kTilesN>
__device__ inline void apply_softcap(Accumulator<kTilesM, kTilesN>& s, float scale) {
  scale_scores(s, [scale](float qk) { return tanh_approx(qk * scale); });
}

// -infinity where a row does not see a key. Without a bound to the left, which is known for all of
// a launch, half of the comparisons are not needed.
template <bool kBoundedLeft, int kTilesM, int kTilesN, bool kPacks>
__device__ inline void apply_mask_within(Accumulator<kTilesM, kTilesN>& s, const ForwardArgs& args,
                                         const Sequence& sequence, TileRows<kPacks> rows,
                                         int first_row, int first_key, int lane) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const semantics::Range visible =
          visible_keys(args, sequence, rows.query_of(first_row + m * 16 + lane / 4 + half * 8));
      const int begin = static_cast<int>(visible.begin) - first_key - lane % 4 * 2;
      const int end = static_cast<int>(visible.end) - first_key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = n * 8 + e;
          if ((kBoundedLeft && key < begin) || key >= end) s.at[m][n][2 * half + e] = -kInfinity;
        }
      }
    }
  }
}

template <int kTilesM, int kTilesN, bool kPacks>
__device__ inline void apply_mask(Accumulator<kTilesM, kTilesN>& s, const ForwardArgs& args,
                                  const Sequence& sequence, TileRows<kPacks> rows, int first_row,
                                  int first_key, int lane) {
  if (args.shape.band_left < 0) {
    apply_mask_within<false>(s, args, sequence, rows, first_row, first_key, lane);
  } else {
    apply_mask_within<true>(s, args, sequence, rows, first_row, first_key, lane);
  }
}

// The larger of a row's maximum and its sink; finite, since differences from it are taken.
__device__ inline float join_sink(float highest, float sink) {
  constexpr float kLeast = __builtin_bit_cast(float, 0xFF7FFFFFu);
  return fmaxf(fmaxf(highest, sink), kLeast);
}

// The log-sum-exp of a row without a term: +infinity by convention, unless there is a sink, which
// is -infinity then.
__device__ inline float empty_lse(bool has_sink) { return has_sink ? -kInfinity : kInfinity; }

// sink_h in fp32.
template <Element kElement>
__device__ inline float load_sink(const ScoreArgs& args, int head) {
  return args.sink_element == BiasElement::kFloat32 ? static_cast<const float*>(args.sink)[head]
                                                    : load_element<kElement>(args.sink, head);
}

}  // namespace fa::cuda
