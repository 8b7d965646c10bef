// The two products of the forward in pairs of bfloat16: S^T = K Q^T with the keys' rows as they
// are, and O^T += V^T P^T, whose sums have the softmax statistics in their lanes as the scores do.
#if defined(FA_CPU_PAIR_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_PRODUCTS_INL_H_
#undef FA_CPU_PAIR_PRODUCTS_INL_H_
#else
#define FA_CPU_PAIR_PRODUCTS_INL_H_
#endif

#include <cmath>
#include <optional>
#include <utility>

#include "core/validate.h"
#include "cpu/pair_parts-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class PairProducts {
 public:
  // Probabilities become pairs of keys; o is transposed.
  static constexpr bool kPairs = true;
  static constexpr bool kFewQueries = false;

  PairProducts(const ForwardCall& call, const SequenceRun& run, const ForwardScratch& layout,
               float* scratch)
      : call_(call),
        run_(run),
        depth_(round_up(call.problem.head_dim, kPairDepth)),
        v_rows_(round_up(call.problem.head_dim_v, kPairRows)),
        scales_late_(run.may_scale_late() && !call.problem.dropout),
        scale_(scales_late_ ? call.scale_log2 : 1.0f),
        most_lag_(call.problem.wants_s_dmask ? 0.0f : kMostLag),  // which wants the maximum itself
        most_rise_(0.5f * std::exp2(most_lag_)),
        own_k_(reinterpret_cast<uint16_t*>(scratch + layout.k)),
        own_v_(reinterpret_cast<uint16_t*>(scratch + layout.v)),
        k_(own_k_),
        v_(own_v_) {
    call_.pairs->begin();
  }
  ~PairProducts() { call_.pairs->end(); }
  PairProducts(const PairProducts&) = delete;
  PairProducts& operator=(const PairProducts&) = delete;

  HWY_INLINE void load_queries(const ForwardPanel& panel) const {
    const uint16_t* rows[kMaxPanel];
    for (int64_t lane = 0; lane < panel.num_lanes; ++lane) {
      rows[lane] = call_.q.as<const uint16_t>() +
                   run_.query_offset(call_.q, panel.head(lane), panel.query(lane));
    }
    call_.pairs->pack_b_transposed({rows, panel.num_lanes, call_.problem.head_dim},
                                   reinterpret_cast<uint32_t*>(panel.q), depth_ / 2 * kPairColumns);
  }

  HWY_INLINE void load_keys(const KeyTile& tile, int64_t) {
    if (call_.packed.tiles != nullptr) {
      k_ = packed_keys(call_, run_, tile);
    } else {
      pack_keys(call_, run_, tile, own_k_);
    }
  }

  HWY_INLINE void load_values(const KeyTile& tile) {
    if (call_.packed.tiles != nullptr) {
      const uint16_t* packed = packed_keys(call_, run_, tile);
      v_ = packed + call_.tile_keys * depth_;
      ahead_ = reinterpret_cast<const char*>(packed) + call_.packed.floats * sizeof(float);
      ahead_end_ = ahead_ + call_.packed.floats * sizeof(float);
    } else {
      pack_values(call_, run_, tile, own_v_);
    }
  }

  // Where ForwardCall::packed has a tile: K, and V^T behind it.
  HWY_INLINE static uint16_t* packed_keys(const ForwardCall& call, const SequenceRun& run,
                                          const KeyTile& tile) {
    return reinterpret_cast<uint16_t*>(
        call.packed.at(run.number(), tile.first_key / call.tile_keys));
  }

  HWY_INLINE static void pack_keys(const ForwardCall& call, const SequenceRun& run,
                                   const KeyTile& tile, uint16_t* to) {
    const uint16_t* rows[kPairTileKeys];
    run.find_rows(call.args.k, tile, rows);
    call.pairs->pack_a({rows, tile.keys.end - tile.first_key, call.problem.head_dim}, to,
                       kPairRows * round_up(call.problem.head_dim, kPairDepth));
  }

  // V^T; zeros where the tile has no key, since a zero P meets them.
  HWY_INLINE static void pack_values(const ForwardCall& call, const SequenceRun& run,
                                     const KeyTile& tile, uint16_t* to) {
    const uint16_t* rows[kPairTileKeys];
    run.find_rows(call.args.v, tile, rows);
    call.pairs->pack_a_transposed({rows, tile.keys.end - tile.first_key, call.problem.head_dim_v},
                                  to, kPairRows * call.tile_keys);
  }

  HWY_INLINE void scores(const ForwardPanel& panel, const ScoreTile& tile) const {
    pair_score_product(call_, run_, panel, tile, k_, depth_, panel.q);
  }

  // S, P = softmax(S), O += P V for one panel and one tile. The scores of a chunk of keys become
  // probabilities before they leave L1, while those of the next chunk are multiplied; O += P V has
  // the whole tile, since it reads and writes O, and L1 to itself, which does not hold what scores
  // and exponentials read as well. Panel `next`, where there is one, comes next with the same keys,
  // its scores in next_tile: its first chunk follows the last.
  HWY_INLINE void attend(ForwardPanel& panel, const ScoreTile& tile, int64_t batch,
                         const ForwardPanel* next, const ScoreTile& next_tile) {
    const bool begun = std::exchange(begun_, false);
    if (!panel.started) {
      std::fill_n(panel.running_max, kPanel, kMinusInfinity);
      std::fill_n(panel.running_sum, kPanel, 0.0f);
    }
    const bool whole = takes_chunks(panel);
    bool has_maxima = panel.started;
    ScoreTile pairs = pairs_of(tile);
    pairs.end = pairs.begin;
    const int64_t first_chunk = tile.begin / kChunkKeys;
    const int64_t num_chunks = ceil_div(tile.end, kChunkKeys) - first_chunk;
    for (int64_t index = 0; index < num_chunks; ++index) {
      const int64_t first = (first_chunk + index) * kChunkKeys;
      ScoreTile chunk = chunk_of(tile, first);
      if (!whole || (index == 0 && !begun)) {  // else it was multiplied beside the one before
        pair_score_product(call_, run_, panel, chunk, k_ + first * depth_, depth_, panel.q);
      }
      run_.finish_scores(panel, chunk, scales_late_);
      const int64_t end = first + chunk.end;
      if (whole) hide_rows_outside(chunk);
      if (!whole || !has_maxima) raise(panel, chunk, pairs);
      has_maxima = true;
      if (whole) {
        if (first + kChunkKeys < tile.end) {
          follow(panel, tile, first + kChunkKeys);
        } else if (next != nullptr) {
          begin(*next, next_tile, chunk);
        }
        exponentiate(panel, chunk, first, pairs);
      } else {
        store_probabilities(call_, panel, chunk, scale_, batch, pairs.at(first / 2, 0),
                            pairs.column_step);
      }
      pairs.end = end;
    }
    add_values(panel, pairs);
  }

  // O from O^T, one row per lane.
  HWY_INLINE void store_rows(const ForwardPanel& panel, float* HWY_RESTRICT rows) const {
    rows_of_blocks(panel.o, v_rows_, panel.num_lanes, rows, v_rows_);
  }

 private:
  // The subtrahend of scores in base 2 is a maximum that may lag behind by as much, so that what
  // was accumulated is rescaled rarely. Sums stay far from overflow, and bfloat16 as precise.
  static constexpr float kMostLag = 8.0f;

  // The tile's probabilities, in pairs behind both chunks, [kPanel / kLanes][tile_keys /
  // 2][kLanes].
  HWY_INLINE ScoreTile pairs_of(const ScoreTile& tile) const {
    ScoreTile pairs = tile.in(tile.scores + 2 * kChunkKeys * kPanel);
    pairs.column_step = call_.tile_keys / 2 * kLanes;
    return pairs;
  }

  // Raises the maxima to those of a chunk. pairs: the tile's probabilities so far, which are spent
  // where a maximum rises. False where none does.
  HWY_INLINE bool raise(ForwardPanel& panel, const ScoreTile& chunk, ScoreTile& pairs) const {
    alignas(64) float correction[kPanel];
    if (!raise_maxima(panel, chunk, scale_, most_lag_, correction)) return false;
    add_values(panel, pairs);
    pairs.begin = pairs.end;
    if (panel.started) rescale(panel, correction);
    return true;
  }

  HWY_INLINE bool takes_chunks(const QueryPanel& panel) const {
    return fills_chunks(panel) && !call_.problem.dropout;
  }

  // What to multiply beside the next exponentials: the scores of a panel's chunk from row `first`
  // on.
  HWY_INLINE void follow(const ForwardPanel& panel, const ScoreTile& tile, int64_t first) {
    following_ = whole_product(k_ + first * depth_, depth_, panel.q, chunk_of(tile, first));
  }
  // The first chunk of the panel that comes next, where that is not the place of `chunk`.
  HWY_INLINE void begin(const ForwardPanel& next, const ScoreTile& tile, const ScoreTile& chunk) {
    const int64_t first = tile.begin / kChunkKeys * kChunkKeys;
    begun_ = takes_chunks(next) && chunk_of(tile, first).scores != chunk.scores;
    if (begun_) follow(next, tile, first);
  }

  // p = exp2(s - maximum) of a whole chunk, while the scores that follow are multiplied. Whether
  // the maxima lag too far behind shows meanwhile; where they do, which is rare, the chunk's
  // probabilities are computed again.
  HWY_INLINE void exponentiate(ForwardPanel& panel, const ScoreTile& chunk, int64_t first,
                               ScoreTile& pairs) {
    const char* ahead = ahead_ < ahead_end_ ? ahead_ : nullptr;
    ahead_ += kChunkAhead;
    const auto run = [&](const PairProduct* beside, int count) HWY_ATTR {
      alignas(64) float maximum[kPanel];
      for (int64_t v = 0; v < panel.vectors(); ++v) {
        const Float m = hn::Load(kFloats, panel.running_max + v * kLanes);
        hn::Store(finite_maximum(m), kFloats, maximum + v * kLanes);
      }
      call_.pairs->exponentiate(
          {chunk.scores, scale_, maximum, panel.running_sum,
           reinterpret_cast<uint32_t*>(pairs.at(first / 2, 0)), pairs.column_step, ahead},
          beside, count);
    };
    alignas(64) float before[kPanel], after[kPanel];
    std::copy_n(panel.running_sum, kPanel, before);
    run(following_ ? &*following_ : nullptr, following_ ? 1 : 0);
    following_.reset();
    if (!may_lag_too_far(panel, before, most_rise_)) return;
    std::copy_n(panel.running_sum, kPanel, after);
    std::copy_n(before, kPanel, panel.running_sum);
    if (raise(panel, chunk, pairs)) {
      run(nullptr, 0);
    } else {
      std::copy_n(after, kPanel, panel.running_sum);
    }
  }

  // O += P V.
  HWY_INLINE void add_values(ForwardPanel& panel, const ScoreTile& pairs) const {
    if (pairs.begin >= pairs.end) return;
    clear_pairs_around(panel, pairs);
    call_.pairs->multiply(pair_key_sum(call_, panel, pairs, v_, v_rows_, panel.started, panel.o));
    panel.started = true;
  }

  // Multiplies what was accumulated for queries whose maximum was replaced.
  HWY_INLINE void rescale(const ForwardPanel& panel, const float* HWY_RESTRICT correction) const {
    for (int64_t v = 0; v < panel.vectors(); ++v) {
      const Float factor = hn::Load(kFloats, correction + v * kLanes);
      if (hn::AllTrue(kFloats, hn::Eq(factor, hn::Set(kFloats, 1.0f)))) continue;
      float* HWY_RESTRICT o = panel.o + v * kLanes * v_rows_;
      for (int64_t d = 0; d < v_rows_; ++d) {
        hn::Store(hn::Mul(hn::Load(kFloats, o + d * kLanes), factor), kFloats, o + d * kLanes);
      }
    }
  }

  const ForwardCall& call_;
  const SequenceRun& run_;
  const int64_t depth_;
  const int64_t v_rows_;
  const bool scales_late_;  // the exponential applies the scale
  const float scale_;       // by which
  const float most_lag_;
  const float most_rise_;  // of a sum by one chunk: 2^most_lag, half of it left for rounding
  uint16_t* const own_k_;
  uint16_t* const own_v_;
  // The tile in work.
  const uint16_t* k_;
  const uint16_t* v_;
  std::optional<PairProduct> following_;  // scores to be multiplied beside the next exponentials
  bool begun_ = false;                    // those of the panel that comes next
  // What is yet to be asked for of the packed tile that comes next.
  const char* ahead_ = nullptr;
  const char* ahead_end_ = nullptr;
};

// The keys and values of a run of tiles, for all tasks that read them.
inline void pack_tiles(const ForwardCall& call, const ForwardTask& task, float*) {
  const SequenceRun run(call, task.batch, task.head_kv);
  const int64_t end = (task.first_panel + task.num_panels) * call.tile_keys;
  const semantics::Range keys{task.first_panel * call.tile_keys,
                              std::min<int64_t>(end, run.sequence().seqlen_k)};
  run.for_each_tile(keys, [&](const KeyTile& tile) HWY_ATTR {
    uint16_t* to = PairProducts::packed_keys(call, run, tile);
    PairProducts::pack_keys(call, run, tile, to);
    PairProducts::pack_values(call, run, tile,
                              to + call.tile_keys * round_up(call.problem.head_dim, kPairDepth));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
