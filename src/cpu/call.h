// One call as the kernels see it: resolved once, read by every task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/arithmetic.h"
#include "core/attention_args.h"
#include "core/problem.h"
#include "core/semantics.h"
#include "core/sequence.h"
#include "cpu/ceilings.h"
#include "cpu/pairs.h"
#include "cpu/row_pairs.h"

namespace fa::cpu {

// Sizes that hold on every instruction set, so that scratch is booked without knowing which.
inline constexpr int64_t kMaxLanes = 16;  // fp32 in the widest vector
inline constexpr int64_t kMaxPanel = 64;  // queries of one panel
inline constexpr int64_t kTileKeys = 96;  // keys of one tile; divisible by every register tile
// Longer tiles for the backward, which reads every panel anew for each (71 -> 86 GFLOP/s at
// head_dim 128).
inline constexpr int64_t kLongTileKeys = 192;
// Of the forward in pairs: O += P V reads and writes O once per tile. 384 and 512 are no faster.
inline constexpr int64_t kPairTileKeys = 256;
// Queries of a key head that are few enough to go row by row through keys and values.
inline constexpr int64_t kFewQueries = 8;
inline constexpr int64_t kMaxHeadsTogether = 16;  // key heads of a task of few queries
// Panels whose P and dS are gathered before they are multiplied.
inline constexpr int64_t kGatheredPanels = 4;
inline constexpr int64_t kMaxPanels = 16;  // panels that share each key tile

using core::ceil_div;
using core::round_up;

// Floats between rows of n: rows that are a power of two apart would share few sets of an L1 cache.
constexpr int64_t padded_row(int64_t n) {
  const int64_t row = round_up(n, kMaxLanes);
  return row % 128 == 0 ? row + kMaxLanes : row;
}

// Books parts of a workspace, in floats, each from a cache line on.
class Booking {
 public:
  int64_t take(int64_t floats) {
    const int64_t at = total_;
    total_ += round_up(floats, kMaxLanes);
    return at;
  }
  int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
};

// Whether one panel holds the queries of all heads of a group. A sequence's own length decides, so
// that its results do not depend on its company.
inline bool packs_group(int64_t group, int64_t panel, int64_t seqlen_q) {
  return group > 1 && seqlen_q > 0 && seqlen_q * group <= panel;
}

struct AttentionCall {
  const core::AttentionArgs& args;
  const core::AttentionProblem& problem;
  float scale_log2;                 // softmax_scale * log2(e): scores are kept in base 2
  int64_t group;                    // query heads per key head
  int64_t panel;                    // lanes per panel on the instruction set that runs
  int64_t tile_keys;                // keys of one tile there
  const PairKernels* pairs;         // of that instruction set, or null
  const RowPairKernels* row_pairs;  // for few queries, likewise
  bool may_pack;                    // whether panels may hold the queries of all heads of a group
  semantics::DropoutKey dropout_key;
  semantics::Word dropout_threshold;
  // The number of the first panel of each batch, all panels of the call counted.
  std::vector<int64_t> first_panel;

  bool packs_group(const core::Sequence& sequence) const {
    return may_pack && cpu::packs_group(group, panel, sequence.seqlen_q);
  }

