// The backward of every CPU implementation against the fp64 reference, over named and random
// problems, and bitwise against itself over the number of threads.
#include <gtest/gtest.h>

#include "core/registry.h"
#include "core/validate.h"
#include "cpu/thread_pool.h"
#include "reference/reference.h"
#include "reference_call.h"
#include "tests/case_runner.h"

namespace fa {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::DataType;
using testing::Spec;
using testing::Tensor;

double gradient_bound(const Spec& spec) {
  if (spec.dtype != DataType::kFloat32) {
    return cases::kHalfBound * testing::unit_roundoff(spec.dtype);
  }
  // The error of an fp32 score, and so the relative one of its probability, grows with the score;
  // these slopes reach 2 per key.
  const double keys = static_cast<double>(std::max(spec.seqlen_k, testing::sum_of(spec.lengths_k)));
  const double growth = spec.alibi_rank > 0 ? 1.0 + keys / 50.0 : 1.0;
  return cases::kFloat32GradientBound * growth;
}

// Owns what a backward writes, and what it is compared with.
struct Gradients {
  explicit Gradients(const testing::Call& call)
      : dq(like(call.q)), dk(like(call.k)), dv(like(call.v)), d_sink(like(call.learnable_sink)) {
    if (!call.spec().boolean_bias) d_bias = like(call.attn_bias);
    for (Tensor* tensor : all()) tensor->poison();
  }

  static Tensor like(const Tensor& tensor) { return tensor; }
  std::vector<Tensor*> all() { return {&dq, &dk, &dv, &d_bias, &d_sink}; }

  AttentionArgs args(const testing::Call& call) const {
    AttentionArgs args = call.args();
    args.s_dmask = {};
    args.dout = call.dout.view();
    args.dq = dq.view();
    args.dk = dk.view();
    args.dv = dv.view();
    args.d_attn_bias = d_bias.view();
    args.d_learnable_sink = d_sink.view();
    return args;
  }

  Tensor dq, dk, dv, d_bias, d_sink;
};

void run(const core::Implementation& implementation, const AttentionArgs& args,
         const AttentionProblem& problem, core::Parallel& parallel) {
  const core::Result<core::PlanPtr> plan = implementation.accept(problem, {});
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  const core::Stream stream{nullptr, &parallel};
  const int64_t bytes = plan.value()->workspace_bytes(stream.num_workers);
  Tensor workspace(DataType::kFloat32, {bytes / 4 + 16});
  workspace.poison();
  const core::Status status = plan.value()->run(args, workspace.view().data, stream);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_TRUE(workspace.canaries_intact());
}

void run_both(const core::Implementation& implementation, const testing::Call& call,
              const Gradients& gradients, core::Parallel& parallel) {
  const auto forward = core::validate_forward(call.args());
  ASSERT_TRUE(forward.ok()) << forward.status().message();
  run(implementation, call.args(), forward.value(), parallel);
  const AttentionArgs args = gradients.args(call);
  const auto backward = core::validate_backward(args);
  ASSERT_TRUE(backward.ok()) << backward.status().message();
  run(implementation, args, backward.value(), parallel);
}

// Threads of which there are more at every question but the first.
class MoreThreads final : public core::Parallel {
 public:
  int num_workers() const override { return ++asked_ == 1 ? 1 : 8; }
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    EXPECT_EQ(max_workers, 1);
    for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
  }

 private:
  mutable int asked_ = 0;
};

struct Expected {
  std::vector<double> value[5], bound[5];

  explicit Expected(const testing::Call& call, const Gradients& gradients) {
    const Tensor* tensors[] = {&gradients.dq, &gradients.dk, &gradients.dv, &gradients.d_bias,
                               &gradients.d_sink};
    for (int i = 0; i < 5; ++i) {
      value[i].resize(static_cast<size_t>(tensors[i]->num_elements()));
      bound[i].resize(value[i].size());
    }
    AttentionArgs args = call.args();
    args.s_dmask = {};
    const auto problem = core::validate_forward(args);
    const bool bias = gradients.d_bias.present(), sink = gradients.d_sink.present();
    reference::backward(args, problem.value(), call.dout.view(),
                        {.dq = value[0].data(),
                         .dk = value[1].data(),
                         .dv = value[2].data(),
                         .d_attn_bias = bias ? value[3].data() : nullptr,
                         .d_learnable_sink = sink ? value[4].data() : nullptr,
                         .dq_bound = bound[0].data(),
                         .dk_bound = bound[1].data(),
                         .dv_bound = bound[2].data(),
                         .d_attn_bias_bound = bias ? bound[3].data() : nullptr,
                         .d_learnable_sink_bound = sink ? bound[4].data() : nullptr});
  }
};

