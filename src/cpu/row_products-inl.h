// Products for few queries, as in decoding: vectors lie along head_dim, and each row of keys and
// values is read once, where it lies, for all queries of its group of heads.
#if defined(FA_CPU_ROW_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_ROW_PRODUCTS_INL_H_
#undef FA_CPU_ROW_PRODUCTS_INL_H_
#else
#define FA_CPU_ROW_PRODUCTS_INL_H_
#endif

#include "cpu/rows_ahead.h"
#include "cpu/sequence-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// to[0 .. 4) = the sums of four vectors' lanes.
HWY_INLINE void sums_of_lanes(Float a, Float b, Float c, Float d, float* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
  to[0] = hn::GetLane(a);
  to[1] = hn::GetLane(b);
  to[2] = hn::GetLane(c);
  to[3] = hn::GetLane(d);
#else
  const hn::Repartition<uint64_t, FloatTag> pairs;
  const auto halves = [](Float x, Float y) HWY_ATTR {  // per block: x0 + x2, y0 + y2, x1 + x3, ...
    return hn::Add(hn::InterleaveLower(kFloats, x, y), hn::InterleaveUpper(kFloats, x, y));
  };
  const auto ab = hn::BitCast(pairs, halves(a, b)), cd = hn::BitCast(pairs, halves(c, d));
  const Float sums = hn::Add(hn::BitCast(kFloats, hn::InterleaveLower(pairs, ab, cd)),
                             hn::BitCast(kFloats, hn::InterleaveUpper(pairs, ab, cd)));
  if constexpr (kLanes == 16) {
    const hn::Half<FloatTag> half;
    const hn::Half<decltype(half)> quarter;
    const auto two = hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums));
    hn::StoreU(hn::Add(hn::LowerHalf(quarter, two), hn::UpperHalf(quarter, two)), quarter, to);
  } else if constexpr (kLanes == 8) {
    const hn::Half<FloatTag> half;
    hn::StoreU(hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums)), half, to);
  } else {
    hn::StoreU(sums, kFloats, to);
  }
#endif
}

class RowProducts {
 public:
  static constexpr bool kPairs = false;
  static constexpr bool kFewQueries = true;
  static constexpr int64_t kKeys = 4;        // of one register tile of scores
  static constexpr int64_t kValueKeys = 24;  // whose values are added to O at once

  RowProducts(const ForwardCall& call, const SequenceRun& run, const ForwardScratch& layout,
              float* scratch)
      : call_(call),
        run_(run),
        q_row_(call.problem.head_dim),
        v_row_(round_up(call.problem.head_dim_v, kMaxLanes)),
        scores_(scratch + layout.scores) {}

  // Calls body with the dtype of keys and values as a compile-time value.
  template <class Body>
  HWY_INLINE static void with_dtype(core::DataType dtype, Body&& body) {
    dispatch_dtype(dtype, body);
  }

