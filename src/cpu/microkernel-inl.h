// The two matrix products of the forward, register tile by register tile.
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

// Accumulators of a register tile: 16 fill half of 32 registers; 6 x 2 leaves 4 of 16 free. Scores
// take few vectors of queries, values few rows of queries, so that a causal mask cuts closely.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
inline constexpr int kScoreRows = 8;  // keys
inline constexpr int kScoreVectors = 2;
inline constexpr int kValueRows = 4;  // queries
inline constexpr int kValueVectors = 4;
#else
inline constexpr int kScoreRows = 6;
inline constexpr int kScoreVectors = 2;
inline constexpr int kValueRows = 6;
inline constexpr int kValueVectors = 2;
#endif

// Queries of a panel: whole register tiles both ways.
inline constexpr int64_t kPanel = kValueRows == 6 ? 48 : 64;
inline constexpr int64_t kStripLanes = kScoreVectors * kLanes;  // of them, in one register tile
static_assert(kPanel <= kMaxPanel && kPanel % kValueRows == 0);
static_assert(kPanel % (kLanes * kScoreVectors) == 0);
static_assert(kTileKeys % kScoreRows == 0 && kTileKeys % semantics::kKeysPerDraw == 0);

// C[kTileRows][kWide vectors] (+)= sum over n of a[r][n] * b[n][...], where a is broadcast and
// element (r, n) of a lies at a[r * a_row + n * a_step].
template <int kTileRows, int kWide, bool kAccumulate>
HWY_INLINE void multiply_tile(const float* HWY_RESTRICT a, int64_t a_row, int64_t a_step,
                              const float* HWY_RESTRICT b, int64_t b_step, int64_t n,
                              float* HWY_RESTRICT c, int64_t c_row) {
  Float sum[kTileRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      sum[r][w] = kAccumulate ? hn::Load(kFloats, c + r * c_row + w * kLanes) : hn::Zero(kFloats);
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
    for (int w = 0; w < kWide; ++w) hn::Store(sum[r][w], kFloats, c + r * c_row + w * kLanes);
  }
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

// S^T[key][query] = sum_d K[key][d] Q^T[d][query], for whole register tiles of keys.
// q: [kPanel / kStripLanes][depth][kStripLanes], k: [keys][k_row], scores: [keys][kPanel].
// keys_of(first, last) gives the keys that matter to the queries in [first, last); those of other
// keys stay undefined.
template <class KeysOf>
HWY_INLINE void score_product(const float* HWY_RESTRICT q, int64_t query_vectors,
                              const float* HWY_RESTRICT k, int64_t k_row, int64_t depth,
                              KeysOf&& keys_of, float* HWY_RESTRICT scores) {
  static_assert(kScoreVectors == 2);
  const auto multiply = [&](int64_t key, int64_t v, auto width) HWY_ATTR {
    multiply_tile<kScoreRows, width(), false>(
        k + key * k_row, k_row, 1, q + v / 2 * kStripLanes * depth + v % 2 * kLanes, kStripLanes,
        depth, scores + key * kPanel + v * kLanes, kPanel);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  for (int64_t v = 0; v < query_vectors; v += 2) {
    const semantics::Range left = keys_of(v * kLanes, (v + 1) * kLanes);
    const semantics::Range right = v + 1 < query_vectors
                                       ? keys_of((v + 1) * kLanes, (v + 2) * kLanes)
                                       : semantics::Range{left.begin, left.begin};
    int64_t key = std::min(left.begin, right.begin) / kScoreRows * kScoreRows;
    const auto touches = [&](semantics::Range keys)
                             HWY_ATTR { return key < keys.end && key + kScoreRows > keys.begin; };
    for (; key < std::max(left.end, right.end); key += kScoreRows) {
      if (touches(left) && touches(right)) {
        multiply(key, v, two);
      } else if (touches(left)) {
        multiply(key, v, one);
      } else if (touches(right)) {
        multiply(key, v + 1, one);
      }
    }
  }
}

// O[query][dv] += sum over keys of P^T[key][query] V[key][dv]; = where o holds nothing yet.
// p: [keys][kPanel], v: [keys][v_row], o: [queries][o_row]. keys_of as above; the rest of P is 0.
template <class KeysOf>
HWY_INLINE void value_product(const float* HWY_RESTRICT p, int64_t num_queries,
                              const float* HWY_RESTRICT v, int64_t v_row, int64_t value_vectors,
                              KeysOf&& keys_of, bool accumulate, float* HWY_RESTRICT o,
                              int64_t o_row) {
  for_each_strip<kValueVectors>(value_vectors, [&](int64_t w, auto width) HWY_ATTR {
    for (int64_t query = 0; query < num_queries; query += kValueRows) {
      const semantics::Range keys = keys_of(query, query + kValueRows);
      const int64_t n = keys.empty() ? 0 : keys.end - keys.begin;
      const float* first_p = p + keys.begin * kPanel + query;
      const float* first_v = v + keys.begin * v_row + w * kLanes;
      float* first_o = o + query * o_row + w * kLanes;
      if (!accumulate) {
        multiply_tile<kValueRows, width(), false>(first_p, 1, kPanel, first_v, v_row, n, first_o,
                                                  o_row);
      } else if (n > 0) {
        multiply_tile<kValueRows, width(), true>(first_p, 1, kPanel, first_v, v_row, n, first_o,
                                                 o_row);
      }
    }
  });
}

// C[key][d] += sum over queries of A^T[key][query] B[query][d], for keys in [begin, end); = where
// kAccumulate is false.
// a: [keys][kPanel], b: [queries][row], c: [keys][row]. queries_of(first, last) gives the queries
// that see any key of [first, last); the rest of A is 0.
template <bool kAccumulate, class QueriesOf>
HWY_INLINE void key_product(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t row,
                            int64_t vectors, int64_t begin, int64_t end, QueriesOf&& queries_of,
                            float* HWY_RESTRICT c) {
  for_each_strip<kValueVectors>(vectors, [&](int64_t w, auto width) HWY_ATTR {
    int64_t key = begin;
    const auto rows = [&](auto count) HWY_ATTR {
      const semantics::Range queries = queries_of(key, key + count());
      if (!kAccumulate || !queries.empty()) {
        const int64_t first = queries.empty() ? 0 : queries.begin;
        const int64_t n = queries.empty() ? 0 : queries.end - queries.begin;
        multiply_tile<count(), width(), kAccumulate>(a + key * kPanel + first, kPanel, 1,
                                                     b + first * row + w * kLanes, row, n,
                                                     c + key * row + w * kLanes, row);
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
