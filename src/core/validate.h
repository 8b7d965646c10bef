// Everything that a caller can get wrong, checked once; no backend checks again.
#pragma once

#include "core/attention_args.h"
#include "core/problem.h"
#include "core/status.h"

namespace fa::core {

inline constexpr int64_t kMaxHeadDim = 512;

// Checks the arguments of a forward call and derives its problem. An error names the argument, its
// actual value and what it must be. Lengths and page numbers are read where they lie on the CPU.
Result<AttentionProblem> validate_forward(const AttentionArgs& args);

// The same for a backward call: the forward's arguments, with out and lse as it wrote them, and the
// gradients.
Result<AttentionProblem> validate_backward(const AttentionArgs& args);

}  // namespace fa::core