  // Unpacked, panel p of a key head covers queries of head kv_head * group + p % group, so that
  // neighbours read the same keys.
  int64_t panels_per_head_kv(const core::Sequence& sequence) const {
    if (sequence.seqlen_q == 0) return 0;
    return packs_group(sequence) ? 1 : ceil_div(sequence.seqlen_q, panel) * group;
  }
};

// The keys of one of the chunks that the backward's tasks share, in whole tiles.
inline semantics::Range keys_of_chunk(int64_t chunk, int64_t num_chunks, int64_t seqlen_k,
                                      int64_t tile_keys) {
  const int64_t tiles = ceil_div(seqlen_k, tile_keys);
  return {chunk * tiles / num_chunks * tile_keys,
          std::min((chunk + 1) * tiles / num_chunks * tile_keys, seqlen_k)};
}

// Consecutive panels of one (batch, key head), against all keys or one split of them.
struct ForwardTask {
  int32_t batch;
  int32_t head_kv;
  int64_t first_panel;
  int64_t num_panels;
  int64_t split;
  double cost;               // query-key pairs
  bool few_queries = false;  // at most kFewQueries in a panel
  int32_t num_heads_kv = 1;  // from head_kv on; more only where queries are few
  double order = 0.0;        // cost of the heaviest task of the head, to start with the heaviest;
                             // of a piece of a task, its own
};

// States of the online softmax, per panel and split.
struct PartialResults {
  float* o;            // [slots][panel][Dv rounded up]
  float* running_max;  // [slots][panel]
  float* running_sum;  // [slots][panel]
};

// Keys and values in tiles, packed once for all tasks that read them.
struct PackedTiles {
  float* tiles = nullptr;  // null: each task packs its own
  int64_t per_head = 0;    // room for tiles of one (batch, key head)
  int64_t floats = 0;      // of one tile

