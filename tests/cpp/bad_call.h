// A valid call of the C interface that can be spoiled in one place, and what must come of it: the
// code, the argument's name and its value in the message, and no write to any output.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "flash_attn/flash_attn.h"
#include "tests/case_tensors.h"
#include "tests/cases.h"

namespace fa::cases {

// A C tensor whose fields can all be spoiled.
struct Spoilable {
  fa_tensor tensor{};
  std::array<int64_t, 8> shape{};
  std::array<int64_t, 8> strides{};

  void copy(const fa_tensor* from, const fa_tensor** used) {
    if (from == nullptr) return;
    tensor = *from;
    for (int d = 0; d < from->ndim; ++d) {
      shape[static_cast<size_t>(d)] = from->shape[d];
      strides[static_cast<size_t>(d)] = from->strides[d];
    }
    tensor.shape = shape.data();
    tensor.strides = strides.data();
    *used = &tensor;
  }
  void set_dtype(int code, int bits) {
    tensor.dtype_code = static_cast<uint8_t>(code);
    tensor.dtype_bits = static_cast<uint8_t>(bits);
  }
  int32_t* lengths() { return static_cast<int32_t*>(tensor.data); }
  // Gives an optional tensor that the case has not a shape and (someone's) memory.
  void give(std::vector<int64_t> extents, int code, int bits, void* memory) {
    tensor = {};
    tensor.data = memory;
    tensor.device_type = FA_CPU;
    tensor.ndim = static_cast<int32_t>(extents.size());
    tensor.dtype_lanes = 1;
    set_dtype(code, bits);
    for (size_t d = 0; d < extents.size(); ++d) shape[d] = extents[d];
    tensor.shape = shape.data();
  }
};

// A valid call, to be spoiled in one place.
class Call {
 public:
  explicit Call(const Case& c) : tensors_(c, core::DataType::kFloat32) {
    fa_attention_args_init(&args);
    q.copy(tensors_.q.c_tensor(), &args.q);
    k.copy(tensors_.k.c_tensor(), &args.k);
    v.copy(tensors_.v.c_tensor(), &args.v);
    out.copy(tensors_.out.c_tensor(), &args.out);
    lse.copy(tensors_.lse.c_tensor(), &args.lse);
    cu_seqlens_q.copy(tensors_.cu_seqlens_q.c_tensor(), &args.cu_seqlens_q);
    cu_seqlens_k.copy(tensors_.cu_seqlens_k.c_tensor(), &args.cu_seqlens_k);
    seqused_k.copy(tensors_.seqused_k.c_tensor(), &args.seqused_k);
    block_table.copy(tensors_.block_table.c_tensor(), &args.block_table);
    fa_attention_gradients_init(&gradients);
    dout.copy(tensors_.dout.c_tensor(), &gradients.dout);
    dq.copy(tensors_.dq.c_tensor(), &gradients.dq);
    dk.copy(tensors_.dk.c_tensor(), &gradients.dk);
    dv.copy(tensors_.dv.c_tensor(), &gradients.dv);
    if (!c.varlen()) return;
    args.max_seqlen_q = c.max_q();
    args.max_seqlen_k = c.max_k();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Makes k and v a cache with room for 5 tokens a row, of which 2 and 4 are held; one is appended.
  void make_cache() {
    give(k_new, &args.k_new, {2, 1, 2, 8}, FA_FLOAT, 32);
    give(v_new, &args.v_new, {2, 1, 2, 8}, FA_FLOAT, 32);
    give_lengths(cache_seqlens, &args.cache_seqlens, 2, 4);
  }
  void give_lengths(Spoilable& optional, const fa_tensor** used, int32_t first, int32_t second) {
    int32_t* values = lengths_[num_lengths_++].data();
    values[0] = first;
    values[1] = second;
    optional.give({2}, FA_INT, 32, values);
    *used = &optional.tensor;
  }
  // The rows of the cache become pages, one for each sequence.
  void give_pages(int32_t first, int32_t second) {
    give_lengths(block_table, &args.block_table, first, second);
    block_table.tensor.ndim = 2;
    block_table.shape[1] = 1;
  }
  void give_rotary(int64_t positions, int64_t half) {
    give(rotary_cos, &args.rotary_cos, {positions, half}, FA_FLOAT, 32);
    give(rotary_sin, &args.rotary_sin, {positions, half}, FA_FLOAT, 32);
  }

  // Of what the forward, over a cache too, and the backward write.
  uint64_t outputs_hash() const {
    uint64_t hash = cache_hash();
    for (const HostTensor* it :
         {&tensors_.out, &tensors_.lse, &tensors_.dq, &tensors_.dk, &tensors_.dv}) {
      hash = hash * 31 ^ it->hash();
    }
    return hash;
  }
  uint64_t cache_hash() const { return tensors_.k.hash() * 31 ^ tensors_.v.hash(); }

  // Memory that is large enough for any optional tensor given here.
  void* spare() { return spare_.data(); }
  void give(Spoilable& optional, const fa_tensor** used, std::vector<int64_t> shape, int code,
            int bits) {
    optional.give(std::move(shape), code, bits, spare());
    *used = &optional.tensor;
  }

  fa_attention_args args{};
  Spoilable q, k, v, out, lse, s_dmask;
  Spoilable cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  Spoilable alibi_slopes, attn_bias, learnable_sink;
  Spoilable cache_seqlens, cache_batch_idx, cache_leftpad, k_new, v_new, rotary_cos, rotary_sin;
  fa_attention_gradients gradients{};
  Spoilable dout, dq, dk, dv, d_attn_bias, d_learnable_sink;
  double scale = 0.0;

 private:
  CaseTensors tensors_;
  alignas(64) std::array<std::byte, 1 << 16> spare_{};
  std::array<std::array<int32_t, 2>, 4> lengths_{};
  size_t num_lengths_ = 0;
};

// q [2, 4, 6, 8], k and v [2, 5, 2, 8].
inline constexpr Case kDense{.name = "dense",
                             .seqlen_q = 4,
                             .seqlen_k = 5,
                             .num_heads = 6,
                             .num_heads_kv = 2,
                             .head_dim = 8};
// q [5 + 3, 2, 8] in sequences of 3 and 2, k and v [9 + 3, 2, 8] of 4 and 5.
inline constexpr Case kVarlen{
    .name = "varlen", .head_dim = 8, .lengths_q = {3, 2}, .lengths_k = {4, 5}, .seqused_k = {4, 2}};
// k and v [6, 4, 2, 8], block_table [2, 3].
inline constexpr Case kPaged{
    .name = "paged", .head_dim = 8, .lengths_q = {3, 2}, .lengths_k = {4, 5}, .page_size = 4};

struct BadCall {
  const char* name;
  const Case& base;
  void (*spoil)(Call& call);
  std::vector<const char*> message;  // the argument, its value
  fa_status code = FA_INVALID_ARGUMENT;
};

inline void expect_refused(
    const BadCall& bad, fa_status (*run)(Call& call), void (*prepare)(Call& call) = [](Call&) {}) {
  Call call(bad.base);
  prepare(call);
  bad.spoil(call);
  const uint64_t before = call.outputs_hash();
  EXPECT_EQ(run(call), bad.code);
  const std::string message = fa_last_error_message();
  for (const char* part : bad.message) {
    EXPECT_NE(message.find(part), std::string::npos) << "'" << part << "' is not in: " << message;
  }
  EXPECT_EQ(call.outputs_hash(), before) << "an output was written";
}

inline std::string name_of(const ::testing::TestParamInfo<BadCall>& info) {
  return info.param.name;
}

}  // namespace fa::cases
