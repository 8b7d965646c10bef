// What the forward and the backward in pairs of bfloat16 share: chunks of scores, and products as
// the kernels take them, whole or in parts.
#if defined(FA_CPU_PAIR_PARTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_PARTS_INL_H_
#undef FA_CPU_PAIR_PARTS_INL_H_
#else
#define FA_CPU_PAIR_PARTS_INL_H_
#endif

#include "cpu/pair_softmax-inl.h"
#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// S^T[key][query] = sum of a[key][d] b[query][d], b being packed, for what the panel's queries see.
HWY_INLINE void pair_score_product(const AttentionCall& call, const SequenceRun& run,
                                   const QueryPanel& panel, const ScoreTile& tile,
                                   const uint16_t* a, int64_t depth, const float* b) {
  constexpr int64_t kStrip = 2 * kPairColumns;  // so that a causal mask cuts closely
  const int64_t columns = round_up(panel.num_lanes, kPairColumns);
  const int64_t strip = run.crosses_band(panel, tile) && panel.one_head() ? kStrip : columns;
  const auto keys_of = run.keys_of(panel, tile);
  for (int64_t column = 0; column < columns; column += strip) {
    const int64_t width = std::min(strip, columns - column);
    const semantics::Range keys = keys_of(column, column + width);
    if (keys.empty()) continue;
    const int64_t first = keys.begin / kPairRows * kPairRows;
    call.pairs->multiply({.a = a + first * depth,
                          .a_row_step = kPairRows * depth,
                          .b = reinterpret_cast<const uint32_t*>(b) + column * depth / 2,
                          .b_depth_step = kBlockB,
                          .b_column_step = kPairColumns * depth / 2,
                          .c = tile.at(first, column / kPairColumns),
                          .c_column_step = tile.column_step,
                          .rows = round_up(keys.end, kPairRows) - first,
                          .columns = width,
                          .depth = depth,
                          .accumulate = false});
  }
}

// The scores of the tile's chunk from row `first` on, in one of two buffers that take turns.
HWY_INLINE ScoreTile chunk_of(const ScoreTile& tile, int64_t first) {
  return {tile.scores + first / kChunkKeys % 2 * kChunkKeys * kPanel,
          tile.first_key + first,
          std::max<int64_t>(tile.begin - first, 0),
          std::min(tile.end - first, kChunkKeys),
          kLanes,
          kChunkColumn};
}

HWY_INLINE ScoreTile whole_chunk(ScoreTile chunk) {
  chunk.begin = 0;
  chunk.end = kChunkKeys;
  return chunk;
}

// s = -inf in rows outside the tile, so that the chunk is a whole one.
HWY_INLINE void hide_rows_outside(ScoreTile& chunk) {
  const auto hide = [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t v = 0; v < kPanel / kLanes; ++v) {
      std::fill_n(chunk.at(begin, v), (end - begin) * kLanes, kMinusInfinity);
    }
  };
  if (chunk.begin > 0) hide(0, chunk.begin);
  if (chunk.end < kChunkKeys) hide(chunk.end, kChunkKeys);
  chunk = whole_chunk(chunk);
}

// Whether a panel's chunks are as wide as the kernels for chunks want them.
HWY_INLINE bool fills_chunks(const QueryPanel& panel) {
  return panel.vectors() * kLanes == kChunkLanes;
}

// The product of a whole chunk of keys.
HWY_INLINE PairProduct whole_product(const uint16_t* a, int64_t depth, const float* b,
                                     const ScoreTile& chunk) {
  return {.a = a,
          .a_row_step = kPairRows * depth,
          .b = reinterpret_cast<const uint32_t*>(b),
          .b_depth_step = kBlockB,
          .b_column_step = kPairColumns * depth / 2,
          .c = chunk.scores,
          .c_column_step = chunk.column_step,
          .rows = kChunkKeys,
          .columns = kChunkLanes,
          .depth = depth,
          .accumulate = false};
}

// C += A P^T or A dS^T, for what the panel's queries see. a: blocks of tile_keys of depth; p: pairs
// in the place of scores.
HWY_INLINE PairProduct pair_key_sum(const AttentionCall& call, const QueryPanel& panel,
                                    const ScoreTile& p, const uint16_t* a, int64_t rows,
                                    bool accumulate, float* c) {
  const int64_t first = p.begin / kPairDepth * kPairDepth;
  return {.a = a + first * kPairRows,
          .a_row_step = kPairRows * call.tile_keys,
          .b = reinterpret_cast<const uint32_t*>(p.at(first / 2, 0)),
          .b_depth_step = kBlockB,
          .b_column_step = p.column_step,
          .c = c,
          .c_column_step = rows * kPairColumns,
          .rows = rows,
          .columns = round_up(panel.num_lanes, kPairColumns),
          .depth = round_up(p.end, kPairDepth) - first,
          .accumulate = accumulate};
}

// Rows of a panel from their transpose in blocks of C: to[lane][0 .. n).
HWY_INLINE void rows_of_blocks(const float* HWY_RESTRICT from, int64_t n, int64_t num_lanes,
                               float* HWY_RESTRICT to, int64_t row) {
  for (int64_t lane = 0; lane < num_lanes; lane += kPairColumns) {
    for (int64_t d = 0; d < n; d += 4) {
      transpose_4_rows(from + lane * n + d * kPairColumns, kPairColumns,
                       std::min(kPairColumns, num_lanes - lane), 1.0f, to + lane * row + d, row);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
