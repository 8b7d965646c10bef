#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "command_line.h"
#include "commands.h"
#include "flash_attn/attention.hpp"

namespace fa::tools {
namespace {

struct Request {
  int64_t batch = 1;
  int64_t seqlen_q = 1024;
  int64_t seqlen_k = -1;  // -1: as seqlen_q
  int64_t num_heads = 16;
  int64_t num_heads_kv = -1;  // -1: as num_heads
  int64_t head_dim = 64;
  int64_t head_dim_v = -1;  // -1: as head_dim
  std::string dtype = "bf16";
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double softcap = 0.0;
  std::optional<double> softmax_scale;
  double dropout_p = 0.0;
  bool alibi = false;
  std::string attn_bias = "none";
  bool sink = false;
  bool lse = false;
  bool backward = false;
  bool deterministic = false;
  bool varlen = false;
  int64_t page_size = 0;
  std::string backend;
};

CommandLine command_line(Request& r) {
  CommandLine command("explain",
                      "Tells which implementation would run a call on the CPU, forward or with\n"
                      "--backward its gradients, and why each other one would not. Nothing is\n"
                      "computed. For other devices, flash_attn.explain tells it in Python.");
  command.option("--batch", "B", &r.batch, "sequences; default 1");
  command.option("--seqlen-q", "N", &r.seqlen_q, "queries of a sequence; default 1024");
  command.option("--seqlen-k", "N", &r.seqlen_k, "keys of a sequence; default as --seqlen-q");
  command.option("--num-heads", "H", &r.num_heads, "heads of q; default 16");
  command.option("--num-heads-kv", "H", &r.num_heads_kv, "heads of k and v; default --num-heads");
  command.option("--head-dim", "D", &r.head_dim, "of q and k; default 64");
  command.option("--head-dim-v", "D", &r.head_dim_v, "of v and out; default as --head-dim");
  command.choice("--dtype", {"fp32", "fp16", "bf16"}, &r.dtype, "of q, k, v, out; default bf16");
  command.flag("--causal", &r.causal, "a query sees no key behind its own position");
  command.option("--window-left", "N", &r.window_left, "keys seen before it; -1, the default: all");
  command.option("--window-right", "N", &r.window_right, "and behind it");
  command.option("--softcap", "X", &r.softcap, "scores go through X tanh(s / X)");
  command.option("--softmax-scale", "X", &r.softmax_scale, "default head_dim^-1/2");
  command.option("--dropout-p", "P", &r.dropout_p, "in [0, 1)");
  command.flag("--alibi", &r.alibi, "with alibi_slopes");
  command.choice("--attn-bias", {"none", "additive", "bool"}, &r.attn_bias, "with attn_bias");
  command.flag("--sink", &r.sink, "with learnable_sink");
  command.flag("--lse", &r.lse, "lse is wanted too");
  command.flag("--backward", &r.backward, "the gradients, of attn_bias and the sink too");
  command.flag("--deterministic", &r.deterministic, "and bitwise equal from run to run");
  command.flag("--varlen", &r.varlen, "sequences behind each other, with cu_seqlens");
  command.option("--page-size", "N", &r.page_size, "k and v in pages, with block_table");
  command.option("--backend", "NAME", &r.backend, "force one, as FLASH_ATTENTION_BACKEND does");
  return command;
}

void set_defaults(Request& r) {
  if (r.seqlen_k == -1) r.seqlen_k = r.seqlen_q;
  if (r.num_heads_kv == -1) r.num_heads_kv = r.num_heads;
  if (r.head_dim_v == -1) r.head_dim_v = r.head_dim;
  if (r.page_size > 0) r.varlen = true;
  if (r.backward) r.lse = true;
}

// What the flags cannot mean, whatever the library says of the call.
std::string mistake(const Request& r) {
  const auto fits = [&](int64_t length) {
    return length == 0 || r.batch <= std::numeric_limits<int32_t>::max() / length;
  };
  if (r.batch < 0 || r.seqlen_q < 0 || r.seqlen_k < 0) return "lengths must not be negative";
  if (r.page_size < 0) return "--page-size must be positive";
  if (r.deterministic && !r.backward) return "--deterministic is of the --backward";
  if (r.varlen && (!fits(r.seqlen_q) || !fits(r.seqlen_k))) {
    return "cu_seqlens are int32: with --varlen, batch times length must be below 2^31";
  }
  return {};
}

// A call whose tensors have shapes but no memory of their own: fa_explain() reads only the lengths.
class PhantomCall {
 public:
  explicit PhantomCall(const Request& r) {
    const DType dtype = r.dtype == "fp32"   ? DType::kFloat32
                        : r.dtype == "fp16" ? DType::kFloat16
                                            : DType::kBFloat16;
    const auto tokens = [&](int64_t length, int64_t heads, int64_t dim) {
      if (r.varlen) return phantom(dtype, {r.batch * length, heads, dim});
      return phantom(dtype, {r.batch, length, heads, dim});
    };
    args_.q = tokens(r.seqlen_q, r.num_heads, r.head_dim);
    args_.k = tokens(r.seqlen_k, r.num_heads_kv, r.head_dim);
    args_.v = tokens(r.seqlen_k, r.num_heads_kv, r.head_dim_v);
    args_.out = tokens(r.seqlen_q, r.num_heads, r.head_dim_v);
    if (r.lse) {
      args_.lse = r.varlen ? phantom(DType::kFloat32, {r.num_heads, r.batch * r.seqlen_q})
                           : phantom(DType::kFloat32, {r.batch, r.num_heads, r.seqlen_q});
    }
    if (r.varlen) set_varlen(r);
    if (r.page_size > 0) set_pages(r, dtype);
    set_options(r, dtype);
  }

