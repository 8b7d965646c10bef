// One (batch, key head) of a call: where its rows lie, what its queries see, how its scores are
// transformed. Shared by every kernel.
#if defined(FA_CPU_SEQUENCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_SEQUENCE_INL_H_
#undef FA_CPU_SEQUENCE_INL_H_
#else
#define FA_CPU_SEQUENCE_INL_H_
#endif

#include <algorithm>

#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// A tile of keys that panels of queries are held against.
struct KeyTile {
  semantics::Range keys;  // within the sequence
  int64_t first_key;      // of row 0; a multiple of tile_keys
};

class SequenceRun {
 public:
  SequenceRun(const AttentionCall& call, int64_t batch, int64_t head_kv)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        sequence_(core::sequence(call.args, call.problem, batch)),
        batch_(batch),
        head_kv_(head_kv) {}

  const core::Sequence& sequence() const { return sequence_; }
  // Of the (batch, key head), among all.
  int64_t number() const { return batch_ * problem_.num_heads_kv + head_kv_; }

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

  // Offset of a key's row of k or v, in elements, wherever the layout keeps it.
  HWY_INLINE int64_t key_offset(const core::TensorView& view, const core::Rows& rows,
                                int64_t key) const {
    int64_t offset = rows.offset + key * rows.row_stride;
    if (problem_.page_size > 0) {
      const core::PagedRow at =
          core::paged_row(args_.block_table, problem_.page_size, batch_, sequence_.k_begin + key);
      offset = at.page * view.strides[0] + at.row * view.strides[1];
    }
    return offset + head_kv_ * rows.head_stride;
  }

