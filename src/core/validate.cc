#include "core/validate.h"

#include <array>
#include <limits>

#include "core/arithmetic.h"
#include "core/checks.h"
#include "core/sequence.h"
#include "core/validate_cache.h"

namespace fa::core {
namespace {

// Lengths of varlen sequences are differences of int32, and positions are counted so.
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();
constexpr int64_t kSDmaskMultiple = 128;

// ---- q, k, v and out. ----

struct Ranks {
  int q;
  int kv;
  const char* q_layout;
  const char* k_layout;
  const char* v_layout;
  const char* out_layout;
};

Ranks ranks(Layout layout, bool paged) {
  constexpr const char* kPagedK = "[num_blocks, page_size, num_heads_kv, head_dim]";
  constexpr const char* kPagedV = "[num_blocks, page_size, num_heads_kv, head_dim_v]";
  if (layout == Layout::kCache) {
    return {4,
            4,
            "[batch, seqlen_q, num_heads, head_dim]",
            paged ? kPagedK : "[batch_cache, seqlen_cache, num_heads_kv, head_dim]",
            paged ? kPagedV : "[batch_cache, seqlen_cache, num_heads_kv, head_dim_v]",
            "[batch, seqlen_q, num_heads, head_dim_v]"};
  }
  if (layout == Layout::kDense) {
    return {4,
            4,
            "[batch, seqlen_q, num_heads, head_dim]",
            "[batch, seqlen_k, num_heads_kv, head_dim]",
            "[batch, seqlen_k, num_heads_kv, head_dim_v]",
            "[batch, seqlen_q, num_heads, head_dim_v]"};
  }
  return {3,
          paged ? 4 : 3,
          "[total_q, num_heads, head_dim] (varlen)",
          paged ? kPagedK : "[total_k, num_heads_kv, head_dim] (varlen)",
          paged ? kPagedV : "[total_k, num_heads_kv, head_dim_v] (varlen)",
          "[total_q, num_heads, head_dim_v] (varlen)"};
}

Status check_main_tensor(Named tensor, int rank, const char* layout, const TensorView& q) {
  FA_TRY(check_rank(tensor, rank, layout));
  if (tensor.view.dtype != q.dtype) {
    return invalid_argument(tensor.name, ": dtype is ", name(tensor.view.dtype),
                            ", must equal q's ", name(q.dtype));
  }
  FA_TRY(check_device(tensor, q.device));
  FA_TRY(check_storage(tensor));
  return check_last_contiguous(tensor);
}

Status check_main_tensors(const AttentionArgs& args, const Ranks& expected) {
  FA_TRY(check_present({"q", args.q}));
  FA_TRY(check_present({"k", args.k}));
  FA_TRY(check_present({"v", args.v}));
  FA_TRY(check_present({"out", args.out}));
  const DataType dtype = args.q.dtype;
  if (dtype != DataType::kFloat32 && dtype != DataType::kFloat16 && dtype != DataType::kBFloat16) {
    return invalid_argument("q: dtype is ", name(dtype), ", must be float32, float16 or bfloat16");
  }
  FA_TRY(check_main_tensor({"q", args.q}, expected.q, expected.q_layout, args.q));
  FA_TRY(check_main_tensor({"k", args.k}, expected.kv, expected.k_layout, args.q));
  FA_TRY(check_main_tensor({"v", args.v}, expected.kv, expected.v_layout, args.q));
  FA_TRY(check_main_tensor({"out", args.out}, expected.q, expected.out_layout, args.q));
  return check_no_broadcast({"out", args.out});
}

Status check_head_dim(Named tensor, const char* what) {
  const int64_t head_dim = tensor.view.shape[tensor.view.ndim - 1];
  if (head_dim >= 1 && head_dim <= kMaxHeadDim) return {};
  return invalid_argument(tensor.name, ": ", what, " is ", head_dim, ", must be in [1, ",
                          kMaxHeadDim, "] (", tensor.name, " has shape ", shape_text(tensor.view),
                          ")");
}

Status check_heads(const AttentionArgs& args, AttentionProblem* problem) {
  const Named q{"q", args.q}, k{"k", args.k}, v{"v", args.v};
  const auto from_end = [](const TensorView& view, int d) { return view.shape[view.ndim - d]; };
  problem->num_heads = from_end(args.q, 2);
  problem->num_heads_kv = from_end(args.k, 2);
  problem->head_dim = from_end(args.q, 1);
  problem->head_dim_v = from_end(args.v, 1);
  FA_TRY(check_head_dim(q, "head_dim"));
  FA_TRY(check_size(k, "head_dim", from_end(args.k, 1), "q's", problem->head_dim));
  FA_TRY(check_head_dim(v, "head_dim_v"));
  if (problem->num_heads_kv < 1) {
    return invalid_argument("k: num_heads_kv is 0, must be at least 1 (k has shape ",
                            shape_text(args.k), ")");
  }
  FA_TRY(check_size(v, "num_heads_kv", from_end(args.v, 2), "k's", problem->num_heads_kv));
  if (problem->num_heads < 1 || problem->num_heads % problem->num_heads_kv != 0) {
    return invalid_argument("q: num_heads is ", problem->num_heads,
                            ", must be a positive multiple of k's num_heads_kv ",
                            problem->num_heads_kv, " (q has shape ", shape_text(args.q),
                            ", k has shape ", shape_text(args.k), ")");
  }
  return {};
}

Status check_dense_sizes(const AttentionArgs& args, AttentionProblem* problem) {
  problem->batch = args.q.shape[0];
  problem->seqlen_q = args.q.shape[1];
  problem->total_q = problem->batch * problem->seqlen_q;
  problem->seqlen_k = args.k.shape[1];
  FA_TRY(check_size({"k", args.k}, "batch", args.k.shape[0], "q's", problem->batch));
  FA_TRY(check_size({"v", args.v}, "batch", args.v.shape[0], "q's", problem->batch));
  FA_TRY(check_size({"v", args.v}, "seqlen_k", args.v.shape[1], "k's", problem->seqlen_k));
  const std::array<int64_t, 4> out{problem->batch, problem->seqlen_q, problem->num_heads,
                                   problem->head_dim_v};
  return check_shape({"out", args.out}, out, "[batch, seqlen_q, num_heads, head_dim_v]");
}

// ---- Varlen and pages. ----

Status check_only_with_layout(const AttentionArgs& args, Layout layout) {
  if (args.block_table.present() && layout == Layout::kDense) {
    return invalid_argument(
        "block_table: is given, must only be used with cu_seqlens_q and "
        "cu_seqlens_k, or with cache_seqlens");
  }
  if (layout == Layout::kCache) return {};
  for (const Named& tensor :
       {Named{"cache_seqlens", args.cache_seqlens}, Named{"cache_batch_idx", args.cache_batch_idx},
        Named{"cache_leftpad", args.cache_leftpad}, Named{"k_new", args.k_new},
        Named{"v_new", args.v_new}, Named{"rotary_cos", args.rotary_cos},
        Named{"rotary_sin", args.rotary_sin}}) {
    if (!tensor.view.present()) continue;
    return invalid_argument(tensor.name, ": is given, must ",
                            layout == Layout::kVarlen
                                ? "not be used with cu_seqlens_q and cu_seqlens_k"
                                : "only be used with cache_seqlens");
  }
  return {};
}

// cu_seqlens_* make a call varlen, cache_seqlens one over a cache; what only those have needs them.
Status check_layout(const AttentionArgs& args, AttentionProblem* problem) {
  const bool q = args.cu_seqlens_q.present();
  const bool k = args.cu_seqlens_k.present();
  if (q != k) {
    const char* missing = q ? "cu_seqlens_k" : "cu_seqlens_q";
    const char* given = q ? "cu_seqlens_q" : "cu_seqlens_k";
    return invalid_argument(missing, ": is missing, must be given together with ", given);
  }
  problem->layout = q                              ? Layout::kVarlen
                    : args.cache_seqlens.present() ? Layout::kCache
                                                   : Layout::kDense;
  if (problem->layout == Layout::kVarlen || !args.seqused_k.present()) {
    return check_only_with_layout(args, problem->layout);
  }
  return invalid_argument(
      "seqused_k: is given, must only be used with cu_seqlens_q and cu_seqlens_k");
}

Status check_max_seqlen(const char* name, int64_t max_seqlen) {
  if (max_seqlen >= 0 && max_seqlen <= kMaxLength) return {};
  return invalid_argument(name, ": is ", max_seqlen, ", must be in [0, ", kMaxLength, "]");
}

Status check_varlen_sizes(const AttentionArgs& args, AttentionProblem* problem) {
  const Device device = args.q.device;
  const Named cu_seqlens_q{"cu_seqlens_q", args.cu_seqlens_q};
  const Named cu_seqlens_k{"cu_seqlens_k", args.cu_seqlens_k};
  FA_TRY(check_int32_vector(cu_seqlens_q, device));
  FA_TRY(check_int32_vector(cu_seqlens_k, device));
  if (args.cu_seqlens_q.shape[0] < 1) {
    return invalid_argument("cu_seqlens_q: has no entries, must have one more than sequences");
  }
  problem->batch = args.cu_seqlens_q.shape[0] - 1;
  FA_TRY(check_size(cu_seqlens_k, "length", args.cu_seqlens_k.shape[0], "cu_seqlens_q's",
                    problem->batch + 1));
  FA_TRY(check_max_seqlen("max_seqlen_q", args.max_seqlen_q));
  FA_TRY(check_max_seqlen("max_seqlen_k", args.max_seqlen_k));
  problem->seqlen_q = args.max_seqlen_q;
  problem->total_q = args.q.shape[0];
  problem->seqlen_k = args.max_seqlen_k;
  if (args.seqused_k.present()) {
    const Named seqused_k{"seqused_k", args.seqused_k};
    FA_TRY(check_int32_vector(seqused_k, device));
    FA_TRY(check_size(seqused_k, "length", args.seqused_k.shape[0],
                      "cu_seqlens_q's number of sequences", problem->batch));
  }
  if (args.block_table.present()) {
    FA_TRY(check_pages(args, problem));
  } else {
    FA_TRY(check_size({"v", args.v}, "total_k", args.v.shape[0], "k's", args.k.shape[0]));
  }
  const std::array<int64_t, 3> out{args.q.shape[0], problem->num_heads, problem->head_dim_v};
  return check_shape({"out", args.out}, out, "[total_q, num_heads, head_dim_v]");
}

// ---- Values of lengths and pages, where they lie on the CPU. ----

Status check_cu_seqlens(Named cu_seqlens, int64_t total, const char* total_name) {
  const int32_t* values = cu_seqlens.view.as<const int32_t>();
  const int64_t batch = cu_seqlens.view.shape[0] - 1;
  if (values[0] != 0) {
    return invalid_argument(cu_seqlens.name, ": entry 0 is ", values[0], ", must be 0");
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (values[b + 1] < values[b]) {
      return invalid_argument(cu_seqlens.name, ": entry ", b + 1, " is ", values[b + 1],
                              ", must be at least entry ", b, ", which is ", values[b]);
    }
  }
  if (values[batch] > total) {
    return invalid_argument(cu_seqlens.name, ": the last entry is ", values[batch],
                            ", must be at most ", total_name, " ", total);
  }
  return {};
}

Status check_seqused_k(const AttentionArgs& args, int64_t batch) {
  const int32_t* used = args.seqused_k.as<const int32_t>();
  const int32_t* cu_seqlens_k = args.cu_seqlens_k.as<const int32_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t length = cu_seqlens_k[b + 1] - cu_seqlens_k[b];
    if (used[b] < 0 || used[b] > length) {
      return invalid_argument("seqused_k: entry ", b, " is ", used[b], ", must be in [0, ", length,
                              "], the keys that cu_seqlens_k gives that sequence");
    }
  }
  return {};
}

Status check_longest(const AttentionArgs& args, const AttentionProblem& problem) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence it = sequence(args, problem, b);
    if (it.seqlen_q > problem.seqlen_q) {
      return invalid_argument("max_seqlen_q: is ", problem.seqlen_q, ", must be at least ",
                              it.seqlen_q, ", the length of sequence ", b);
    }
    if (it.seqlen_k > problem.seqlen_k) {
      return invalid_argument("max_seqlen_k: is ", problem.seqlen_k, ", must be at least ",
                              it.seqlen_k, ", the length of sequence ", b);
    }
  }
  return {};
}

