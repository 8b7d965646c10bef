// What precedes attention over a KV cache: rotary embedding of the queries and the new keys (Su et
// al., "RoFormer", arXiv:2104.09864), and the new keys' and values' way into the cache. A warp per
// row.
#pragma once

#include "cuda/device/element.h"
#include "cuda/device/sequence.h"

namespace fa::cuda {

// One token of one head: where it comes from, where it goes, where it stands.
struct TokenRow {
  const void* from;
  void* to;
  Index from_at, to_at;
  int columns;
  int position;  // of its rotation; -1: none
};

// Where the cache has room for position `position` of a sequence; false where it has none.
__device__ inline bool cache_place(const ForwardArgs& args, int batch, int position,
                                   KeyPlace& place) {
  const PageArgs& pages = args.pages;
  if (position < 0) return false;
  if (pages.block_table == nullptr) {
    place = {args.cache.batch_idx == nullptr ? batch : args.cache.batch_idx[batch], position};
    return place.batch >= 0 && place.batch < args.cache.num_rows && position < args.shape.seqlen_k;
  }
  const int slot = position / pages.page_size;
  if (slot >= pages.max_pages) return false;
  place = {pages.block_table[batch * pages.table_stride + slot], position - slot * pages.page_size};
  return place.batch >= 0 && place.batch < pages.num_pages;
}

__device__ inline Index offset(const TensorArgs& tensor, int batch, int row, int head) {
  return batch * tensor.batch_stride + row * tensor.row_stride + head * tensor.head_stride;
}

// New key or value `token` of a head; false where the cache has no room for it.
__device__ inline bool new_row(const ForwardArgs& args, const UpdateArgs& update, bool is_key,
                               int batch, int token, int head, TokenRow& row) {
  const int cached = args.cache.seqlens[batch];
  KeyPlace place;
  if (token >= args.cache.seqlen_new || !cache_place(args, batch, cached + token, place)) {
    return false;
  }
  const TensorArgs& from = is_key ? update.k_new : update.v_new;
  const TensorArgs& to = is_key ? args.k : args.v;
  row = {from.data,
         to.data,
         offset(from, batch, token, head),
         offset(to, place.batch, place.row, head),
         is_key ? args.shape.head_dim : args.shape.head_dim_v,
         is_key && update.rotary_dim > 0 ? cached + token : -1};
  return true;
}

__device__ inline bool query_row(const ForwardArgs& args, const UpdateArgs& update, int batch,
                                 int token, int head, TokenRow& row) {
  if (token >= args.shape.seqlen_q) return false;
  row = {update.q.data,
         args.q.data,
         offset(update.q, batch, token, head),
         offset(args.q, batch, token, head),
         args.shape.head_dim,
         args.cache.seqlens[batch] + (update.queries_advance ? token : 0)};
  return true;
}

template <Element kElement>
__device__ inline float load_angle(const UpdateArgs& update, const void* table, Index at) {
  return update.rotary_element == BiasElement::kFloat32 ? static_cast<const float*>(table)[at]
                                                        : load_element<kElement>(table, at);
}

// Column `column` of a row after (x, y) -> (x cos - y sin, x sin + y cos) for each of its pairs.
template <Element kElement>
__device__ inline float rotated(const UpdateArgs& update, const TokenRow& row, int column) {
  const float own = load_element<kElement>(row.from, row.from_at + column);
  if (row.position < 0 || column >= update.rotary_dim) return own;
  const int half = update.rotary_dim / 2;
  const bool is_first = update.interleaved ? column % 2 == 0 : column < half;
  const int pair = update.interleaved ? column / 2 : column % half;
  const int away = update.interleaved ? 1 : half;
  const float partner =
      load_element<kElement>(row.from, row.from_at + column + (is_first ? away : -away));
  const int position = clamp(row.position, 0, update.num_positions - 1);
  const float cos = load_angle<kElement>(update, update.cos, position * update.cos_stride + pair);
  const float sin = load_angle<kElement>(update, update.sin, position * update.sin_stride + pair);
  return is_first ? own * cos - partner * sin : partner * sin + own * cos;
}

// Of each token the heads of k, then those of v, then those of q.
template <KernelSpec kSpec>
__global__ void __launch_bounds__(kSpec.num_warps * 32)
    update_cache(const __grid_constant__ ForwardArgs args,
                 const __grid_constant__ UpdateArgs update) {
  const int heads = update.num_heads_kv;
  const int rows_per_token = 2 * heads + (update.rotary_dim > 0 ? args.shape.num_heads : 0);
  const Index index = static_cast<Index>(blockIdx.x) * kSpec.num_warps + threadIdx.x / 32;
  const int head = static_cast<int>(index % rows_per_token);
  const int token = static_cast<int>(index / rows_per_token % update.num_tokens);
  const Index batch = index / rows_per_token / update.num_tokens;
  if (batch >= args.shape.batch) return;
  const int b = static_cast<int>(batch);
  TokenRow row;
  const bool exists = head < 2 * heads
                          ? new_row(args, update, head < heads, b, token, head % heads, row)
                          : query_row(args, update, b, token, head - 2 * heads, row);
  if (!exists) return;
#pragma unroll 1
  for (int column = threadIdx.x % 32; column < row.columns; column += 32) {
    store_element<kSpec.element>(row.to, row.to_at + column,
                                 rotated<kSpec.element>(update, row, column));
  }
}

}  // namespace fa::cuda
