// Everything that a caller can get wrong, without a cache: see bad_call.h.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "bad_call.h"

namespace fa::cases {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void set_scale(Call& c, double scale) {
  c.scale = scale;
  c.args.softmax_scale = &c.scale;
}

void set_head_dim(Call& c, int64_t head_dim) { c.q.shape[3] = c.k.shape[3] = head_dim; }

const BadCall kMissing[] = {
    {"q_is_null", kDense, [](Call& c) { c.args.q = nullptr; }, {"q", "missing"}},
    {"k_is_null", kDense, [](Call& c) { c.args.k = nullptr; }, {"k", "missing"}},
    {"v_is_null", kDense, [](Call& c) { c.args.v = nullptr; }, {"v", "missing"}},
    {"out_is_null", kDense, [](Call& c) { c.args.out = nullptr; }, {"out", "missing"}},
    {"struct_size_0",
     kDense,
     [](Call& c) { c.args.struct_size = 0; },
     {"struct_size is 0", "fa_attention_args_init"}},
    {"struct_size_of_another_version",
     kDense,
     [](Call& c) { c.args.struct_size = 77; },
     {"struct_size is 77", "fa_attention_args_init"}},
    {"q_without_data", kDense, [](Call& c) { c.q.tensor.data = nullptr; }, {"q", "null"}},
    {"lse_without_data", kDense, [](Call& c) { c.lse.tensor.data = nullptr; }, {"lse", "null"}},
    {"cu_seqlens_q_alone",
     kVarlen,
     [](Call& c) { c.args.cu_seqlens_k = nullptr; },
     {"cu_seqlens_k", "missing"}},
    {"cu_seqlens_k_alone",
     kVarlen,
     [](Call& c) { c.args.cu_seqlens_q = nullptr; },
     {"cu_seqlens_q", "missing"}},
    {"seqused_k_of_a_dense_call",
     kDense,
     [](Call& c) { c.give(c.seqused_k, &c.args.seqused_k, {2}, FA_INT, 32); },
     {"seqused_k", "cu_seqlens"}},
    {"block_table_of_a_dense_call",
     kDense,
     [](Call& c) {
       c.give(c.block_table, &c.args.block_table, {2, 1}, FA_INT, 32);
     },
     {"block_table", "cu_seqlens"}},
};

const BadCall kTensorFields[] = {
    {"ndim_negative", kDense, [](Call& c) { c.q.tensor.ndim = -1; }, {"q:", "ndim is -1"}},
    {"ndim_6", kDense, [](Call& c) { c.k.tensor.ndim = 6; }, {"k:", "ndim is 6"}},
    {"shape_null", kDense, [](Call& c) { c.v.tensor.shape = nullptr; }, {"v:", "shape is NULL"}},
    {"lanes_4",
     kDense,
     [](Call& c) { c.out.tensor.dtype_lanes = 4; },
     {"out:", "dtype_lanes is 4"}},
    {"lanes_0",
     kDense,
     [](Call& c) { c.lse.tensor.dtype_lanes = 0; },
     {"lse:", "dtype_lanes is 0"}},
    {"size_negative", kDense, [](Call& c) { c.q.shape[1] = -3; }, {"q:", "is -3"}},
    {"stride_negative", kDense, [](Call& c) { c.k.strides[1] = -16; }, {"k:", "-16"}},
    {"misaligned",
     kDense,
     [](Call& c) { c.q.tensor.data = static_cast<char*>(c.q.tensor.data) + 1; },
     {"q:", "aligned"}},
    {"misaligned_by_byte_offset",
     kDense,
     [](Call& c) { c.v.tensor.byte_offset = 2; },
     {"v:", "aligned"}},
    {"size_overflows",
     kDense,
     [](Call& c) { c.q.shape[1] = int64_t{1} << 62; },
     {"q:", "4611686018427387904"}},
    {"stride_overflows",
     kDense,
     [](Call& c) { c.k.strides[0] = int64_t{1} << 62; },
     {"k:", "4611686018427387904"}},
    {"more_keys_than_an_int32_counts",
     kDense,
     [](Call& c) {
       for (Spoilable* it : {&c.k, &c.v}) {
         it->shape[1] = int64_t{1} << 31;
         it->strides[1] = 0;
       }
     },
     {"k:", "seqlen_k is 2147483648", "at most 2147483647"}},
    {"compact_size_overflows",
     kDense,
     [](Call& c) {
       c.v.tensor.strides = nullptr;
       c.v.shape[1] = c.v.shape[2] = int64_t{1} << 40;
     },
     {"v:", "1099511627776"}},
    {"out_broadcast", kDense, [](Call& c) { c.out.strides[2] = 0; }, {"out:", "stride 0"}},
    {"q_last_stride_2", kDense, [](Call& c) { c.q.strides[3] = 2; }, {"q:", "stride 2"}},
    {"out_last_stride_2", kDense, [](Call& c) { c.out.strides[3] = 2; }, {"out:", "stride 2"}},
    {"q_float64", kDense, [](Call& c) { c.q.set_dtype(FA_FLOAT, 64); }, {"q:", "float64"}},
    {"q_int32", kDense, [](Call& c) { c.q.set_dtype(FA_INT, 32); }, {"q:", "int32"}},
    {"q_complex64", kDense, [](Call& c) { c.q.set_dtype(5, 64); }, {"q:", "complex64", "float32"}},
    {"k_float8", kDense, [](Call& c) { c.k.set_dtype(10, 8); }, {"k:", "float8", "float32"}},
    {"v_unknown_dtype", kDense, [](Call& c) { c.v.set_dtype(99, 3); }, {"v:", "code 99", "3 bits"}},
    {"k_float16", kDense, [](Call& c) { c.k.set_dtype(FA_FLOAT, 16); }, {"k:", "float16"}},
    {"out_bfloat16", kDense, [](Call& c) { c.out.set_dtype(FA_BFLOAT, 16); }, {"out:", "bfloat16"}},
    {"v_on_cuda",
     kDense,
     [](Call& c) {
       c.v.tensor.device_type = FA_CUDA;
       c.v.tensor.device_id = 1;
     },
     {"v:", "cuda:1"}},
    {"q_on_an_unknown_device", kDense, [](Call& c) { c.q.tensor.device_type = 99; }, {"q", "99"}},
    {"all_on_a_gpu_that_is_not_there",
     kDense,
     [](Call& c) {
       for (Spoilable* it : {&c.q, &c.k, &c.v, &c.out, &c.lse}) {
         it->tensor.device_type = FA_CUDA;
         it->tensor.device_id = 4096;
       }
     },
     {"cuda:4096"},
     FA_UNSUPPORTED},
};

const BadCall kShapes[] = {
    {"q_rank_3", kDense, [](Call& c) { c.q.tensor.ndim = 3; }, {"q:", "3 dimensions"}},
    {"out_rank_5", kDense, [](Call& c) { c.out.tensor.ndim = 5; }, {"out:", "5 dimensions"}},
    {"k_head_dim", kDense, [](Call& c) { c.k.shape[3] = 7; }, {"k:", "head_dim is 7"}},
    {"head_dim_0", kDense, [](Call& c) { set_head_dim(c, 0); }, {"q:", "head_dim is 0"}},
    {"head_dim_513", kDense, [](Call& c) { set_head_dim(c, 513); }, {"q:", "head_dim is 513"}},
    {"head_dim_v_0", kDense, [](Call& c) { c.v.shape[3] = 0; }, {"v:", "head_dim_v is 0"}},
    {"head_dim_v_513", kDense, [](Call& c) { c.v.shape[3] = 513; }, {"v:", "head_dim_v is 513"}},
    {"num_heads_not_a_multiple",
     kDense,
     [](Call& c) { c.q.shape[2] = 5; },
     {"q:", "num_heads is 5"}},
    {"num_heads_0", kDense, [](Call& c) { c.q.shape[2] = 0; }, {"q:", "num_heads is 0"}},
    {"num_heads_kv_0", kDense, [](Call& c) { c.k.shape[2] = 0; }, {"k:", "num_heads_kv is 0"}},
    {"v_num_heads_kv", kDense, [](Call& c) { c.v.shape[2] = 1; }, {"v:", "num_heads_kv is 1"}},
    {"k_batch", kDense, [](Call& c) { c.k.shape[0] = 1; }, {"k:", "batch is 1"}},
    {"v_batch", kDense, [](Call& c) { c.v.shape[0] = 1; }, {"v:", "batch is 1"}},
    {"v_seqlen_k", kDense, [](Call& c) { c.v.shape[1] = 4; }, {"v:", "seqlen_k is 4"}},
    {"out_seqlen_q", kDense, [](Call& c) { c.out.shape[1] = 3; }, {"out:", "[2, 3, 6, 8]"}},
    {"out_head_dim", kDense, [](Call& c) { c.out.shape[3] = 7; }, {"out:", "[2, 4, 6, 7]"}},
    {"lse_shape", kDense, [](Call& c) { c.lse.shape[2] = 5; }, {"lse:", "[2, 6, 5]"}},
    {"lse_rank", kDense, [](Call& c) { c.lse.tensor.ndim = 2; }, {"lse:", "[2, 6]"}},
    {"lse_float16", kDense, [](Call& c) { c.lse.set_dtype(FA_FLOAT, 16); }, {"lse:", "float16"}},
    {"lse_on_cuda",
     kDense,
     [](Call& c) { c.lse.tensor.device_type = FA_CUDA; },
     {"lse:", "cuda:0"}},
    {"s_dmask_not_rounded_up",
     kDense,
     [](Call& c) {
       c.give(c.s_dmask, &c.args.s_dmask, {2, 6, 4, 5}, FA_FLOAT, 32);
     },
     {"s_dmask:", "[2, 6, 4, 5]"}},
    {"s_dmask_bfloat16",
     kDense,
     [](Call& c) {
       c.give(c.s_dmask, &c.args.s_dmask, {2, 6, 128, 128}, FA_BFLOAT, 16);
     },
     {"s_dmask:", "bfloat16"}},
};

const BadCall kScalars[] = {
    {"scale_negative", kDense, [](Call& c) { set_scale(c, -1.5); }, {"softmax_scale", "-1.5"}},
    {"scale_nan", kDense, [](Call& c) { set_scale(c, kNan); }, {"softmax_scale", "nan"}},
    {"scale_infinite", kDense, [](Call& c) { set_scale(c, kInfinity); }, {"softmax_scale", "inf"}},
    {"softcap_negative", kDense, [](Call& c) { c.args.softcap = -2.5; }, {"softcap", "-2.5"}},
    {"softcap_nan", kDense, [](Call& c) { c.args.softcap = kNan; }, {"softcap", "nan"}},
    {"softcap_beyond_fp32", kDense, [](Call& c) { c.args.softcap = 1e300; }, {"softcap", "1e+300"}},
    {"dropout_1", kDense, [](Call& c) { c.args.dropout_p = 1.0; }, {"dropout_p", "is 1,"}},
    {"dropout_negative", kDense, [](Call& c) { c.args.dropout_p = -0.1; }, {"dropout_p", "-0.1"}},
    {"dropout_nan", kDense, [](Call& c) { c.args.dropout_p = kNan; }, {"dropout_p", "nan"}},
    {"window_left",
     kDense,
     [](Call& c) { c.args.window_size_left = -2; },
     {"window_size_left", "-2"}},
    {"window_right",
     kDense,
     [](Call& c) { c.args.window_size_right = -7; },
     {"window_size_right", "-7"}},
    {"backend_unknown",
     kDense,
     [](Call& c) { c.args.backend = "cpu:quantum"; },
     {"backend", "cpu:quantum"}},
    {"backend_of_another_device",
     kDense,
     [](Call& c) { c.args.backend = "cuda:sm90"; },
     {"backend", "cuda:sm90"}},
    {"backend_prefix_of_a_name",
     kDense,
     [](Call& c) { c.args.backend = "refer"; },
     {"backend", "refer"}},
};

const BadCall kOptions[] = {
    {"alibi_shape",
     kDense,
     [](Call& c) { c.give(c.alibi_slopes, &c.args.alibi_slopes, {5}, FA_FLOAT, 32); },
     {"alibi_slopes:", "[5]"}},
    {"alibi_batch",
     kDense,
     [](Call& c) {
       c.give(c.alibi_slopes, &c.args.alibi_slopes, {3, 6}, FA_FLOAT, 32);
     },
     {"alibi_slopes:", "[3, 6]"}},
    {"alibi_rank",
     kDense,
     [](Call& c) {
       c.give(c.alibi_slopes, &c.args.alibi_slopes, {1, 2, 6}, FA_FLOAT, 32);
     },
     {"alibi_slopes:", "[1, 2, 6]"}},
    {"alibi_float16",
     kDense,
     [](Call& c) { c.give(c.alibi_slopes, &c.args.alibi_slopes, {6}, FA_FLOAT, 16); },
     {"alibi_slopes:", "float16"}},
    {"bias_not_broadcastable",
     kDense,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {2, 6, 4, 4}, FA_FLOAT, 32);
     },
     {"attn_bias:", "[2, 6, 4, 4]"}},
    {"bias_by_num_heads_kv",
     kDense,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {2, 2, 4, 5}, FA_FLOAT, 32);
     },
     {"attn_bias:", "[2, 2, 4, 5]"}},
    {"bias_rank_5",
     kDense,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {1, 1, 1, 1, 5}, FA_FLOAT, 32);
     },
     {"attn_bias:", "[1, 1, 1, 1, 5]"}},
    {"bias_int32",
     kDense,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {4, 5}, FA_INT, 32);
     },
     {"attn_bias:", "int32"}},
    {"bias_bfloat16_of_a_float32_call",
     kDense,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {4, 5}, FA_BFLOAT, 16);
     },
     {"attn_bias:", "bfloat16"}},
    {"sink_shape",
     kDense,
     [](Call& c) { c.give(c.learnable_sink, &c.args.learnable_sink, {2}, FA_FLOAT, 32); },
     {"learnable_sink:", "[2]"}},
    {"sink_rank",
     kDense,
     [](Call& c) {
       c.give(c.learnable_sink, &c.args.learnable_sink, {2, 6}, FA_FLOAT, 32);
     },
     {"learnable_sink:", "[2, 6]"}},
    {"sink_float64",
     kDense,
     [](Call& c) { c.give(c.learnable_sink, &c.args.learnable_sink, {6}, FA_FLOAT, 64); },
     {"learnable_sink:", "float64"}},
};