Status check_varlen_values(const AttentionArgs& args, const AttentionProblem& problem) {
  const bool paged = problem.page_size > 0;
  FA_TRY(check_cu_seqlens({"cu_seqlens_q", args.cu_seqlens_q}, args.q.shape[0], "q's total_q"));
  FA_TRY(check_cu_seqlens({"cu_seqlens_k", args.cu_seqlens_k}, paged ? kMaxLength : args.k.shape[0],
                          "k's total_k"));
  if (args.seqused_k.present()) FA_TRY(check_seqused_k(args, problem.batch));
  FA_TRY(check_longest(args, problem));
  return paged ? check_page_indices(args, problem) : Status{};
}

Status check_counts(const AttentionProblem& problem) {
  struct Count {
    const char* what;
    int64_t value;
  };
  for (const Count& it :
       {Count{"q: batch", problem.batch}, Count{"q: num_heads", problem.num_heads},
        Count{"q: seqlen_q", problem.seqlen_q}, Count{"k: seqlen_k", problem.seqlen_k},
        Count{"k_new: seqlen_new", problem.seqlen_new}}) {
    if (it.value <= kMaxLength) continue;
    return invalid_argument(it.what, " is ", it.value, ", must be at most ", kMaxLength);
  }
  return {};
}

// ---- Scalars. ----

