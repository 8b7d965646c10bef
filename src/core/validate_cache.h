// The part of validation that is about pages and KV caches.
#pragma once

#include "core/attention_args.h"
#include "core/problem.h"
#include "core/status.h"

namespace fa::core {

// block_table and the pages in k and v. problem->batch is known.
Status check_pages(const AttentionArgs& args, AttentionProblem* problem);

// The pages that hold the used keys exist; the rest of the table is not read. On the CPU.
Status check_page_indices(const AttentionArgs& args, const AttentionProblem& problem);

// Sizes of Layout::kCache, and what is appended to the cache; the values, too, on the CPU.
Status check_cache(const AttentionArgs& args, AttentionProblem* problem);

}  // namespace fa::core
