// The matrix products of forward and backward, register tile by register tile.
//
// Scores are kept transposed, S^T [key][query]: K needs no transpose, a query's softmax statistics
// lie in one lane, and the keys' axis, which both products run along, is the slow one.
#if defined(FA_CPU_MICROKERNEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_MICROKERNEL_INL_H_
#undef FA_CPU_MICROKERNEL_INL_H_
#else
#define FA_CPU_MICROKERNEL_INL_H_
#endif

#include <algorithm>

#include "cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Accumulators of a register tile. The scores' rows are keys, their vectors lie along queries; rows
// of values are queries.
template <int kTileRows, int kTileVectors>
struct TileShape {
  static constexpr int kRows = kTileRows;
  static constexpr int kVectors = kTileVectors;
};

// 16 accumulators fill half of 32 registers; 6 x 2 leaves 4 of 16 free. Scores take few vectors of
// queries, values few rows of queries, so that a causal mask cuts closely.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
struct Shapes {
  using Scores = TileShape<8, 2>;
  using Values = TileShape<4, 4>;
};
// Fewest loads and other instructions for a product: where another program has the core's other
// thread, Sapphire Rapids reaches 85% of the peak with 6 x 4 and 76% with 8 x 2. Zen 4 does not
// gain, and loses at the mask's edge.
struct WideShapes {
  using Scores = TileShape<6, 4>;
  using Values = TileShape<6, 4>;
};
inline constexpr int64_t kPanel = 64;  // queries
#else
struct Shapes {
  using Scores = TileShape<6, 2>;
  using Values = TileShape<6, 2>;
};
inline constexpr int64_t kPanel = 48;
#endif

inline constexpr int kValueRows = Shapes::Values::kRows;
inline constexpr int kValueVectors = Shapes::Values::kVectors;
// Queries of one register tile of scores.
template <class TileShapes>
inline constexpr int64_t kStripLanes = TileShapes::Scores::kVectors* kLanes;
static_assert(kPanel <= kMaxPanel && kTileKeys % semantics::kKeysPerDraw == 0);

// Where sums are kept.
struct KeptRows {
  static constexpr bool kInPlace = true;
  float* rows;
  int64_t row;

  HWY_INLINE KeptRows from(int64_t first_row, int64_t first_vector) const {
    return {rows + first_row * row + first_vector * kLanes, row};
  }
  HWY_INLINE Float load(int r, int w) const {
    return hn::Load(kFloats, rows + r * row + w * kLanes);
  }
  HWY_INLINE void store(Float sum, int r, int w) const {
    hn::Store(sum, kFloats, rows + r * row + w * kLanes);
  }
};

// Where sums that are complete go: times factor, once those of `plus`, unless null, are added.
struct FinishedRows {
  static constexpr bool kInPlace = false;
  float* rows;
  int64_t row;
  float factor;
  const float* plus;
  int64_t plus_row;

  HWY_INLINE FinishedRows from(int64_t first_row, int64_t first_vector) const {
    const int64_t first = first_vector * kLanes;
    const float* more = plus == nullptr ? nullptr : plus + first_row * plus_row + first;
    return {rows + first_row * row + first, row, factor, more, plus_row};
  }
  HWY_INLINE void store(Float sum, int r, int w) const {
    if (plus != nullptr) sum = hn::Add(hn::Load(kFloats, plus + r * plus_row + w * kLanes), sum);
    hn::StoreU(hn::Mul(sum, hn::Set(kFloats, factor)), kFloats, rows + r * row + w * kLanes);
  }
};

// Rows of a left factor: the first ones lie wherever they do, the others are copies.
struct LeftRows {
  struct From {
    const float* rows;
    int64_t row;
  };
  From given;         // from row 0
  int64_t num_given;  // a multiple of a register tile's rows
  From copies;        // from row 0

  HWY_INLINE From from(int64_t first) const {
    const From& part = first < num_given ? given : copies;
    return {part.rows + first * part.row, part.row};
  }
};

