// One attention call on small tensors whose elements come from a formula in integers, which
// tests/golden/make_golden.py shares: inputs need not be stored beside the expected outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/attention_args.h"
#include "testing.h"

namespace fa::testing {

// Options of a call; the meaning of each is AttentionArgs'.
struct Spec {
  std::string name{};
  core::DataType dtype = core::DataType::kFloat32;
  int64_t batch = 2;  // dense
  int64_t seqlen_q = 5;
  int64_t seqlen_k = 7;
  std::vector<int64_t> lengths_q{};  // not empty: varlen, one entry per sequence
  std::vector<int64_t> lengths_k{};
  std::vector<int64_t> seqused_k{};
  int64_t spare_rows = 0;  // varlen: rows of q, and of k where not paged, behind the last sequence
  int64_t page_size = 0;
  int64_t num_heads = 2;
  int64_t num_heads_kv = 2;
  int64_t head_dim = 4;
  int64_t head_dim_v = 4;
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  std::optional<double> softmax_scale{};
  double softcap = 0.0;
  int alibi_rank = 0;  // 1: [H], 2: [B, H]
  std::vector<int64_t> bias_shape{};
  bool boolean_bias = false;
  bool sink = false;
  double dropout_p = 0.0;
  uint64_t seed = 0;
  uint64_t offset = 0;
  bool s_dmask = false;

  bool varlen() const { return !lengths_q.empty(); }
};

// Tensors of the formula.
enum class Tag : uint32_t { kQ = 1, kK, kV, kBias, kSink, kAlibi, kDout };

inline uint32_t formula_bits(Tag tag, int64_t index) {
  uint32_t h =
      static_cast<uint32_t>(index) * 2654435761u + static_cast<uint32_t>(tag) * 40503u + 12345u;
  h = (h ^ h >> 15) * 2246822519u;
  return h ^ h >> 13;
}

// A multiple of 2^-10 within (-2, 2): exact in fp32 and fp16.
inline double formula(Tag tag, int64_t index) {
  return (static_cast<double>(formula_bits(tag, index) % 4001) - 2000.0) / 1024.0;
}

inline int64_t sum_of(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (int64_t value : values) sum += value;
  return sum;
}

// Owns the tensors of a Spec. Outputs are poisoned.
class Call {
 public:
  explicit Call(const Spec& spec) : spec_(spec) {
    make_inputs();
    if (spec.varlen()) make_varlen();
    make_outputs();
    q.fill([](int64_t index) { return formula(Tag::kQ, index); });
    k.fill([](int64_t index) { return formula(Tag::kK, index); });
    v.fill([](int64_t index) { return formula(Tag::kV, index); });
    dout.fill([](int64_t index) { return formula(Tag::kDout, index); });
    make_options();
    for (Tensor* output : {&out, &lse, &s_dmask}) output->poison();
  }

  const Spec& spec() const { return spec_; }
  int64_t num_sequences() const {
    return spec_.varlen() ? static_cast<int64_t>(spec_.lengths_q.size()) : spec_.batch;
  }
  int64_t max_seqlen_q() const { return longest(spec_.lengths_q, spec_.seqlen_q); }
  int64_t max_seqlen_k() const { return longest(spec_.lengths_k, spec_.seqlen_k); }

  core::AttentionArgs args() const {
    core::AttentionArgs args;
    args.q = q.view();
    args.k = k.view();
    args.v = v.view();
    args.out = out.view();
    args.lse = lse.view();
    args.s_dmask = s_dmask.view();
    args.cu_seqlens_q = cu_seqlens_q.view();
    args.cu_seqlens_k = cu_seqlens_k.view();
    args.seqused_k = seqused_k.view();
    args.block_table = block_table.view();
    args.alibi_slopes = alibi_slopes.view();
    args.attn_bias = attn_bias.view();
    args.learnable_sink = learnable_sink.view();
    if (spec_.varlen()) {
      args.max_seqlen_q = max_seqlen_q();
      args.max_seqlen_k = max_seqlen_k();
    }
    args.softmax_scale = spec_.softmax_scale;
    args.causal = spec_.causal;
    args.window_left = spec_.window_left;
    args.window_right = spec_.window_right;
    args.softcap = spec_.softcap;
    args.dropout_p = spec_.dropout_p;
    args.dropout_seed = spec_.seed;
    args.dropout_offset = spec_.offset;
    return args;
  }

  Tensor q, k, v, out, lse, s_dmask, dout;
  Tensor cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  Tensor alibi_slopes, attn_bias, learnable_sink;

