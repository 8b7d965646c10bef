"""Every name that clients import is there, with the original's signature, on PyTorch alone."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

NORM = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,"
    " rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,"
)
NORM_OUT = " return_dropout_mask=False, out_dtype=None, out=None, residual_out=None"
NORM_REF = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,"
    " rowscale=None, prenorm=False, zero_centered_weight=False, dropout_mask=None,"
    " dropout_mask1=None, upcast=False"
)
ADD_NORM = (
    "x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, layerscale=None, prenorm=False,"
    " residual_in_fp32=False, return_dropout_mask=False"
)
PARALLEL_NORM = (
    "x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm=False,"
    " residual_in_fp32=False, return_dropout_mask=False"
)
NORM_MODULE = (
    "hidden_size, prenorm=False, p=0.0, eps=1e-5, residual_in_fp32=False, device=None, dtype=None"
)
COLUMN = (
    "in_features, out_features, process_group, bias=True, sequence_parallel=True, multiple_of=1,"
    " device=None, dtype=None"
)
BENCHMARK = "repeats=10, desc='', verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs"

# FlashAttention 2.8's parameters and defaults; a class stands for its constructor.
SIGNATURES = {
    "bert_padding": {
        "IndexFirstAxis.apply": "input, indices",
        "IndexPutFirstAxis.apply": "values, indices, first_axis_dim",
        "index_first_axis": "input, indices",
        "index_put_first_axis": "values, indices, first_axis_dim",
        "index_first_axis_residual": "input, indices",
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
        "pad_input": "hidden_states, indices, batch, seqlen",
        "rearrange": "tensor, pattern, **axes_lengths",
    },
    "layers.rotary": {
        "rotate_half": "x, interleaved=False",
        "apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
        "apply_rotary_emb": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,"
            " max_seqlen=None"
        ),
        "apply_rotary_emb_func": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,"
            " max_seqlen=None"
        ),
        "apply_rotary_emb_qkv_": (
            "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,"
            " num_heads_q=None"
        ),
        "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
        "ApplyRotaryEmb.apply": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,"
            " max_seqlen=None"
        ),
        "ApplyRotaryEmbQKV_.apply": (
            "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,"
            " num_heads_q=None"
        ),
        "ApplyRotaryEmbKV_.apply": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
        "RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
        "RotaryEmbedding.forward": (
            "qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"
        ),
        "RotaryEmbedding._update_cos_sin_cache": "seqlen, device=None, dtype=None",
    },
    "layers.patch_embed": {
        "PatchEmbed": (
            "img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None, flatten=True,"
            " bias=True, fused_bias_fc=False"
        ),
        "PatchEmbed.forward": "x",
    },
    "ops.triton.rotary": {
        "apply_rotary": (
            "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False,"
            " inplace=False, conjugate=False"
        ),
    },
    "ops.triton.cross_entropy": {
        "cross_entropy_loss": (
            "logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,"
            " lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None"
        ),
    },
    "ops.triton.layer_norm": {
        "layer_norm_fn": f"{NORM} is_rms_norm=False,{NORM_OUT}",
        "rms_norm_fn": f"{NORM}{NORM_OUT}",
        "layer_norm_ref": NORM_REF,
        "rms_norm_ref": NORM_REF,
        "layer_norm_linear_fn": (
            "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6,"
            " prenorm=False, residual_in_fp32=False, is_rms_norm=False"
        ),
        "RMSNorm": (
            "hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None,"
            " dtype=None"
        ),
        "RMSNorm.forward": "x, residual=None, prenorm=False, residual_in_fp32=False",
    },
    "ops.layer_norm": {
        "layer_norm": "x, weight, bias, epsilon",
        "dropout_add_layer_norm": ADD_NORM,
        "dropout_add_layer_norm_parallel_residual": PARALLEL_NORM,
        "DropoutAddLayerNorm": NORM_MODULE,
        "DropoutAddLayerNorm.forward": "x0, residual=None",
    },
    "ops.rms_norm": {
        "rms_norm": "x, weight, epsilon",
        "dropout_add_rms_norm": ADD_NORM,
        "dropout_add_rms_norm_parallel_residual": PARALLEL_NORM,
        "RMSNorm": "hidden_size, eps=1e-5, device=None, dtype=None",
        "RMSNorm.forward": "x",
        "DropoutAddRMSNorm": NORM_MODULE,
        "DropoutAddRMSNorm.forward": "x0, residual=None",
    },
    "ops.activations": {
        "bias_gelu": "y, bias",
        "bias_gelu_back": "g, y, bias",
        "bias_gelu_impl": "input, bias",
        "gelu_fwd": "x",
        "gelu_bwd": "g, x",
        "fast_gelu_impl": "input",
        "relu_bwd": "g, x",
        "sqrelu_fwd": "x",
        "sqrelu_bwd": "g, x",
        "swiglu": "x, y",
        "swiglu_fwd": "x, y",
        "swiglu_bwd": "x, y, g",
    },
    "ops.fused_dense": {
        "fused_dense_func": (
            "x, weight, bias=None, return_residual=False, process_group=None,"
            " sequence_parallel=True"
        ),
        "FusedDense": (
            "in_features, out_features, bias=True, return_residual=False, device=None, dtype=None"
        ),
        "FusedDense.forward": "x, process_group=None",
        "ColumnParallelLinear": COLUMN,
        "ColumnParallelLinear.forward": "x",
        "RowParallelLinear": COLUMN,
        "RowParallelLinear.forward": "x",
        "fused_mlp_func": (
            "x, weight1, weight2, bias1=None, bias2=None, activation='gelu_approx',"
            " save_pre_act=True, return_residual=False, checkpoint_lvl=0, heuristic=0,"
            " process_group=None, sequence_parallel=True"
        ),
        "FusedMLP": (
            "in_features, hidden_features=None, out_features=None, bias1=True, bias2=True,"
            " activation='gelu_approx', return_residual=False, checkpoint_lvl=0, heuristic='auto',"
            " device=None, dtype=None"
        ),
        "ParallelFusedMLP": (
            "in_features, hidden_features=None, out_features=None, activation='gelu_approx',"
            " process_group=None, bias1=True, bias2=True, sequence_parallel=True,"
            " checkpoint_lvl=0, heuristic='auto', device=None, dtype=None"
        ),
    },
    "losses.cross_entropy": {
        "CrossEntropyLoss": (
            "ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0,"
            " lse_square_scale=0.0, inplace_backward=False, process_group=None,"
            " return_z_loss=False"
        ),
        "CrossEntropyLoss.forward": "input, target, precomputed_lse=None",
    },
    "modules.mha": {
        "get_alibi_slopes": "nheads",
        "FlashSelfAttention": (
            "causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1),"
            " alibi_slopes=None, deterministic=False"
        ),
        "FlashSelfAttention.forward": "qkv, causal=None, cu_seqlens=None, max_seqlen=None",
        "FlashCrossAttention": (
            "causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None,"
            " window_size=(-1, -1), deterministic=False"
        ),
        "FlashCrossAttention.forward": (
            "q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None,"
            " max_seqlen_k=None"
        ),
        "SelfAttention": "causal=False, softmax_scale=None, attention_dropout=0.0",
        "SelfAttention.forward": "qkv, causal=None, key_padding_mask=None",
        "CrossAttention": "causal=False, softmax_scale=None, attention_dropout=0.0",
        "CrossAttention.forward": "q, kv, causal=None, key_padding_mask=None",
        "LinearResidual.forward": "input",
        "MHA": (
            "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True,"
            " out_proj_bias=True, dropout=0.0, softmax_scale=None, causal=False, layer_idx=None,"
            " dwconv=False, rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_scale_base=None,"
            " rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1),"
            " fused_bias_fc=False, use_flash_attn=False, return_residual=False,"
            " checkpointing=False, device=None, dtype=None"
        ),
        "MHA.forward": (
            "x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None,"
            " mixer_subset=None, inference_params=None, **kwargs"
        ),
        "MHA.allocate_inference_cache": "batch_size, max_seqlen, dtype=None",
        "ParallelMHA": (
            "embed_dim, num_heads, process_group, num_heads_kv=None, qkv_proj_bias=True,"
            " out_proj_bias=True, dropout=0.0, softmax_scale=None, causal=False, layer_idx=None,"
            " rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_scale_base=None,"
            " rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1),"
            " use_flash_attn=False, checkpointing=False, sequence_parallel=True, device=None,"
            " dtype=None"
        ),
        "ParallelMHA.forward": "x, seqlen=None, inference_params=None, **kwargs",
        "ParallelMHA.allocate_inference_cache": "batch_size, max_seqlen, dtype=None",
    },
    "modules.mlp": {
        "Mlp": (
            "in_features, hidden_features=None, out_features=None, activation=F.gelu, bias1=True,"
            " bias2=True, return_residual=False, device=None, dtype=None"
        ),
        "ParallelMLP": (
            "in_features, hidden_features=None, out_features=None, activation=F.gelu,"
            " process_group=None, sequence_parallel=True, bias1=True, bias2=True, device=None,"
            " dtype=None"
        ),
        "GatedMlp": (
            "in_features, hidden_features=None, out_features=None, activation=F.sigmoid,"
            " bias1=True, bias2=True, multiple_of=128, return_residual=False, device=None,"
            " dtype=None"
        ),
        "ParallelGatedMlp": (
            "in_features, process_group, hidden_features=None, out_features=None,"
            " activation=F.sigmoid, bias1=True, bias2=True, multiple_of=128,"
            " sequence_parallel=True, device=None, dtype=None"
        ),
        "Mlp.forward": "x",
        "ParallelMLP.forward": "x",
        "GatedMlp.forward": "x",
        "ParallelGatedMlp.forward": "x",
        "FusedMLP.forward": "x, process_group=None",
        "ParallelFusedMLP.forward": "x",
    },
    "modules.block": {
        "Block": (
            "dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout,"
            " prenorm=True, resid_dropout1=0.0, resid_dropout2=0.0, drop_path1=0.0,"
            " drop_path2=0.0, fused_dropout_add_ln=False, return_residual=False,"
            " residual_in_fp32=False, sequence_parallel=False, mark_shared_params=False"
        ),
        "Block.allocate_inference_cache": "batch_size, max_seqlen, dtype=None, **kwargs",
        "Block.forward": "hidden_states, residual=None, mixer_subset=None, mixer_kwargs=None",
        "ParallelBlock": (
            "dim, mixer_cls=None, mlp_cls=None, norm_cls=nn.LayerNorm, dropout_cls=nn.Dropout,"
            " resid_dropout1=0.0, resid_dropout2=0.0, tied_norm=False,"
            " fused_dropout_add_ln=False, residual_in_fp32=False, sequence_parallel=False,"
            " mark_shared_params=False"
        ),
        "ParallelBlock.allocate_inference_cache": "batch_size, max_seqlen, dtype=None, **kwargs",
        "ParallelBlock.forward": (
            "hidden_states1, hidden_states2=None, residual=None, mixer_kwargs=None"
        ),
    },
    "modules.embedding": {
        "GPT2Embeddings": (
            "embed_dim, vocab_size, max_position_embeddings, padding_idx=None,"
            " word_embed_proj_dim=None, device=None, dtype=None"
        ),
        "GPT2Embeddings.forward": "input_ids, position_ids=None",
        "BertEmbeddings": (
            "embed_dim, vocab_size, max_position_embeddings, type_vocab_size, padding_idx=None,"
            " device=None, dtype=None"
        ),
        "BertEmbeddings.forward": "input_ids, position_ids=None, token_type_ids=None",
        "VocabParallelEmbedding": (
            "num_embeddings, *args, process_group=None, padding_idx=None, **kwargs"
        ),
        "VocabParallelEmbedding.forward": "input",
        "ColumnParallelEmbedding": (
            "num_embeddings, embedding_dim, *args, process_group=None, **kwargs"
        ),
        "ParallelGPT2Embeddings": (
            "embed_dim, vocab_size, max_position_embeddings, process_group, padding_idx=None,"
            " sequence_parallel=True, device=None, dtype=None"
        ),
        "ParallelGPT2Embeddings.forward": (
            "input_ids, position_ids=None, combine_batch_seqlen_dim=False"
        ),
    },
    "utils.distributed": {
        "all_gather_raw": "input_, process_group, async_op=False",
        "reduce_scatter_raw": "input_, process_group, async_op=False",
        "all_reduce_raw": "input_, process_group, async_op=False",
        "all_gather": "input_, process_group",
        "reduce_scatter": "input_, process_group",
        "all_reduce": "input_, process_group",
        "sync_shared_params": "model, process_group",
        "allreduce_sequence_parallel_grad": "model, process_group",
        "get_dim_for_local_rank": "dim, world_size, local_rank, multiple_of=1",
    },
    "utils.generation": {
        "modify_logits_for_top_k_filtering": "logits, top_k",
        "modify_logits_for_top_p_filtering": "logits, top_p",
        "sample": "logits, top_k=1, top_p=0.0, temperature=1.0",
        "decode": (
            "input_ids, model, max_length, top_k=1, top_p=0.0, temperature=1.0,"
            " eos_token_id=None, teacher_outputs=None, vocab_size=None, tensor_parallel=1,"
            " cg=False, enable_timing=False"
        ),
        "GenerationMixin.generate": (
            "input_ids, max_length, top_k=1, top_p=0.0, temperature=1.0,"
            " return_dict_in_generate=False, output_scores=False, **kwargs"
        ),
        "GenerationMixin.allocate_inference_cache": (
            "batch_size, max_seqlen, dtype=None, **kwargs"
        ),
        "allocate_inference_cache": (
            "max_batch_size, max_seqlen, nheads, headdim, layers, device, dtype=torch.float16"
        ),
        "InferenceParams.reset": "max_seqlen, max_batch_size",
    },
    "utils.pretrained": {
        "state_dict_from_pretrained": "model_name, device=None, dtype=None",
    },
    "utils.benchmark": {
        "benchmark_forward": f"fn, *inputs, {BENCHMARK}",
        "benchmark_backward": f"fn, *inputs, grad=None, {BENCHMARK}",
        "benchmark_combined": f"fn, *inputs, grad=None, {BENCHMARK}",
        "benchmark_fwd_bwd": f"fn, *inputs, grad=None, {BENCHMARK}",
        "benchmark_all": f"fn, *inputs, grad=None, {BENCHMARK}",
        "pytorch_profiler": (
            "fn, *inputs, trace_filename=None, backward=False, amp=False,"
            " amp_dtype=torch.float16, cpu=False, verbose=True, **kwinputs"
        ),
        "benchmark_memory": "fn, *inputs, desc='', verbose=True, **kwinputs",
    },
    "utils.testing": {
        "generate_random_padding_mask": (
            "max_seqlen, batch_size, device, mode='random', zero_lengths=False"
        ),
        "generate_qkv": (
            "q, k, v, query_padding_mask=None, key_padding_mask=None, qv=None, kvpacked=False,"
            " qkvpacked=False, query_unused_mask=None, key_unused_mask=None"
        ),
        "construct_local_mask": (
            "seqlen_q, seqlen_k, window_size=(-1, -1), sink_token_length=0,"
            " query_padding_mask=None, key_padding_mask=None, key_leftpad=None, device=None"
        ),
        "attention_ref": (
            "q, k, v, query_padding_mask=None, key_padding_mask=None, key_leftpad=None,"
            " attn_bias=None, dropout_p=0.0, dropout_mask=None, causal=False, qv=None,"
            " q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),"
            " attention_chunk=0, sink_token_length=0, learnable_sink=None, softcap=0.0,"
            " upcast=True, reorder_ops=False, intermediate_dtype=None"
        ),
    },
}
# The names and shapes of a checkpoint: what each module's state_dict() holds. With 4 heads of 16, 2
# of them for k and v where heads are grouped; q comes before k, and k before v.
FC = "fc1.weight 256 64, fc1.bias 256, fc2.weight 64 256, fc2.bias 64"
OUT = "out_proj.weight 64 64, out_proj.bias 64"
STATES = {
    "modules.mha MHA(64, 4)": f"Wqkv.weight 192 64, Wqkv.bias 192, {OUT}",
    "modules.mha MHA(64, 4, 2, use_flash_attn=True, use_alibi=True, rotary_emb_dim=16)": (
        f"Wqkv.weight 128 64, Wqkv.bias 128, {OUT}"
    ),
    "modules.mha MHA(64, 4, fused_bias_fc=True, return_residual=True, qkv_proj_bias=False)": (
        f"Wqkv.weight 192 64, {OUT}"
    ),
    "modules.mha MHA(64, 4, 2, cross_attn=True)": (
        f"Wq.weight 64 64, Wq.bias 64, Wkv.weight 64 64, Wkv.bias 64, {OUT}"
    ),
    "modules.mha MHA(64, 4, dwconv=True)": (
        f"Wqkv.weight 192 64, Wqkv.bias 192, dwconv_qkv.weight 192 1 3, dwconv_qkv.bias 192, {OUT}"
    ),
    "modules.mha MHA(64, 4, 2, dwconv=True)": (
        "Wqkv.weight 128 64, Wqkv.bias 128, dwconv_q.weight 64 1 3, dwconv_q.bias 64,"
        f" dwconv_kv.weight 64 1 3, dwconv_kv.bias 64, {OUT}"
    ),
    "modules.mlp Mlp(64)": FC,
    "modules.mlp GatedMlp(48, bias1=False)": "fc1.weight 256 48, fc2.weight 48 128, fc2.bias 48",
    "modules.mlp FusedMLP(64)": FC,
    "modules.block Block(64)": (
        "mixer.Wqkv.weight 192 64, mixer.Wqkv.bias 192, mixer.out_proj.weight 64 64,"
        " mixer.out_proj.bias 64, norm1.weight 64, norm1.bias 64, mlp.fc1.weight 256 64,"
        " mlp.fc1.bias 256, mlp.fc2.weight 64 256, mlp.fc2.bias 64, norm2.weight 64, norm2.bias 64"
    ),
    "modules.block ParallelBlock(64, nn.Identity, nn.Identity)": (
        "norm1.weight 64, norm1.bias 64, norm2.weight 64, norm2.bias 64"
    ),
    "modules.block ParallelBlock(64, nn.Identity, nn.Identity, tied_norm=True)": (
        "norm1.weight 64, norm1.bias 64"
    ),
    "modules.embedding GPT2Embeddings(64, 100, 32, word_embed_proj_dim=16)": (
        "word_embeddings.weight 100 16, project_in.weight 64 16, position_embeddings.weight 32 64"
    ),
    "modules.embedding GPT2Embeddings(64, 100, 0)": "word_embeddings.weight 100 64",
    "modules.embedding BertEmbeddings(64, 100, 32, 2)": (
        "word_embeddings.weight 100 64, position_embeddings.weight 32 64,"
        " token_type_embeddings.weight 2 64"
    ),
    "layers.patch_embed PatchEmbed(8, 4, 3, 64)": "proj.weight 64 48, proj.bias 64",
    "layers.rotary RotaryEmbedding(16, scale_base=512)": "",
    "losses.cross_entropy CrossEntropyLoss()": "",
    "ops.triton.layer_norm RMSNorm(64, dropout_p=0.1)": "weight 64",
    "ops.rms_norm RMSNorm(64)": "weight 64",
    "ops.rms_norm DropoutAddRMSNorm(64)": "weight 64",
    "ops.layer_norm DropoutAddLayerNorm(64)": "weight 64, bias 64",
}
ROWS = [(module, name) for module, names in SIGNATURES.items() for name in names]

# What clients import, from their sources.
CLIENTS = {
    "transformers": [
        "bert_padding.index_first_axis",
        "bert_padding.pad_input",
        "bert_padding.unpad_input",
        "layers.rotary.apply_rotary_emb",
    ],
    "verl, OpenRLHF, axolotl": [
        "bert_padding.index_first_axis",
        "bert_padding.pad_input",
        "bert_padding.rearrange",
        "bert_padding.unpad_input",
        "losses.cross_entropy.CrossEntropyLoss",
        "ops.triton.cross_entropy.cross_entropy_loss",
        "utils.distributed.all_gather",
    ],
    "vLLM, esm, ModernBERT": [
        "layers.rotary.RotaryEmbedding",
        "ops.triton.layer_norm.RMSNorm",
        "ops.triton.layer_norm.layer_norm_fn",
        "ops.triton.rotary.apply_rotary",
    ],
    "remote code of models": [
        "bert_padding.IndexFirstAxis",
        "bert_padding.IndexPutFirstAxis",
        "layers.rotary.ApplyRotaryEmb",
        "layers.rotary.ApplyRotaryEmbKV_",
        "layers.rotary.ApplyRotaryEmbQKV_",
    ],
    "mamba": ["layers.rotary.RotaryEmbedding"],
    "Megatron-LM": ["layers.rotary.apply_rotary_emb"],
    "nanotron, llm-foundry, xtuner": [
        "bert_padding.unpad_input_for_concatenated_sequences",
        "modules.mha.flash_attn_varlen_kvpacked_func",
        "ops.triton.layer_norm.layer_norm_fn",
        "ops.triton.layer_norm.rms_norm_fn",
    ],
    "stripedhyena, safari": [
        "losses.cross_entropy.CrossEntropyLoss",
        "modules.block.Block",
        "modules.embedding.GPT2Embeddings",
        "modules.embedding.ParallelGPT2Embeddings",
        "modules.mha.MHA",
        "modules.mha.ParallelMHA",
        "modules.mlp.FusedMLP",
        "modules.mlp.Mlp",
        "modules.mlp.ParallelFusedMLP",
        "ops.fused_dense.ColumnParallelLinear",
        "ops.fused_dense.FusedDense",
        "ops.layer_norm.dropout_add_layer_norm",
        "ops.rms_norm.RMSNorm",
        "ops.rms_norm.rms_norm",
        "utils.distributed.all_gather_raw",
        "utils.distributed.sync_shared_params",
        "utils.generation.GenerationMixin",
        "utils.generation.InferenceParams",
        "utils.pretrained.state_dict_from_pretrained",
    ],
}
MODULES = sorted({*SIGNATURES, "utils.torch"})


def resolve(module: str, name: str):
    found = importlib.import_module(f"flash_attn.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters(function) -> list[inspect.Parameter]:
    """Without self; a class stands for its constructor."""
    function = function.__init__ if inspect.isclass(function) else function
    found = list(inspect.signature(function).parameters.values())
    return found[1:] if found and found[0].name == "self" else found


@pytest.mark.parametrize(("module", "name"), ROWS, ids=[".".join(row) for row in ROWS])
def test_signatures_are_the_originals(module, name):
    known = {"F": F, "nn": nn, "torch": torch}
    expected = parameters(eval(f"lambda {SIGNATURES[module][name]}: None", known))
    actual = parameters(resolve(module, name))
    # What this library adds comes by keyword only, and does nothing by default.
    names = {p.name for p in expected}
    added = [p for p in actual if p.name not in names]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in added)
    actual = [p for p in actual if p.name in names]
    assert [(p.name, p.kind) for p in actual] == [(p.name, p.kind) for p in expected]
    for one, other in zip(actual, expected):
        assert one.default is other.default or one.default == other.default, one.name


@pytest.mark.parametrize(("module", "name"), ROWS, ids=[".".join(row) for row in ROWS])
def test_public_names_are_documented(module, name):
    if not name.rpartition(".")[2].startswith("_") and name.count(".") == 0:
        assert inspect.getdoc(resolve(module, name))
        assert name in importlib.import_module(f"flash_attn.{module}").__all__


@pytest.mark.parametrize("made", STATES)
def test_checkpoints_have_the_originals_names_and_shapes(made):
    module, _, expression = made.partition(" ")
    scope = {"nn": nn, **vars(importlib.import_module(f"flash_attn.{module}"))}
    state = eval(expression, scope).state_dict()
    actual = sorted(" ".join([name, *map(str, tensor.shape)]) for name, tensor in state.items())
    assert actual == sorted(filter(None, STATES[made].split(", ")))


def test_the_fields_of_a_generations_state_are_the_originals():
    fields = dataclasses.fields(resolve("utils.generation", "InferenceParams"))
    assert [field.name for field in fields] == [
        "max_seqlen",
        "max_batch_size",
        "seqlen_offset",
        "batch_size_offset",
        "key_value_memory_dict",
        "lengths_per_sample",
    ]
    state = resolve("utils.generation", "InferenceParams")(9, 2)
    assert (state.seqlen_offset, state.batch_size_offset) == (0, 0)
    assert state.key_value_memory_dict == {} and state.lengths_per_sample is None


@pytest.mark.parametrize("client", CLIENTS)
def test_what_clients_import_is_there(client):
    for path in CLIENTS[client]:
        module, _, name = path.rpartition(".")
        assert callable(resolve(module, name)), path


def test_modules_hold_the_public_functions():
    from flash_attn import flash_attn_varlen_kvpacked_func as public
    from flash_attn.modules.mha import flash_attn_varlen_kvpacked_func

    assert flash_attn_varlen_kvpacked_func is public


def test_importing_needs_pytorch_alone():
    """No Triton, einops, torchvision or transformers, and not the native library."""
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "einops", "torchvision", "transformers", "tvm_ffi"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib
for module in {MODULES!r}:
    importlib.import_module(f"flash_attn.{{module}}")
from flash_attn import _native
print(_native._module)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None"
