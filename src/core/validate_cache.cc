#include "core/validate_cache.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>
#include <vector>

#include "core/arithmetic.h"
#include "core/checks.h"
#include "core/sequence.h"

namespace fa::core {

Status check_pages(const AttentionArgs& args, AttentionProblem* problem) {
  const Named table{"block_table", args.block_table};
  FA_TRY(check_rank(table, 2, "[batch, max_blocks]"));
  FA_TRY(check_dtype(table, DataType::kInt32));
  FA_TRY(check_device(table, args.q.device));
  FA_TRY(check_storage(table));
  FA_TRY(check_last_contiguous(table));
  FA_TRY(check_size(table, "batch", args.block_table.shape[0], "the call's number of sequences",
                    problem->batch));
  problem->page_size = args.k.shape[1];
  if (problem->page_size < 1) {
    return invalid_argument("k: page_size is 0, must be at least 1 (k has shape ",
                            shape_text(args.k), ")");
  }
  FA_TRY(check_size({"v", args.v}, "num_blocks", args.v.shape[0], "k's", args.k.shape[0]));
  return check_size({"v", args.v}, "page_size", args.v.shape[1], "k's", problem->page_size);
}

// The pages that hold the used keys exist; the rest of the table is not read.
Status check_page_indices(const AttentionArgs& args, const AttentionProblem& problem) {
  const int64_t max_blocks = args.block_table.shape[1];
  const int64_t num_blocks = args.k.shape[0];
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence it = sequence(args, problem, b);
    const int64_t seqlen_k = it.seqlen_k == 0 ? 0 : it.k_begin + it.seqlen_k;
    const int64_t pages = ceil_div(seqlen_k, problem.page_size);
    if (pages > max_blocks) {
      return invalid_argument("block_table: max_blocks is ", max_blocks, ", must be at least ",
                              pages, ", the pages of ", problem.page_size, " that the ", seqlen_k,
                              " keys of sequence ", b, " take");
    }
    const int32_t* table = args.block_table.as<const int32_t>() + b * args.block_table.strides[0];
    for (int64_t p = 0; p < pages; ++p) {
      if (table[p] >= 0 && table[p] < num_blocks) continue;
      return invalid_argument("block_table: entry [", b, ", ", p, "] is ", table[p],
                              ", must be in [0, ", num_blocks, "), the number of pages in k");
    }
  }
  return {};
}

