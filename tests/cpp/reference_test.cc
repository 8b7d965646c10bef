#include "reference/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "core/validate.h"
#include "reference_call.h"
#include "testing.h"

namespace fa::reference {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::DataType;
using core::Device;
using core::DeviceType;
using fa::testing::Call;
using fa::testing::Spec;
using fa::testing::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DataType kDtypes[] = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};

AttentionProblem valid(const AttentionArgs& args) {
  const core::Result<AttentionProblem> problem = core::validate_forward(args);
  EXPECT_TRUE(problem.ok()) << problem.status().message();
  return problem.ok() ? problem.value() : AttentionProblem{};
}

using Doubles = std::vector<double>;

Doubles zeros(const Tensor& tensor) { return Doubles(static_cast<size_t>(tensor.num_elements())); }

struct Forward {
  Doubles out, lse, bound;
};

Forward oracle(const Call& call) {
  Forward result{Doubles(zeros(call.out).size(), kNan), Doubles(zeros(call.lse).size(), kNan),
                 Doubles(zeros(call.out).size(), kNan)};
  const AttentionArgs args = call.args();
  forward(args, valid(args), {result.out.data(), result.lse.data(), result.bound.data()});
  return result;
}

// Each gradient with its bound; sized by the call, and poisoned, as results must not be added to.
struct Backward {
  explicit Backward(const Call& call) {
    const auto poisoned = [](const Tensor& tensor) {
      return Doubles(static_cast<size_t>(tensor.num_elements()), kNan);
    };
    dq = dq_bound = poisoned(call.q);
    dk = dk_bound = poisoned(call.k);
    dv = dv_bound = poisoned(call.v);
    d_bias = d_bias_bound = poisoned(call.attn_bias);
    d_sink = d_sink_bound = poisoned(call.learnable_sink);
    const AttentionArgs args = call.args();
    backward(args, valid(args), call.dout.view(),
             {dq.data(), dk.data(), dv.data(), d_bias.data(), d_sink.data(), dq_bound.data(),
              dk_bound.data(), dv_bound.data(), d_bias_bound.data(), d_sink_bound.data()});
  }
  Doubles dq, dk, dv, d_bias, d_sink;
  Doubles dq_bound, dk_bound, dv_bound, d_bias_bound, d_sink_bound;
};

core::Status run_backend(const Call& call, int num_workers = 1) {
  const AttentionArgs args = call.args();
  const AttentionProblem problem = valid(args);
  const auto plan = implementation().accept(problem, Device{});
  if (!plan.ok()) return plan.status();
  std::vector<double> workspace(static_cast<size_t>(plan.value()->workspace_bytes(num_workers)) /
                                sizeof(double));
  fa::testing::SerialParallel parallel(num_workers);
  return plan.value()->run(args, workspace.data(), {nullptr, &parallel});
}

void expect_bitwise(const Doubles& actual, const Doubles& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t n = 0; n < actual.size(); ++n) {
    ASSERT_TRUE(actual[n] == expected[n] || (std::isnan(actual[n]) && std::isnan(expected[n])))
        << "element " << n << ": " << actual[n] << " and " << expected[n];
  }
}

// ---- The forward and the backward against an independent implementation. ----

using Golden = std::map<std::string, std::vector<std::string>>;

Golden read_golden(const std::string& name) {
  Golden golden;
  std::ifstream file(std::string(FA_TESTS_DIR) + "/golden/" + name + ".txt");
  EXPECT_TRUE(file.good()) << name;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key, number;
    words >> key;
    while (words >> number) golden[key].push_back(number);
  }
  return golden;
}

Doubles doubles(const Golden& golden, const std::string& key) {
  Doubles result;
  const auto found = golden.find(key);
  if (found == golden.end()) return result;
  for (const std::string& text : found->second)
    result.push_back(std::strtod(text.c_str(), nullptr));
  return result;
}