std::vector<core::Implementation> cpu_implementations(DataType dtype = DataType::kFloat32) {
  std::vector<core::Implementation> list;
  AttentionProblem trivial;
  trivial.batch = trivial.seqlen_q = trivial.seqlen_k = 1;
  trivial.num_heads = trivial.num_heads_kv = trivial.head_dim = trivial.head_dim_v = 1;
  trivial.dtype = dtype;
  trivial.direction = core::Direction::kBackward;
  for (const core::Implementation& it : core::implementations(core::DeviceType::kCpu)) {
    if (it.accept(trivial, {}).ok()) list.push_back(it);
  }
  return list;
}

const char* const kNames[] = {"dq", "dk", "dv", "d_attn_bias", "d_learnable_sink"};

void check(const Spec& spec) {
  testing::Call call(spec);
  Gradients first(call);
  const Expected expected(call, first);
  cpu::ThreadPool pool(2);
  for (const core::Implementation& implementation : cpu_implementations()) {
    SCOPED_TRACE(implementation.name);
    Gradients gradients(call);
    run_both(implementation, call, gradients, pool);
    if (::testing::Test::HasFatalFailure()) return;
    const auto tensors = gradients.all();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const double error = testing::normalised_error(*tensors[i], expected.value[i].data(),
                                                     expected.bound[i].data());
      EXPECT_LE(error, gradient_bound(spec)) << kNames[i];
      EXPECT_TRUE(tensors[i]->canaries_intact()) << kNames[i];
    }
  }
}

// ---- Named problems ----

const std::vector<Spec>& specs() {
  static const std::vector<Spec> list{
      {.name = "one_key", .seqlen_q = 1, .seqlen_k = 1},
      {.name = "several_tiles", .seqlen_q = 150, .seqlen_k = 230, .head_dim = 64, .head_dim_v = 64},
      {.name = "causal",
       .seqlen_q = 200,
       .seqlen_k = 200,
       .head_dim = 40,
       .head_dim_v = 40,
       .causal = true},
      {.name = "causal_more_queries", .seqlen_q = 130, .seqlen_k = 70, .causal = true},
      {.name = "head_dims_differ",
       .seqlen_q = 70,
       .seqlen_k = 100,
       .head_dim = 24,
       .head_dim_v = 72},
      {.name = "head_dim_1", .seqlen_q = 20, .seqlen_k = 30, .head_dim = 1, .head_dim_v = 1},
      {.name = "head_dim_256",
       .batch = 1,
       .seqlen_q = 65,
       .seqlen_k = 97,
       .num_heads = 1,
       .num_heads_kv = 1,
       .head_dim = 256,
       .head_dim_v = 256},
      {.name = "window", .seqlen_q = 210, .seqlen_k = 190, .window_left = 17, .window_right = 3},
      {.name = "left_window_causal",
       .seqlen_q = 130,
       .seqlen_k = 300,
       .causal = true,
       .window_left = 100},
      {.name = "softcap", .seqlen_q = 70, .seqlen_k = 130, .softcap = 1.5},
      {.name = "alibi", .seqlen_q = 70, .seqlen_k = 130, .causal = true, .alibi_rank = 2},
      {.name = "gqa",
       .seqlen_q = 100,
       .seqlen_k = 120,
       .num_heads = 6,
       .num_heads_kv = 2,
       .head_dim = 16,
       .head_dim_v = 16,
       .causal = true},
      {.name = "dropout",
       .seqlen_q = 70,
       .seqlen_k = 130,
       .dropout_p = 0.3,
       .seed = 5,
       .offset = 11},
      {.name = "bias_full", .seqlen_q = 70, .seqlen_k = 130, .bias_shape = {2, 2, 70, 130}},
      {.name = "bias_per_key", .seqlen_q = 70, .seqlen_k = 130, .bias_shape = {130}},
      {.name = "bias_per_query", .seqlen_q = 70, .seqlen_k = 130, .bias_shape = {70, 1}},
      {.name = "bias_scalar", .seqlen_q = 70, .seqlen_k = 130, .bias_shape = {1, 1}},
      {.name = "bias_per_batch",
       .seqlen_q = 70,
       .seqlen_k = 130,
       .causal = true,
       .bias_shape = {2, 1, 1, 130}},
      {.name = "bias_per_head_softcap_gqa",
       .seqlen_q = 70,
       .seqlen_k = 130,
       .num_heads = 4,
       .num_heads_kv = 2,
       .softcap = 2.0,
       .bias_shape = {4, 70, 130}},
      {.name = "boolean_bias",
       .seqlen_q = 70,
       .seqlen_k = 130,
       .bias_shape = {70, 130},
       .boolean_bias = true},
      {.name = "sink", .seqlen_q = 70, .seqlen_k = 130, .sink = true},
      {.name = "sink_dropout_window",
       .seqlen_q = 130,
       .seqlen_k = 70,
       .window_left = 5,
       .window_right = 5,
       .sink = true,
       .dropout_p = 0.2,
       .seed = 3},
      {.name = "varlen",
       .lengths_q = {100, 0, 7, 65},
       .lengths_k = {130, 50, 0, 65},
       .spare_rows = 3,
       .head_dim = 16,
       .head_dim_v = 16,
       .causal = true},
      {.name = "varlen_everything",
       .lengths_q = {70, 5},
       .lengths_k = {130, 40},
       .seqused_k = {110, 40},
       .spare_rows = 2,
       .num_heads = 4,
       .num_heads_kv = 2,
       .head_dim = 8,
       .head_dim_v = 8,
       .window_left = 90,
       .window_right = 4,
       .softcap = 3.0,
       .alibi_rank = 1,
       .bias_shape = {2, 4, 70, 130},
       .sink = true,
       .dropout_p = 0.1,
       .seed = 9},
      {.name = "no_queries", .seqlen_q = 0, .seqlen_k = 20},
      {.name = "no_keys", .seqlen_q = 20, .seqlen_k = 0},
  };
  return list;
}