 private:
  static int64_t longest(const std::vector<int64_t>& lengths, int64_t dense) {
    return lengths.empty() ? dense : *std::max_element(lengths.begin(), lengths.end());
  }

  void make_inputs() {
    const Spec& s = spec_;
    if (!s.varlen()) {
      q = Tensor(s.dtype, {s.batch, s.seqlen_q, s.num_heads, s.head_dim});
      k = Tensor(s.dtype, {s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim});
      v = Tensor(s.dtype, {s.batch, s.seqlen_k, s.num_heads_kv, s.head_dim_v});
      return;
    }
    q = Tensor(s.dtype, {sum_of(s.lengths_q) + s.spare_rows, s.num_heads, s.head_dim});
    if (s.page_size > 0) return make_pages();
    const int64_t total_k = sum_of(s.lengths_k) + s.spare_rows;
    k = Tensor(s.dtype, {total_k, s.num_heads_kv, s.head_dim});
    v = Tensor(s.dtype, {total_k, s.num_heads_kv, s.head_dim_v});
  }

  // Pages are given out from the last to the first; page 0 and table entries of -1 are not used.
  void make_pages() {
    const Spec& s = spec_;
    const auto pages_of = [&](int64_t length) { return (length + s.page_size - 1) / s.page_size; };
    int64_t num_blocks = 1;
    for (int64_t length : s.lengths_k) num_blocks += pages_of(length);
    k = Tensor(s.dtype, {num_blocks, s.page_size, s.num_heads_kv, s.head_dim});
    v = Tensor(s.dtype, {num_blocks, s.page_size, s.num_heads_kv, s.head_dim_v});
    const int64_t max_blocks = pages_of(max_seqlen_k()) + 1;
    block_table = Tensor(core::DataType::kInt32, {num_sequences(), max_blocks});
    int64_t page = num_blocks;
    for (int64_t b = 0; b < num_sequences(); ++b) {
      const int64_t used = pages_of(s.lengths_k[static_cast<size_t>(b)]);
      for (int64_t p = 0; p < max_blocks; ++p) {
        block_table.set(b * max_blocks + p, p < used ? static_cast<double>(--page) : -1.0);
      }
    }
  }

  void make_varlen() {
    const auto cumulative = [](const std::vector<int64_t>& lengths) {
      std::vector<int64_t> sums{0};
      for (int64_t length : lengths) sums.push_back(sums.back() + length);
      return int32_tensor(sums);
    };
    cu_seqlens_q = cumulative(spec_.lengths_q);
    cu_seqlens_k = cumulative(spec_.lengths_k);
    if (!spec_.seqused_k.empty()) seqused_k = int32_tensor(spec_.seqused_k);
  }

  void make_outputs() {
    const Spec& s = spec_;
    const auto up = [](int64_t length) { return (length + 127) / 128 * 128; };
    if (s.varlen()) {
      out = Tensor(s.dtype, {q.view().shape[0], s.num_heads, s.head_dim_v});
      lse = Tensor(core::DataType::kFloat32, {s.num_heads, q.view().shape[0]});
    } else {
      out = Tensor(s.dtype, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v});
      lse = Tensor(core::DataType::kFloat32, {s.batch, s.num_heads, s.seqlen_q});
    }
    dout = out;
    if (!s.s_dmask) return;
    s_dmask =
        Tensor(s.dtype, {num_sequences(), s.num_heads, up(max_seqlen_q()), up(max_seqlen_k())});
  }

  void make_options() {
    const Spec& s = spec_;
    if (s.alibi_rank > 0) {
      alibi_slopes = s.alibi_rank == 1
                         ? Tensor(core::DataType::kFloat32, {s.num_heads})
                         : Tensor(core::DataType::kFloat32, {num_sequences(), s.num_heads});
      alibi_slopes.fill([](int64_t index) { return std::abs(formula(Tag::kAlibi, index)); });
    }
    if (!s.bias_shape.empty() && s.boolean_bias) {
      attn_bias = Tensor(core::DataType::kBool, s.bias_shape);
      attn_bias.fill(
          [](int64_t index) { return formula_bits(Tag::kBias, index) % 4 != 0 ? 1.0 : 0.0; });
    } else if (!s.bias_shape.empty()) {
      attn_bias = Tensor(core::DataType::kFloat32, s.bias_shape);
      attn_bias.fill([](int64_t index) { return formula(Tag::kBias, index); });
    }
    if (s.sink) {
      learnable_sink = Tensor(core::DataType::kFloat32, {s.num_heads});
      learnable_sink.fill([](int64_t index) { return formula(Tag::kSink, index); });
    }
  }

  Spec spec_;
};

}  // namespace fa::testing