namespace {

// Tokens that a row of the cache has room for.
int64_t capacity(const AttentionArgs& args, const AttentionProblem& problem) {
  return problem.page_size > 0 ? args.block_table.shape[1] * problem.page_size : args.k.shape[1];
}

Status check_batch_vector(Named vector, const AttentionArgs& args, int64_t batch) {
  if (!vector.view.present()) return {};
  FA_TRY(check_int32_vector(vector, args.q.device));
  return check_size(vector, "length", vector.view.shape[0], "q's batch", batch);
}

Status check_new_tensor(Named added, const char* layout, const AttentionArgs& args,
                        const std::array<int64_t, 4>& shape) {
  FA_TRY(check_shape(added, shape, layout));
  FA_TRY(check_dtype(added, args.q.dtype));
  FA_TRY(check_device(added, args.q.device));
  FA_TRY(check_storage(added));
  return check_last_contiguous(added);
}

Status check_new(const AttentionArgs& args, AttentionProblem* problem) {
  if (args.k_new.present() != args.v_new.present()) {
    const bool k = args.k_new.present();
    return invalid_argument(k ? "v_new" : "k_new", ": is missing, must be given together with ",
                            k ? "k_new" : "v_new");
  }
  if (!args.k_new.present()) return {};
  FA_TRY(check_rank({"k_new", args.k_new}, 4, "[batch, seqlen_new, num_heads_kv, head_dim]"));
  problem->appends = true;
  problem->seqlen_new = args.k_new.shape[1];
  const int64_t batch = problem->batch, heads = problem->num_heads_kv;
  FA_TRY(check_new_tensor({"k_new", args.k_new}, "[batch, seqlen_new, num_heads_kv, head_dim]",
                          args, {batch, problem->seqlen_new, heads, problem->head_dim}));
  FA_TRY(check_new_tensor({"v_new", args.v_new}, "[batch, seqlen_new, num_heads_kv, head_dim_v]",
                          args, {batch, problem->seqlen_new, heads, problem->head_dim_v}));
  FA_TRY(check_no_broadcast({"k", args.k}));
  return check_no_broadcast({"v", args.v});
}

Status check_rotary(const AttentionArgs& args, AttentionProblem* problem) {
  const Named cos{"rotary_cos", args.rotary_cos}, sin{"rotary_sin", args.rotary_sin};
  if (cos.view.present() != sin.view.present()) {
    return invalid_argument(cos.view.present() ? "rotary_sin" : "rotary_cos",
                            ": is missing, rotary_cos and rotary_sin must be given together");
  }
  if (!cos.view.present()) return {};
  if (!problem->appends) {
    return invalid_argument("rotary_cos: is given, must only be used with k_new and v_new");
  }
  constexpr const char* kLayout = "[seqlen_rotary, rotary_dim / 2]";
  FA_TRY(check_rank(cos, 2, kLayout));
  FA_TRY(check_shape(sin, std::array{cos.view.shape[0], cos.view.shape[1]}, kLayout));
  for (const Named& table : {cos, sin}) {
    FA_TRY(check_float32_or(args.q.dtype, table));
    FA_TRY(check_device(table, args.q.device));
    FA_TRY(check_storage(table));
    FA_TRY(check_last_contiguous(table));
  }
  if (cos.view.dtype != sin.view.dtype) {
    return invalid_argument("rotary_sin: dtype is ", name(sin.view.dtype),
                            ", must equal rotary_cos's ", name(cos.view.dtype));
  }
  problem->rotary_dim = 2 * cos.view.shape[1];
  if (problem->rotary_dim > problem->head_dim) {
    return invalid_argument("rotary_cos: rotary_dim is ", problem->rotary_dim,
                            ", must be at most q's head_dim ", problem->head_dim);
  }
  return {};
}

Status check_row(const AttentionArgs& args, const AttentionProblem& problem, int64_t b) {
  const int32_t length = args.cache_seqlens.as<const int32_t>()[b];
  const int64_t room = capacity(args, problem);
  const int64_t end = length + problem.seqlen_new;
  if (problem.seqlen_new > room) {
    return invalid_argument("k_new: seqlen_new is ", problem.seqlen_new, ", must be at most ", room,
                            ", the tokens that a row of the cache has room for");
  }
  if (length < 0 || end > room) {
    return invalid_argument("cache_seqlens: entry ", b, " is ", length, ", must be in [0, ",
                            room - problem.seqlen_new, "]: the cache has room for ", room,
                            " tokens, of which ", problem.seqlen_new, " are appended");
  }
  if (args.cache_leftpad.present()) {
    const int32_t leftpad = args.cache_leftpad.as<const int32_t>()[b];
    if (leftpad < 0 || leftpad > end) {
      return invalid_argument("cache_leftpad: entry ", b, " is ", leftpad, ", must be in [0, ", end,
                              "], the tokens of that row");
    }
  }
  if (args.cache_batch_idx.present()) {
    const int32_t row = args.cache_batch_idx.as<const int32_t>()[b];
    if (row < 0 || row >= args.k.shape[0]) {
      return invalid_argument("cache_batch_idx: entry ", b, " is ", row, ", must be in [0, ",
                              args.k.shape[0], "), the rows of k");
    }
  }
  if (problem.rotary_dim == 0) return {};
  const bool by_position = args.causal || args.window_left >= 0 || args.window_right >= 0;
  const int64_t last = std::max(end, length + (by_position ? problem.seqlen_q : 1));
  if (last > args.rotary_cos.shape[0]) {
    return invalid_argument("rotary_cos: has ", args.rotary_cos.shape[0],
                            " positions, must have at least ", last, ", those of row ", b);
  }
  return {};
}

// Two sequences that append to one row, or to one page, would write over each other's tokens, or
// read them while they are being written. Reading a row or a page together is allowed.
Status check_targets_differ(const AttentionArgs& args, const AttentionProblem& problem) {
  const bool paged = problem.page_size > 0;
  if (problem.seqlen_new == 0 || !(paged || args.cache_batch_idx.present())) return {};
  std::vector<std::pair<int64_t, int64_t>> targets;  // a row or page, and who appends to it
  for (int64_t b = 0; b < problem.batch; ++b) {
    if (!paged) {
      targets.emplace_back(args.cache_batch_idx.as<const int32_t>()[b], b);
      continue;
    }
    const int32_t* table = args.block_table.as<const int32_t>() + b * args.block_table.strides[0];
    const int64_t length = args.cache_seqlens.as<const int32_t>()[b];
    const int64_t last = (length + problem.seqlen_new - 1) / problem.page_size;
    for (int64_t p = length / problem.page_size; p <= last; ++p) targets.emplace_back(table[p], b);
  }
  std::sort(targets.begin(), targets.end());
  const auto twice =
      std::adjacent_find(targets.begin(), targets.end(),
                         [](const auto& a, const auto& b) { return a.first == b.first; });
  if (twice == targets.end()) return {};
  const auto [where, first] = *twice;
  const int64_t second = std::next(twice)->second;
  if (paged) {
    return invalid_argument("block_table: page ", where, " is appended to twice, by sequences ",
                            first, " and ", second, ", must be appended to once");
  }
  return invalid_argument("cache_batch_idx: entries ", first, " and ", second, " are both ", where,
                          ", must differ where k_new and v_new are appended");
}

}  // namespace