Spec spec_of(const Golden& golden) {
  Spec spec;
  const auto set = [&](const char* key, auto& field) {
    const Doubles values = doubles(golden, key);
    if (!values.empty()) field = static_cast<std::decay_t<decltype(field)>>(values[0]);
  };
  const auto set_list = [&](const char* key, std::vector<int64_t>& field) {
    for (double value : doubles(golden, key)) field.push_back(static_cast<int64_t>(value));
  };
  const auto set_word = [&](const char* key, uint64_t& field) {  // more bits than a double holds
    const auto found = golden.find(key);
    if (found != golden.end()) field = std::strtoull(found->second[0].c_str(), nullptr, 10);
  };
  set("batch", spec.batch);
  set("seqlen_q", spec.seqlen_q);
  set("seqlen_k", spec.seqlen_k);
  set_list("lengths_q", spec.lengths_q);
  set_list("lengths_k", spec.lengths_k);
  set_list("seqused_k", spec.seqused_k);
  set("spare_rows", spec.spare_rows);
  set("page_size", spec.page_size);
  set("num_heads", spec.num_heads);
  set("num_heads_kv", spec.num_heads_kv);
  set("head_dim", spec.head_dim);
  set("head_dim_v", spec.head_dim_v);
  set("causal", spec.causal);
  set("window_left", spec.window_left);
  set("window_right", spec.window_right);
  set("softcap", spec.softcap);
  set("alibi_rank", spec.alibi_rank);
  set_list("bias_shape", spec.bias_shape);
  set("boolean_bias", spec.boolean_bias);
  set("sink", spec.sink);
  set("dropout_p", spec.dropout_p);
  set_word("seed", spec.seed);
  set_word("offset", spec.offset);
  const Doubles scale = doubles(golden, "softmax_scale");
  if (!scale.empty()) spec.softmax_scale = scale[0];
  return spec;
}

// Both sides compute in fp64; the files hold 16 digits.
constexpr double kGoldenTolerance = 1e-14;

void expect_near(const char* what, const Doubles& actual, const Doubles& expected,
                 const Doubles& bound) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  ASSERT_EQ(actual.size(), bound.size()) << what;
  for (size_t n = 0; n < actual.size(); ++n) {
    if (actual[n] == expected[n]) continue;
    ASSERT_LE(std::abs(actual[n] - expected[n]), kGoldenTolerance * bound[n])
        << what << "[" << n << "]: " << actual[n] << ", must be " << expected[n];
  }
}

class Goldens : public ::testing::TestWithParam<const char*> {};

TEST_P(Goldens, reference_agrees_with_an_independent_implementation) {
  const Golden golden = read_golden(GetParam());
  const Call call(spec_of(golden));
  const Forward it = oracle(call);
  expect_near("out", it.out, doubles(golden, "out"), doubles(golden, "bound"));
  expect_near("bound", it.bound, doubles(golden, "bound"), doubles(golden, "bound"));
  expect_near("lse", it.lse, doubles(golden, "lse"), Doubles(it.lse.size(), 8.0));
  const Backward gradients(call);
  const auto check = [&](const char* name, const Doubles& value, const Doubles& bound) {
    const Doubles expected_bound = doubles(golden, std::string(name) + "_bound");
    if (expected_bound.empty() && call.spec().boolean_bias) return;  // has no gradient
    expect_near(name, value, doubles(golden, name), expected_bound);
    expect_near(name, bound, expected_bound, expected_bound);
  };
  check("dq", gradients.dq, gradients.dq_bound);
  check("dk", gradients.dk, gradients.dk_bound);
  check("dv", gradients.dv, gradients.dv_bound);
  check("d_bias", gradients.d_bias, gradients.d_bias_bound);
  check("d_sink", gradients.d_sink, gradients.d_sink_bound);
}

INSTANTIATE_TEST_SUITE_P(files, Goldens,
                         ::testing::Values("plain", "causal_more_keys", "causal_more_queries",
                                           "window_softcap_scale", "alibi_gqa", "bias_broadcast",
                                           "bias_boolean", "dropout", "varlen", "paged"),
                         [](const auto& info) { return std::string(info.param); });

// ---- The backward against differences of the forward. ----