Status check_window(const char* name, int64_t value) {
  if (value >= -1) return {};
  return invalid_argument(name, ": is ", value, ", must be -1 (unbounded) or at least 0");
}

// In the range of fp32, in which kernels compute.
Status check_not_negative(const char* name, double value) {
  if (value >= 0.0 && value <= std::numeric_limits<float>::max()) return {};
  return invalid_argument(name, ": is ", value, ", must be at least 0 and finite in float32");
}

Status check_scalars(const AttentionArgs& args, AttentionProblem* problem) {
  if (args.softmax_scale) FA_TRY(check_not_negative("softmax_scale", *args.softmax_scale));
  FA_TRY(check_not_negative("softcap", args.softcap));
  FA_TRY(check_window("window_size_left", args.window_left));
  FA_TRY(check_window("window_size_right", args.window_right));
  if (!(args.dropout_p >= 0.0 && args.dropout_p < 1.0)) {
    return invalid_argument("dropout_p: is ", args.dropout_p, ", must be in [0, 1)");
  }
  constexpr int64_t kMaxSplits = 256;
  if (args.num_splits < 0 || args.num_splits > kMaxSplits) {
    return invalid_argument("num_splits: is ", args.num_splits, ", must be in [0, ", kMaxSplits,
                            "], 0 leaving the choice to the implementation");
  }
  problem->num_splits = args.num_splits;
  problem->band = semantics::mask_band(args.causal, args.window_left, args.window_right);
  problem->softcap = args.softcap > 0.0;
  problem->dropout = args.dropout_p > 0.0;
  return {};
}