class Backward : public ::testing::TestWithParam<Spec> {};

TEST_P(Backward, agrees_with_the_reference_in_each_dtype) {
  for (DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    SCOPED_TRACE(core::name(dtype));
    Spec spec = GetParam();
    spec.dtype = dtype;
    check(spec);
  }
}

INSTANTIATE_TEST_SUITE_P(Specs, Backward, ::testing::ValuesIn(specs()),
                         [](const auto& info) { return info.param.name; });

// ---- Random problems ----

Spec random_spec(uint64_t seed) {
  testing::Random random(seed);
  const auto sometimes = [&](int percent) { return random.between(1, 100) <= percent; };
  Spec spec{.name = "random"};
  spec.dtype = static_cast<DataType>(
      random.between(static_cast<int>(DataType::kFloat32), static_cast<int>(DataType::kBFloat16)));
  spec.num_heads_kv = random.between(1, 2);
  spec.num_heads = spec.num_heads_kv * random.between(1, 3);
  spec.head_dim = random.between(1, 80);
  spec.head_dim_v = sometimes(70) ? spec.head_dim : random.between(1, 80);
  if (sometimes(40)) {
    for (int64_t b = random.between(1, 4); b > 0; --b) {
      spec.lengths_q.push_back(sometimes(15) ? 0 : random.between(1, 150));
      spec.lengths_k.push_back(sometimes(15) ? 0 : random.between(1, 220));
    }
    spec.spare_rows = random.between(0, 2);
  } else {
    spec.batch = random.between(1, 2);
    spec.seqlen_q = random.between(1, 200);
    spec.seqlen_k = random.between(1, 250);
  }
  spec.causal = sometimes(40);
  if (sometimes(30)) spec.window_left = random.between(0, 150);
  if (sometimes(30)) spec.window_right = random.between(0, 150);
  if (sometimes(20)) spec.softcap = 1.0 + random.uniform() * 20;
  if (sometimes(20)) spec.alibi_rank = 1;
  if (sometimes(20)) spec.sink = true;
  if (sometimes(25)) spec.dropout_p = random.uniform() * 0.8;
  spec.seed = random.next();
  spec.offset = random.next();
  return spec;
}

TEST(BackwardProperty, agrees_with_the_reference_on_random_problems) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    check(random_spec(seed));
  }
}

// ---- Exact properties ----

