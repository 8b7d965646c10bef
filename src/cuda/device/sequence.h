// Which rows a block computes, where its sequence lies, and which keys it visits.
#pragma once

#include "cuda/device/element.h"
#include "cuda/device/kernel_args.h"

namespace fa::cuda {

__device__ inline int clamp(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// What one block computes: tile `tile` of the rows of (batch, head).
struct Work {
  int batch;
  int head;
  int tile;
};

// The block's place in the order that ScheduleArgs describes.
__device__ inline Work work_of(const ForwardArgs& args, int index) {
  const int heads_per_group = args.schedule.heads_per_group;
  const int group_size = heads_per_group * args.schedule.num_tiles_m;
  const int group = index / group_size;
  const int within = index % group_size;
  const int groups_per_batch = args.schedule.num_heads / heads_per_group;
  const int tile = within / heads_per_group;
  return {group / groups_per_batch,
          group % groups_per_batch * heads_per_group + within % heads_per_group,
          args.schedule.num_tiles_m - 1 - tile};
}

// Rows and keys of one sequence. Key j is row k_begin + j of entry k_batch of k and v, or where the
// page table has it.
struct Sequence {
  int batch;
  int q_batch;
  int q_begin;
  int seqlen_q;
  int k_batch;
  int k_begin;
  int seqlen_k;
};

// Whatever the arrays hold, the rows lie within q and out, and the keys within k and v.
__device__ inline Sequence sequence_of(const ForwardArgs& args, int batch) {
  const SequenceArgs& at = args.sequences;
  Sequence it{batch, batch, 0, args.shape.seqlen_q, batch, 0, args.shape.seqlen_k};
  int capacity = args.shape.seqlen_k;
  if (at.cu_seqlens_q != nullptr) {
    it.q_batch = it.k_batch = 0;
    it.q_begin = clamp(at.cu_seqlens_q[batch], 0, at.total_q);
    it.seqlen_q = clamp(at.cu_seqlens_q[batch + 1], it.q_begin, at.total_q) - it.q_begin;
    it.seqlen_q = min(it.seqlen_q, at.most_queries);
    it.k_begin =
        args.pages.block_table != nullptr ? 0 : clamp(at.cu_seqlens_k[batch], 0, at.total_k);
    it.seqlen_k = at.cu_seqlens_k[batch + 1] - at.cu_seqlens_k[batch];
    capacity = at.total_k - it.k_begin;
  }
  if (args.pages.block_table != nullptr) {
    it.k_batch = 0;
    capacity = args.pages.max_pages * args.pages.page_size;
  }
  if (at.seqused_k != nullptr) it.seqlen_k = at.seqused_k[batch];
  if (args.cache.seqlens != nullptr) {
    const CacheArgs& cache = args.cache;
    if (cache.batch_idx != nullptr)
      it.k_batch = clamp(cache.batch_idx[batch], 0, cache.num_rows - 1);
    if (cache.leftpad != nullptr) it.k_begin = clamp(cache.leftpad[batch], 0, capacity);
    it.seqlen_k = clamp(cache.seqlens[batch], 0, capacity) + cache.seqlen_new - it.k_begin;
    capacity -= it.k_begin;
  }
  it.seqlen_k = min(clamp(it.seqlen_k, 0, capacity), at.most_keys);
  return it;
}

// Which query of which head a row of a tile is. `head` is the tile's first.
template <bool kPacks>
struct TileRows {
  int head;
  int heads_per_kv;
  __device__ int query_of(int row) const { return kPacks ? row / heads_per_kv : row; }
  __device__ int head_of(int row) const { return kPacks ? head + row % heads_per_kv : head; }
};

// Whatever the array holds, within out.
__device__ inline int end_of_sequences(const ForwardArgs& args) {
  return clamp(args.sequences.cu_seqlens_q[args.shape.batch], 0, args.sequences.total_q);
}

// Varlen rows behind the last sequence belong to none: out = 0, lse = +infinity, as for any row
// that sees no key. `work` is one of those past the last batch entry, which share these rows; each
// has `num_heads` heads.
template <Element kElement>
__device__ inline void clear_rows_past_the_end(const ForwardArgs& args, const Work& work,
                                               int num_heads, int thread, int num_threads) {
#pragma unroll 1
  for (int i = work.tile; i < (args.sequences.total_q - end_of_sequences(args)) * num_heads;
       i += args.schedule.num_tiles_m) {
    const int row = end_of_sequences(args) + i / num_heads;
    const int head = work.head * num_heads + i % num_heads;
    const Index out = row * args.out.row_stride + head * args.out.head_stride;
#pragma unroll 1
    for (int d = thread; d < args.shape.head_dim_v; d += num_threads) {
      store_element<kElement>(args.out.data, out + d, 0.0f);
    }
    if (args.lse != nullptr && thread == 0) {
      args.lse[head * args.lse_head_stride + row * args.lse_row_stride] = kInfinity;
    }
  }
}

// The keys that row `row` of a sequence sees.
__device__ inline semantics::Range visible_keys(const ForwardArgs& args, const Sequence& sequence,
                                                int row) {
  return semantics::visible_keys(row, sequence.seqlen_q, sequence.seqlen_k,
                                 {args.shape.band_left, args.shape.band_right});
}

// Steps of kTileN keys that a tile of rows visits, from `end` - 1 down to `begin`, and those of
// them, [full_begin, full_end), in which every row sees every key.
struct KeySteps {
  int begin;
  int end;
  int full_begin;
  int full_end;
};

// rows [first_row, last_row] of a sequence, both within it.
template <int kTileN>
__device__ inline KeySteps key_steps(const ForwardArgs& args, const Sequence& sequence,
                                     int first_row, int last_row) {
  const semantics::Range first = visible_keys(args, sequence, first_row);
  const semantics::Range last = visible_keys(args, sequence, last_row);
  const int begin = static_cast<int>(first.begin);
  const int end = static_cast<int>(last.end);
  if (begin >= end) return {0, 0, 0, 0};
  return {begin / kTileN, (end + kTileN - 1) / kTileN,
          (static_cast<int>(last.begin) + kTileN - 1) / kTileN,
          static_cast<int>(first.end) / kTileN};
}

// The part of them that split `split` of `num_splits` visits, which may be none.
__device__ inline KeySteps steps_of_split(KeySteps steps, int split, int num_splits) {
  const int each = (steps.end - steps.begin + num_splits - 1) / num_splits;
  const int begin = min(steps.begin + split * each, steps.end);
  return {begin, min(begin + each, steps.end), steps.full_begin, steps.full_end};
}

// Where SplitArgs has a row of one split.
__device__ inline Index split_row(const ForwardArgs& args, int split, int batch, int head,
                                  int query) {
  const Index heads = static_cast<Index>(batch) * args.shape.num_heads + head;
  return split * args.splits.num_rows + heads * args.shape.seqlen_q + query;
}

// The entry and row of k and v that hold key `j`; any j >= 0 gives an address within them.
struct KeyPlace {
  int batch;
  int row;
};

__device__ inline KeyPlace paged_place(const PageArgs& pages, const Sequence& sequence, int j) {
  const int key = sequence.k_begin + j;
  const int slot = pages.page_shift >= 0 ? key >> pages.page_shift : key / pages.page_size;
  const int page = pages.block_table[sequence.batch * pages.table_stride + slot];
  return {clamp(page, 0, pages.num_pages - 1), key - slot * pages.page_size};
}

}  // namespace fa::cuda
