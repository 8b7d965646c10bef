#include "cpu/cpu.h"

#include <utility>

#include "cpu/call.h"
#include "cpu/plans.h"

namespace fa::cpu {
namespace {

using core::AttentionProblem;

const std::vector<InstructionSet>& available_sets() {
  static const std::vector<InstructionSet> sets = instruction_sets();
  return sets;
}

// One accept function per instruction set, so that an Implementation stays a plain value.
template <size_t kIndex>
core::Result<core::PlanPtr> accept(const AttentionProblem& problem, core::Device) {
  const InstructionSet& set = available_sets()[kIndex];
  if (!set.supported()) return core::unsupported("this processor lacks the instructions");
  if (set.pairs != nullptr && problem.dtype != core::DataType::kBFloat16) {
    return core::unsupported("takes bfloat16 only");
  }
  if (problem.direction == core::Direction::kForward) return make_forward_plan(problem, set);
  if (problem.page_size > 0 || problem.layout == core::Layout::kCache) {
    return core::unsupported("the backward does not take pages or a cache; use contiguous k and v");
  }
  return make_backward_plan(problem, set);
}

template <size_t... kIndices>
std::vector<core::Implementation> make_implementations(std::index_sequence<kIndices...>) {
  constexpr decltype(&accept<0>) kAccept[] = {accept<kIndices>...};
  std::vector<core::Implementation> list;
  for (size_t i = 0; i < available_sets().size(); ++i) {
    list.push_back({available_sets()[i].name, core::DeviceType::kCpu, kAccept[i]});
  }
  return list;
}

}  // namespace

std::vector<core::Implementation> implementations() {
  constexpr size_t kMaxInstructionSets = 10;
  return make_implementations(std::make_index_sequence<kMaxInstructionSets>{});
}

}  // namespace fa::cpu
