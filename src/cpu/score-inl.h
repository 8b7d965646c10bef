// What happens to scores between the two products: transforms, mask, softmax, dropout. Each step is
// a pass over a tile that lies in L1; a call pays only for the steps that it asks for.
#if defined(FA_CPU_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_SCORE_INL_H_
#undef FA_CPU_SCORE_INL_H_
#else
#define FA_CPU_SCORE_INL_H_
#endif

#include "core/element.h"
#include "core/semantics.h"
#include "cpu/forward_call.h"
#include "cpu/microkernel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Consecutive queries of one head, and their state of the online softmax, one lane per query.
struct Panel {
  int64_t head;
  int64_t first_query;  // within the sequence
  int64_t num_queries;
  semantics::Range keys;  // visible to at least one of the queries
  bool started;           // o, running_max and running_sum hold something
  float* q;               // Q^T: [depth][kPanel], times scale * log2(e)
  float* o;               // [kPanel][value_row], not yet divided by the sum
  float* running_max;     // [kPanel], of scores in base 2
  float* running_sum;     // [kPanel]

  int64_t vectors() const { return (num_queries + kLanes - 1) / kLanes; }
};

// The scores of one panel against the keys [begin, end) of a tile.
struct ScoreTile {
  float* scores;      // S^T: [kTileKeys][kPanel]
  int64_t first_key;  // the sequence's index of row 0
  int64_t begin;
  int64_t end;
};

// Calls body(vector at (key, lanes from v), key's row, v) and stores what it returns.
template <class Body>
HWY_INLINE void transform_scores(const Panel& panel, const ScoreTile& tile, Body&& body) {
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.scores + row * kPanel + v * kLanes;
      hn::Store(body(hn::Load(kFloats, at), row, v), kFloats, at);
    }
  }
}

// s = softcap * tanh(s / softcap), both in base 2.
HWY_INLINE void apply_softcap(const Panel& panel, const ScoreTile& tile, double softcap) {
  const Float cap = hn::Set(kFloats, static_cast<float>(softcap * semantics::kLog2e));
  const Float inverse = hn::Set(kFloats, static_cast<float>(1.0 / (softcap * semantics::kLog2e)));
  transform_scores(panel, tile, [&](Float s, int64_t, int64_t) HWY_ATTR {
    return hn::Mul(cap, tanh(hn::Mul(s, inverse)));
  });
}

// s -= slope * |position of the query - key|.
HWY_INLINE void apply_alibi(const Panel& panel, const ScoreTile& tile, float slope,
                            int64_t diagonal) {
  const Float factor = hn::Set(kFloats, -slope * static_cast<float>(semantics::kLog2e));
  transform_scores(panel, tile, [&](Float s, int64_t row, int64_t v) HWY_ATTR {
    const int64_t distance = panel.first_query + v * kLanes + diagonal - (tile.first_key + row);
    const auto lane = hn::Iota(kInts, static_cast<int32_t>(distance));
    return hn::MulAdd(factor, hn::ConvertTo(kFloats, hn::Abs(lane)), s);
  });
}

// Adds the bias of one (batch, head), or hides where a boolean one is false.
struct Bias {
  const core::TensorView* view;
  int64_t offset;        // elements
  int64_t query_stride;  // 0: the same for all queries
  int64_t key_stride;
  bool boolean;

  float at(int64_t query, int64_t key) const {
    const int64_t i = offset + query * query_stride + key * key_stride;
    if (boolean) return view->as<const uint8_t>()[i] != 0 ? 0.0f : kMinusInfinity;
    return core::load_element(*view, i) * static_cast<float>(semantics::kLog2e);
  }
};

HWY_INLINE void apply_bias(const Panel& panel, const ScoreTile& tile, const Bias& bias) {
  alignas(64) float row_bias[kPanel] = {};
  const int64_t distinct = bias.query_stride == 0 ? 1 : panel.num_queries;
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    for (int64_t i = 0; i < distinct; ++i) {
      row_bias[i] = bias.at(panel.first_query + i, tile.first_key + row);
    }
    for (int64_t i = distinct; i < panel.num_queries; ++i) row_bias[i] = row_bias[0];
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.scores + row * kPanel + v * kLanes;
      const Float b = hn::Load(kFloats, row_bias + v * kLanes);
      const Float sum = hn::Add(hn::Load(kFloats, at), b);
      // A hidden key's score may be anything, NaN included.
      const auto hidden = hn::Eq(b, hn::Set(kFloats, kMinusInfinity));
      hn::Store(hn::IfThenElse(hidden, b, sum), kFloats, at);
    }
  }
}

// s = -inf where the band hides the key. Selects, so that a masked score may be anything.
HWY_INLINE void apply_band(const Panel& panel, const ScoreTile& tile, int64_t seqlen_q,
                           int64_t seqlen_k, semantics::MaskBand band) {
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    const auto queries = semantics::visible_queries(tile.first_key + row, seqlen_q, seqlen_k, band);
    const int32_t first = static_cast<int32_t>(queries.begin - panel.first_query);
    const int32_t last = static_cast<int32_t>(queries.end - panel.first_query);
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.scores + row * kPanel + v * kLanes;
      const auto lane = hn::Iota(kInts, static_cast<int32_t>(v * kLanes));
      const auto hidden =
          hn::Or(hn::Lt(lane, hn::Set(kInts, first)), hn::Gt(lane, hn::Set(kInts, last - 1)));
      hn::Store(hn::IfThenElse(hn::RebindMask(kFloats, hidden), hn::Set(kFloats, kMinusInfinity),
                               hn::Load(kFloats, at)),
                kFloats, at);
    }
  }
}

