#include "core/problem.h"

#include "core/attention_args.h"

#include <cmath>

#include "core/status.h"

namespace fa::core {

double softmax_scale(const AttentionArgs& args) {
  if (args.softmax_scale) return *args.softmax_scale;
  return 1.0 / std::sqrt(static_cast<double>(args.q.shape[args.q.ndim - 1]));
}

size_t AttentionProblemHash::operator()(const AttentionProblem& problem) const {
  constexpr uint64_t kFnvPrime = 0x100000001B3;
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a, a word at a time
  std::apply(
      [&](auto... field) { ((hash = (hash ^ static_cast<uint64_t>(field)) * kFnvPrime), ...); },
      problem.fields());
  return static_cast<size_t>(hash ^ (hash >> 32));
}

std::string to_string(const AttentionProblem& p) {
  std::string text =
      concat(p.direction == Direction::kForward ? "forward " : "backward ", name(p.dtype),
             p.layout == Layout::kVarlen  ? " varlen"
             : p.layout == Layout::kCache ? " cache"
                                          : " dense");
  if (p.page_size > 0) text += concat(" paged(", p.page_size, ")");
  text += concat(" batch=", p.batch, " seqlen_q=", p.seqlen_q, " seqlen_k=", p.seqlen_k,
                 " num_heads=", p.num_heads, " num_heads_kv=", p.num_heads_kv,
                 " head_dim=", p.head_dim, " head_dim_v=", p.head_dim_v);
  if (!p.band.unbounded()) text += concat(" band=(", p.band.left, ", ", p.band.right, ")");
  if (p.softcap) text += " softcap";
  if (p.alibi) text += " alibi";
  if (p.bias == BiasKind::kAdditive) text += " attn_bias";
  if (p.bias == BiasKind::kBoolean) text += " attn_bias(bool)";
  if (p.sink) text += " learnable_sink";
  if (p.dropout) text += " dropout";
  if (p.appends) text += concat(" seqlen_new=", p.seqlen_new);
  if (p.rotary_dim > 0) text += concat(" rotary_dim=", p.rotary_dim);
  if (p.num_splits > 0) text += concat(" num_splits=", p.num_splits);
  if (p.wants_lse) text += " lse";
  if (p.wants_s_dmask) text += " s_dmask";
  if (p.deterministic) text += " deterministic";
  if (!p.vector_rows) text += " unaligned";
  return text;
}

}  // namespace fa::core
