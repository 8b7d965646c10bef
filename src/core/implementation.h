// How a backend offers itself: an Implementation accepts a problem and gives a Plan, or refuses
// with a reason. Accepting is the support query; there is no other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/attention_args.h"
#include "core/parallel.h"
#include "core/problem.h"
#include "core/status.h"

namespace fa::core {

// Where a plan runs.
struct Stream {
  void* handle;        // a GPU's stream
  Parallel* parallel;  // a CPU's threads, or null
  // Of which as many take part. Asked once: from one moment to the next they may answer otherwise.
  int num_workers = parallel != nullptr ? parallel->num_workers() : 1;
};

// Immutable; may be run from several threads at once, each with its own workspace.
class Plan {
 public:
  virtual ~Plan() = default;
  // Scratch that run() needs when num_workers threads take part, 64-byte aligned.
  virtual int64_t workspace_bytes(int num_workers) const = 0;
  // Whether run() takes null for it, and is slower.
  virtual bool workspace_is_optional() const { return false; }
  // The args have been validated and match the problem that the plan was made for.
  virtual Status run(const AttentionArgs& args, void* workspace, const Stream& stream) const = 0;
  // What runs, for people: "" where the implementation's name says it all.
  virtual std::string describe() const { return {}; }
};

using PlanPtr = std::shared_ptr<const Plan>;

struct Implementation {
  const char* name;  // "cpu:avx2"
  DeviceType device_type;
  Result<PlanPtr> (*accept)(const AttentionProblem& problem, Device device);
};

}  // namespace fa::core