// ---- Optional inputs. ----

Status check_alibi(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.alibi_slopes.present()) return {};
  const Named slopes{"alibi_slopes", args.alibi_slopes};
  FA_TRY(check_dtype(slopes, DataType::kFloat32));
  FA_TRY(check_device(slopes, args.q.device));
  if (args.alibi_slopes.ndim == 2) {
    FA_TRY(check_shape(slopes, std::array{problem->batch, problem->num_heads},
                       "[batch, num_heads] (or [num_heads])"));
  } else {
    FA_TRY(
        check_shape(slopes, std::array{problem->num_heads}, "[num_heads] (or [batch, num_heads])"));
  }
  FA_TRY(check_storage(slopes));
  FA_TRY(check_last_contiguous(slopes));
  problem->alibi = true;
  return {};
}

Status check_bias_shape(Named bias, const AttentionProblem& problem) {
  constexpr int kRank = 4;
  const std::array<int64_t, kRank> target{problem.batch, problem.num_heads, problem.seqlen_q,
                                          problem.seqlen_k};
  const int ndim = bias.view.ndim;
  bool fits = ndim <= kRank;
  for (int d = 0; fits && d < ndim; ++d) {
    const int64_t size = bias.view.shape[d];
    fits = size == 1 || size == target[kRank - ndim + d];
  }
  if (fits) return {};
  const bool varlen = problem.layout == Layout::kVarlen;
  return invalid_argument(bias.name, ": shape is ", shape_text(bias.view),
                          ", must be broadcastable to [", target[0], ", ", target[1], ", ",
                          target[2], ", ", target[3], "], [batch, num_heads, ",
                          varlen ? "max_seqlen_q, max_seqlen_k]" : "seqlen_q, seqlen_k]");
}

