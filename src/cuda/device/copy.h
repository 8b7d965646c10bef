// Tiles between global and shared memory.
#pragma once

#include "cuda/device/element.h"
#include "cuda/device/sequence.h"
#include "cuda/device/shared_tile.h"

namespace fa::cuda {

// How the threads of a block share a tile: groups of chunks side by side in a row, rows one behind
// another. A pass moves a whole number of swizzle periods, so that a thread's place in shared
// memory is a constant away from its place in the first pass.
template <int kRows, int kColumns, int kThreads>
struct CopyShape {
  using Tile = SharedTile<kRows, kColumns>;
  static constexpr int kRowsPerPass = kThreads / Tile::kGroupChunks;
  static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kPassBytes = kRowsPerPass * Tile::kRowBytes;
  static constexpr bool kPartialPass = kRows % kRowsPerPass != 0;
  static_assert(kRowsPerPass % 8 == 0);

  __device__ static int row(int thread) { return thread / Tile::kGroupChunks; }
  __device__ static int chunk(int thread) { return thread % Tile::kGroupChunks; }
};

// 8 elements at `from`, of which the first `count` exist (none where it is not positive).
template <Element kElement>
__device__ inline void gather_8(Word (&words)[4], const void* from, int count) {
  const Half* elements = static_cast<const Half*>(from);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const Word low = 2 * w < count ? elements[2 * w] : 0;
    const Word high = 2 * w + 1 < count ? elements[2 * w + 1] : 0;
    words[w] = low | high << 16;
  }
}

// Rows at a constant stride, in elements.
struct StridedRows {
  static constexpr bool kLooksUp = false;
  Half* data;
  Index stride;
  // Of row `row`, and of the one `step` rows behind the row at `current`.
  __device__ Half* first(int row) const { return data + row * stride; }
  __device__ const Half* next(const Half* current, int, int step) const {
    return current + step * stride;
  }
};

// Queries of the heads of a group, in turn.
struct PackedRows {
  static constexpr bool kLooksUp = false;
  Half* data;
  Index query_stride;
  Index head_stride;
  int group;
  __device__ Half* first(int row) const {
    return data + row / group * query_stride + row % group * head_stride;
  }
  __device__ const Half* next(const Half*, int row, int step) const { return first(row + step); }
};

__device__ inline StridedRows query_rows(const TensorArgs& tensor, const Sequence& sequence,
                                         int head) {
  return {static_cast<Half*>(tensor.data) + sequence.q_batch * tensor.batch_stride +
              sequence.q_begin * tensor.row_stride + head * tensor.head_stride,
          tensor.row_stride};
}

// The rows of a tile, whose first head is `head`.
template <bool kPacks>
__device__ inline auto tile_rows(const ForwardArgs& args, const TensorArgs& tensor,
                                 const Sequence& sequence, int head) {
  const StridedRows rows = query_rows(tensor, sequence, head);
  if constexpr (kPacks) {
    return PackedRows{rows.data, rows.stride, tensor.head_stride, args.shape.heads_per_kv};
  } else {
    return rows;
  }
}