const BadCall kVarlenCalls[] = {
    {"q_rank_4", kVarlen, [](Call& c) { c.q.tensor.ndim = 4; }, {"q:", "4 dimensions"}},
    {"cu_seqlens_q_starts_at_1",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.lengths()[0] = 1; },
     {"cu_seqlens_q:", "entry 0 is 1"}},
    {"cu_seqlens_k_falls",
     kVarlen,
     [](Call& c) { c.cu_seqlens_k.lengths()[1] = 11; },
     {"cu_seqlens_k:", "entry 1, which is 11"}},
    {"cu_seqlens_q_negative",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.lengths()[1] = -4; },
     {"cu_seqlens_q:", "entry 1 is -4"}},
    {"cu_seqlens_q_beyond_total_q",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.lengths()[2] = 9; },
     {"cu_seqlens_q:", "last entry is 9"}},
    {"cu_seqlens_k_beyond_total_k",
     kVarlen,
     [](Call& c) { c.cu_seqlens_k.lengths()[2] = 13; },
     {"cu_seqlens_k:", "last entry is 13"}},
    {"cu_seqlens_q_int64",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.set_dtype(FA_INT, 64); },
     {"cu_seqlens_q:", "int64"}},
    {"cu_seqlens_k_of_another_length",
     kVarlen,
     [](Call& c) { c.cu_seqlens_k.shape[0] = 2; },
     {"cu_seqlens_k:", "length is 2"}},
    {"cu_seqlens_q_empty",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.shape[0] = 0; },
     {"cu_seqlens_q:", "no entries"}},
    {"cu_seqlens_q_rank_2",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.tensor.ndim = 2; },
     {"cu_seqlens_q:", "2 dimensions"}},
    {"cu_seqlens_q_without_data",
     kVarlen,
     [](Call& c) { c.cu_seqlens_q.tensor.data = nullptr; },
     {"cu_seqlens_q:", "null"}},
    {"max_seqlen_q_too_small",
     kVarlen,
     [](Call& c) { c.args.max_seqlen_q = 2; },
     {"max_seqlen_q:", "is 2"}},
    {"max_seqlen_k_too_small",
     kVarlen,
     [](Call& c) { c.args.max_seqlen_k = 3; },
     {"max_seqlen_k:", "is 3"}},
    {"max_seqlen_q_negative",
     kVarlen,
     [](Call& c) { c.args.max_seqlen_q = -1; },
     {"max_seqlen_q:", "is -1"}},
    {"max_seqlen_k_beyond_int32",
     kVarlen,
     [](Call& c) { c.args.max_seqlen_k = int64_t{1} << 31; },
     {"max_seqlen_k:", "2147483648"}},
    {"seqused_k_beyond_its_sequence",
     kVarlen,
     [](Call& c) { c.seqused_k.lengths()[0] = 5; },
     {"seqused_k:", "entry 0 is 5"}},
    {"seqused_k_negative",
     kVarlen,
     [](Call& c) { c.seqused_k.lengths()[1] = -1; },
     {"seqused_k:", "entry 1 is -1"}},
    {"seqused_k_of_another_length",
     kVarlen,
     [](Call& c) { c.seqused_k.shape[0] = 3; },
     {"seqused_k:", "length is 3"}},
    {"seqused_k_int64",
     kVarlen,
     [](Call& c) { c.seqused_k.set_dtype(FA_INT, 64); },
     {"seqused_k:", "int64"}},
    {"v_total_k", kVarlen, [](Call& c) { c.v.shape[0] = 11; }, {"v:", "total_k is 11"}},
    {"out_total_q", kVarlen, [](Call& c) { c.out.shape[0] = 7; }, {"out:", "[7, 2, 8]"}},
    {"lse_total_q", kVarlen, [](Call& c) { c.lse.shape[1] = 5; }, {"lse:", "[2, 5]"}},
    {"bias_by_total_k",
     kVarlen,
     [](Call& c) {
       c.give(c.attn_bias, &c.args.attn_bias, {2, 2, 3, 9}, FA_FLOAT, 32);
     },
     {"attn_bias:", "[2, 2, 3, 9]"}},
    {"page_beyond_the_last",
     kPaged,
     [](Call& c) { c.block_table.lengths()[0] = 6; },
     {"block_table:", "entry [0, 0] is 6"}},
    {"page_negative",
     kPaged,
     [](Call& c) { c.block_table.lengths()[3] = -1; },
     {"block_table:", "entry [1, 0] is -1"}},
    {"too_few_pages",
     kPaged,
     [](Call& c) { c.block_table.shape[1] = 1; },
     {"block_table:", "max_blocks is 1"}},
    {"block_table_batch",
     kPaged,
     [](Call& c) { c.block_table.shape[0] = 1; },
     {"block_table:", "batch is 1"}},
    {"block_table_rank",
     kPaged,
     [](Call& c) { c.block_table.tensor.ndim = 1; },
     {"block_table:", "1 dimensions"}},
    {"block_table_int64",
     kPaged,
     [](Call& c) { c.block_table.set_dtype(FA_INT, 64); },
     {"block_table:", "int64"}},
    {"page_sizes_differ", kPaged, [](Call& c) { c.v.shape[1] = 3; }, {"v:", "page_size is 3"}},
    {"numbers_of_pages_differ",
     kPaged,
     [](Call& c) { c.v.shape[0] = 5; },
     {"v:", "num_blocks is 5"}},
    {"page_size_0",
     kPaged,
     [](Call& c) { c.k.shape[1] = c.v.shape[1] = 0; },
     {"k:", "page_size is 0"}},
    {"paged_k_rank_3", kPaged, [](Call& c) { c.k.tensor.ndim = 3; }, {"k:", "3 dimensions"}},
};