Status check_bias(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.attn_bias.present()) return {};
  const Named bias{"attn_bias", args.attn_bias};
  const DataType dtype = args.attn_bias.dtype;
  const bool boolean = dtype == DataType::kBool || dtype == DataType::kUInt8;
  if (!boolean && dtype != DataType::kFloat32 && dtype != problem->dtype) {
    return invalid_argument("attn_bias: dtype is ", name(dtype), ", must be float32, q's ",
                            name(problem->dtype), ", or bool (keep where true)");
  }
  FA_TRY(check_device(bias, args.q.device));
  FA_TRY(check_bias_shape(bias, *problem));
  FA_TRY(check_storage(bias));
  if (args.attn_bias.strides[args.attn_bias.ndim - 1] != 0) FA_TRY(check_last_contiguous(bias));
  problem->bias = boolean ? BiasKind::kBoolean : BiasKind::kAdditive;
  return {};
}

Status check_sink(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.learnable_sink.present()) return {};
  const Named sink{"learnable_sink", args.learnable_sink};
  FA_TRY(check_float32_or(problem->dtype, sink));
  FA_TRY(check_device(sink, args.q.device));
  FA_TRY(check_shape(sink, std::array{problem->num_heads}, "[num_heads]"));
  FA_TRY(check_storage(sink));
  FA_TRY(check_last_contiguous(sink));
  problem->sink = true;
  return {};
}

// ---- Optional outputs. ----

Status check_lse(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.lse.present()) return {};
  const Named lse{"lse", args.lse};
  if (problem->layout == Layout::kVarlen) {
    FA_TRY(
        check_shape(lse, std::array{problem->num_heads, args.q.shape[0]}, "[num_heads, total_q]"));
  } else {
    FA_TRY(check_shape(lse, std::array{problem->batch, problem->num_heads, problem->seqlen_q},
                       "[batch, num_heads, seqlen_q]"));
  }
  problem->wants_lse = true;
  return check_output(lse, DataType::kFloat32, args.q.device);
}

Status check_s_dmask(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.s_dmask.present()) return {};
  const Named s_dmask{"s_dmask", args.s_dmask};
  FA_TRY(check_shape(
      s_dmask,
      std::array{problem->batch, problem->num_heads, round_up(problem->seqlen_q, kSDmaskMultiple),
                 round_up(problem->seqlen_k, kSDmaskMultiple)},
      "[batch, num_heads, seqlen_q and seqlen_k rounded up to 128]"));
  problem->wants_s_dmask = true;
  return check_output(s_dmask, problem->dtype, args.q.device);
}

bool has_vector_rows(const TensorView& view) {
  constexpr int64_t kVectorBytes = 16;
  const int64_t bytes = byte_size(view.dtype);
  bool vectors = reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0 &&
                 view.shape[view.ndim - 1] * bytes % kVectorBytes == 0;
  for (int d = 0; d + 1 < view.ndim; ++d) {
    vectors = vectors && (view.shape[d] <= 1 || view.strides[d] * bytes % kVectorBytes == 0);
  }
  return vectors;
}