TEST(BackwardProperty, is_bitwise_equal_for_every_number_of_threads) {
  for (Spec spec : {specs()[2], specs()[11], specs()[12], specs()[17], specs()[23]}) {
    for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16}) {
      spec.dtype = dtype;
      SCOPED_TRACE(spec.name);
      for (const core::Implementation& implementation : cpu_implementations()) {
        testing::Call call(spec);
        testing::SerialParallel serial(1);
        Gradients expected(call);
        run_both(implementation, call, expected, serial);
        for (int threads : {2, 3, 7}) {
          cpu::ThreadPool pool(threads);
          Gradients gradients(call);
          run_both(implementation, call, gradients, pool);
          for (size_t i = 0; i < gradients.all().size(); ++i) {
            EXPECT_TRUE(gradients.all()[i]->bitwise_equal(*expected.all()[i]))
                << kNames[i] << ", " << threads << " threads, " << implementation.name;
          }
        }
      }
    }
  }
}

// More workers have tasks of fewer panels, which may copy keys less or share packed tiles.
TEST(ForwardProperty, is_bitwise_equal_for_every_number_of_workers) {
  testing::Spec spec{.name = "many_panels", .batch = 1, .seqlen_q = 200, .seqlen_k = 130};
  spec.num_heads = spec.num_heads_kv = 33;
  spec.head_dim = spec.head_dim_v = 32;
  spec.causal = true;
  for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16}) {
    spec.dtype = dtype;
    for (const core::Implementation& implementation : cpu_implementations(dtype)) {
      testing::Call expected(spec);
      const auto problem = core::validate_forward(expected.args());
      ASSERT_TRUE(problem.ok()) << problem.status().message();
      testing::SerialParallel serial(1);
      run(implementation, expected.args(), problem.value(), serial);
      for (int workers : {4, 8, 100}) {
        testing::SerialParallel many(workers);
        testing::Call call(spec);
        run(implementation, call.args(), problem.value(), many);
        EXPECT_TRUE(call.out.bitwise_equal(expected.out)) << workers << ' ' << implementation.name;
        EXPECT_TRUE(call.lse.bitwise_equal(expected.lse)) << workers << ' ' << implementation.name;
      }
    }
  }
}

// Keys that no query sees, with values as large as fp32 has them.
// Scratch is there for as many as there were at first.
TEST(BackwardProperty, a_call_has_the_threads_that_it_found) {
  for (const core::Implementation& implementation : core::implementations(core::DeviceType::kCpu)) {
    testing::Call call({.name = "many_keys", .seqlen_q = 300, .seqlen_k = 600, .head_dim = 64});
    MoreThreads forward_threads, backward_threads;
    const auto forward = core::validate_forward(call.args());
    ASSERT_TRUE(forward.ok());
    if (!implementation.accept(forward.value(), {}).ok()) continue;
    run(implementation, call.args(), forward.value(), forward_threads);
    const Gradients gradients(call);
    const AttentionArgs args = gradients.args(call);
    const auto backward = core::validate_backward(args);
    ASSERT_TRUE(backward.ok());
    if (!implementation.accept(backward.value(), {}).ok()) continue;
    run(implementation, args, backward.value(), backward_threads);
  }
}

TEST(BackwardProperty, masked_keys_do_not_leak) {
  const Spec spec{.seqlen_q = 100,
                  .seqlen_k = 150,
                  .head_dim = 16,
                  .head_dim_v = 16,
                  .window_left = 10,
                  .window_right = 0};
  for (const core::Implementation& implementation : cpu_implementations()) {
    testing::SerialParallel serial;
    testing::Call clean(spec), poisoned(spec);
    const int64_t row = spec.num_heads_kv * spec.head_dim;
    const auto first_seen = spec.seqlen_k - spec.seqlen_q - spec.window_left;
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t i = 0; i < first_seen * row; ++i) {
        poisoned.k.set(b * spec.seqlen_k * row + i, i % 2 == 0 ? 3e38 : -3e38);
        poisoned.v.set(b * spec.seqlen_k * row + i, i % 3 == 0 ? 3e38 : -3e38);
      }
    }
    Gradients expected(clean), gradients(poisoned);
    run_both(implementation, clean, expected, serial);
    run_both(implementation, poisoned, gradients, serial);
    for (size_t i = 0; i < gradients.all().size(); ++i) {
      EXPECT_TRUE(gradients.all()[i]->bitwise_equal(*expected.all()[i])) << kNames[i];
    }
    for (int64_t i = 0; i < first_seen * row; ++i) EXPECT_EQ(gradients.dk.get(i), 0.0);
  }
}

}  // namespace
}  // namespace fa