  // Copies the tile's rows of k or v to [tile_keys][row_size], widened.
  HWY_INLINE void load_rows(const core::TensorView& from, const KeyTile& tile, int64_t row_size,
                            float* HWY_RESTRICT to) const {
    const int64_t n = from.shape[from.ndim - 1];
    const core::Rows rows = core::key_rows(from, sequence_);
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
        const auto row_of = [&](int64_t i) HWY_ATTR {
          return from.as<const char>() + key_offset(from, rows, i) * core::byte_size(dtype());
        };
        if (key + kRowsAhead < tile.keys.end) prefetch_row<dtype()>(row_of(key + kRowsAhead), n);
        widen_row<dtype()>(row_of(key), n, to + (key - tile.first_key) * row_size);
      }
    });
  }

  // Where the tile's rows of 16-bit elements lie, from row 0 on; null where it has no key.
  HWY_INLINE void find_rows(const core::TensorView& from, const KeyTile& tile,
                            const uint16_t** to) const {
    const core::Rows rows = core::key_rows(from, sequence_);
    std::fill_n(to, tile.keys.begin - tile.first_key, nullptr);
    for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
      to[key - tile.first_key] = from.as<const uint16_t>() + key_offset(from, rows, key);
    }
  }

  // The reverse of load_rows: rounds the tile's rows, times factor, to dk or dv.
  HWY_INLINE void store_rows(const core::TensorView& to, const KeyTile& tile,
                             const float* HWY_RESTRICT from, int64_t row_size, float factor) const {
    const int64_t n = to.shape[to.ndim - 1];
    const core::Rows rows = core::key_rows(to, sequence_);
    dispatch_dtype(to.dtype, [&](auto dtype) HWY_ATTR {
      for (int64_t key = tile.keys.begin; key < tile.keys.end; ++key) {
        if (key + kRowsAhead < tile.keys.end) {
          prefetch_row<dtype()>(row_at<dtype()>(to, rows, head_kv_, key + kRowsAhead), n);
        }
        narrow_row<dtype()>(from + (key - tile.first_key) * row_size, hn::Set(kFloats, factor), n,
                            row_at<dtype()>(to, rows, head_kv_, key));
      }
    });
  }
  HWY_INLINE void store_key(const float* HWY_RESTRICT row, float factor, const core::TensorView& to,
                            int64_t key) const {
    const core::Rows rows = core::key_rows(to, sequence_);
    narrow(row, factor, to, rows.offset + key * rows.row_stride + head_kv_ * rows.head_stride);
  }

  // Offset of a query's row of q, out and their like, in elements.
  HWY_INLINE int64_t query_offset(const core::TensorView& view, int64_t head, int64_t query) const {
    const core::Rows rows = core::query_rows(view, sequence_);
    return rows.offset + query * rows.row_stride + head * rows.head_stride;
  }

  // to = the row of one lane of a panel, widened, and zeros up to a whole vector.
  HWY_INLINE void load_query(const core::TensorView& from, const QueryPanel& panel, int64_t lane,
                             float* HWY_RESTRICT to) const {
    widen(from, query_offset(from, panel.head(lane), panel.query(lane)), from.shape[from.ndim - 1],
          to);
  }

  // to = all rows of a panel, widened: [num_lanes][row_size].
  HWY_INLINE void load_queries(const core::TensorView& from, const QueryPanel& panel,
                               int64_t row_size, float* HWY_RESTRICT to) const {
    const int64_t n = from.shape[from.ndim - 1];
    const core::Rows rows = core::query_rows(from, sequence_);
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
        prefetch_ahead<dtype()>(from, rows, panel, head, query);
        widen_row<dtype()>(row_at<dtype()>(from, rows, head, query), n, to + lane * row_size);
      });
    });
  }

  // Rounds a panel's rows, times factor, to dq.
  HWY_INLINE void store_queries(const core::TensorView& to, const QueryPanel& panel,
                                const float* HWY_RESTRICT from, int64_t row_size,
                                float factor) const {
    const int64_t n = to.shape[to.ndim - 1];
    const core::Rows rows = core::query_rows(to, sequence_);
    dispatch_dtype(to.dtype, [&](auto dtype) HWY_ATTR {
      panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
        prefetch_ahead<dtype()>(to, rows, panel, head, query);
        narrow_row<dtype()>(from + lane * row_size, hn::Set(kFloats, factor), n,
                            row_at<dtype()>(to, rows, head, query));
      });
    });
  }

  // to[lane] = the inner product of the lane's rows of out and dout.
  HWY_INLINE void multiply_queries(const QueryPanel& panel, float* HWY_RESTRICT to) const {
    const int64_t n = problem_.head_dim_v;
    const core::Rows out = core::query_rows(args_.out, sequence_);
    const core::Rows dout = core::query_rows(args_.dout, sequence_);
    dispatch_dtype(args_.out.dtype, [&](auto dtype) HWY_ATTR {
      panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
        prefetch_ahead<dtype()>(args_.out, out, panel, head, query);
        to[lane] = inner_product<dtype()>(row_at<dtype()>(args_.out, out, head, query),
                                          row_at<dtype()>(args_.dout, dout, head, query), n);
      });
    });
  }

  // to = (rows of the panel * factor)^T: [kPanel / kStripLanes][n][kStripLanes]; lanes that only
  // fill up the panel are zero. buffer: 4 rows of n floats, each rounded up to a vector.
  HWY_INLINE void load_transposed(const core::TensorView& from, const QueryPanel& panel,
                                  float factor, float* HWY_RESTRICT buffer,
                                  float* HWY_RESTRICT to) const {
    const int64_t n = from.shape[from.ndim - 1];
    const int64_t row = round_up(n, kMaxLanes);
    const core::Rows rows = core::query_rows(from, sequence_);
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      panel.for_each_lane([&](int64_t lane, int64_t head, int64_t query) HWY_ATTR {
        prefetch_ahead<dtype()>(from, rows, panel, head, query);
        widen_row<dtype()>(row_at<dtype()>(from, rows, head, query), n, buffer + lane % 4 * row);
        if (lane % 4 == 3) transpose_lanes(buffer, row, n, factor, lane - 3, to);
      });
    });
    const int64_t whole = panel.num_lanes / 4 * 4;
    for (int64_t lane = whole; lane < filled_lanes(panel); lane += 4) {
      const int64_t filled = std::max<int64_t>(panel.num_lanes - lane, 0);
      std::fill_n(buffer + filled * row, (4 - filled) * row, 0.0f);
      transpose_lanes(buffer, row, n, factor, lane, to);
    }
  }

  // The same from a panel's rows of `row` floats, which get filled up with zeros.
  HWY_INLINE static void transpose_panel(const QueryPanel& panel, float* HWY_RESTRICT rows,
                                         int64_t row, int64_t n, float factor,
                                         float* HWY_RESTRICT to) {
    const int64_t lanes = filled_lanes(panel);
    std::fill_n(rows + panel.num_lanes * row, (lanes - panel.num_lanes) * row, 0.0f);
    for (int64_t lane = 0; lane < lanes; lane += 4) {
      transpose_lanes(rows + lane * row, row, n, factor, lane, to);
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
    return [this, &panel, &tile, clips, queries = queries_of(panel, tile)](int64_t row) HWY_ATTR {
      if (!clips) return semantics::Range{0, panel.vectors()};
      const semantics::Range lanes = queries(std::max<int64_t>(row - kValueRows + 1, tile.begin),
                                             std::min<int64_t>(row + kValueRows, tile.end));
      if (lanes.empty()) return semantics::Range{0, 0};
      return semantics::Range{
          lanes.begin / kValueRows * kValueRows / kLanes,
          (std::min(round_up(lanes.end, kValueRows), panel.num_lanes) + kLanes - 1) / kLanes};
    };
  }

  HWY_INLINE float* lse_at(int64_t head, int64_t query) const {
    const core::TensorView& lse = args_.lse;
    if (problem_.layout == core::Layout::kVarlen) {
      return lse.as<float>() + head * lse.strides[0] + (sequence_.q_begin + query) * lse.strides[1];
    }
    return lse.as<float>() + batch_ * lse.strides[0] + head * lse.strides[1] +
           query * lse.strides[2];
  }

  // to[0 .. n) = from[offset ...), and zeros up to a whole vector.
  HWY_INLINE static void widen(const core::TensorView& from, int64_t offset, int64_t n,
                               float* HWY_RESTRICT to) {
    dispatch_dtype(from.dtype, [&](auto dtype) HWY_ATTR {
      widen_row<dtype()>(from.as<const char>() + offset * core::byte_size(dtype()), n, to);
    });
  }

  // to[offset ...] = from * factor, rounded to to's dtype, one row.
  HWY_INLINE static void narrow(const float* HWY_RESTRICT from, float factor,
                                const core::TensorView& to, int64_t offset) {
    dispatch_dtype(to.dtype, [&](auto dtype) HWY_ATTR {
      narrow_row<dtype()>(from, hn::Set(kFloats, factor), to.shape[to.ndim - 1],
                          to.as<char>() + offset * core::byte_size(dtype()));
    });
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
  template <core::DataType kType>
  HWY_INLINE static char* row_at(const core::TensorView& view, const core::Rows& rows, int64_t head,
                                 int64_t query) {
    return view.as<char>() + (rows.offset + query * rows.row_stride + head * rows.head_stride) *
                                 core::byte_size(kType);
  }

  // Rows of a head lie far apart, which processors do not foresee.
  static constexpr int64_t kRowsAhead = 4;

  template <core::DataType kType>
  HWY_INLINE static void prefetch_row(const char* row, int64_t n) {
    constexpr int64_t kCacheLine = 64;
    for (int64_t at = 0; at < n * core::byte_size(kType); at += kCacheLine) {
      __builtin_prefetch(row + at);
    }
  }

  // The row that is kRowsAhead of a query's, where the panel has it.
  template <core::DataType kType>
  HWY_INLINE static void prefetch_ahead(const core::TensorView& view, const core::Rows& rows,
                                        const QueryPanel& panel, int64_t head, int64_t query) {
    if (query + kRowsAhead > panel.last_query()) return;
    prefetch_row<kType>(row_at<kType>(view, rows, head, query + kRowsAhead),
                        view.shape[view.ndim - 1]);
  }

  // Lanes that products read.
  static int64_t filled_lanes(const QueryPanel& panel) {
    return round_up(panel.num_lanes, std::max<int64_t>(kLanes, 4));
  }

  // Four rows to the columns from `lane` on of a panel's strips.
  HWY_INLINE static void transpose_lanes(const float* HWY_RESTRICT rows, int64_t row, int64_t n,
                                         float factor, int64_t lane, float* HWY_RESTRICT to) {
    const auto strip_of = [&](int64_t at) HWY_ATTR {
      return to + at / kStripLanes * kStripLanes * n + at % kStripLanes;
    };
    if constexpr (kStripLanes % 4 == 0) {
      transpose_4_rows(rows, row, n, factor, strip_of(lane), kStripLanes);
    } else {
      for (int64_t i = 0; i < 4; ++i) {
        float* HWY_RESTRICT column = strip_of(lane + i);
        for (int64_t d = 0; d < n; ++d) column[d * kStripLanes] = rows[i * row + d] * factor;
      }
    }
  }

  HWY_INLINE Bias bias() const {
    const core::TensorView& view = args_.attn_bias;
    return {&view,
            batch_ * bias_stride(view, 4),
            bias_stride(view, 3),
            bias_stride(view, 2),
            bias_stride(view, 1),
            problem_.bias == core::BiasKind::kBoolean};
  }

  const AttentionCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const core::Sequence sequence_;
  const int64_t batch_;
  const int64_t head_kv_;
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
