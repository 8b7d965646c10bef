// Where one call's tensors lie, and its scalars. See docs for the meaning of each option.
#pragma once

#include <cstdint>
#include <optional>

#include "core/tensor_view.h"

namespace fa::core {

struct AttentionArgs {
  // Dense:  q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], out [B, Sq, H, Dv].
  // Varlen: q [total_q, H, D], k [total_k, Hk, D], v [total_k, Hk, Dv], out [total_q, H, Dv].
  // Paged:  k [num_blocks, page_size, Hk, D], v [num_blocks, page_size, Hk, Dv].
  TensorView q, k, v, out;
  TensorView lse;      // [B, H, Sq], varlen [H, total_q]; fp32; optional
  TensorView s_dmask;  // [B, H, Sq up to 128, Sk up to 128] in q's dtype; optional

  // Present together: varlen. int32 [B + 1].
  TensorView cu_seqlens_q, cu_seqlens_k;
  TensorView seqused_k;    // int32 [B]: keys in use of each sequence; optional
  TensorView block_table;  // int32 [B, max_blocks]: the pages of each sequence; optional
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;

  TensorView alibi_slopes;    // fp32 [H] or [B, H]
  TensorView attn_bias;       // broadcastable to [B, H, Sq, Sk]; fp32, q's dtype, or bool
  TensorView learnable_sink;  // [H]; fp32 or q's dtype

  // Present: k and v are a cache, [batch_cache, seqlen_cache, Hk, D] or pages, of which the row of
  // batch b holds cache_seqlens[b] tokens. int32 [B].
  TensorView cache_seqlens;
  TensorView cache_batch_idx;  // int32 [B]: the row of each batch; optional
  TensorView cache_leftpad;    // int32 [B]: tokens at the start of a row to skip; optional
  TensorView k_new, v_new;     // [B, Snew, Hk, D], written behind the cached tokens; optional
  TensorView rotary_cos, rotary_sin;  // [positions, rotary_dim / 2], fp32 or q's dtype; optional
  bool rotary_interleaved = true;     // pairs (0, 1), (2, 3)...; else (d, d + rotary_dim / 2)

  // Backward only, where out and lse are inputs. Each has the shape of what it is the gradient of.
  TensorView dout, dq, dk, dv;  // in q's dtype
  TensorView d_attn_bias;       // in attn_bias's dtype, summed where it was broadcast; optional
  TensorView d_learnable_sink;  // in learnable_sink's dtype; optional
  bool deterministic = false;   // bitwise equal from run to run

  std::optional<double> softmax_scale;  // absent: D^-1/2
  bool causal = false;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // -1: unbounded
  double softcap = 0.0;       // 0: none
  int64_t num_splits = 0;     // of the keys; 0: as the implementation likes
  double dropout_p = 0.0;
  uint64_t dropout_seed = 0;
  uint64_t dropout_offset = 0;

  // Lengths, rows and page numbers are checked where they lie on the CPU, unless the caller knows
  // that the tensors only stand for others.
  bool values_are_real = true;
  bool values_are_on_host = false;  // wherever q lies
  bool values_are_readable() const {
    return values_are_real && (values_are_on_host || q.device.type == DeviceType::kCpu);
  }
};

// The softmax scale in force: semantics.md's default is D^-1/2.
double softmax_scale(const AttentionArgs& args);

}  // namespace fa::core