  PhantomCall(const PhantomCall&) = delete;  // args_ points into it
  PhantomCall& operator=(const PhantomCall&) = delete;

  const ForwardArgs& args() const { return args_; }

  // Each of the shape of what it belongs to.
  Gradients gradients(const Request& r) const {
    Gradients all{.dout = args_.out, .dq = args_.q, .dk = args_.k, .dv = args_.v};
    if (r.attn_bias == "additive") all.d_attn_bias = args_.attn_bias;
    all.d_learnable_sink = args_.learnable_sink;
    all.deterministic = r.deterministic;
    return all;
  }

 private:
  Tensor phantom(DType dtype, std::initializer_list<int64_t> shape) {
    return tensor(static_cast<void*>(memory_), dtype, shape);
  }

  void set_varlen(const Request& r) {
    for (int64_t b = 0; b <= r.batch; ++b) {
      cu_seqlens_q_.push_back(static_cast<int32_t>(b * r.seqlen_q));
      cu_seqlens_k_.push_back(static_cast<int32_t>(b * r.seqlen_k));
    }
    args_.cu_seqlens_q = tensor(cu_seqlens_q_.data(), {r.batch + 1});
    args_.cu_seqlens_k = tensor(cu_seqlens_k_.data(), {r.batch + 1});
    args_.max_seqlen_q = r.seqlen_q;
    args_.max_seqlen_k = r.seqlen_k;
  }

  void set_pages(const Request& r, DType dtype) {
    const int64_t blocks = (r.seqlen_k + r.page_size - 1) / r.page_size;
    block_table_.assign(static_cast<size_t>(r.batch * blocks), 0);
    args_.block_table = tensor(block_table_.data(), {r.batch, blocks});
    args_.k = phantom(dtype, {1, r.page_size, r.num_heads_kv, r.head_dim});
    args_.v = phantom(dtype, {1, r.page_size, r.num_heads_kv, r.head_dim_v});
  }

  void set_options(const Request& r, DType dtype) {
    if (r.alibi) args_.alibi_slopes = phantom(DType::kFloat32, {r.num_heads});
    if (r.attn_bias != "none") {
      args_.attn_bias = phantom(r.attn_bias == "bool" ? DType::kBool : dtype,
                                {r.batch, r.num_heads, r.seqlen_q, r.seqlen_k});
    }
    if (r.sink) args_.learnable_sink = phantom(dtype, {r.num_heads});
    args_.softmax_scale = r.softmax_scale;
    args_.causal = r.causal;
    args_.window_size_left = r.window_left;
    args_.window_size_right = r.window_right;
    args_.softcap = r.softcap;
    args_.dropout_p = r.dropout_p;
    if (!r.backend.empty()) args_.backend = r.backend.c_str();
  }

  alignas(64) unsigned char memory_[64]{};
  std::vector<int32_t> cu_seqlens_q_, cu_seqlens_k_, block_table_;
  ForwardArgs args_;
};

void print_request(const Request& r) {
  std::printf("%s, %s, %s: batch %lld, %lld queries, %lld keys, %lld heads",
              r.backward ? "Backward" : "Forward", r.dtype.c_str(),
              r.page_size > 0 ? "paged"
              : r.varlen      ? "varlen"
                              : "dense",
              static_cast<long long>(r.batch), static_cast<long long>(r.seqlen_q),
              static_cast<long long>(r.seqlen_k), static_cast<long long>(r.num_heads));
  if (r.num_heads_kv != r.num_heads) {
    std::printf(" over %lld of k and v", static_cast<long long>(r.num_heads_kv));
  }
  std::printf(", head_dim %lld", static_cast<long long>(r.head_dim));
  if (r.head_dim_v != r.head_dim) std::printf(" / %lld", static_cast<long long>(r.head_dim_v));
  std::printf("%s\n\n", r.causal ? ", causal" : "");
}

}  // namespace

int run_explain(int argc, char** argv) {
  Request request;
  const CommandLine command = command_line(request);
  if (const auto code = command.parse(argc, argv)) return *code;
  set_defaults(request);
  if (const std::string message = mistake(request); !message.empty()) return command.fail(message);
  const PhantomCall call(request);
  std::string text;
  const Status status = request.backward ? explain(call.args(), call.gradients(request), &text)
                                         : explain(call.args(), &text);
  if (!status.ok()) return command.fail(status.message());
  print_request(request);
  std::printf("%s", text.c_str());
  if (text.find(" chosen ") != std::string::npos) return kSuccess;
  std::printf("\nNothing here runs it.\n");
  return kFailure;
}

}  // namespace fa::tools