const std::vector<Spec>& differentiable_specs() {
  static const std::vector<Spec> specs{
      {.name = "plain"},
      {.name = "head_dims_differ", .head_dim = 3, .head_dim_v = 5},
      {.name = "softmax_scale", .softmax_scale = 0.9},
      {.name = "zero_scale", .softmax_scale = 0.0},
      {.name = "causal_more_queries", .seqlen_q = 7, .seqlen_k = 4, .causal = true},
      {.name = "window", .window_left = 2, .window_right = 1},
      {.name = "softcap", .softcap = 1.5},
      {.name = "softcap_alibi_causal", .causal = true, .softcap = 2.0, .alibi_rank = 2},
      {.name = "gqa", .num_heads = 6, .num_heads_kv = 2},
      {.name = "bias_full", .bias_shape = {2, 2, 5, 7}},
      {.name = "bias_per_key", .bias_shape = {7}},
      {.name = "bias_per_query", .bias_shape = {5, 1}},
      {.name = "bias_per_batch", .causal = true, .bias_shape = {2, 1, 1, 7}},
      {.name = "bias_per_head_softcap_gqa",
       .num_heads = 4,
       .num_heads_kv = 1,
       .softcap = 3.0,
       .bias_shape = {4, 5, 7}},
      {.name = "boolean_bias", .bias_shape = {5, 7}, .boolean_bias = true},
      {.name = "sink", .sink = true},
      {.name = "sink_dropout_window",
       .window_left = 1,
       .window_right = 1,
       .sink = true,
       .dropout_p = 0.4,
       .seed = 3},
      {.name = "dropout", .dropout_p = 0.3, .seed = 5, .offset = 11},
      {.name = "varlen", .lengths_q = {3, 5}, .lengths_k = {6, 2}, .causal = true},
      {.name = "varlen_empty_sequences_spare_rows",
       .lengths_q = {0, 4, 3, 0},
       .lengths_k = {3, 0, 5, 0},
       .spare_rows = 2,
       .sink = true},
      {.name = "varlen_everything",
       .lengths_q = {4, 0, 5},
       .lengths_k = {6, 3, 7},
       .seqused_k = {5, 0, 7},
       .num_heads = 4,
       .num_heads_kv = 2,
       .head_dim = 3,
       .head_dim_v = 2,
       .causal = true,
       .window_left = 4,
       .softcap = 2.5,
       .alibi_rank = 1,
       .bias_shape = {4, 1, 7},
       .sink = true,
       .dropout_p = 0.25,
       .seed = 9},
      {.name = "paged",
       .lengths_q = {3, 2},
       .lengths_k = {7, 4},
       .seqused_k = {6, 4},
       .page_size = 3,
       .num_heads = 4,
       .causal = true},
  };
  return specs;
}

class Differentiable : public ::testing::TestWithParam<Spec> {
 protected:
  // <dout, out>, of which the gradients are taken.
  static double loss(const Call& call) {
    const Doubles out = oracle(call).out;
    double sum = 0.0;
    for (size_t n = 0; n < out.size(); ++n) sum += out[n] * call.dout.get(static_cast<int64_t>(n));
    return sum;
  }

  // Central differences at two steps, extrapolated to an error of h^4. The steps are exact in fp32.
  static double derivative(Call& call, Tensor& input, int64_t index) {
    const double value = input.get(index);
    const auto slope = [&](double step) {
      input.set(index, value + step);
      const double above = loss(call);
      input.set(index, value - step);
      const double below = loss(call);
      input.set(index, value);
      return (above - below) / (2.0 * step);
    };
    return (4.0 * slope(0x1p-9) - slope(0x1p-8)) / 3.0;
  }

  static void check(const char* what, Call& call, Tensor& input, const Doubles& gradient,
                    const Doubles& bound) {
    constexpr double kTolerance = 1e-8;  // of h^4 and the fifth derivative; measured: below 2e-9
    for (int64_t index = 0; index < input.num_elements(); ++index) {
      const size_t n = static_cast<size_t>(index);
      ASSERT_LE(std::abs(gradient[n]), bound[n] * (1.0 + 1e-12)) << what << "[" << index << "]";
      ASSERT_NEAR(gradient[n], derivative(call, input, index), kTolerance * (bound[n] + 1e-3))
          << what << "[" << index << "]";
    }
  }
};

TEST_P(Differentiable, backward_is_the_derivative_of_the_forward) {
  Call call(GetParam());
  const Backward gradients(call);
  check("dq", call, call.q, gradients.dq, gradients.dq_bound);
  check("dk", call, call.k, gradients.dk, gradients.dk_bound);
  check("dv", call, call.v, gradients.dv, gradients.dv_bound);
  check("d_learnable_sink", call, call.learnable_sink, gradients.d_sink, gradients.d_sink_bound);
  if (!GetParam().boolean_bias) {
    check("d_attn_bias", call, call.attn_bias, gradients.d_bias, gradients.d_bias_bound);
  }
}

