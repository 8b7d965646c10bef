// The softmax of a chunk of scores, whose probabilities become pairs of keys.
#if defined(FA_CPU_PAIR_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_SOFTMAX_INL_H_
#undef FA_CPU_PAIR_SOFTMAX_INL_H_
#else
#define FA_CPU_PAIR_SOFTMAX_INL_H_
#endif

#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Pairs between the tile's keys and the next multiples of kPairDepth: zeros, since they get
// multiplied.
HWY_INLINE void clear_pairs_around(const QueryPanel& panel, const ScoreTile& tile) {
  const auto clear = [&](int64_t begin, int64_t end) HWY_ATTR {
    if (begin >= end) return;
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      std::fill_n(tile.at(begin, v), (end - begin) * kLanes, 0.0f);
    }
  };
  clear(tile.begin / kPairDepth * kPairDepth / 2, tile.begin / kPairStep * kPairStep / 2);
  clear(round_up(tile.end, kPairStep) / 2, round_up(tile.end, kPairDepth) / 2);
}

// kPairStep rows of one column, rounded.
HWY_INLINE void store_step(const Float (&rows)[kPairStep], float* to) {
  const Word pair = pair_of_bfloat16(rows[0], rows[1]);
#if defined(__aarch64__) && HWY_TARGET != HWY_SCALAR
  const Word next = pair_of_bfloat16(rows[2], rows[3]);
  hn::Store(hn::BitCast(kFloats, hn::InterleaveLower(kWords, pair, next)), kFloats, to);
  hn::Store(hn::BitCast(kFloats, hn::InterleaveUpper(kWords, pair, next)), kFloats, to + kLanes);
#else
  hn::Store(hn::BitCast(kFloats, pair), kFloats, to);
#endif
}

// Rounds value(row) of the rows [begin, end) of a column to pairs; what is missing from a step is
// zero. Returns the values' sum.
template <class ValueOf>
HWY_INLINE Float store_pairs(int64_t begin, int64_t end, float* to, ValueOf&& value) {
  const Float none = hn::Zero(kFloats);
  if (begin >= end) return none;
  Float sum0 = none, sum1 = none;
  const auto store = [&](int64_t first, auto&& value_of) HWY_ATTR {
    Float rows[kPairStep];
    for (int64_t i = 0; i < kPairStep; i += 2) {
      rows[i] = value_of(first + i);
      rows[i + 1] = value_of(first + i + 1);
      sum0 = hn::Add(sum0, rows[i]);
      sum1 = hn::Add(sum1, rows[i + 1]);
    }
    store_step(rows, to + first / 2 * kLanes);
  };
  const auto value_or_none = [&](int64_t row)
                                 HWY_ATTR { return row < begin || row >= end ? none : value(row); };
  int64_t row = begin / kPairStep * kPairStep;
  if (row < begin) {
    store(row, value_or_none);
    row += kPairStep;
  }
  for (; row + kPairStep <= end; row += kPairStep) store(row, value);
  if (row < end) store(row, value_or_none);
  return hn::Add(sum0, sum1);
}

// Rounds a tile to pairs, in place.
HWY_INLINE void pack_pairs(const QueryPanel& panel, const ScoreTile& tile) {
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* column = tile.at(0, v);
    store_pairs(tile.begin, tile.end, column,
                [&](int64_t row) HWY_ATTR { return hn::Load(kFloats, column + row * kLanes); });
  }
}

// Whether maxima may lag too far behind scores of a chunk that raised the sums from `before`: by
// its largest probability at least, and so by more than most_rise. Probabilities tell nothing where
// there is no maximum yet.
HWY_INLINE bool may_lag_too_far(const ForwardPanel& panel, const float* HWY_RESTRICT before,
                                float most_rise) {
  const Float most = hn::Set(kFloats, most_rise);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const Float maximum = hn::Load(kFloats, panel.running_max + v * kLanes);
    const Float rise = hn::Sub(hn::Load(kFloats, panel.running_sum + v * kLanes),
                               hn::Load(kFloats, before + v * kLanes));
    const auto known = hn::Gt(maximum, hn::Set(kFloats, kMinusInfinity));
    if (!hn::AllTrue(kFloats, hn::And(hn::Le(rise, most), known))) return true;
  }
  return false;
}

// Replaces maxima that lag more than most_lag behind those of a chunk's scores times scale, and
// rescales sums. corrections: 2^(old - new). Lane by lane, so that no query's result depends on
// others. False where none was replaced.
HWY_INLINE bool raise_maxima(ForwardPanel& panel, const ScoreTile& chunk, float scale,
                             float most_lag, float* HWY_RESTRICT correction) {
  bool any_rose = false;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const Float scores = column_maximum(chunk.at(0, v), chunk, {chunk.begin, chunk.end});
    const Float maximum = hn::Mul(scores, hn::Set(kFloats, scale));
    const Float old = hn::Load(kFloats, panel.running_max + v * kLanes);
    const auto rises = hn::Gt(maximum, hn::Add(old, hn::Set(kFloats, most_lag)));
    const Float one = hn::Set(kFloats, 1.0f);
    if (hn::AllFalse(kFloats, rises)) {
      hn::Store(one, kFloats, correction + v * kLanes);
      continue;
    }
    any_rose = true;
    const Float factor = hn::IfThenElse(rises, exp2(hn::Sub(old, finite_maximum(maximum))), one);
    hn::Store(factor, kFloats, correction + v * kLanes);
    hn::Store(hn::IfThenElse(rises, maximum, old), kFloats, panel.running_max + v * kLanes);
    float* sum = panel.running_sum + v * kLanes;
    hn::Store(hn::Mul(hn::Load(kFloats, sum), factor), kFloats, sum);
  }
  return any_rose;
}

// p = exp2(s * scale - maximum) as pairs, and the sums.
HWY_INLINE void store_probabilities(const AttentionCall& call, const ForwardPanel& panel,
                                    const ScoreTile& chunk, float scale, int64_t batch, float* to,
                                    int64_t column_step) {
  const bool drops = call.problem.dropout;  // the scale is 1 then
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    float* HWY_RESTRICT column = chunk.at(0, v);
    const Float subtrahend = finite_maximum(hn::Load(kFloats, panel.running_max + v * kLanes));
    Float sum;
    if (drops) {
      sum = exponentials(column, chunk, {chunk.begin, chunk.end}, subtrahend);
    } else {
      const auto probability = [&](int64_t row) HWY_ATTR {
        const Float s = hn::Load(kFloats, column + row * kLanes);
        return exp2(hn::MulSub(s, hn::Set(kFloats, scale), subtrahend));
      };
      sum = store_pairs(chunk.begin, chunk.end, to + v * column_step, probability);
    }
    float* total = panel.running_sum + v * kLanes;
    hn::Store(hn::Add(hn::Load(kFloats, total), sum), kFloats, total);
  }
  if (!drops) return;
  apply_dropout(call, panel, chunk, batch);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const float* column = chunk.at(0, v);
    store_pairs(chunk.begin, chunk.end, to + v * column_step,
                [&](int64_t row) HWY_ATTR { return hn::Load(kFloats, column + row * kLanes); });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