// The subtrahend of scores: their maximum, or 0 while there is none.
HWY_INLINE Float finite_maximum(Float maximum) {
  return hn::IfThenElse(hn::Eq(maximum, hn::Set(kFloats, kMinusInfinity)), hn::Zero(kFloats),
                        maximum);
}

// Multiplies the accumulators of queries whose maximum rose.
HWY_INLINE void rescale(const Panel& panel, const float* HWY_RESTRICT correction,
                        int64_t value_row) {
  for (int64_t query = 0; query < panel.num_queries; ++query) {
    if (correction[query] == 1.0f) continue;
    const Float factor = hn::Set(kFloats, correction[query]);
    float* HWY_RESTRICT o = panel.o + query * value_row;
    for (int64_t d = 0; d < value_row; d += kLanes) {
      hn::Store(hn::Mul(hn::Load(kFloats, o + d), factor), kFloats, o + d);
    }
  }
}

// One step of the online softmax (Milakov and Gimelshein, 2018): turns the scores into
// exp2(s - max), updates maximum and sum, and rescales what was accumulated.
HWY_INLINE void online_softmax(Panel& panel, const ScoreTile& tile, int64_t value_row) {
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

// ---- Dropout ----

HWY_INLINE void multiply_wide(Word a, uint32_t b, Word& high, Word& low) {
#if HWY_TARGET == HWY_SCALAR
  const uint64_t product = uint64_t{hn::GetLane(a)} * b;
  high = hn::Set(kWords, static_cast<uint32_t>(product >> 32));
  low = hn::Set(kWords, static_cast<uint32_t>(product));
#else
  const hn::RepartitionToWide<WordTag> wide;
  const Word factor = hn::Set(kWords, b);
  const auto even = hn::MulEven(a, factor);
  const auto odd =
      hn::MulEven(hn::BitCast(kWords, hn::ShiftRight<32>(hn::BitCast(wide, a))), factor);
  high = hn::OddEven(hn::BitCast(kWords, odd), hn::BitCast(kWords, hn::ShiftRight<32>(even)));
  low = hn::OddEven(hn::BitCast(kWords, hn::ShiftLeft<32>(odd)), hn::BitCast(kWords, even));
#endif
}

// semantics::philox for one vector of queries; words 0 to 3 of the counters, replaced by the draws.
HWY_INLINE void philox(Word& w0, Word& w1, Word& w2, Word& w3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < semantics::kPhiloxRounds; ++round) {
    Word high0, low0, high1, low1;
    multiply_wide(w0, semantics::kPhiloxMultiplier0, high0, low0);
    multiply_wide(w2, semantics::kPhiloxMultiplier1, high1, low1);
    w0 = hn::Xor(hn::Xor(high1, w1), hn::Set(kWords, key0));
    w1 = low1;
    w2 = hn::Xor(hn::Xor(high0, w3), hn::Set(kWords, key1));
    w3 = low0;
    key0 += semantics::kPhiloxWeyl0;
    key1 += semantics::kPhiloxWeyl1;
  }
}

// Calls body(kept, key's row, v) with the mask of each vector of the tile.
template <class Body>
HWY_INLINE void for_each_dropout_mask(const ForwardCall& call, const Panel& panel,
                                      const ScoreTile& tile, int64_t batch, Body&& body) {
  const int64_t batch_head = batch * call.problem.num_heads + panel.head;
  const auto threshold = hn::Set(kInts, static_cast<int32_t>(call.dropout_threshold));
  const Word low_half = hn::Set(kWords, 0xFFFFu);
  constexpr int64_t kStep = semantics::kKeysPerDraw;
  for (int64_t first = tile.begin / kStep * kStep; first < tile.end; first += kStep) {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      Word w0 = hn::Set(kWords, static_cast<uint32_t>((tile.first_key + first) / kStep));
      Word w1 = hn::Iota(kWords, static_cast<uint32_t>(panel.first_query + v * kLanes));
      Word w2 = hn::Set(kWords, static_cast<uint32_t>(batch_head));
      Word w3 = hn::Set(kWords, call.dropout_key.counter3);
      philox(w0, w1, w2, w3, call.dropout_key.key0, call.dropout_key.key1);
      const auto visit = [&](int64_t lane, Word bits) HWY_ATTR {
        const int64_t row = first + lane;
        if (row < tile.begin || row >= tile.end) return;
        const auto kept = hn::Lt(hn::BitCast(kInts, bits), threshold);
        body(hn::RebindMask(kFloats, kept), row, v);
      };
      const auto visit_word = [&](int64_t lane, Word word) HWY_ATTR {
        visit(lane, hn::And(word, low_half));
        visit(lane + 1, hn::ShiftRight<16>(word));
      };
      visit_word(0, w0);
      visit_word(2, w1);
      visit_word(4, w2);
      visit_word(6, w3);
    }
  }
}

// p = 0 where dropped; 1 / (1 - dropout_p) is applied to the output.
HWY_INLINE void apply_dropout(const ForwardCall& call, const Panel& panel, const ScoreTile& tile,
                              int64_t batch) {
  for_each_dropout_mask(call, panel, tile, batch, [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
    float* at = tile.scores + row * kPanel + v * kLanes;
    hn::Store(hn::IfThenElseZero(kept, hn::Load(kFloats, at)), kFloats, at);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
