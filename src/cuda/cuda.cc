#include "cuda/cuda.h"

#include "cuda/device.h"
#include "cuda/forward_plan.h"
#include "cuda/heuristics.h"
#include "cuda/nvrtc.h"
#include "cuda/split_plan.h"

namespace fa::cuda {
namespace {

using core::Result;

core::Status check_compiler() {
  const Result<std::string> compiler = nvrtc_identity();
  return compiler.ok() ? core::Status{} : compiler.status();
}

Result<core::PlanPtr> accept_sm80(const core::AttentionProblem& problem, core::Device at) {
  const Result<const Device*> found = device(at.index);
  if (!found.ok()) return found.status();
  FA_TRY(check_sm80(problem, found.value()->properties));
  FA_TRY(check_compiler());
  const KernelId kernel = choose_sm80(problem, found.value()->properties);
  if (wants_split_plan(problem)) {
    return make_split_plan(problem, at.index, *found.value(),
                           choose_split(problem, found.value()->properties), kernel);
  }
  return make_forward_plan(problem, at.index, *found.value(), kernel, kernel);
}

Result<core::PlanPtr> accept_sm90(const core::AttentionProblem& problem, core::Device at) {
  const Result<const Device*> found = device(at.index);
  if (!found.ok()) return found.status();
  FA_TRY(check_sm90(problem, found.value()->properties));
  FA_TRY(check_compiler());
  const KernelId otherwise = choose_sm80(problem, found.value()->properties);
  if (!wants_split_plan(problem)) {
    return make_forward_plan(problem, at.index, *found.value(), choose_sm90(problem), otherwise);
  }
  return make_split_plan(problem, at.index, *found.value(),
                         choose_split_sm90(problem, found.value()->properties), otherwise);
}

}  // namespace

std::vector<core::Implementation> implementations() {
  return {{"cuda:sm90", core::DeviceType::kCuda, accept_sm90},
          {"cuda:sm80", core::DeviceType::kCuda, accept_sm80}};
}

}  // namespace fa::cuda
