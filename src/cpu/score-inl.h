// What happens to scores before and after the softmax: transforms, mask, dropout. Each step is a
// pass over a tile that lies in L1; a call pays only for the steps that it asks for.
#if defined(FA_CPU_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_SCORE_INL_H_
#undef FA_CPU_SCORE_INL_H_
#else
#define FA_CPU_SCORE_INL_H_
#endif

#include "core/element.h"
#include "core/semantics.h"
#include "cpu/call.h"
#include "cpu/microkernel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Consecutive queries of one head, one lane each; or, where a whole group of heads has few queries,
// those of all its heads, head after head, so that they share every key that is read.
struct QueryPanel {
  int64_t first_head;
  int64_t first_query;       // of each head, within the sequence
  int64_t queries_per_head;  // num_lanes where there is one head
  int64_t num_lanes;
  semantics::Range keys;  // visible to at least one of the queries

  int64_t vectors() const { return ceil_div(num_lanes, kLanes); }
  // Those from a lane on, of a panel of one head.
  QueryPanel from(int64_t lane) const {
    return {first_head, first_query + lane, num_lanes - lane, num_lanes - lane, keys};
  }
  bool one_head() const { return queries_per_head == num_lanes; }
  int64_t head(int64_t lane) const { return first_head + lane / queries_per_head; }
  int64_t query(int64_t lane) const { return first_query + lane % queries_per_head; }
  int64_t last_query() const { return first_query + queries_per_head - 1; }

  // Calls body(lane, head, query).
  template <class Body>
  HWY_INLINE void for_each_lane(Body&& body) const {
    int64_t lane = 0;
    for (int64_t h = first_head; lane < num_lanes; ++h) {
      for (int64_t i = 0; i < queries_per_head; ++i) body(lane++, h, first_query + i);
    }
  }
};

// Per lane of vector v: the head, counted from the panel's first.
HWY_INLINE hn::Vec<IntTag> head_of_lanes(const QueryPanel& panel, int64_t v) {
  if (panel.one_head()) return hn::Zero(kInts);
  const Float lane = hn::Add(hn::Iota(kFloats, static_cast<float>(v * kLanes)),
                             hn::Set(kFloats, 0.5f));  // away from the boundary
  const float per_head = 1.0f / static_cast<float>(panel.queries_per_head);
  return hn::ConvertTo(kInts, hn::Mul(lane, hn::Set(kFloats, per_head)));
}

// Per lane of vector v: the query within the sequence.
HWY_INLINE hn::Vec<IntTag> query_of_lanes(const QueryPanel& panel, int64_t v) {
  const auto lane = lanes_from(static_cast<int32_t>(panel.first_query + v * kLanes));
  if (panel.one_head()) return lane;
  const auto before = hn::Mul(head_of_lanes(panel, v),
                              hn::Set(kInts, static_cast<int32_t>(panel.queries_per_head)));
  return hn::Sub(lane, before);
}

// The scores of one panel against the keys [begin, end) of a tile.
struct ScoreTile {
  float* scores;      // S^T: [tile_keys][kPanel], or [kPanel / kLanes][tile_keys][kLanes]
  int64_t first_key;  // the sequence's index of row 0
  int64_t begin;
  int64_t end;
  int64_t row_step;
  int64_t column_step;  // between vectors of lanes

  // The key's row, vector v of lanes.
  HWY_INLINE float* at(int64_t row, int64_t v) const {
    return scores + row * row_step + v * column_step;
  }
  HWY_INLINE float& at_lane(int64_t row, int64_t lane) const {
    return at(row, lane / kLanes)[lane % kLanes];
  }
  // The same keys and lanes in another buffer.
  HWY_INLINE ScoreTile in(float* buffer) const {
    ScoreTile other = *this;
    other.scores = buffer;
    return other;
  }
};

// Calls body(vector at (key, lanes from v), key's row, v) and stores what it returns.
template <class Body>
HWY_INLINE void transform_scores(const QueryPanel& panel, const ScoreTile& tile, Body&& body) {
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.at(row, v);
      hn::Store(body(hn::Load(kFloats, at), row, v), kFloats, at);
    }
  }
}

// s = softcap * tanh(s / softcap), both in base 2. derivatives, where not null, gets
// 1 - tanh^2(s / softcap) in the layout of the scores.
HWY_INLINE void apply_softcap(const QueryPanel& panel, const ScoreTile& tile, double softcap,
                              float* derivatives) {
  const Float cap = hn::Set(kFloats, static_cast<float>(softcap * semantics::kLog2e));
  const Float inverse = hn::Set(kFloats, static_cast<float>(1.0 / (softcap * semantics::kLog2e)));
  transform_scores(panel, tile, [&](Float s, int64_t row, int64_t v) HWY_ATTR {
    const Float t = tanh(hn::Mul(s, inverse));
    if (derivatives != nullptr) {
      hn::Store(hn::NegMulAdd(t, t, hn::Set(kFloats, 1.0f)), kFloats,
                tile.in(derivatives).at(row, v));
    }
    return hn::Mul(cap, t);
  });
}

