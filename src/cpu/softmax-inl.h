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
  float* q;            // packed as the products want it
  float* o;            // not yet divided by the sum
  float* running_max;  // [kPanel], of scores in base 2
  float* running_sum;  // [kPanel]
};

// The subtrahend of scores: their maximum, or 0 while there is none.
HWY_INLINE Float finite_maximum(Float maximum) {
  return hn::IfThenElse(hn::Eq(maximum, hn::Set(kFloats, kMinusInfinity)), hn::Zero(kFloats),
                        maximum);
}

// Turns a column of scores into p = exp2(s - subtrahend) and returns their sum.
HWY_INLINE Float exponentials(float* HWY_RESTRICT column, const ScoreTile& tile,
                              semantics::Range rows, Float subtrahend) {
  Float sum0 = hn::Zero(kFloats), sum1 = hn::Zero(kFloats);
  const auto probability = [&](int64_t at) HWY_ATTR {
    const Float p = exp2(hn::Sub(hn::Load(kFloats, column + at * tile.row_step), subtrahend));
    hn::Store(p, kFloats, column + at * tile.row_step);
    return p;
  };
  int64_t row = rows.begin;
  for (; row + 2 <= rows.end; row += 2) {
    sum0 = hn::Add(sum0, probability(row));
    sum1 = hn::Add(sum1, probability(row + 1));
  }
  if (row < rows.end) sum0 = hn::Add(sum0, probability(row));
  return hn::Add(sum0, sum1);
}

// The largest of a column's scores.
HWY_INLINE Float column_maximum(const float* HWY_RESTRICT column, const ScoreTile& tile,
                                semantics::Range rows) {
  Float max0 = hn::Set(kFloats, kMinusInfinity), max1 = max0;
  int64_t row = rows.begin;
  for (; row + 2 <= rows.end; row += 2) {
    max0 = hn::Max(max0, hn::Load(kFloats, column + row * tile.row_step));
    max1 = hn::Max(max1, hn::Load(kFloats, column + (row + 1) * tile.row_step));
  }
  if (row < rows.end) max0 = hn::Max(max0, hn::Load(kFloats, column + row * tile.row_step));
  return hn::Max(max0, max1);
}

// Turns scores into exp2(s - max), updates maximum and sum, and has what was accumulated rescaled
// by rescale(corrections). rows_of(v) gives the rows of column v that matter; the others stay as
// they are.
template <class RowsOf, class Rescale>
HWY_INLINE void online_softmax(ForwardPanel& panel, const ScoreTile& tile, RowsOf&& rows_of,
                               Rescale&& rescale) {
  alignas(64) float correction[kPanel];
  bool any_rose = false;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* HWY_RESTRICT column = tile.at(0, v);
    const Float none = hn::Set(kFloats, kMinusInfinity);
    const Float old_max = panel.started ? hn::Load(kFloats, panel.running_max + v * kLanes) : none;
    const semantics::Range rows = rows_of(v);
    const Float new_max = hn::Max(old_max, column_maximum(column, tile, rows));
    const Float subtrahend = finite_maximum(new_max);
    Float sum = exponentials(column, tile, rows, subtrahend);

    hn::Store(new_max, kFloats, panel.running_max + v * kLanes);
    if (panel.started) {
      const Float factor = exp2(hn::Sub(old_max, subtrahend));
      hn::Store(factor, kFloats, correction + v * kLanes);
      any_rose = any_rose || !hn::AllTrue(kFloats, hn::Eq(old_max, new_max));
      sum = hn::MulAdd(hn::Load(kFloats, panel.running_sum + v * kLanes), factor, sum);
    }
    hn::Store(sum, kFloats, panel.running_sum + v * kLanes);
  }
  if (any_rose) rescale(correction);
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
