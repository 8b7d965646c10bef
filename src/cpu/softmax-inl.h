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

// Pairs of keys take the place of the first half of a column's fp32 rows.
HWY_INLINE void store_pair(Float even, Float odd, float* HWY_RESTRICT column, int64_t row) {
  hn::Store(hn::BitCast(kFloats, pair_of_bfloat16(even, odd)), kFloats, column + row / 2 * kLanes);
}

// Pairs between the tile's keys and the next multiples of kPairDepth: zeros, since they get
// multiplied.
HWY_INLINE void clear_pairs_around(const QueryPanel& panel, const ScoreTile& tile) {
  const auto clear = [&](int64_t begin, int64_t end) HWY_ATTR {
    if (begin >= end) return;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      std::fill_n(tile.at(begin, v), (end - begin) * kLanes, 0.0f);
    }
  };
  clear(tile.begin / kPairDepth * kPairDepth / 2, tile.begin / 2);
  clear((tile.end + 1) / 2, round_up(tile.end, kPairDepth) / 2);
}

// Rounds probabilities to pairs, in place.
HWY_INLINE void pack_pairs(const QueryPanel& panel, const ScoreTile& tile) {
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const auto at = [&](int64_t r) HWY_ATTR {
      return r >= tile.begin && r < tile.end ? hn::Load(kFloats, tile.at(r, v)) : hn::Zero(kFloats);
    };
    for (int64_t row = tile.begin / 2 * 2; row < tile.end; row += 2) {
      store_pair(at(row), at(row + 1), tile.at(0, v), row);
    }
  }
}

// Turns a column of scores into p = exp2(s * scale - subtrahend) and returns their sum. kPacks:
// leaves them in pairs.
template <bool kPacks>
HWY_INLINE Float exponentials(float* HWY_RESTRICT column, const ScoreTile& tile,
                              semantics::Range rows, Float scale, Float subtrahend) {
  Float sum0 = hn::Zero(kFloats), sum1 = hn::Zero(kFloats);
  int64_t row = rows.begin;
  if constexpr (kPacks) {
    const auto probability = [&](int64_t at) HWY_ATTR {
      return exp2(hn::MulSub(hn::Load(kFloats, column + at * tile.row_step), scale, subtrahend));
    };
    if (row % 2 != 0) {
      sum1 = probability(row);
      store_pair(hn::Zero(kFloats), sum1, column, row - 1);
      ++row;
    }
    for (; row + 2 <= rows.end; row += 2) {
      const Float even = probability(row), odd = probability(row + 1);
      sum0 = hn::Add(sum0, even);
      sum1 = hn::Add(sum1, odd);
      store_pair(even, odd, column, row);
    }
    if (row < rows.end) {
      const Float even = probability(row);
      sum0 = hn::Add(sum0, even);
      store_pair(even, hn::Zero(kFloats), column, row);
    }
  } else {
    const auto probability = [&](int64_t at) HWY_ATTR {
      const Float p = exp2(hn::Sub(hn::Load(kFloats, column + at * tile.row_step), subtrahend));
      hn::Store(p, kFloats, column + at * tile.row_step);
      return p;
    };
    for (; row + 2 <= rows.end; row += 2) {
      sum0 = hn::Add(sum0, probability(row));
      sum1 = hn::Add(sum1, probability(row + 1));
    }
    if (row < rows.end) sum0 = hn::Add(sum0, probability(row));
  }
  return hn::Add(sum0, sum1);
}

// Turns scores, still to be multiplied by `scale` > 0 where kPacks, into exp2(s - max), updates
// maximum and sum, and has what was accumulated rescaled by rescale(corrections). rows_of(v) gives
// the rows of column v that matter; the others stay as they are.
template <bool kPacks, class RowsOf, class Rescale>
HWY_INLINE void online_softmax(ForwardPanel& panel, const ScoreTile& tile, float scale,
                               RowsOf&& rows_of, Rescale&& rescale) {
  alignas(64) float correction[kPanel];
  bool any_rose = false;
  const Float factor_of_scores = hn::Set(kFloats, scale);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* HWY_RESTRICT column = tile.at(0, v);
    const Float none = hn::Set(kFloats, kMinusInfinity);
    const Float old_max = panel.started ? hn::Load(kFloats, panel.running_max + v * kLanes) : none;
    Float max0 = none, max1 = none;
    const semantics::Range rows = rows_of(v);
    int64_t row = rows.begin;
    for (; row + 2 <= rows.end; row += 2) {
      max0 = hn::Max(max0, hn::Load(kFloats, column + row * tile.row_step));
      max1 = hn::Max(max1, hn::Load(kFloats, column + (row + 1) * tile.row_step));
    }
    if (row < rows.end) max0 = hn::Max(max0, hn::Load(kFloats, column + row * tile.row_step));
    Float tile_max = hn::Max(max0, max1);
    if constexpr (kPacks) tile_max = hn::Mul(tile_max, factor_of_scores);
    const Float new_max = hn::Max(old_max, tile_max);
    const Float subtrahend = finite_maximum(new_max);
    Float sum = exponentials<kPacks>(column, tile, rows, factor_of_scores, subtrahend);

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