void give_sink(Call& c) { c.give(c.learnable_sink, &c.args.learnable_sink, {6}, FA_FLOAT, 32); }

void give_bias(Call& c, int code, int bits) {
  c.give(c.attn_bias, &c.args.attn_bias, {6, 4, 5}, code, bits);
}

void give_d_bias(Call& c, std::vector<int64_t> shape, int code, int bits) {
  c.give(c.d_attn_bias, &c.gradients.d_attn_bias, std::move(shape), code, bits);
}

const BadCall kGradients[] = {
    {"struct_size_0",
     kDense,
     [](Call& c) { c.gradients.struct_size = 0; },
     {"gradients: struct_size is 0", "fa_attention_gradients_init"}},
    {"args_struct_size_0", kDense, [](Call& c) { c.args.struct_size = 0; }, {"args: struct_size"}},
    {"q_is_null", kDense, [](Call& c) { c.args.q = nullptr; }, {"q:", "missing"}},
    {"out_is_null", kDense, [](Call& c) { c.args.out = nullptr; }, {"out:", "missing"}},
    {"lse_is_null", kDense, [](Call& c) { c.args.lse = nullptr; }, {"lse:", "missing"}},
    {"dout_is_null", kDense, [](Call& c) { c.gradients.dout = nullptr; }, {"dout:", "missing"}},
    {"dq_is_null", kDense, [](Call& c) { c.gradients.dq = nullptr; }, {"dq:", "missing"}},
    {"dk_is_null", kDense, [](Call& c) { c.gradients.dk = nullptr; }, {"dk:", "missing"}},
    {"dv_is_null", kDense, [](Call& c) { c.gradients.dv = nullptr; }, {"dv:", "missing"}},
    {"dq_without_data", kDense, [](Call& c) { c.dq.tensor.data = nullptr; }, {"dq:", "null"}},
    {"dv_ndim_negative", kDense, [](Call& c) { c.dv.tensor.ndim = -1; }, {"dv:", "ndim is -1"}},
    {"dout_lanes_2",
     kDense,
     [](Call& c) { c.dout.tensor.dtype_lanes = 2; },
     {"dout:", "dtype_lanes is 2"}},
    {"dout_seqlen_q", kDense, [](Call& c) { c.dout.shape[1] = 3; }, {"dout:", "[2, 3, 6, 8]"}},
    {"dq_head_dim", kDense, [](Call& c) { c.dq.shape[3] = 7; }, {"dq:", "[2, 4, 6, 7]"}},
    {"dk_by_num_heads", kDense, [](Call& c) { c.dk.shape[2] = 6; }, {"dk:", "[2, 5, 6, 8]"}},
    {"dv_rank_3", kDense, [](Call& c) { c.dv.tensor.ndim = 3; }, {"dv:", "[2, 5, 2]"}},
    {"dq_total_q", kVarlen, [](Call& c) { c.dq.shape[0] = 5; }, {"dq:", "[5, 2, 8]"}},
    {"dout_float16", kDense, [](Call& c) { c.dout.set_dtype(FA_FLOAT, 16); }, {"dout:", "float16"}},
    {"dq_bfloat16", kDense, [](Call& c) { c.dq.set_dtype(FA_BFLOAT, 16); }, {"dq:", "bfloat16"}},
    {"dv_float64", kDense, [](Call& c) { c.dv.set_dtype(FA_FLOAT, 64); }, {"dv:", "float64"}},
    {"dk_on_cuda", kDense, [](Call& c) { c.dk.tensor.device_type = FA_CUDA; }, {"dk:", "cuda:0"}},
    {"dq_broadcast", kDense, [](Call& c) { c.dq.strides[2] = 0; }, {"dq:", "stride 0"}},
    {"dk_broadcast", kDense, [](Call& c) { c.dk.strides[0] = 0; }, {"dk:", "stride 0"}},
    {"dv_stride_negative", kDense, [](Call& c) { c.dv.strides[1] = -16; }, {"dv:", "-16"}},
    {"dv_last_stride_2", kDense, [](Call& c) { c.dv.strides[3] = 2; }, {"dv:", "stride 2"}},
    {"dout_last_stride_0", kDense, [](Call& c) { c.dout.strides[3] = 0; }, {"dout:", "stride 0"}},
    {"dq_misaligned", kDense, [](Call& c) { c.dq.tensor.byte_offset = 2; }, {"dq:", "aligned"}},
    {"s_dmask_is_given",
     kDense,
     [](Call& c) {
       c.give(c.s_dmask, &c.args.s_dmask, {2, 6, 128, 128}, FA_FLOAT, 32);
     },
     {"s_dmask:", "must be absent"}},
    {"d_attn_bias_without_a_bias",
     kDense,
     [](Call& c) {
       give_d_bias(c, {6, 4, 5}, FA_FLOAT, 32);
     },
     {"d_attn_bias:", "attn_bias is not"}},
    {"d_attn_bias_of_a_boolean_bias",
     kDense,
     [](Call& c) {
       give_bias(c, FA_BOOL, 8);
       give_d_bias(c, {6, 4, 5}, FA_FLOAT, 32);
     },
     {"d_attn_bias:", "boolean"}},
    {"d_attn_bias_not_summed",
     kDense,
     [](Call& c) {
       give_bias(c, FA_FLOAT, 32);
       give_d_bias(c, {2, 6, 4, 5}, FA_FLOAT, 32);
     },
     {"d_attn_bias:", "[2, 6, 4, 5]", "[6, 4, 5]"}},
    {"d_attn_bias_float64",
     kDense,
     [](Call& c) {
       give_bias(c, FA_FLOAT, 32);
       give_d_bias(c, {6, 4, 5}, FA_FLOAT, 64);
     },
     {"d_attn_bias:", "float64"}},
    {"d_learnable_sink_without_a_sink",
     kDense,
     [](Call& c) { c.give(c.d_learnable_sink, &c.gradients.d_learnable_sink, {6}, FA_FLOAT, 32); },
     {"d_learnable_sink:", "learnable_sink is not"}},
    {"d_learnable_sink_shape",
     kDense,
     [](Call& c) {
       give_sink(c);
       c.give(c.d_learnable_sink, &c.gradients.d_learnable_sink, {2}, FA_FLOAT, 32);
     },
     {"d_learnable_sink:", "[2]"}},
    {"softcap_negative", kDense, [](Call& c) { c.args.softcap = -2.5; }, {"softcap", "-2.5"}},
    {"backend_unknown",
     kDense,
     [](Call& c) { c.args.backend = "cpu:quantum"; },
     {"backend", "cpu:quantum"}},
    {"pages", kPaged, [](Call&) {}, {"pages", "contiguous"}, FA_UNSUPPORTED},
};

class BadInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(BadInput, is_named_and_nothing_is_written) {
  expect_refused(GetParam(), [](Call& c) { return fa_forward(&c.args); });
}

class BadBackwardInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(BadBackwardInput, is_named_and_nothing_is_written) {
  expect_refused(GetParam(), [](Call& c) { return fa_backward(&c.args, &c.gradients); });
}

INSTANTIATE_TEST_SUITE_P(Missing, BadInput, ::testing::ValuesIn(kMissing), name_of);
INSTANTIATE_TEST_SUITE_P(TensorFields, BadInput, ::testing::ValuesIn(kTensorFields), name_of);
INSTANTIATE_TEST_SUITE_P(Shapes, BadInput, ::testing::ValuesIn(kShapes), name_of);
INSTANTIATE_TEST_SUITE_P(Scalars, BadInput, ::testing::ValuesIn(kScalars), name_of);
INSTANTIATE_TEST_SUITE_P(Options, BadInput, ::testing::ValuesIn(kOptions), name_of);
INSTANTIATE_TEST_SUITE_P(Varlen, BadInput, ::testing::ValuesIn(kVarlenCalls), name_of);
INSTANTIATE_TEST_SUITE_P(Gradients, BadBackwardInput, ::testing::ValuesIn(kGradients), name_of);

