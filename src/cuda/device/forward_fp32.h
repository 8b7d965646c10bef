// The forward for fp32 inputs, in fp32 arithmetic throughout: no tensor core multiplies fp32
// without rounding it first. Any alignment, paged or not, every option, as the arguments say.
//
// A block takes tile_m queries and visits tile_n keys at a time. A thread has two rows of the
// scores and four keys, 8 lanes a row; and of the output the same rows and every eighth group of 4
// columns.
#pragma once

#include "cuda/device/copy.h"
#include "cuda/device/score.h"

namespace fa::cuda {

template <KernelSpec kSpec>
struct Forward32 {
  static constexpr int kLanesPerRow = 8;
  static constexpr int kRowsPerThread = 2;
  static constexpr int kThreads = kSpec.tile_m / kRowsPerThread * kLanesPerRow;
  static constexpr int kKeysPerThread = kSpec.tile_n / kLanesPerRow;
  static constexpr int kColumnGroups = kSpec.head_dim_v / (4 * kLanesPerRow);
  static constexpr int kQStride = kSpec.head_dim + kFloatRowGap;
  static constexpr int kPStride = kSpec.tile_n + kFloatRowGap;
  static constexpr int kKeyFloats = kSpec.tile_n * kQStride;  // of k or v, in turn
  static_assert(kThreads == kSpec.num_warps * 32 && kSpec.tile_n % 4 == 0);
};

// Rows of up to kColumns floats into shared memory, zeros beyond `end_row` and `columns`.
// `address(row)` gives a row's elements, and is asked for rows below end_row only.
template <int kThreads, int kRows, int kColumns, class Address>
__device__ inline void load_rows(float* to, int stride, int first_row, int end_row, int columns,
                                 Address&& address) {
  for (int at = threadIdx.x; at < kRows * kColumns; at += kThreads) {
    const int row = at / kColumns, column = at % kColumns;
    const bool exists = first_row + row < end_row && column < columns;
    to[row * stride + column] = exists ? address(first_row + row)[column] : 0.0f;
  }
}

__device__ inline const float* fp32_query_row(const TensorArgs& tensor, const Sequence& sequence,
                                              int head, int row) {
  return static_cast<const float*>(tensor.data) + sequence.q_batch * tensor.batch_stride +
         (sequence.q_begin + row) * tensor.row_stride + head * tensor.head_stride;
}

// Of any element type, which the caller knows.
__device__ inline Index key_offset(const ForwardArgs& args, const TensorArgs& tensor,
                                   const Sequence& sequence, int kv_head, int key) {
  KeyPlace place{sequence.k_batch, sequence.k_begin + key};
  if (args.pages.block_table != nullptr) place = paged_place(args.pages, sequence, key);
  return place.batch * tensor.batch_stride + place.row * tensor.row_stride +
         kv_head * tensor.head_stride;
}

__device__ inline float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Over the 8 lanes of a row.
template <class Join>
__device__ inline float reduce_row(float value, Join&& join) {
  for (int mask = 1; mask < 8; mask *= 2) value = join(value, shuffle_xor(value, mask));
  return value;
}

// One thread's two rows.
template <KernelSpec kSpec>
struct Rows32 {
  using F = Forward32<kSpec>;
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};
  float4 o[2][F::kColumnGroups] = {};

  // s = q k^T of the thread's rows and keys lane, lane + 8, ...
  __device__ static void multiply_q_k(float (&s)[2][F::kKeysPerThread], const float* q,
                                      const float* k, int lane) {
    for (int d = 0; d < kSpec.head_dim; d += 4) {
      const float4 q0 = load4(q + d), q1 = load4(q + F::kQStride + d);
#pragma unroll
      for (int n = 0; n < F::kKeysPerThread; ++n) {
        const float4 key = load4(k + (lane + n * F::kLanesPerRow) * F::kQStride + d);
        s[0][n] = dot4(q0, key, s[0][n]);
        s[1][n] = dot4(q1, key, s[1][n]);
      }
    }
  }

