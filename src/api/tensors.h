// The tensors of a call: their names, and their places in the C structs and in the core's.
#pragma once

#include "core/attention_args.h"
#include "flash_attn/flash_attn.h"

namespace fa::api {

template <class Struct>
struct TensorField {
  const char* name;
  const fa_tensor* Struct::*from;
  core::TensorView core::AttentionArgs::*to;
};

inline constexpr TensorField<fa_attention_args> kTensors[] = {
    {"q", &fa_attention_args::q, &core::AttentionArgs::q},
    {"k", &fa_attention_args::k, &core::AttentionArgs::k},
    {"v", &fa_attention_args::v, &core::AttentionArgs::v},
    {"out", &fa_attention_args::out, &core::AttentionArgs::out},
    {"lse", &fa_attention_args::lse, &core::AttentionArgs::lse},
    {"s_dmask", &fa_attention_args::s_dmask, &core::AttentionArgs::s_dmask},
    {"cu_seqlens_q", &fa_attention_args::cu_seqlens_q, &core::AttentionArgs::cu_seqlens_q},
    {"cu_seqlens_k", &fa_attention_args::cu_seqlens_k, &core::AttentionArgs::cu_seqlens_k},
    {"seqused_k", &fa_attention_args::seqused_k, &core::AttentionArgs::seqused_k},
    {"block_table", &fa_attention_args::block_table, &core::AttentionArgs::block_table},
    {"alibi_slopes", &fa_attention_args::alibi_slopes, &core::AttentionArgs::alibi_slopes},
    {"attn_bias", &fa_attention_args::attn_bias, &core::AttentionArgs::attn_bias},
    {"learnable_sink", &fa_attention_args::learnable_sink, &core::AttentionArgs::learnable_sink},
    {"cache_seqlens", &fa_attention_args::cache_seqlens, &core::AttentionArgs::cache_seqlens},
    {"cache_batch_idx", &fa_attention_args::cache_batch_idx, &core::AttentionArgs::cache_batch_idx},
    {"cache_leftpad", &fa_attention_args::cache_leftpad, &core::AttentionArgs::cache_leftpad},
    {"k_new", &fa_attention_args::k_new, &core::AttentionArgs::k_new},
    {"v_new", &fa_attention_args::v_new, &core::AttentionArgs::v_new},
    {"rotary_cos", &fa_attention_args::rotary_cos, &core::AttentionArgs::rotary_cos},
    {"rotary_sin", &fa_attention_args::rotary_sin, &core::AttentionArgs::rotary_sin}};

inline constexpr TensorField<fa_attention_gradients> kGradients[] = {
    {"dout", &fa_attention_gradients::dout, &core::AttentionArgs::dout},
    {"dq", &fa_attention_gradients::dq, &core::AttentionArgs::dq},
    {"dk", &fa_attention_gradients::dk, &core::AttentionArgs::dk},
    {"dv", &fa_attention_gradients::dv, &core::AttentionArgs::dv},
    {"d_attn_bias", &fa_attention_gradients::d_attn_bias, &core::AttentionArgs::d_attn_bias},
    {"d_learnable_sink", &fa_attention_gradients::d_learnable_sink,
     &core::AttentionArgs::d_learnable_sink}};

}  // namespace fa::api
