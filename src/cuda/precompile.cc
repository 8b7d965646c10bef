#include "cuda/precompile.h"

#include <cstdlib>
#include <string_view>

#include "cuda/heuristics.h"
#include "cuda/kernel_cache.h"
#include "cuda/kernels.h"

namespace fa::cuda {
namespace {

// The sum of the numbers that stand before `what` in ptxas's report.
int sum_before(std::string_view log, std::string_view what) {
  int sum = 0;
  for (size_t at = log.find(what); at != std::string_view::npos; at = log.find(what, at + 1)) {
    size_t first = at;
    while (first > 0 && log[first - 1] >= '0' && log[first - 1] <= '9') --first;
    sum += std::atoi(std::string{log.substr(first, at - first)}.c_str());
  }
  return sum;
}

// C7510 to C7515: wgmma in flight was waited for, each for another reason.
bool tells_of_serialisation(std::string_view log) {
  for (const char* code : {"C7510", "C7511", "C7512", "C7513", "C7514", "C7515"}) {
    if (log.find(code) != std::string_view::npos) return true;
  }
  return log.find("wgmma.mma_async instructions are serialized") != std::string_view::npos;
}

int number_after(std::string_view log, std::string_view what) {
  const size_t at = log.find(what);
  if (at == std::string_view::npos) return 0;
  return std::atoi(std::string{log.substr(at + what.size(), 8)}.c_str());
}

}  // namespace

std::vector<KernelId> kernels_for(int compute_capability) {
  return reachable_kernels(typical_properties(compute_capability));
}

core::Result<CompileReport> precompile(const KernelId& id, int compute_capability) {
  const core::Result<CompiledKernel> compiled = compile_kernel(id, compute_capability);
  if (!compiled.ok()) return compiled.status();
  const core::Result<std::string> key = cache_key(id, compute_capability);
  if (!key.ok()) return key.status();
  FA_TRY(KernelCache().store(key.value(), compiled.value()));
  const std::string& log = compiled.value().log;
  return CompileReport{
      number_after(log, "Used "),
      sum_before(log, " bytes spill stores") + sum_before(log, " bytes spill loads"),
      tells_of_serialisation(log)};
}

}  // namespace fa::cuda