// Rows [first_row, first_row + kRows) of one head into `tile`; rows from `end_row` on and columns
// from `columns` on become zero.
template <Element kElement, Loader kLoader, int kThreads, int kRows, int kColumns, class Rows>
__device__ inline void load_tile(SharedTile<kRows, kColumns> tile, int first_row, int end_row,
                                 int columns, int thread, const Rows& rows) {
  using Shape = CopyShape<kRows, kColumns, kThreads>;
  using Tile = SharedTile<kRows, kColumns>;
  const int thread_row = Shape::row(thread);
  const int column = Shape::chunk(thread) * 8;
  SharedAddress to = tile.address(thread_row, Shape::chunk(thread));
  // All pages are looked up before the first copy, which they would else wait for one by one.
  const Half* looked_up[Shape::kPasses];
  if constexpr (Rows::kLooksUp) {
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      looked_up[pass] = rows.first(first_row + pass * Shape::kRowsPerPass + thread_row) + column;
    }
  }
  const Half* from = Rows::kLooksUp ? looked_up[0] : rows.first(first_row + thread_row) + column;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = pass * Shape::kRowsPerPass + thread_row;
    if (Shape::kPartialPass && row >= kRows) break;
    const bool exists = first_row + row < end_row;
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const int group_column = group * Tile::kGroupChunks * 8;
      const SharedAddress address = to + pass * Shape::kPassBytes + group * Tile::kGroupBytes;
      if constexpr (kLoader == Loader::kElement) {
        Word words[4];
        gather_8<kElement>(words, from + group_column,
                           exists ? columns - column - group_column : 0);
        store_shared_16(address, words);
      } else {
        copy_async_16(address, from + group_column, exists && column + group_column < columns);
      }
    }
    if (pass + 1 < Shape::kPasses && Rows::kLooksUp) {
      from = looked_up[pass + 1];
    } else if (pass + 1 < Shape::kPasses) {
      from = rows.next(from - column, first_row + row, Shape::kRowsPerPass) + column;
    }
  }
}

// Keys or values of a sequence behind a page table, or not, as the arguments say. Any row gives an
// address within k or v.
struct PagedRows {
  static constexpr bool kLooksUp = true;
  const PageArgs& pages;
  const TensorArgs& tensor;
  const Sequence& sequence;
  const Half* head;  // of page 0
  __device__ const Half* first(int row) const {
    const KeyPlace place = paged_place(pages, sequence, min(row, sequence.seqlen_k - 1));
    return head + place.batch * tensor.batch_stride + place.row * tensor.row_stride;
  }
  __device__ const Half* next(const Half*, int row, int step) const { return first(row + step); }
};

struct MaybePagedRows {
  static constexpr bool kLooksUp = false;
  StridedRows strided;
  PagedRows paged;
  __device__ const Half* first(int row) const {
    return paged.pages.block_table != nullptr ? paged.first(row) : strided.first(row);
  }
  __device__ const Half* next(const Half*, int row, int step) const { return first(row + step); }
};

template <Loader kLoader>
__device__ inline auto key_rows(const ForwardArgs& args, const TensorArgs& tensor,
                                const Sequence& sequence, int kv_head) {
  Half* head = static_cast<Half*>(tensor.data) + kv_head * tensor.head_stride;
  const StridedRows strided{
      head + sequence.k_batch * tensor.batch_stride + sequence.k_begin * tensor.row_stride,
      tensor.row_stride};
  if constexpr (kLoader == Loader::kVector) {
    return strided;
  } else {
    const PagedRows paged{args.pages, tensor, sequence, head};
    if constexpr (kLoader == Loader::kPagedVector) {
      return paged;
    } else {
      return MaybePagedRows{strided, paged};
    }
  }
}

// A tile's rows below `end_row` and columns below `columns` to global memory.
template <Loader kLoader, int kThreads, int kRows, int kColumns, class Rows>
__device__ inline void store_tile(SharedTile<kRows, kColumns> tile, const Rows& rows, int first_row,
                                  int end_row, int columns, int thread) {
  using Shape = CopyShape<kRows, kColumns, kThreads>;
  using Tile = SharedTile<kRows, kColumns>;
  const int chunk = Shape::chunk(thread);
  const SharedAddress from = tile.address(Shape::row(thread), chunk);
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = pass * Shape::kRowsPerPass + Shape::row(thread);
    if (row >= kRows || first_row + row >= end_row) break;
    Half* to = rows.first(first_row + row);
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const int column = (group * Tile::kGroupChunks + chunk) * 8;
      if (column >= columns) continue;
      Word words[4];
      load_shared_16(words, from + pass * Shape::kPassBytes + group * Tile::kGroupBytes);
      if constexpr (kLoader != Loader::kElement) {
        store_global_16(to + column, words);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (column + e < columns) {
            to[column + e] = static_cast<Half>(words[e / 2] >> 16 * (e % 2));
          }
        }
      }
    }
  }
}

}  // namespace fa::cuda
