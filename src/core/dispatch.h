// From a problem to the plan that runs it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/implementation.h"

namespace fa::core {

struct Choice {
  const char* implementation;
  PlanPtr plan;
};

// Whether `forced`, a name ("cpu:avx2", "reference"), a family ("cpu") or "" for none, means an
// implementation of the device's list.
Status check_forced(Device device, std::string_view forced);

// The first implementation of the device's list that accepts the problem. `forced` restricts
// the list; a forced backend that refuses is an error, never a reason to fall back. Plans are
// cached.
Result<Choice> choose(const AttentionProblem& problem, Device device, std::string_view forced);

struct Candidate {
  enum class Outcome { kChosen, kAccepts, kRefused, kExcluded };
  const char* implementation;
  Outcome outcome;
  std::string reason;
};

// What choose() thinks of each implementation, in its order.
std::vector<Candidate> explain(const AttentionProblem& problem, Device device,
                               std::string_view forced);

std::string to_string(const std::vector<Candidate>& candidates);

}  // namespace fa::core
