// Whole calls with the kernels of AMX, on tiles that are emulated, against those of AVX512-BF16.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/validate.h"
#include "cpu/call.h"
#include "cpu/cpu.h"
#include "cpu/plans.h"
#include "tests/cpp/reference_call.h"

namespace fa::cpu {

const PairKernels* emulated_pair_kernels();

namespace {

using core::DataType;
using testing::Call;
using testing::Spec;
using testing::Tensor;

std::optional<InstructionSet> pair_set() {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name == std::string("cpu:avx512_bf16") && set.supported()) return set;
  }
  return std::nullopt;
}

void run_plan(const core::PlanPtr& plan, const core::AttentionArgs& args) {
  core::Parallel& parallel = default_parallel();
  const auto bytes = static_cast<size_t>(plan->workspace_bytes(parallel.num_workers()));
  std::vector<char> workspace(bytes + 64, char{-1});
  char* first = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  const core::Status status = plan->run(args, first, {nullptr, &parallel});
  ASSERT_TRUE(status.ok()) << status.message();
}

std::vector<double> values_of(const Tensor& tensor) {
  std::vector<double> values;
  for (int64_t i = 0; i < tensor.view().num_elements(); ++i) values.push_back(tensor.get(i));
  return values;
}

// out, lse, dq, dk and dv.
std::vector<std::vector<double>> results(const Spec& spec, InstructionSet set,
                                         const PairKernels& kernels) {
  set.pairs = &kernels;
  Call call(spec);
  core::AttentionArgs args = call.args();
  const auto forward = core::validate_forward(args);
  EXPECT_TRUE(forward.ok()) << forward.status().message();
  run_plan(make_forward_plan(forward.value(), set), args);
  Tensor dq = call.q, dk = call.k, dv = call.v;
  for (Tensor* gradient : {&dq, &dk, &dv}) gradient->poison();
  args.dout = call.dout.view();
  args.dq = dq.view();
  args.dk = dk.view();
  args.dv = dv.view();
  const auto backward = core::validate_backward(args);
  EXPECT_TRUE(backward.ok()) << backward.status().message();
  run_plan(make_backward_plan(backward.value(), set), args);
  return {values_of(call.out), values_of(call.lse), values_of(dq), values_of(dk), values_of(dv)};
}

Spec spec_of(const char* name, int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim) {
  Spec spec;
  spec.name = name;
  spec.dtype = DataType::kBFloat16;
  spec.batch = 1;
  spec.seqlen_q = seqlen_q;
  spec.seqlen_k = seqlen_k;
  spec.num_heads = spec.num_heads_kv = 1;
  spec.head_dim = spec.head_dim_v = head_dim;
  return spec;
}

std::vector<Spec> specs() {
  std::vector<Spec> list{spec_of("several flushes", 600, 400, 64),
                         spec_of("one panel", 64, 192, 64), spec_of("one chunk", 256, 20, 32),
                         spec_of("odd blocks", 200, 210, 48)};
  list.push_back(spec_of("causal", 650, 500, 64));
  list.back().causal = true;
  list.push_back(spec_of("window", 330, 700, 32));
  list.back().window_left = 40;
  list.back().window_right = 90;
  list.push_back(spec_of("groups", 320, 200, 32));
  list.back().num_heads = 2;
  list.push_back(spec_of("rising maxima", 128, 600, 64));
  list.back().softmax_scale = 4.0;
  return list;
}

TEST(PairCalls, tiles_agree_with_dot_products) {
  const std::optional<InstructionSet> set = pair_set();
  if (!set) GTEST_SKIP() << "this processor has no AVX512-BF16";
  for (const Spec& spec : specs()) {
    const auto one = results(spec, *set, *emulated_pair_kernels());
    const auto other = results(spec, *set, *avx512_pair_kernels());
    for (size_t i = 0; i < one.size(); ++i) {
      double largest = 0;
      for (double value : other[i]) {
        if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
      }
      for (size_t e = 0; e < one[i].size(); ++e) {  // each rounds P, dS and then the result
        if (one[i][e] == other[i][e]) continue;     // infinite, too
        ASSERT_NEAR(one[i][e], other[i][e], 0.01 * largest) << spec.name << ' ' << i << ' ' << e;
      }
    }
  }
}

}  // namespace
}  // namespace fa::cpu
