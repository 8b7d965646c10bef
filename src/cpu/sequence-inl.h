// One (batch, key head) of a call: its panels and tiles, what its queries see, how its scores are
// transformed. Shared by every kernel.
#if defined(FA_CPU_SEQUENCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_SEQUENCE_INL_H_
#undef FA_CPU_SEQUENCE_INL_H_
#else
#define FA_CPU_SEQUENCE_INL_H_
#endif

#include <algorithm>

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class SequenceRun : public SequenceRows {
 public:
  using SequenceRows::SequenceRows;

  HWY_INLINE semantics::Range visible_keys(int64_t query) const {
    return semantics::visible_keys(query, sequence_.seqlen_q, sequence_.seqlen_k, problem_.band);
  }

  // Panel `index` of the key head: all its query heads at once, or they take turns.
  HWY_INLINE QueryPanel panel(int64_t index) const {
    if (call_.packs_group(sequence_)) {
      const int64_t count = sequence_.seqlen_q;
      return {head_kv_ * call_.group,
              0,
              count,
              count * call_.group,
              {visible_keys(0).begin, visible_keys(count - 1).end}};
    }
    const int64_t first = index / call_.group * kPanel;
    const int64_t count = std::min<int64_t>(kPanel, sequence_.seqlen_q - first);
    // Ends grow with the query, and so do beginnings.
    return {head_kv_ * call_.group + index % call_.group,
            first,
            count,
            count,
            {visible_keys(first).begin, visible_keys(first + count - 1).end}};
  }

  // Tiles start at multiples of tile_keys whatever the task, so that a query's sums are grouped
  // alike in every cut of the work.
  template <class Body>
  HWY_INLINE void for_each_tile(semantics::Range keys, Body&& body) const {
    const int64_t size = call_.tile_keys;
    for (int64_t first = keys.begin / size * size; first < keys.end; first += size) {
      body(
          KeyTile{{std::max<int64_t>(first, keys.begin), std::min<int64_t>(first + size, keys.end)},
                  first});
    }
  }

  // The panel's share of the tile; empty where it sees none of it.
  HWY_INLINE ScoreTile score_tile(const QueryPanel& panel, const KeyTile& tile,
                                  float* scores) const {
    const bool blocked = call_.pairs != nullptr;
    return {scores,
            tile.first_key,
            std::max(panel.keys.begin, tile.keys.begin) - tile.first_key,
            std::min(panel.keys.end, tile.keys.end) - tile.first_key,
            blocked ? kLanes : kPanel,
            blocked ? call_.tile_keys * kLanes : kLanes};
  }

  HWY_INLINE float alibi_slope(int64_t head) const {
    const core::TensorView& slopes = args_.alibi_slopes;
    const float* at = slopes.as<const float>();
    return slopes.ndim == 1 ? at[head * slopes.strides[0]]
                            : at[batch_ * slopes.strides[0] + head * slopes.strides[1]];
  }

  // Whether a key of the tile is hidden from a query of the panel.
  HWY_INLINE bool crosses_band(const QueryPanel& panel, const ScoreTile& tile) const {
    if (problem_.band.unbounded()) return false;
    const semantics::Range first = visible_keys(panel.first_query);
    const semantics::Range last = visible_keys(panel.last_query());
    return tile.first_key + tile.end > first.end || tile.first_key + tile.begin < last.begin;
  }

  // The rows of the tile that the panel's lanes in [first, last) see, for the products to clip.
  HWY_INLINE auto keys_of(const QueryPanel& panel, const ScoreTile& tile) const {
    const bool clips = crosses_band(panel, tile) && panel.one_head();
    return [this, &panel, &tile, clips](int64_t first, int64_t last) HWY_ATTR {
      if (!clips) return semantics::Range{tile.begin, tile.end};
      const int64_t last_query = std::min(last, panel.num_lanes) - 1;
      return semantics::Range{
          std::max<int64_t>(tile.begin,
                            visible_keys(panel.first_query + first).begin - tile.first_key),
          std::min<int64_t>(tile.end,
                            visible_keys(panel.first_query + last_query).end - tile.first_key)};
    };
  }

  // The panel's lanes that see any of the tile's rows in [first, last). For panels of one head.
  HWY_INLINE auto queries_of(const QueryPanel& panel, const ScoreTile& tile) const {
    const bool clips = crosses_band(panel, tile);
    return [this, &panel, &tile, clips](int64_t first, int64_t last) HWY_ATTR {
      if (!clips) return semantics::Range{0, panel.num_lanes};
      const auto seen_by = [&](int64_t row) HWY_ATTR {
        return semantics::visible_queries(tile.first_key + row, sequence_.seqlen_q,
                                          sequence_.seqlen_k, problem_.band);
      };
      return semantics::Range{
          std::max<int64_t>(0, seen_by(first).begin - panel.first_query),
          std::min<int64_t>(panel.num_lanes, seen_by(last - 1).end - panel.first_query)};
    };
  }

  // The vectors of lanes that products of a tile read at a row: those of queries that see one of
  // the keys around it, register tile by register tile. For panels of one head.
  HWY_INLINE auto vectors_of(const QueryPanel& panel, const ScoreTile& tile) const {
    const bool clips = crosses_band(panel, tile);
    return [&panel, &tile, clips, queries = queries_of(panel, tile)](int64_t row) HWY_ATTR {
      if (!clips) return semantics::Range{0, panel.vectors()};
      const semantics::Range lanes = queries(std::max<int64_t>(row - kValueRows + 1, tile.begin),
                                             std::min<int64_t>(row + kValueRows, tile.end));
      if (lanes.empty()) return semantics::Range{0, 0};
      return semantics::Range{
          lanes.begin / kValueRows * kValueRows / kLanes,
          ceil_div(std::min(round_up(lanes.end, kValueRows), panel.num_lanes), kLanes)};
    };
  }

  // Products of pairs leave the scale out, since q times scale would be rounded. Whether it may be
  // left to the exponential: nothing else is done to the scores, and hidden ones stay at -inf.
  HWY_INLINE bool may_scale_late() const {
    return call_.pairs != nullptr && call_.scale_log2 > 0.0f && !problem_.softcap &&
           !problem_.alibi && problem_.bias == core::BiasKind::kNone;
  }

  // From products to scores, masked, all in base 2. scales_late: the exponential will apply the
  // scale. softcap_derivatives, where not null, gets those of tanh for each score.
  HWY_INLINE void finish_scores(const QueryPanel& panel, const ScoreTile& tile, bool scales_late,
                                float* softcap_derivatives = nullptr) const {
    if (call_.pairs != nullptr && !scales_late) {
      const Float scale = hn::Set(kFloats, call_.scale_log2);
      transform_scores(panel, tile,
                       [&](Float s, int64_t, int64_t) HWY_ATTR { return hn::Mul(s, scale); });
    }
    if (problem_.softcap) apply_softcap(panel, tile, args_.softcap, softcap_derivatives);
    if (problem_.alibi) {
      apply_alibi(panel, tile, sequence_.seqlen_k - sequence_.seqlen_q,
                  [this](int64_t head) HWY_ATTR { return alibi_slope(head); });
    }
    if (problem_.bias != core::BiasKind::kNone) apply_bias(panel, tile, bias());
    if (crosses_band(panel, tile)) {
      apply_band(panel, tile, sequence_.seqlen_q, sequence_.seqlen_k, problem_.band);
    }
  }

 private:
  HWY_INLINE Bias bias() const {
    const core::TensorView& view = args_.attn_bias;
    return {&view,
            batch_ * bias_stride(view, 4),
            bias_stride(view, 3),
            bias_stride(view, 2),
            bias_stride(view, 1),
            problem_.bias == core::BiasKind::kBoolean};
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