  float* at(int64_t head, int64_t tile) const { return tiles + (head * per_head + tile) * floats; }
};

struct ForwardCall : AttentionCall {
  int64_t num_splits;  // of the keys; 1: each task finishes its panels
  PartialResults partials;
  core::TensorView q;  // args.q, or its rotated copy
  PackedTiles packed{};
};

// Where the scratch of one worker lies, in floats. Sized for the whole task.
struct ForwardScratch {
  int64_t q, o, running_max, running_sum, k, v, scores, rows, total;
  static ForwardScratch layout(const core::AttentionProblem& problem, int64_t max_panels,
                               int64_t tile_keys);
  // Of one key head.
  static ForwardScratch for_few_queries(const core::AttentionProblem& problem);
};

// A bias's dimensions counted from the right: 1 keys, 2 queries, 3 heads, 4 batch. Those that it
// lacks or that are 1 are broadcast.
inline int64_t bias_extent(const core::TensorView& bias, int from_right) {
  const int d = bias.ndim - from_right;
  return d < 0 ? 1 : bias.shape[d];
}
inline int64_t bias_stride(const core::TensorView& bias, int from_right) {
  return bias_extent(bias, from_right) == 1 ? 0 : bias.strides[bias.ndim - from_right];
}

// Runs one task on one instruction set. scratch: ForwardScratch::total floats.
using ForwardKernel = void (*)(const ForwardCall& call, const ForwardTask& task, float* scratch);

struct ForwardKernels {
  ForwardKernel attend;        // one split of the keys, or all
  ForwardKernel combine;       // the splits; not called where there is one
  ForwardKernel update_cache;  // before all else, where there is something to append
  // Tiles from first_panel on into ForwardCall::packed; null where tasks pack their own.
  ForwardKernel pack_tiles = nullptr;
};

// What the phases of a backward leave of consecutive panels.
struct BackwardBuffers {
  float* q;     // Q of each panel, packed as the products want it
  float* dout;  // dO of each panel, likewise
  float* dq;    // not yet times scale: [panels][chunks][panel][D rounded up]
  // Q and dO as the right factors of dK += dS^T Q and dV += P^T dO: rows that are padded, [panels]
  // [panel][padded_row(D)], or pairs of queries, [panels][panel / 2][D rounded up].
  float* q_right;
  float* dout_right;
};

// Where they lie, in floats.
struct BackwardBuffersLayout {
  int64_t q, dout, dq, q_right, dout_right;
  // lanes: of all panels, those that only fill up a panel included.
  static BackwardBuffersLayout book(Booking& book, const core::AttentionProblem& problem,
                                    int64_t lanes, int64_t num_chunks, bool pairs);
  BackwardBuffers at(float* base) const {
    return {base + q, base + dout, base + dq, base + q_right, base + dout_right};
  }
};

// One (batch, key head) and a part of its work.
struct BackwardTask {
  int32_t batch;
  int32_t head_kv;
  int64_t first;  // panel, or chunk of keys, by the phase; 0 where it is a whole head
  int64_t count;  // panels
  double cost;
};

struct BackwardCall : AttentionCall {
  BackwardBuffers buffers;  // of all panels of the call, unless own_lanes
  float* lse;    // in base 2; +inf where the query sees no key: [panels][panel], of the whole call
  float* delta;  // sum_d dO O: likewise
  int64_t num_chunks;  // of the keys of each (batch, key head), each with a dQ of its own
  // Where a task goes through all phases, it keeps the panels of its (batch, key head), of at most
  // this many lanes, in its scratch. Else 0.
  int64_t own_lanes;
  float scale;       // softmax_scale: the factor of dQ and dK
  float keep_scale;  // 1 / (1 - dropout_p): that of dV
  bool owns_panels() const { return own_lanes > 0; }
};

// Panels that a worker keeps in its scratch.
struct OwnPanels {
  int64_t lanes;
  int64_t num_chunks;
  // The sum of the chunks so far, and the chunk in work.
  int64_t dq_slots() const { return num_chunks > 1 ? 2 : 1; }
};

// Where the scratch of one worker lies, in floats.
struct BackwardScratch {
  int64_t k, v, dk, dv, probabilities, score_gradients, softcap_derivatives, bias_sums,
      k_transposed, gathered_p, gathered_ds, rows, total;
  BackwardBuffersLayout panels;
  static BackwardScratch layout(const core::AttentionProblem& problem, int64_t tile_keys,
                                bool pairs, OwnPanels own);
};

using BackwardKernel = void (*)(const BackwardCall& call, const BackwardTask& task, float* scratch);

// The phases of a backward. All tasks of one are done before the next starts, unless each task goes
// through all of them with a head of its own.
struct BackwardKernels {
  BackwardKernel prepare;        // panels: packs q and dout, delta and lse
  BackwardKernel differentiate;  // chunk of keys: dk, dv, and the chunk's share of dq
  BackwardKernel finish;         // panels: dq
  // Batch and head of the bias, `first` its tile of keys or, where it is broadcast along them, its
  // panel: d_attn_bias.
  BackwardKernel differentiate_bias;
};

struct InstructionSet {
  const char* name;     // "cpu:avx2"
  bool (*supported)();  // by this processor and operating system
  ForwardKernels forward;
  BackwardKernels backward;
  int64_t panel;
  int64_t tile_keys = kTileKeys;  // of the forward
  // For the state of a task's panels. It is read in order, so that it may exceed a core's L2: where
  // fewer panels share a tile, its rows are copied again, whose pages of memory are far apart.
  int64_t panel_bytes = 1024 * 1024;
  const PairKernels* pairs = nullptr;  // where set, the kernels take bfloat16 alone
  CeilingLoops ceilings{};             // none: those of a set behind it in the list hold for it too
  int64_t backward_tile_keys = kLongTileKeys;
  int64_t backward_tasks = 32;                // that a call should have, whatever the threads
  const RowPairKernels* row_pairs = nullptr;  // for few queries, where they are faster than fp32
};

// Those that the kernels were compiled for, best first.
std::vector<InstructionSet> instruction_sets();

// Defined once for each of Highway's targets, by forward.cc and backward.cc.
template <int64_t kTarget>
ForwardKernels forward_kernels();
template <int64_t kTarget>
BackwardKernels backward_kernels();
// Its signature has no type of ours, and so g++ would export it.
template <int64_t kTarget>
__attribute__((visibility("hidden"))) int64_t panel_size();

// With larger register tiles; null where the target has none.
template <int64_t kTarget>
ForwardKernels wide_forward_kernels();

// Kernels whose products are those of AttentionCall::pairs; null where the target has none.
template <int64_t kTarget>
ForwardKernels pair_forward_kernels();
template <int64_t kTarget>
BackwardKernels pair_backward_kernels();

}  // namespace fa::cpu
