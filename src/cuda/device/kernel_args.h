// What varies from launch to launch, by what it belongs to. Shared by host and device code; only
// fixed-size fields in an order that every compiler lays out alike.
#pragma once

#include "core/semantics.h"

namespace fa::cuda {

using semantics::Index;

// Element (batch, row, head, d) lies at data[batch * batch_stride + row * row_stride +
// head * head_stride + d], strides in elements. Pages: `batch` is the page.
struct TensorArgs {
  void* data;
  Index batch_stride;
  Index row_stride;
  Index head_stride;
};

struct ShapeArgs {
  int batch;
  int num_heads;
  int heads_per_kv;
  int seqlen_q;    // varlen: the longest
  int seqlen_k;    // varlen: the longest
  int head_dim;    // as given, not padded
  int head_dim_v;  // as given, not padded
  int band_left;   // -1: no bound
  int band_right;  // -1: no bound
};

// Where each sequence lies; null pointers: dense.
struct SequenceArgs {
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* seqused_k;
  int total_q;
  int total_k;  // varlen without pages
  // Longer sequences count as so long: what attn_bias or the results of splits have room for.
  int most_queries;
  int most_keys;
};

// What a KV cache holds; null `seqlens`: k and v are none. Sequence `b` is row batch_idx[b] of k
// and v, or b without batch_idx, or its pages; of its seqlens[b] + seqlen_new keys the first
// leftpad[b] are skipped.
struct CacheArgs {
  const int* seqlens;
  const int* batch_idx;
  const int* leftpad;
  int seqlen_new;
  int num_rows;  // of k and v
};

struct PageArgs {
  const int* block_table;  // null: not paged
  Index table_stride;
  int page_size;
  int num_pages;
  int max_pages;   // of one sequence
  int page_shift;  // log2 of page_size; -1: it is no power of two
  int box_rows;    // forward_sm90: rows that the copy engine moves at once; divides page_size
  int padding;
};

enum class BiasElement : int { kNone, kOwn, kFloat32, kBoolean };

struct ScoreArgs {
  float scale;         // kPlain, kGeneral: softmax_scale; kSoftcap: softmax_scale / softcap
  float scale_log2;    // of a score inside 2^x: log2(e) times softmax_scale (kPlain) or softcap
                       // (kSoftcap); kGeneral has it in the score
  float softcap;       // kGeneral; 0: none
  int bias_has_pairs;  // keys 2i and 2i + 1 of attn_bias lie side by side, aligned together
  const float* alibi_slopes;
  Index alibi_batch_stride;
  const void* bias;
  Index bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride;
  const void* sink;  // [num_heads]
  BiasElement bias_element;
  BiasElement sink_element;  // kNone, kOwn or kFloat32
};

struct DropoutArgs {
  semantics::DropoutKey key;
  semantics::Word threshold;  // 0: no dropout
  float keep_scale;           // 1 / (1 - p)
  int padding;
};

// Which block computes what: blocks of `heads_per_group` heads of one batch entry take their tiles
// in turn, so that these heads' keys share the L2 cache, the longest tiles first.
struct ScheduleArgs {
  int num_tiles_m;  // of the longest sequence; paired: half of them, rounded up
  int num_heads;    // that have tiles of their own: those of q, or those of k where they are packed
  int heads_per_group;
  int num_blocks;  // that a launch of one block per tile (or pair) has; forward_sm90 may have
                   // fewer, each of which takes every gridDim-th
  int paired;      // forward_sm90: a block takes a head's i-th tile and its i-th from the end
  int log2_heads_together;  // forward_sm90, varlen: in place of heads_per_group; divides num_heads
  // forward_sm90, varlen, not null: blocks take tile after tile; how many have been taken, in the
  // low kTileBits, beside what says that it counts for this launch. Anything else at the start,
  // and 0 at the end: a memset before each launch took 4 to 8 us on an H100.
  unsigned long long* counter;
  unsigned long long ticket;  // low kTileBits: 0; of one launch alone
};
inline constexpr int kTileBits = 20;
inline constexpr long long kMaxCountedTiles = 1ll << (kTileBits - 1);  // teams count beyond them

// How many blocks share the keys of a tile, and where they leave their results for combine_splits:
// row r of split s, normalised, at o[(s * num_rows + r) * row_elements], and its log-sum-exp at
// lse[s * num_rows + r], -infinity where it saw no key. r counts queries, then heads, then batch.
struct SplitArgs {
  float* o;
  float* lse;
  Index num_rows;
  int row_elements;
  int num_splits;  // 1: out is written
  int num_tiles;   // blocks of one split
  int padding;
};

struct ForwardArgs {
  TensorArgs q, k, v, out;
  float* lse;  // null: not wanted
  Index lse_batch_stride, lse_head_stride, lse_row_stride;
  ShapeArgs shape;
  ScheduleArgs schedule;
  SequenceArgs sequences;
  CacheArgs cache;
  PageArgs pages;
  ScoreArgs score;
  DropoutArgs dropout;
  SplitArgs splits;
};

// CUtensorMap: how Hopper's copy engine finds the elements of a tensor.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// What forward_sm90 reads through it. Varlen kernels' v is one for copy_ended_box(), and k where
// keys_end().
struct TensorMaps {
  TensorMap q, k, v;
  int key_rows;  // of an entry of k and v, or of a page
};

// What precedes attention over a KV cache. ForwardArgs' q is where rotated queries go.
struct UpdateArgs {
  TensorArgs k_new, v_new;
  TensorArgs q;
  const void* cos;  // row p: the angles of position p
  const void* sin;
  Index cos_stride, sin_stride;
  int num_positions;
  int rotary_dim;  // 0: nothing is rotated
  int num_heads_kv;
  int num_tokens;              // of a batch entry, new keys or queries
  BiasElement rotary_element;  // kOwn or kFloat32
  int interleaved;             // pairs (0, 1), (2, 3)...; else (d, d + rotary_dim / 2)
  int queries_advance;         // query i at position i behind the cached keys; else all at 0
  int padding;
};

// S_dmask: element (batch, head, row, key) lies at data[batch * batch_stride + head * head_stride +
// row * row_stride + key].
struct SDmaskArgs {
  void* data;
  Index batch_stride, head_stride, row_stride;
  int rows;
  int keys;
};

}  // namespace fa::cuda