INSTANTIATE_TEST_SUITE_P(specs, Differentiable, ::testing::ValuesIn(differentiable_specs()),
                         [](const auto& info) { return info.param.name; });

TEST(backward, gradients_that_are_not_wanted_are_not_written) {
  const Call call({.bias_shape = {5, 7}, .sink = true});
  const AttentionArgs args = call.args();
  const Backward all(call);
  Doubles dk = zeros(call.k);
  backward(args, valid(args), call.dout.view(), {.dk = dk.data()});
  expect_bitwise(dk, all.dk);
  Doubles dq_bound = zeros(call.q);
  backward(args, valid(args), call.dout.view(), {.dq_bound = dq_bound.data()});
  expect_bitwise(dq_bound, all.dq_bound);
}

// ---- Defined results at the edges. ----

TEST(forward, rows_without_visible_keys_are_zero_and_their_lse_infinite) {
  const Call call({.seqlen_q = 5, .seqlen_k = 2, .causal = true});
  const Forward it = oracle(call);
  for (int64_t row = 0; row < 2 * 2 * 5; ++row) {
    const bool visible = row % 5 >= 3;  // lse is [B, H, Sq]
    EXPECT_EQ(it.lse[static_cast<size_t>(row)] == kInfinity, !visible) << row;
  }
  for (size_t d = 0; d < 3u * 2 * 4; ++d) EXPECT_EQ(it.out[d], 0.0);  // out is [B, Sq, H, Dv]
}

TEST(forward, without_keys_the_lse_is_the_sink) {
  const Call call({.seqlen_k = 0, .sink = true});
  const Forward it = oracle(call);
  for (double value : it.out) EXPECT_EQ(value, 0.0);
  for (size_t row = 0; row < it.lse.size(); ++row) {
    EXPECT_EQ(it.lse[row], call.learnable_sink.get(static_cast<int64_t>(row) / 5 % 2));
  }
}

TEST(forward, a_score_of_minus_infinity_is_a_masked_key) {
  Spec spec{.bias_shape = {5, 7}, .boolean_bias = true};
  Call boolean(spec);
  for (int64_t j = 0; j < 7; ++j) boolean.attn_bias.set(j, 0.0);  // row 0 sees nothing
  spec.boolean_bias = false;
  Call additive(spec);
  additive.attn_bias.fill(
      [&](int64_t index) { return boolean.attn_bias.get(index) != 0.0 ? 0.0 : -kInfinity; });
  expect_bitwise(oracle(additive).out, oracle(boolean).out);
  expect_bitwise(oracle(additive).lse, oracle(boolean).lse);
  EXPECT_EQ(oracle(boolean).lse[0], kInfinity);
}

TEST(forward, rows_of_no_sequence_are_zero_and_their_lse_infinite) {
  const Call call({.lengths_q = {2, 1}, .lengths_k = {3, 3}, .spare_rows = 2, .sink = true});
  const Forward it = oracle(call);
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t row = 0; row < 5; ++row) {
      EXPECT_EQ(it.lse[static_cast<size_t>(head * 5 + row)] == kInfinity, row >= 3);
    }
  }
  for (size_t n = 3u * 2 * 4; n < it.out.size(); ++n) EXPECT_EQ(it.out[n], 0.0);
}

TEST(forward, masked_keys_do_not_leak) {
  const Spec spec{.seqlen_q = 3, .seqlen_k = 9, .window_left = 2, .window_right = 0};
  const Call call(spec);
  Call poisoned(spec);  // query 0 stands at key 6, so that keys 0 to 3 are seen by none
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t n = 0; n < 4 * 2 * 4; ++n) {
      poisoned.k.set(b * 9 * 2 * 4 + n, kNan);
      poisoned.v.set(b * 9 * 2 * 4 + n, kNan);
    }
  }
  expect_bitwise(oracle(poisoned).out, oracle(call).out);
  expect_bitwise(oracle(poisoned).lse, oracle(call).lse);
  expect_bitwise(Backward(poisoned).dq, Backward(call).dq);
}

