// Where the rows of one (batch, key head) of a call lie, and copies of them: widened, transposed,
// rounded.
#if defined(FA_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_ROWS_INL_H_
#undef FA_CPU_ROWS_INL_H_
#else
#define FA_CPU_ROWS_INL_H_
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

class SequenceRows {
 public:
  SequenceRows(const AttentionCall& call, int64_t batch, int64_t head_kv)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        sequence_(core::sequence(call.args, call.problem, batch)),
        batch_(batch),
        head_kv_(head_kv) {}

  const core::Sequence& sequence() const { return sequence_; }
  // Of the (batch, key head), among all.
  int64_t number() const { return batch_ * problem_.num_heads_kv + head_kv_; }

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

  // The tile's rows of k or v for num_panels to be held against. Where they are few, copies in
  // `copies`, as load_rows makes them, would cost more than they save: rows of fp32 are left where
  // they lie, but for those that do not fill a register tile of so many.
  HWY_INLINE LeftRows left_rows(const core::TensorView& from, const KeyTile& tile,
                                int64_t num_panels, int64_t tile_rows, int64_t row_size,
                                float* HWY_RESTRICT copies) const {
    constexpr int64_t kFewPanels = 2;
    LeftRows left{{nullptr, 0}, 0, {copies, row_size}};
    KeyTile rest = tile;
    if (num_panels <= kFewPanels && from.dtype == core::DataType::kFloat32 &&
        problem_.page_size == 0) {
      const core::Rows rows = core::key_rows(from, sequence_);
      left.given = {from.as<const float>() + key_offset(from, rows, tile.first_key),
                    rows.row_stride};
      left.num_given = (tile.keys.end - tile.first_key) / tile_rows * tile_rows;
      rest.keys.begin = std::max<int64_t>(rest.keys.begin, tile.first_key + left.num_given);
    }
    load_rows(from, rest, row_size, copies);
    return left;
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

  // Rows of an fp32 gradient of whole vectors, from `key` on or of a panel, for products to write.
  HWY_INLINE FinishedRows key_target(const core::TensorView& to, int64_t key, float factor) const {
    const core::Rows rows = core::key_rows(to, sequence_);
    return {to.as<float>() + key_offset(to, rows, key), rows.row_stride, factor, nullptr, 0};
  }
  HWY_INLINE FinishedRows query_target(const core::TensorView& to, const QueryPanel& panel,
                                       float factor) const {
    return {to.as<float>() + query_offset(to, panel.first_head, panel.first_query),
            core::query_rows(to, sequence_).row_stride, factor, nullptr, 0};
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

  // to = (rows of the panel * factor)^T: [kPanel / kStrip][n][kStrip]; lanes that only fill up the
  // panel are zero. buffer: 4 rows of n floats, each rounded up to a vector.
  template <int64_t kStrip>
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
        if (lane % 4 == 3) transpose_lanes<kStrip>(buffer, row, n, factor, lane - 3, to);
      });
    });
    const int64_t whole = panel.num_lanes / 4 * 4;
    for (int64_t lane = whole; lane < filled_lanes(panel); lane += 4) {
      const int64_t filled = std::max<int64_t>(panel.num_lanes - lane, 0);
      std::fill_n(buffer + filled * row, (4 - filled) * row, 0.0f);
      transpose_lanes<kStrip>(buffer, row, n, factor, lane, to);
    }
  }

  // The same from a panel's rows of `row` floats, which get filled up with zeros.
  template <int64_t kStrip>
  HWY_INLINE static void transpose_panel(const QueryPanel& panel, float* HWY_RESTRICT rows,
                                         int64_t row, int64_t n, float factor,
                                         float* HWY_RESTRICT to) {
    const int64_t lanes = filled_lanes(panel);
    std::fill_n(rows + panel.num_lanes * row, (lanes - panel.num_lanes) * row, 0.0f);
    for (int64_t lane = 0; lane < lanes; lane += 4) {
      transpose_lanes<kStrip>(rows + lane * row, row, n, factor, lane, to);
    }
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

 protected:
  const AttentionCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const core::Sequence sequence_;
  const int64_t batch_;
  const int64_t head_kv_;

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
  template <int64_t kStrip>
  HWY_INLINE static void transpose_lanes(const float* HWY_RESTRICT rows, int64_t row, int64_t n,
                                         float factor, int64_t lane, float* HWY_RESTRICT to) {
    const auto strip_of = [&](int64_t at)
                              HWY_ATTR { return to + at / kStrip * kStrip * n + at % kStrip; };
    if constexpr (kStrip % 4 == 0) {
      transpose_4_rows(rows, row, n, factor, strip_of(lane), kStrip);
    } else {
      for (int64_t i = 0; i < 4; ++i) {
        float* HWY_RESTRICT column = strip_of(lane + i);
        for (int64_t d = 0; d < n; ++d) column[d * kStrip] = rows[i * row + d] * factor;
      }
    }
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