Status check_all(const AttentionArgs& args, AttentionProblem* problem) {
  FA_TRY(check_layout(args, problem));
  FA_TRY(check_main_tensors(args, ranks(problem->layout, args.block_table.present())));
  problem->dtype = args.q.dtype;
  FA_TRY(check_heads(args, problem));
  // A CPU's kernels do not ask, and their plans are to be shared.
  if (args.q.device.type != DeviceType::kCpu) {
    problem->vector_rows = has_vector_rows(args.q) && has_vector_rows(args.k) &&
                           has_vector_rows(args.v) && has_vector_rows(args.out);
  }
  if (problem->layout == Layout::kVarlen) {
    FA_TRY(check_varlen_sizes(args, problem));
    if (args.values_are_readable()) FA_TRY(check_varlen_values(args, *problem));
  } else if (problem->layout == Layout::kCache) {
    FA_TRY(check_cache(args, problem));
  } else {
    FA_TRY(check_dense_sizes(args, problem));
  }
  FA_TRY(check_counts(*problem));
  FA_TRY(check_scalars(args, problem));
  FA_TRY(check_alibi(args, problem));
  FA_TRY(check_bias(args, problem));
  FA_TRY(check_sink(args, problem));
  FA_TRY(check_lse(args, problem));
  return check_s_dmask(args, problem);
}

// A gradient has the shape of what it belongs to, and the same dtype. dout alone is not written.
Status check_gradient(Named gradient, Named of) {
  if (!gradient.view.present()) {
    return invalid_argument(gradient.name, ": is missing, must be a tensor of ", of.name,
                            "'s shape ", shape_text(of.view));
  }
  bool equal = gradient.view.ndim == of.view.ndim;
  for (int d = 0; equal && d < of.view.ndim; ++d) {
    equal = gradient.view.shape[d] == of.view.shape[d];
  }
  if (!equal) {
    return invalid_argument(gradient.name, ": shape is ", shape_text(gradient.view),
                            ", must equal ", of.name, "'s ", shape_text(of.view));
  }
  FA_TRY(check_dtype(gradient, of.view.dtype));
  FA_TRY(check_device(gradient, of.view.device));
  FA_TRY(check_storage(gradient));
  return check_last_contiguous(gradient);
}

Status check_written_gradient(Named gradient, Named of) {
  FA_TRY(check_gradient(gradient, of));
  return check_no_broadcast(gradient);
}

Status check_gradients(const AttentionArgs& args, AttentionProblem* problem) {
  if (!args.lse.present()) {
    return invalid_argument("lse: is missing, the backward needs the forward's");
  }
  if (args.s_dmask.present()) {
    return invalid_argument("s_dmask: is given, must be absent in the backward");
  }
  FA_TRY(check_gradient({"dout", args.dout}, {"out", args.out}));
  FA_TRY(check_written_gradient({"dq", args.dq}, {"q", args.q}));
  FA_TRY(check_written_gradient({"dk", args.dk}, {"k", args.k}));
  FA_TRY(check_written_gradient({"dv", args.dv}, {"v", args.v}));
  if (args.d_attn_bias.present()) {
    if (problem->bias != BiasKind::kAdditive) {
      return invalid_argument("d_attn_bias: is given, but attn_bias is ",
                              problem->bias == BiasKind::kNone ? "not" : "boolean");
    }
    FA_TRY(
        check_written_gradient({"d_attn_bias", args.d_attn_bias}, {"attn_bias", args.attn_bias}));
    problem->wants_d_attn_bias = true;
  }
  if (args.d_learnable_sink.present()) {
    if (!problem->sink) {
      return invalid_argument("d_learnable_sink: is given, but learnable_sink is not");
    }
    FA_TRY(check_written_gradient({"d_learnable_sink", args.d_learnable_sink},
                                  {"learnable_sink", args.learnable_sink}));
    problem->wants_d_learnable_sink = true;
  }
  return {};
}

}  // namespace

Result<AttentionProblem> validate_backward(const AttentionArgs& args) {
  AttentionProblem problem;
  problem.direction = Direction::kBackward;
  problem.deterministic = args.deterministic;
  FA_TRY(check_all(args, &problem));
  FA_TRY(check_gradients(args, &problem));
  return problem;
}

Result<AttentionProblem> validate_forward(const AttentionArgs& args) {
  AttentionProblem problem;
  FA_TRY(check_all(args, &problem));
  return problem;
}

}  // namespace fa::core