Status check_cache(const AttentionArgs& args, AttentionProblem* problem) {
  problem->batch = args.q.shape[0];
  problem->seqlen_q = args.q.shape[1];
  problem->total_q = problem->batch * problem->seqlen_q;
  const std::array<int64_t, 4> out{problem->batch, problem->seqlen_q, problem->num_heads,
                                   problem->head_dim_v};
  FA_TRY(check_shape({"out", args.out}, out, "[batch, seqlen_q, num_heads, head_dim_v]"));
  if (args.block_table.present()) {
    FA_TRY(check_pages(args, problem));
    if (args.cache_batch_idx.present()) {
      return invalid_argument("cache_batch_idx: is given, must not be used with block_table");
    }
  } else {
    FA_TRY(check_size({"v", args.v}, "batch_cache", args.v.shape[0], "k's", args.k.shape[0]));
    FA_TRY(check_size({"v", args.v}, "seqlen_cache", args.v.shape[1], "k's", args.k.shape[1]));
    if (!args.cache_batch_idx.present() && args.k.shape[0] != problem->batch) {
      return invalid_argument("k: batch_cache is ", args.k.shape[0], ", must equal q's batch ",
                              problem->batch, " where cache_batch_idx is not given");
    }
  }
  problem->seqlen_k = capacity(args, *problem);
  FA_TRY(check_batch_vector({"cache_seqlens", args.cache_seqlens}, args, problem->batch));
  FA_TRY(check_batch_vector({"cache_batch_idx", args.cache_batch_idx}, args, problem->batch));
  FA_TRY(check_batch_vector({"cache_leftpad", args.cache_leftpad}, args, problem->batch));
  FA_TRY(check_new(args, problem));
  FA_TRY(check_rotary(args, problem));
  if (args.dropout_p != 0.0) {
    return invalid_argument("dropout_p: is ", args.dropout_p, ", must be 0 with a cache");
  }
  if (args.s_dmask.present()) {
    return invalid_argument("s_dmask: is given, must not be used with a cache");
  }
  if (!args.values_are_readable()) return {};
  for (int64_t b = 0; b < problem->batch; ++b) FA_TRY(check_row(args, *problem, b));
  if (problem->page_size > 0) FA_TRY(check_page_indices(args, *problem));
  return check_targets_differ(args, *problem);
}

}  // namespace fa::core
