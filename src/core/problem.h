// What to compute: a value, without pointers, that plans are cached by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

#include "core/semantics.h"
#include "core/tensor_view.h"

namespace fa::core {

enum class Direction : uint8_t { kForward, kBackward };
enum class Layout : uint8_t { kDense, kVarlen, kCache };
enum class BiasKind : uint8_t { kNone, kAdditive, kBoolean };

struct AttentionProblem {
  Direction direction = Direction::kForward;
  DataType dtype = DataType::kFloat32;
  Layout layout = Layout::kDense;
  int64_t page_size = 0;  // 0: k and v are not paged
  int64_t batch = 0;
  int64_t total_q = 0;   // rows of q, over the whole batch
  int64_t seqlen_q = 0;  // varlen: the longest
  int64_t seqlen_k = 0;  // varlen: the longest; cache: what a row has room for
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  semantics::MaskBand band;
  bool softcap = false;
  bool alibi = false;
  bool dropout = false;
  bool sink = false;
  BiasKind bias = BiasKind::kNone;
  bool wants_lse = false;
  bool wants_s_dmask = false;
  bool wants_d_attn_bias = false;
  bool wants_d_learnable_sink = false;
  bool deterministic = false;
  bool appends = false;  // cache: k_new and v_new
  int64_t seqlen_new = 0;
  int64_t rotary_dim = 0;  // 0: no rotary embedding
  int64_t num_splits = 0;  // of the keys; 0: as the implementation likes
  // On a GPU: rows of q, k, v and out start at multiples of 16 bytes, and fill a multiple of them.
  bool vector_rows = true;

  auto fields() const {
    return std::tuple{direction,
                      dtype,
                      layout,
                      page_size,
                      batch,
                      total_q,
                      seqlen_q,
                      seqlen_k,
                      num_heads,
                      num_heads_kv,
                      head_dim,
                      head_dim_v,
                      band.left,
                      band.right,
                      softcap,
                      alibi,
                      dropout,
                      sink,
                      bias,
                      wants_lse,
                      wants_s_dmask,
                      wants_d_attn_bias,
                      wants_d_learnable_sink,
                      deterministic,
                      appends,
                      seqlen_new,
                      rotary_dim,
                      num_splits,
                      vector_rows};
  }
  bool operator==(const AttentionProblem& other) const { return fields() == other.fields(); }
};

struct AttentionProblemHash {
  size_t operator()(const AttentionProblem& problem) const;
};

std::string to_string(const AttentionProblem& problem);

}  // namespace fa::core
