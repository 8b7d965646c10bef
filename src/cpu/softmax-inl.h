// The online softmax (Milakov and Gimelshein, 2018) of a panel of queries, tile by tile.
#if defined(FA_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_SOFTMAX_INL_H_
#undef FA_CPU_SOFTMAX_INL_H_
#else
#define FA_CPU_SOFTMAX_INL_H_
#endif

#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// A panel and its state of the online softmax, one lane per query.
struct ForwardPanel : QueryPanel {
  bool started;        // o, running_max and running_sum hold something
  float* q;            // Q^T: [depth][kPanel], times scale * log2(e)
  float* o;            // [kPanel][value_row], not yet divided by the sum
  float* running_max;  // [kPanel], of scores in base 2
  float* running_sum;  // [kPanel]
};

// The subtrahend of scores: their maximum, or 0 while there is none.
HWY_INLINE Float finite_maximum(Float maximum) {
  return hn::IfThenElse(hn::Eq(maximum, hn::Set(kFloats, kMinusInfinity)), hn::Zero(kFloats),
                        maximum);
}

// Multiplies the accumulators of queries whose maximum rose.
HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction,
                        int64_t value_row) {
  for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
    if (correction[lane] == 1.0f) continue;
    const Float factor = hn::Set(kFloats, correction[lane]);
    float* HWY_RESTRICT o = panel.o + lane * value_row;
    for (int64_t d = 0; d < value_row; d += kLanes) {
      hn::Store(hn::Mul(hn::Load(kFloats, o + d), factor), kFloats, o + d);
    }
  }
}

// Turns the scores into exp2(s - max), updates maximum and sum, and rescales what was accumulated.
HWY_INLINE void online_softmax(ForwardPanel& panel, const ScoreTile& tile, int64_t value_row) {
  alignas(64) float correction[kPanel];
  bool any_rose = false;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* HWY_RESTRICT column = tile.scores + v * kLanes;
    const Float none = hn::Set(kFloats, kMinusInfinity);
    const Float old_max = panel.started ? hn::Load(kFloats, panel.running_max + v * kLanes) : none;
    Float max0 = old_max, max1 = none;
    int64_t row = tile.begin;
    for (; row + 2 <= tile.end; row += 2) {
      max0 = hn::Max(max0, hn::Load(kFloats, column + row * kPanel));
      max1 = hn::Max(max1, hn::Load(kFloats, column + (row + 1) * kPanel));
    }
    if (row < tile.end) max0 = hn::Max(max0, hn::Load(kFloats, column + row * kPanel));
    const Float new_max = hn::Max(max0, max1);
    const Float subtrahend = finite_maximum(new_max);

    Float sum0 = hn::Zero(kFloats), sum1 = hn::Zero(kFloats);
    const auto probability = [&](int64_t at) HWY_ATTR {
      const Float p = exp2(hn::Sub(hn::Load(kFloats, column + at * kPanel), subtrahend));
      hn::Store(p, kFloats, column + at * kPanel);
      return p;
    };
    for (row = tile.begin; row + 2 <= tile.end; row += 2) {
      sum0 = hn::Add(sum0, probability(row));
      sum1 = hn::Add(sum1, probability(row + 1));
    }
    if (row < tile.end) sum0 = hn::Add(sum0, probability(row));
    Float sum = hn::Add(sum0, sum1);

    hn::Store(new_max, kFloats, panel.running_max + v * kLanes);
    if (panel.started) {
      const Float factor = exp2(hn::Sub(old_max, subtrahend));
      hn::Store(factor, kFloats, correction + v * kLanes);
      any_rose = any_rose || !hn::AllTrue(kFloats, hn::Eq(old_max, new_max));
      sum = hn::MulAdd(hn::Load(kFloats, panel.running_sum + v * kLanes), factor, sum);
    }
    hn::Store(sum, kFloats, panel.running_sum + v * kLanes);
  }
  if (any_rose) rescale(panel, correction, value_row);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