TEST(forward, unused_pages_and_keys_past_seqused_do_not_leak) {
  const Spec spec{.lengths_q = {3, 2}, .lengths_k = {7, 5}, .seqused_k = {4, 5}, .page_size = 3};
  const Call call(spec);
  Call poisoned(spec);
  // Of 6 pages, sequence 0 has 5, 4, 3 and uses one row of page 4; sequence 1 has 2, 1 and uses two
  // rows of page 1.
  const auto used = [](int64_t page, int64_t row) {
    const int64_t rows[] = {0, 2, 3, 0, 1, 3};
    return row < rows[page];
  };
  const int64_t row_size = 2 * 4;
  for (Tensor* tensor : {&poisoned.k, &poisoned.v}) {
    for (int64_t index = 0; index < tensor->num_elements(); ++index) {
      const int64_t row = index / row_size;
      if (!used(row / 3, row % 3)) tensor->set(index, kNan);
    }
  }
  expect_bitwise(oracle(poisoned).out, oracle(call).out);
}

TEST(forward, paged_equals_contiguous) {
  const Spec paged_spec{.lengths_q = {3, 2}, .lengths_k = {7, 5}, .page_size = 2, .causal = true};
  Spec spec = paged_spec;
  spec.page_size = 0;
  const Call contiguous(spec);
  Call paged(paged_spec);
  const int64_t row_size = 2 * 4;
  int64_t key = 0;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t j = 0; j < paged_spec.lengths_k[static_cast<size_t>(b)]; ++j, ++key) {
      const int64_t max_blocks = paged.block_table.view().shape[1];
      const auto page = static_cast<int64_t>(paged.block_table.get(b * max_blocks + j / 2));
      for (int64_t d = 0; d < row_size; ++d) {
        paged.k.set((page * 2 + j % 2) * row_size + d, contiguous.k.get(key * row_size + d));
        paged.v.set((page * 2 + j % 2) * row_size + d, contiguous.v.get(key * row_size + d));
      }
    }
  }
  expect_bitwise(oracle(paged).out, oracle(contiguous).out);
  expect_bitwise(oracle(paged).lse, oracle(contiguous).lse);
}

TEST(forward, nan_in_a_visible_key_reaches_the_result) {
  Call call({});
  call.k.set(0, kNan);
  const Forward it = oracle(call);
  EXPECT_TRUE(std::isnan(it.out[0]));
  EXPECT_TRUE(std::isnan(it.lse[0]));
}

// ---- The backend. ----

// The specs of the gradients serve again, in each dtype.
class Backend : public ::testing::TestWithParam<Spec> {};

TEST_P(Backend, rounds_the_oracle_once) {
  for (DataType dtype : kDtypes) {
    Spec spec = GetParam();
    spec.dtype = dtype;
    const Call call(spec);
    const Forward it = oracle(call);
    const core::Status status = run_backend(call, 3);
    ASSERT_TRUE(status.ok()) << status.message();
    Tensor out = call.out, lse = call.lse;
    out.fill([&](int64_t index) { return it.out[static_cast<size_t>(index)]; });
    lse.fill([&](int64_t index) { return it.lse[static_cast<size_t>(index)]; });
    EXPECT_TRUE(call.out.bitwise_equal(out)) << core::name(dtype);
    EXPECT_TRUE(call.lse.bitwise_equal(lse)) << core::name(dtype);
    EXPECT_TRUE(call.out.canaries_intact());
    EXPECT_TRUE(call.lse.canaries_intact());
    EXPECT_LE(fa::testing::normalised_error(call.out, it.out.data(), it.bound.data()),
              fa::testing::unit_roundoff(dtype));
  }
}

INSTANTIATE_TEST_SUITE_P(specs, Backend, ::testing::ValuesIn(differentiable_specs()),
                         [](const auto& info) { return info.param.name; });