  // Scores of row r to probabilities in shared memory, relative to the new maximum.
  template <class Keeps>
  __device__ void update(int r, float (&s)[F::kKeysPerThread], float* p, int lane, Keeps&& keeps) {
    float highest = max[r];
    for (float value : s) highest = fmaxf(highest, value);
    highest = reduce_row(highest, [](float a, float b) { return fmaxf(a, b); });
    const float offset = highest == -kInfinity ? 0.0f : highest;
    const float rescale = expf(max[r] - offset);
    max[r] = highest;
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < F::kKeysPerThread; ++n) {
      const float probability = expf(s[n] - offset);
      total += probability;
      p[lane + n * F::kLanesPerRow] = keeps(lane + n * F::kLanesPerRow) ? probability : 0.0f;
    }
    sum[r] = sum[r] * rescale + total;
#pragma unroll
    for (float4& group : o[r]) {
      group = {group.x * rescale, group.y * rescale, group.z * rescale, group.w * rescale};
    }
  }

  // o += p v
  __device__ void multiply_p_v(const float* p, const float* v, int lane) {
    for (int j = 0; j < kSpec.tile_n; ++j) {
      const float p0 = p[j], p1 = p[F::kPStride + j];
#pragma unroll
      for (int c = 0; c < F::kColumnGroups; ++c) {
        const float4 value = load4(v + j * F::kQStride + (c * F::kLanesPerRow + lane) * 4);
        o[0][c] = {fmaf(p0, value.x, o[0][c].x), fmaf(p0, value.y, o[0][c].y),
                   fmaf(p0, value.z, o[0][c].z), fmaf(p0, value.w, o[0][c].w)};
        o[1][c] = {fmaf(p1, value.x, o[1][c].x), fmaf(p1, value.y, o[1][c].y),
                   fmaf(p1, value.z, o[1][c].z), fmaf(p1, value.w, o[1][c].w)};
      }
    }
  }

  // What remains of row r of a split, whose sum over the lanes is `total`.
  __device__ void store_split(int r, float total, const ForwardArgs& args, Index at, int lane) {
    const bool empty = max[r] == -kInfinity;
    store_columns(r, empty ? 0.0f : 1.0f / total, args,
                  args.splits.o + at * args.splits.row_elements, lane);
    if (lane == 0) args.splits.lse[at] = empty ? -kInfinity : max[r] + logf(total);
  }

  __device__ void store_columns(int r, float factor, const ForwardArgs& args, float* to, int lane) {
#pragma unroll
    for (int c = 0; c < F::kColumnGroups; ++c) {
      const float4 value = o[r][c];
      const float values[4] = {value.x, value.y, value.z, value.w};
      for (int e = 0; e < 4; ++e) {
        const int column = (c * F::kLanesPerRow + lane) * 4 + e;
        if (column < args.shape.head_dim_v) to[column] = values[e] * factor;
      }
    }
  }

  // `total` is the row's sum, over its lanes.
  __device__ void store(int r, float total, const ForwardArgs& args, const Sequence& sequence,
                        int head, int row, int lane) {
    float highest = max[r], factor = 1.0f;
    const bool has_sink = args.score.sink_element != BiasElement::kNone;
    if (has_sink) {
      const float sink = load_sink<Element::kFloat32>(args.score, head);
      const float joint = join_sink(highest, sink);
      factor = expf(highest - joint);
      total = total * factor + expf(sink - joint);
      highest = joint;
    }
    const bool empty = total == 0.0f;
    factor = empty ? 0.0f : factor / total;
    if (args.dropout.threshold != 0) factor *= args.dropout.keep_scale;
    float* out = const_cast<float*>(fp32_query_row(args.out, sequence, head, row));
    store_columns(r, factor, args, out, lane);
    if (args.lse == nullptr || lane != 0) return;
    args.lse[sequence.q_batch * args.lse_batch_stride + head * args.lse_head_stride +
             (sequence.q_begin + row) * args.lse_row_stride] =
        empty ? empty_lse(has_sink) : highest + logf(total);
  }
};

