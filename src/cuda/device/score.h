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

// `score_of(row)` is the GeneralScore of a row's head.
template <int kTilesM, int kTilesN, bool kPacks, class ScoreOf>
__device__ inline void apply_general_score(Accumulator<kTilesM, kTilesN>& s, ScoreOf&& score_of,
                                           const Sequence& sequence, TileRows<kPacks> rows,
                                           int first_row, int first_key, int lane) {
  const auto any = score_of(first_row);
  for_each_score(s, first_row, first_key, lane,
                 [&](float& value, int, int) { value = any.scaled(value); });
  if (any.args.alibi_slopes != nullptr) {
    for_each_score(s, first_row, first_key, lane, [&](float& value, int row, int j) {
      value += score_of(row).alibi(rows.query_of(row), j);
    });
  }
  if (any.args.bias_element != BiasElement::kNone) {
    for_each_score(s, first_row, first_key, lane, [&](float& value, int row, int j) {
      const int i = rows.query_of(row);
      if (i < sequence.seqlen_q && j < sequence.seqlen_k) value += score_of(row).bias(i, j);
    });
  }
}

template <int kTilesM, int kTilesN>
__device__ inline void apply_softcap(Accumulator<kTilesM, kTilesN>& s, float scale) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.at[m][n][e] = tanh_approx(s.at[m][n][e] * scale);
    }
  }
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

// sink_h in fp32.
template <Element kElement>
__device__ inline float load_sink(const ScoreArgs& args, int head) {
  return args.sink_element == BiasElement::kFloat32 ? static_cast<const float*>(args.sink)[head]
                                                    : load_element<kElement>(args.sink, head);
}

}  // namespace fa::cuda