// What the table spoils is valid before.
TEST(BadInputBase, calls_are_valid_before_they_are_spoiled) {
  for (const Case* c : {&kDense, &kVarlen, &kPaged}) {
    Call call(*c);
    const uint64_t before = call.outputs_hash();
    EXPECT_EQ(fa_forward(&call.args), FA_OK) << c->name << ": " << fa_last_error_message();
    const uint64_t between = call.outputs_hash();
    EXPECT_NE(between, before);
    if (c->page_size > 0) continue;
    EXPECT_EQ(fa_backward(&call.args, &call.gradients), FA_OK)
        << c->name << ": " << fa_last_error_message();
    EXPECT_NE(call.outputs_hash(), between);
  }
}

TEST(BadInputBase, null_args_are_refused) {
  EXPECT_EQ(fa_forward(nullptr), FA_INVALID_ARGUMENT);
  EXPECT_NE(std::string{fa_last_error_message()}.find("args"), std::string::npos);
  EXPECT_EQ(fa_explain(nullptr, nullptr, 0, nullptr), FA_INVALID_ARGUMENT);
  EXPECT_EQ(fa_forward_oracle(nullptr, nullptr, nullptr, nullptr), FA_INVALID_ARGUMENT);
  fa_attention_args_init(nullptr);
}