  // Rows of Q, times scale * log2(e).
  HWY_INLINE void load_queries(const ForwardPanel& panel) const {
    const Float scale = hn::Set(kFloats, call_.scale_log2);
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      float* row = panel.q + lane * q_row_;
      run_.load_query(call_.q, panel, lane, row);
      for (int64_t d = 0; d < q_row_; d += kLanes) {
        hn::StoreU(hn::Mul(hn::LoadU(kFloats, row + d), scale), kFloats, row + d);
      }
    }
  }

  // How often scores() and values() call ahead.step(), at least; values() for each row.
  static int64_t score_steps(int64_t num_lanes, int64_t head_dim) {
    return ceil_div(num_lanes, 4) * ceil_div(head_dim, kLanes);
  }
  static int64_t value_steps(int64_t num_lanes, int64_t head_dim_v) {
    return std::max<int64_t>(num_lanes / 4, 1) *
           std::max<int64_t>(head_dim_v / (num_lanes < 4 ? 8 : kSums / 4) / kLanes, 1);
  }

  // S[lane][first ...] for kKeys rows of keys, of which the last may come again.
  template <core::DataType kType>
  HWY_INLINE void scores(const ForwardPanel& panel, const void* const (&rows)[kKeys], int64_t first,
                         RowsAhead& ahead) const {
    int64_t lane = 0;
    for (; lane + 4 <= panel.num_lanes; lane += 4) {
      score_block<kType, 4>(panel, rows, lane, first, ahead);
    }
    for (; lane + 2 <= panel.num_lanes; lane += 2) {
      score_block<kType, 2>(panel, rows, lane, first, ahead);
    }
    for (; lane < panel.num_lanes; ++lane) {
      score_block<kType, 1>(panel, rows, lane, first, ahead);
    }
  }

  // P = softmax(S) over the tile's keys; what was accumulated is rescaled.
  HWY_INLINE void softmax(ForwardPanel& panel, semantics::Range keys) const {
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) softmax(panel, lane, keys);
    panel.started = true;
  }

  // O[lane][dv] += sum over rows of P[lane][first + row] V[row][dv].
  template <core::DataType kType>
  HWY_INLINE void values(const ForwardPanel& panel, const void* const* rows, int64_t count,
                         int64_t first, RowsAhead& ahead) const {
    int64_t lane = 0;
    for (; lane + 4 <= panel.num_lanes; lane += 4) {
      value_strips<kType, 4, kSums / 4>(panel, lane, rows, count, first, ahead);
    }
    for (; lane + 2 <= panel.num_lanes; lane += 2) {
      value_strips<kType, 2, kSums / 2>(panel, lane, rows, count, first, ahead);
    }
    for (; lane < panel.num_lanes; ++lane) {
      value_strips<kType, 1, 8>(panel, lane, rows, count, first, ahead);
    }
  }

 protected:
  static constexpr int64_t kMaxRows = kLongTileKeys;

  // [lane][key], from the tile's first on.
  HWY_INLINE float* scores_of(int64_t lane) const { return scores_ + lane * kMaxRows; }

  const ForwardCall& call_;
  const SequenceRun& run_;
  const int64_t q_row_;
  const int64_t v_row_;

 private:
  static constexpr int kSums = HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON ? 16 : 8;

  template <core::DataType kType, int kQueries>
  HWY_INLINE void score_block(const ForwardPanel& panel, const void* const (&rows)[kKeys],
                              int64_t lane, int64_t key, RowsAhead& ahead) const {
    const float* HWY_RESTRICT q = panel.q + lane * q_row_;
    Float sum[kQueries][kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) sum[i][k] = hn::Zero(kFloats);
    }
    auto lines = ahead.template share<(kQueries >= 4)>(ceil_div(q_row_, kLanes));
    for (int64_t d = 0; d < q_row_; d += kLanes) {
      lines.step(d / kLanes);
      Float k_row[kKeys];
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) k_row[k] = load_widened<kType>(rows[k], d);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        const Float query = hn::LoadU(kFloats, q + i * q_row_ + d);
#pragma GCC unroll 4
        for (int k = 0; k < kKeys; ++k) sum[i][k] = hn::MulAdd(query, k_row[k], sum[i][k]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      sums_of_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3], scores_of(lane + i) + key);
    }
  }

  // Scores of a lane to exp2(s - max), zeros up to a whole vector; its maximum, sum and O follow.
  HWY_INLINE void softmax(const ForwardPanel& panel, int64_t lane, semantics::Range keys) const {
    const core::AttentionProblem& problem = call_.problem;
    float* HWY_RESTRICT s = scores_of(lane);
    const int64_t count = keys.end - keys.begin;
    const semantics::Range visible = run_.visible_keys(panel.query(lane));
    if (problem.softcap) {
      const Float cap =
          hn::Set(kFloats, static_cast<float>(call_.args.softcap * semantics::kLog2e));
      const Float inverse = hn::Div(hn::Set(kFloats, 1.0f), cap);
      for_each_vector(s, count, [&](Float x, int64_t) HWY_ATTR {
        return hn::Mul(cap, tanh(hn::Mul(x, inverse)));
      });
    }
    if (problem.alibi) {
      const float slope =
          -run_.alibi_slope(panel.head(lane)) * static_cast<float>(semantics::kLog2e);
      const int64_t position =
          panel.query(lane) + run_.sequence().seqlen_k - run_.sequence().seqlen_q - keys.begin;
      for_each_vector(s, count, [&](Float x, int64_t i) HWY_ATTR {
        const auto key = lanes_from(static_cast<int32_t>(i));
        const auto distance = hn::Abs(hn::Sub(hn::Set(kInts, static_cast<int32_t>(position)), key));
        return hn::MulAdd(hn::Set(kFloats, slope), hn::ConvertTo(kFloats, distance), x);
      });
    }
    std::fill(s, s + std::clamp<int64_t>(visible.begin - keys.begin, 0, count), kMinusInfinity);
    std::fill(s + std::clamp<int64_t>(visible.end - keys.begin, 0, count),
              s + round_up(count, kLanes), kMinusInfinity);

    const float old_max = panel.started ? panel.running_max[lane] : kMinusInfinity;
    Float maximum = hn::Set(kFloats, old_max);
    for (int64_t i = 0; i < count; i += kLanes) {
      maximum = hn::Max(maximum, hn::Load(kFloats, s + i));
    }
    maximum = hn::MaxOfLanes(kFloats, maximum);
    const Float subtrahend = finite_maximum(maximum);
    Float sum = hn::Zero(kFloats);
    for_each_vector(s, count, [&](Float x, int64_t) HWY_ATTR {
      const Float p = exp2(hn::Sub(x, subtrahend));
      sum = hn::Add(sum, p);
      return p;
    });
    const Float factor = exp2(hn::Sub(hn::Set(kFloats, old_max), subtrahend));
    const float total = hn::GetLane(hn::SumOfLanes(kFloats, sum));
    panel.running_max[lane] = hn::GetLane(maximum);
    panel.running_sum[lane] =
        total + (panel.started ? panel.running_sum[lane] * hn::GetLane(factor) : 0.0f);
    float* HWY_RESTRICT o = panel.o + lane * v_row_;
    for (int64_t d = 0; d < v_row_; d += kLanes) {
      hn::Store(panel.started ? hn::Mul(hn::Load(kFloats, o + d), factor) : hn::Zero(kFloats),
                kFloats, o + d);
    }
  }

  template <class Body>
  HWY_INLINE static void for_each_vector(float* HWY_RESTRICT s, int64_t count, Body&& body) {
    for (int64_t i = 0; i < count; i += kLanes) {
      hn::Store(body(hn::Load(kFloats, s + i), i), kFloats, s + i);
    }
  }

  template <core::DataType kType, int kQueries, int kVectors>
  HWY_INLINE void value_strips(const ForwardPanel& panel, int64_t lane, const void* const* rows,
                               int64_t count, int64_t first, RowsAhead& ahead) const {
    const int64_t dv = call_.problem.head_dim_v;
    int64_t d = 0;
    for (; d + kVectors * kLanes <= dv; d += kVectors * kLanes) {
      value_strip<kType, kQueries, kVectors>(panel, lane, d, rows, count, first, ahead);
    }
    for (; d < dv; d += kLanes) {
      value_strip<kType, kQueries, 1>(panel, lane, d, rows, count, first, ahead);
    }
  }

  template <core::DataType kType, int kQueries, int kVectors>
  HWY_INLINE void value_strip(const ForwardPanel& panel, int64_t lane, int64_t d,
                              const void* const* rows, int64_t count, int64_t first,
                              RowsAhead& ahead) const {
    float* HWY_RESTRICT o = panel.o + lane * v_row_ + d;
    const float* HWY_RESTRICT p = scores_of(lane) + first;
    Float sum[kQueries][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::Load(kFloats, o + i * v_row_ + v * kLanes);
    }
    auto lines = ahead.template share<(kQueries >= 4)>(count);
    for (int64_t key = 0; key < count; ++key) {
      lines.step(key);
      Float value[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) value[v] = load_widened<kType>(rows[key], d + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        const Float weight = hn::Set(kFloats, p[i * kMaxRows + key]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(weight, value[v], sum[i][v]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        hn::Store(sum[i][v], kFloats, o + i * v_row_ + v * kLanes);
      }
    }
  }

  float* const scores_;  // [lanes][kMaxRows]
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