// Leaves C[kTileRows][kWide vectors] (+)= sum over n of a[r][n] * b[n][...] in `to`, where a is
// broadcast and element (r, n) of a lies at a[r * a_row + n * a_step]. `to` is c where it is of the
// same type.
template <int kTileRows, int kWide, bool kAccumulate, class To>
HWY_INLINE void multiply_tile(const float* HWY_RESTRICT a, int64_t a_row, int64_t a_step,
                              const float* HWY_RESTRICT b, int64_t b_step, int64_t n,
                              const KeptRows& c, const To& to) {
  KeptRows start = c;
  if constexpr (To::kInPlace) start = to;
  Float sum[kTileRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      sum[r][w] = kAccumulate ? start.load(r, w) : hn::Zero(kFloats);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    Float right[kWide];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) right[w] = in_register(hn::Load(kFloats, b + w * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Float left = hn::Set(kFloats, a[r * a_row]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) sum[r][w] = hn::MulAdd(left, right[w], sum[r][w]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) to.store(sum[r][w], r, w);
  }
}

// Calls body(width) where 0 < width <= kWidest.
template <int kWidest, class Body>
HWY_INLINE void with_width(int64_t width, Body&& body) {
  if (width == kWidest) return body(std::integral_constant<int, kWidest>{});
  if constexpr (kWidest > 1) with_width<kWidest - 1>(width, body);
}

// Calls body(offset in vectors, width) over `num_vectors` in steps of kWide, the rest narrower.
template <int kWide, class Body>
HWY_INLINE void for_each_strip(int64_t num_vectors, Body&& body) {
  int64_t v = 0;
  for (; v + kWide <= num_vectors; v += kWide) body(v, std::integral_constant<int, kWide>{});
  if constexpr (kWide > 2) {
    if (v + 2 <= num_vectors) {
      body(v, std::integral_constant<int, 2>{});
      v += 2;
    }
  }
  if (v < num_vectors) body(v, std::integral_constant<int, 1>{});
}

// One register tile of scores. Not inlined, so that its loop has the registers to itself.
template <class TileShapes, int kWidth>
HWY_NOINLINE void score_tile(const float* HWY_RESTRICT q, const float* HWY_RESTRICT k,
                             int64_t k_row, int64_t depth, float* HWY_RESTRICT scores) {
  const KeptRows to{scores, kPanel};
  multiply_tile<TileShapes::Scores::kRows, kWidth, false>(k, k_row, 1, q, kStripLanes<TileShapes>,
                                                          depth, to, to);
}

// S^T[key][query] = sum_d K[key][d] Q^T[d][query], for whole register tiles of keys.
// q: [kPanel / kStripLanes][depth][kStripLanes], scores: [keys][kPanel].
// keys_of(first, last) gives the keys that matter to the queries in [first, last); those of other
// keys stay undefined. Its ends do not fall from one query to the next.
template <class TileShapes, class KeysOf>
HWY_INLINE void score_product(const float* HWY_RESTRICT q, int64_t query_vectors, const LeftRows& k,
                              int64_t depth, KeysOf&& keys_of, float* HWY_RESTRICT scores) {
  constexpr int kRows = TileShapes::Scores::kRows;
  constexpr int kVectors = TileShapes::Scores::kVectors;
  static_assert(kPanel % kStripLanes<TileShapes> == 0 && kTileKeys % kRows == 0);
  for (int64_t strip = 0; strip < query_vectors; strip += kVectors) {
    const int64_t count = std::min<int64_t>(query_vectors - strip, kVectors);
    semantics::Range seen[kVectors];
    for (int64_t v = 0; v < count; ++v) {
      seen[v] = keys_of((strip + v) * kLanes, (strip + v + 1) * kLanes);
    }
    const float* strip_q = q + strip * kLanes * depth;
    int64_t first = 0, last = 0;  // vectors that see any of the tile's keys
    for (int64_t key = seen[0].begin / kRows * kRows; key < seen[count - 1].end; key += kRows) {
      while (first < count && seen[first].end <= key) ++first;
      while (last < count && seen[last].begin < key + kRows) ++last;
      const LeftRows::From rows = k.from(key);
      with_width<kVectors>(last - first, [&](auto width) HWY_ATTR {
        score_tile<TileShapes, width()>(strip_q + first * kLanes, rows.rows, rows.row, depth,
                                        scores + key * kPanel + (strip + first) * kLanes);
      });
    }
  }
}

// O[query][dv] += sum over keys of P^T[key][query] V[key][dv], for one register tile of O.
template <int kRows, int kWidth, class To>
HWY_INLINE void value_tile(const float* HWY_RESTRICT p, const float* HWY_RESTRICT v, int64_t v_row,
                           semantics::Range keys, bool accumulate, const KeptRows& o,
                           const To& to) {
  const int64_t n = keys.empty() ? 0 : keys.end - keys.begin;
  const float* first_p = p + keys.begin * kPanel;
  const float* first_v = v + keys.begin * v_row;
  if (!accumulate) {
    multiply_tile<kRows, kWidth, false>(first_p, 1, kPanel, first_v, v_row, n, o, to);
  } else if (n > 0 || !To::kInPlace) {
    multiply_tile<kRows, kWidth, true>(first_p, 1, kPanel, first_v, v_row, n, o, to);
  }
}

// The same for a panel; = where o holds nothing yet. Whole register tiles of queries go to `to`,
// the last ones to `rest`; both may be o.
// p: [keys][kPanel], v: [keys][v_row], o: [queries][o_row]. keys_of as above; the rest of P is 0.
template <class TileShapes, class KeysOf, class To>
HWY_INLINE void value_product(const float* HWY_RESTRICT p, int64_t num_queries,
                              const float* HWY_RESTRICT v, int64_t v_row, int64_t value_vectors,
                              KeysOf&& keys_of, bool accumulate, const KeptRows& o, const To& to,
                              const To& rest) {
  constexpr int kRows = TileShapes::Values::kRows;
  constexpr int kRest = kPanel % kRows;  // queries of a panel's last register tile
  for_each_strip<TileShapes::Values::kVectors>(value_vectors, [&](int64_t w, auto width) HWY_ATTR {
    const float* strip_v = v + w * kLanes;
    const int64_t end = std::min<int64_t>(num_queries, kPanel - kRest);
    for (int64_t query = 0; query < end; query += kRows) {
      value_tile<kRows, width()>(p + query, strip_v, v_row, keys_of(query, query + kRows),
                                 accumulate, o.from(query, w),
                                 (query + kRows <= num_queries ? to : rest).from(query, w));
    }
    if constexpr (kRest > 0) {
      constexpr int64_t kFirst = kPanel - kRest;
      if (num_queries <= kFirst) return;
      value_tile<kRest, width()>(p + kFirst, strip_v, v_row, keys_of(kFirst, kPanel), accumulate,
                                 o.from(kFirst, w), rest.from(kFirst, w));
    }
  });
}

// C[key][d] += sum over queries of A^T[key][query] B[query][d], for keys in [begin, end); = where
// kAccumulate is false. The result goes to `to`, which may be c.
// a: [keys][kPanel], b: [queries][row], c: [keys][row]. queries_of(first, last) gives the queries
// that see any key of [first, last); the rest of A is 0.
template <bool kAccumulate, class QueriesOf, class To>
HWY_INLINE void key_product(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t row,
                            int64_t vectors, int64_t begin, int64_t end, QueriesOf&& queries_of,
                            const KeptRows& c, const To& to) {
  for_each_strip<kValueVectors>(vectors, [&](int64_t w, auto width) HWY_ATTR {
    int64_t key = begin;
    const auto rows = [&](auto count) HWY_ATTR {
      const semantics::Range queries = queries_of(key, key + count());
      if (!kAccumulate || !queries.empty() || !To::kInPlace) {
        const int64_t first = queries.empty() ? 0 : queries.begin;
        const int64_t n = queries.empty() ? 0 : queries.end - queries.begin;
        multiply_tile<count(), width(), kAccumulate>(a + key * kPanel + first, kPanel, 1,
                                                     b + first * row + w * kLanes, row, n,
                                                     c.from(key, w), to.from(key, w));
      }
      key += count();
    };
    while (key + kValueRows <= end) rows(std::integral_constant<int, kValueRows>{});
    while (key < end) rows(std::integral_constant<int, 1>{});
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
