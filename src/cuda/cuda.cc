#include "cuda/cuda.h"

#include "cuda/device.h"
#include "cuda/forward_plan.h"
#include "cuda/heuristics.h"
#include "cuda/nvrtc.h"

namespace fa::cuda {
namespace {

using core::Result;

Result<core::PlanPtr> accept_sm80(const core::AttentionProblem& problem, core::Device at) {
  const Result<const Device*> found = device(at.index);
  if (!found.ok()) return found.status();
  FA_TRY(check_problem(problem, found.value()->properties));
  const Result<std::string> compiler = nvrtc_identity();
  if (!compiler.ok()) return compiler.status();
  return make_forward_plan(problem, at.index, *found.value());
}

}  // namespace

std::vector<core::Implementation> implementations() {
  return {{"cuda:sm80", core::DeviceType::kCuda, accept_sm80}};
}

}  // namespace fa::cuda