template <KernelSpec kSpec>
__device__ inline void attend_fp32(const ForwardArgs& args, const Sequence& sequence, int head,
                                   int tile_row, int split, float* shared) {
  using F = Forward32<kSpec>;
  const int lane = threadIdx.x % F::kLanesPerRow;
  const int thread_row = threadIdx.x / F::kLanesPerRow * F::kRowsPerThread;
  const int kv_head = head / args.shape.heads_per_kv;
  float* q = shared;
  float* keys = q + kSpec.tile_m * F::kQStride;
  float* p = keys + F::kKeyFloats;
  const auto load_keys = [&](const TensorArgs& tensor, int step, int columns) {
    load_rows<F::kThreads, kSpec.tile_n, kSpec.head_dim>(
        keys, F::kQStride, step * kSpec.tile_n, sequence.seqlen_k, columns, [&](int key) {
          return static_cast<const float*>(tensor.data) +
                 key_offset(args, tensor, sequence, kv_head, key);
        });
  };
  load_rows<F::kThreads, kSpec.tile_m, kSpec.head_dim>(
      q, F::kQStride, tile_row, sequence.seqlen_q, args.shape.head_dim,
      [&](int row) { return fp32_query_row(args.q, sequence, head, row); });

  const GeneralScore<Element::kFloat32> score(args, sequence, head);
  const Index batch_head = static_cast<Index>(sequence.batch) * args.shape.num_heads + head;
  const int last_row = min(tile_row + kSpec.tile_m, sequence.seqlen_q) - 1;
  const KeySteps steps = steps_of_split(key_steps<kSpec.tile_n>(args, sequence, tile_row, last_row),
                                        split, args.splits.num_splits);
  Rows32<kSpec> rows;
#pragma unroll 1
  for (int step = steps.end - 1; step >= steps.begin; --step) {
    __syncthreads();  // q has arrived, and everybody is done with the last v
    load_keys(args.k, step, args.shape.head_dim);
    __syncthreads();
    float s[2][F::kKeysPerThread] = {};
    rows.multiply_q_k(s, q + thread_row * F::kQStride, keys, lane);
    __syncthreads();
    load_keys(args.v, step, args.shape.head_dim_v);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row + thread_row + r;
      const semantics::Range visible = visible_keys(args, sequence, row);
#pragma unroll
      for (int n = 0; n < F::kKeysPerThread; ++n) {
        const int key = step * kSpec.tile_n + lane + n * F::kLanesPerRow;
        const bool sees = row < sequence.seqlen_q && key >= visible.begin && key < visible.end;
        s[r][n] = sees ? score(s[r][n], row, key) : -kInfinity;
      }
      rows.update(r, s[r], p + (thread_row + r) * F::kPStride, lane, [&](int n) {
        return args.dropout.threshold == 0 ||
               semantics::dropout_keeps(args.dropout.key, args.dropout.threshold, batch_head, row,
                                        step * kSpec.tile_n + n);
      });
    }
    __syncthreads();
    rows.multiply_p_v(p + thread_row * F::kPStride, keys, lane);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = tile_row + thread_row + r;
    const float total = reduce_row(rows.sum[r], [](float a, float b) { return a + b; });
    if (row >= sequence.seqlen_q) continue;
    if (args.splits.num_splits > 1) {
      rows.store_split(r, total, args, split_row(args, split, sequence.batch, head, row), lane);
    } else {
      rows.store(r, total, args, sequence, head, row, lane);
    }
  }
}

template <KernelSpec kSpec>
__global__ void __launch_bounds__(Forward32<kSpec>::kThreads)
    forward_fp32(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) float floats[];
  const int split = blockIdx.x / args.splits.num_tiles;
  const Work work = work_of(args, blockIdx.x % args.splits.num_tiles);
  if (work.batch >= args.shape.batch) {
    clear_rows_past_the_end<Element::kFloat32>(args, work, 1, threadIdx.x,
                                               Forward32<kSpec>::kThreads);
    return;
  }
  const Sequence sequence = sequence_of(args, work.batch);
  const int tile_row = work.tile * kSpec.tile_m;
  if (tile_row >= sequence.seqlen_q) return;
  attend_fp32<kSpec>(args, sequence, work.head, tile_row, split, floats);
}

}  // namespace fa::cuda