// s -= slope * |position of the query - key|. slope_of(head) gives each head's.
template <class SlopeOf>
HWY_INLINE void apply_alibi(const QueryPanel& panel, const ScoreTile& tile, int64_t diagonal,
                            SlopeOf&& slope_of) {
  alignas(64) float factors[kPanel] = {};
  for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
    factors[lane] = -slope_of(panel.head(lane)) * static_cast<float>(semantics::kLog2e);
  }
  transform_scores(panel, tile, [&](Float s, int64_t row, int64_t v) HWY_ATTR {
    const auto key = hn::Set(kInts, static_cast<int32_t>(tile.first_key + row - diagonal));
    const auto distance = hn::Abs(hn::Sub(query_of_lanes(panel, v), key));
    return hn::MulAdd(hn::Load(kFloats, factors + v * kLanes), hn::ConvertTo(kFloats, distance), s);
  });
}

// The bias of one batch: added, or, where it is boolean, hiding what is false.
struct Bias {
  const core::TensorView* view;
  int64_t offset;       // elements
  int64_t head_stride;  // strides are 0 where it is broadcast
  int64_t query_stride;
  int64_t key_stride;
  bool boolean;

  float at(int64_t head, int64_t query, int64_t key) const {
    const int64_t i = offset + head * head_stride + query * query_stride + key * key_stride;
    if (boolean) return view->as<const uint8_t>()[i] != 0 ? 0.0f : kMinusInfinity;
    return core::load_element(*view, i) * static_cast<float>(semantics::kLog2e);
  }
};

HWY_INLINE void apply_bias(const QueryPanel& panel, const ScoreTile& tile, const Bias& bias) {
  alignas(64) float row_bias[kPanel] = {};
  const bool same = bias.query_stride == 0 && (panel.one_head() || bias.head_stride == 0);
  const int64_t distinct = same ? 1 : panel.num_lanes;
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    for (int64_t i = 0; i < distinct; ++i) {
      row_bias[i] = bias.at(panel.head(i), panel.query(i), tile.first_key + row);
    }
    for (int64_t i = distinct; i < panel.num_lanes; ++i) row_bias[i] = row_bias[0];
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.at(row, v);
      const Float b = hn::Load(kFloats, row_bias + v * kLanes);
      const Float sum = hn::Add(hn::Load(kFloats, at), b);
      // A hidden key's score may be anything, NaN included.
      const auto hidden = hn::Eq(b, hn::Set(kFloats, kMinusInfinity));
      hn::Store(hn::IfThenElse(hidden, b, sum), kFloats, at);
    }
  }
}

// s = -inf where the band hides the key. Selects, so that a masked score may be anything.
HWY_INLINE void apply_band(const QueryPanel& panel, const ScoreTile& tile, int64_t seqlen_q,
                           int64_t seqlen_k, semantics::MaskBand band) {
  for (int64_t row = tile.begin; row < tile.end; ++row) {
    const auto queries = semantics::visible_queries(tile.first_key + row, seqlen_q, seqlen_k, band);
    if (queries.begin <= panel.first_query && queries.end > panel.last_query()) continue;
    const auto first = hn::Set(kInts, static_cast<int32_t>(queries.begin));
    const auto last = hn::Set(kInts, static_cast<int32_t>(queries.end - 1));
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      float* at = tile.at(row, v);
      const auto query = query_of_lanes(panel, v);
      const auto hidden = hn::Or(hn::Lt(query, first), hn::Gt(query, last));
      hn::Store(hn::IfThenElse(hn::RebindMask(kFloats, hidden), hn::Set(kFloats, kMinusInfinity),
                               hn::Load(kFloats, at)),
                kFloats, at);
    }
  }
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
HWY_INLINE void for_each_dropout_mask(const AttentionCall& call, const QueryPanel& panel,
                                      const ScoreTile& tile, int64_t batch, Body&& body) {
  const int64_t batch_head = batch * call.problem.num_heads + panel.first_head;
  const auto threshold = hn::Set(kInts, static_cast<int32_t>(call.dropout_threshold));
  const Word low_half = hn::Set(kWords, 0xFFFFu);
  constexpr int64_t kStep = semantics::kKeysPerDraw;
  for (int64_t first = tile.begin / kStep * kStep; first < tile.end; first += kStep) {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      Word w0 = hn::Set(kWords, static_cast<uint32_t>((tile.first_key + first) / kStep));
      Word w1 = hn::BitCast(kWords, query_of_lanes(panel, v));
      Word w2 = hn::Add(hn::Set(kWords, static_cast<uint32_t>(batch_head)),
                        hn::BitCast(kWords, head_of_lanes(panel, v)));
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
HWY_INLINE void apply_dropout(const AttentionCall& call, const QueryPanel& panel,
                              const ScoreTile& tile, int64_t batch) {
  for_each_dropout_mask(call, panel, tile, batch, [&](auto kept, int64_t row, int64_t v) HWY_ATTR {
    float* at = tile.at(row, v);
    hn::Store(hn::IfThenElseZero(kept, hn::Load(kFloats, at)), kFloats, at);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