TEST(BadInputBase, null_gradients_are_refused) {
  Call call(kDense);
  EXPECT_EQ(fa_backward(&call.args, nullptr), FA_INVALID_ARGUMENT);
  EXPECT_STREQ(fa_last_error_message(), "gradients is NULL");
  EXPECT_EQ(fa_backward(nullptr, &call.gradients), FA_INVALID_ARGUMENT);
  EXPECT_STREQ(fa_last_error_message(), "args is NULL");
  EXPECT_EQ(fa_explain_backward(&call.args, nullptr, nullptr, 0, nullptr), FA_INVALID_ARGUMENT);
  EXPECT_EQ(fa_backward_oracle(&call.args, nullptr, nullptr), FA_INVALID_ARGUMENT);
  fa_attention_gradients_init(nullptr);
}

// Bytes in which nothing is a valid field must not crash the checks.
TEST(BadInputBase, garbage_tensors_are_refused) {
  Call call(kDense);
  detail::Random random(7);
  for (int trial = 0; trial < 2000; ++trial) {
    fa_tensor garbage = call.q.tensor;
    std::array<int64_t, 8> shape = call.q.shape, strides = call.q.strides;
    garbage.shape = shape.data();
    garbage.strides = random.one_in(4) ? nullptr : strides.data();
    const auto wild = [&] {
      return static_cast<int64_t>(random.next() >> random.between(0, 63)) *
             (random.one_in(2) ? 1 : -1);
    };
    if (random.one_in(3)) garbage.ndim = static_cast<int32_t>(wild());
    if (random.one_in(3)) garbage.dtype_code = static_cast<uint8_t>(wild());
    if (random.one_in(3)) garbage.dtype_bits = static_cast<uint8_t>(wild());
    if (random.one_in(3)) garbage.device_type = static_cast<int32_t>(wild());
    shape[static_cast<size_t>(random.between(0, 3))] = wild();
    strides[static_cast<size_t>(random.between(0, 3))] = wild();
    // k and v are of q's sizes no longer, unless luck made the same ones.
    if (shape == call.q.shape) continue;
    call.args.q = &garbage;
    EXPECT_NE(fa_forward(&call.args), FA_OK);
    EXPECT_EQ(fa_explain(&call.args, nullptr, 0, nullptr), FA_INVALID_ARGUMENT);
  }
}

}  // namespace
}  // namespace fa::cases