TEST(backend, results_do_not_depend_on_strides) {
  const Call compact({});
  ASSERT_TRUE(run_backend(compact).ok());
  Call strided({});
  const auto spread = [](const Tensor& tensor) {  // gaps, and heads before rows
    const core::TensorView view = tensor.view();
    const int64_t d = view.shape[3] + 3, s = view.shape[1];
    Tensor result(view.dtype, {view.shape[0], s, view.shape[2], view.shape[3]},
                  {view.shape[2] * s * d + 5, d, s * d, 1});
    result.fill([&](int64_t index) { return tensor.get(index); });
    return result;
  };
  strided.q = spread(strided.q);
  strided.k = spread(strided.k);
  strided.v = spread(strided.v);
  strided.out = spread(strided.out);
  strided.lse = Tensor(DataType::kFloat32, {2, 2, 5}, {40, 10, 1});
  ASSERT_TRUE(run_backend(strided).ok());
  EXPECT_TRUE(strided.out.bitwise_equal(compact.out));
  EXPECT_TRUE(strided.lse.bitwise_equal(compact.lse));
  EXPECT_TRUE(strided.out.canaries_intact());
}

TEST(backend, runs_without_optional_outputs) {
  Call call({.lengths_q = {2, 1}, .lengths_k = {3, 3}, .spare_rows = 2});
  call.lse = Tensor();
  const Forward it = oracle(Call(call.spec()));
  ASSERT_TRUE(run_backend(call).ok());
  EXPECT_LE(fa::testing::normalised_error(call.out, it.out.data(), it.bound.data()),
            fa::testing::unit_roundoff(DataType::kFloat32));
}

TEST(backend, empty_calls_write_nothing) {
  for (const Spec& spec : {Spec{.batch = 0}, Spec{.seqlen_q = 0}}) {
    const Call call(spec);
    EXPECT_TRUE(run_backend(call).ok());
  }
}

// Where the divisor of the softmax and the keeping of dropout are put back, s_dmask must give out.
TEST(backend, s_dmask_reproduces_out) {
  for (const Spec& spec :
       {Spec{.seqlen_q = 9, .seqlen_k = 20, .causal = true, .dropout_p = 0.3, .s_dmask = true},
        Spec{.seqlen_q = 9, .seqlen_k = 4, .causal = true, .sink = true, .s_dmask = true}}) {
    const Call call(spec);
    ASSERT_TRUE(run_backend(call).ok());
    EXPECT_TRUE(call.s_dmask.canaries_intact());
    const core::TensorView shape = call.s_dmask.view();
    ASSERT_EQ(shape.shape[2], 128);
    ASSERT_EQ(shape.shape[3], 128);
    for (int64_t row = 0; row < 2 * 2 * 128; ++row) {
      const int64_t b = row / 256, head = row / 128 % 2, i = row % 128;
      double sum = 0.0, greatest = 0.0;
      Doubles out(4, 0.0);
      for (int64_t j = 0; j < 128; ++j) {
        const double value = call.s_dmask.get(row * 128 + j);
        const bool visible = i < spec.seqlen_q && j <= i + spec.seqlen_k - spec.seqlen_q;
        ASSERT_EQ(value != 0.0, visible) << "row " << row << " key " << j;
        if (!visible) continue;
        sum += std::abs(value);
        greatest = std::max(greatest, std::abs(value));
        for (int64_t d = 0; d < 4 && value > 0.0; ++d) {
          out[static_cast<size_t>(d)] += value / (1.0 - spec.dropout_p) *
                                         call.v.get(((b * spec.seqlen_k + j) * 2 + head) * 4 + d);
        }
      }
      if (sum == 0.0) continue;
      EXPECT_EQ(greatest, 1.0);
      if (spec.sink) continue;  // its term of the divisor is not in s_dmask
      for (int64_t d = 0; d < 4; ++d) {
        EXPECT_NEAR(out[static_cast<size_t>(d)] / sum,
                    call.out.get(((b * spec.seqlen_q + i) * 2 + head) * 4 + d), 1e-5);
      }
    }
  }
}

TEST(backend, refuses_what_it_cannot_do_with_a_reason) {
  AttentionProblem problem;
  problem.direction = core::Direction::kBackward;
  const auto on_cpu = implementation().accept(problem, Device{});
  ASSERT_FALSE(on_cpu.ok());
  EXPECT_EQ(on_cpu.status().code(), core::StatusCode::kUnsupported);
  EXPECT_FALSE(on_cpu.status().message().empty());
  const auto on_gpu = implementation().accept(AttentionProblem{}, {DeviceType::kCuda, 0});
  ASSERT_FALSE(on_gpu.ok());
  EXPECT_EQ(on_gpu.status().code(), core::StatusCode::kUnsupported);
}

}  // namespace
}  // namespace fa::reference
