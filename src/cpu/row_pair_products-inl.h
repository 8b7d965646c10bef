// Products for few queries in bfloat16 where the processor multiplies its pairs: the rows of
// RowProducts, and its softmax, with P rounded to bfloat16.
#if defined(FA_CPU_ROW_PAIR_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_ROW_PAIR_PRODUCTS_INL_H_
#undef FA_CPU_ROW_PAIR_PRODUCTS_INL_H_
#else
#define FA_CPU_ROW_PAIR_PRODUCTS_INL_H_
#endif

#include <algorithm>

#include "cpu/row_pairs.h"
#include "cpu/row_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class RowPairProducts : public RowProducts {
 public:
  static_assert(kKeys == kRowPairKeys);
  static constexpr int64_t kValueKeys = 48;
  using RowProducts::RowProducts;

  template <class Body>
  HWY_INLINE static void with_dtype(core::DataType, Body&& body) {
    body(std::integral_constant<core::DataType, core::DataType::kBFloat16>{});
  }

  // Rows of Q as they are: times the scale they would be rounded.
  HWY_INLINE void load_queries(const ForwardPanel& panel) const {
    const int64_t n = call_.problem.head_dim;
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      const uint16_t* from = call_.q.as<const uint16_t>() +
                             run_.query_offset(call_.q, panel.head(lane), panel.query(lane));
      uint16_t* to = reinterpret_cast<uint16_t*>(panel.q) + lane * q_row();
      std::copy_n(from, n, to);
      std::fill(to + n, to + q_row(), uint16_t{0});
    }
  }

  static int64_t score_steps(int64_t num_lanes, int64_t head_dim) {
    return ceil_div(num_lanes, 4) * ceil_div(head_dim, kPairDepth);
  }
  static int64_t value_steps(int64_t num_lanes, int64_t head_dim_v) {
    return std::max<int64_t>(head_dim_v * std::min<int64_t>(num_lanes, 8) / kRowPairSums / 2, 1);
  }

  template <core::DataType>
  HWY_INLINE void scores(const ForwardPanel& panel, const void* const (&rows)[kKeys], int64_t first,
                         RowsAhead& ahead) const {
    call_.row_pairs->scores({.q = reinterpret_cast<const uint16_t*>(panel.q),
                             .q_row = q_row(),
                             .lanes = panel.num_lanes,
                             .rows = rows,
                             .n = call_.problem.head_dim,
                             .scale = call_.scale_log2,
                             .to = scores_of(0) + first,
                             .to_row = kMaxRows,
                             .ahead = &ahead});
  }

  HWY_INLINE void softmax(ForwardPanel& panel, semantics::Range keys) const {
    RowProducts::softmax(panel, keys);
    const int64_t count = round_up(keys.end - keys.begin, kMaxLanes);
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      call_.row_pairs->round(scores_of(lane), count, probabilities_of(lane));
    }
  }

  template <core::DataType>
  HWY_INLINE void values(const ForwardPanel& panel, const void* const* rows, int64_t count,
                         int64_t first, RowsAhead& ahead) const {
    call_.row_pairs->values({.p = probabilities_of(0) + first,
                             .p_row = 2 * kMaxRows,
                             .lanes = panel.num_lanes,
                             .rows = rows,
                             .count = count,
                             .n = call_.problem.head_dim_v,
                             .o = panel.o,
                             .o_row = v_row_,
                             .ahead = &ahead});
  }

 private:
  int64_t q_row() const { return round_up(call_.problem.head_dim, kPairDepth); }
  // In the place of the scores.
  HWY_INLINE uint16_t* probabilities_of(int64_t lane) const {
    return reinterpret_cast<uint16_t*>(scores_of(lane));
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
