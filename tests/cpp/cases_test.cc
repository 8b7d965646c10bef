// Every case, forward and backward, on every implementation that this machine has, against the
// oracle; and properties that hold without tolerance.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "core/semantics.h"
#include "tests/case_runner.h"
#include "tests/cases.h"

namespace fa::core {
void PrintTo(DataType dtype, std::ostream* to) { *to << name(dtype); }
}  // namespace fa::core

namespace fa::cases {

// How GoogleTest shows a parameter.
void PrintTo(const Case& c, std::ostream* to) { *to << describe(c); }

namespace {

using core::DataType;

// Instrumented, cases take ten times as long: then the quick ones, in which every option occurs.
// Emulated, a hundred times.
#if defined(FA_EMULATED)
constexpr uint64_t kRandomCases = 4;
constexpr int64_t kMaxCost = kQuickCost / 8;
#elif defined(FA_INSTRUMENTED)
constexpr uint64_t kRandomCases = 40;
constexpr int64_t kMaxCost = kQuickCost;
#else
constexpr uint64_t kRandomCases = 200;
constexpr int64_t kMaxCost = std::numeric_limits<int64_t>::max();
#endif

std::vector<Case> named_cases() {
  std::vector<Case> list;
  for (const Case& c : kCases) {
    if (c.cost() <= kMaxCost) list.push_back(c);
  }
  return list;
}

// Oracles take longer than kernels: the last one is kept, since the implementations of one case and
// dtype follow each other.
PreparedCase& prepared(const Case& c, DataType dtype) {
  static std::unique_ptr<PreparedCase> last;
  if (last == nullptr || last->dtype() != dtype || label(last->test_case()) != label(c)) {
    last = std::make_unique<PreparedCase>(c, dtype);
  }
  return *last;
}

using Pass = Outcome (PreparedCase::*)(const char* backend);

// Whether the implementation took the case. A refusal is no fault: some serve one dtype only.
bool expect_right(const Case& c, DataType dtype, const std::string& implementation, Pass pass) {
  const Outcome outcome = (prepared(c, dtype).*pass)(implementation.c_str());
  if (outcome.refused()) return false;
  EXPECT_EQ(outcome.fault(), "") << implementation << " on " << describe(c);
  EXPECT_EQ(outcome.implementation, implementation);
  return true;
}

// Those of which this machine can run the backward.
std::vector<std::string> backward_implementations() {
  std::vector<std::string> names = available_implementations();
  std::erase_if(names, [](const std::string& name) {
    return std::none_of(std::begin(kDTypes), std::end(kDTypes), [&](DataType dtype) {
      PreparedCase it(Case{.name = "plain"}, dtype);
      it.args().backend = name.c_str();
      return chosen_implementation(it.args(), &it.gradients()) == name;
    });
  });
  return names;
}

std::string identifier(std::string text) {
  for (char& letter : text) {
    if (std::isalnum(static_cast<unsigned char>(letter)) == 0) letter = '_';
  }
  return text;
}

// ---- Against the oracle. ----

using NamedCaseParam = std::tuple<Case, DataType, std::string>;

class NamedCase : public ::testing::TestWithParam<NamedCaseParam> {};

TEST_P(NamedCase, is_within_bounds) {
  const auto& [c, dtype, implementation] = GetParam();
  if (!expect_right(c, dtype, implementation, &PreparedCase::run)) {
    GTEST_SKIP() << implementation << " refuses it";
  }
}

class NamedCaseBackward : public NamedCase {};

TEST_P(NamedCaseBackward, is_within_bounds_or_refuses_pages) {
  const auto& [c, dtype, implementation] = GetParam();
  if (c.page_size > 0) {
    const Outcome outcome = prepared(c, dtype).run_backward(implementation.c_str());
    EXPECT_EQ(outcome.status, FA_UNSUPPORTED);
    EXPECT_TRUE(outcome.message.find("pages") != std::string::npos ||
                outcome.message.find("takes bfloat16 only") != std::string::npos)
        << outcome.message;
  } else if (!expect_right(c, dtype, implementation, &PreparedCase::run_backward)) {
    GTEST_SKIP() << implementation << " refuses it";
  }
}

std::string case_name(const ::testing::TestParamInfo<NamedCaseParam>& info) {
  const auto& [c, dtype, implementation] = info.param;
  return identifier(std::string{c.name} + "_" + core::name(dtype) + "_" + implementation);
}

INSTANTIATE_TEST_SUITE_P(All, NamedCase,
                         ::testing::Combine(::testing::ValuesIn(named_cases()),
                                            ::testing::ValuesIn(kDTypes),
                                            ::testing::ValuesIn(available_implementations())),
                         case_name);
INSTANTIATE_TEST_SUITE_P(All, NamedCaseBackward,
                         ::testing::Combine(::testing::ValuesIn(named_cases()),
                                            ::testing::ValuesIn(kDTypes),
                                            ::testing::ValuesIn(backward_implementations())),
                         case_name);

class RandomCases : public ::testing::TestWithParam<DataType> {
 protected:
  void expect_all_right(const std::vector<std::string>& implementations, Pass pass) {
    for (uint64_t seed = 0; seed < kRandomCases; ++seed) {
      for (const std::string& implementation : implementations) {
        expect_right(random_case(seed), GetParam(), implementation, pass);
      }
    }
  }
};

TEST_P(RandomCases, are_within_bounds) {
  expect_all_right(available_implementations(), &PreparedCase::run);
}

TEST_P(RandomCases, have_gradients_within_bounds) {
  expect_all_right(backward_implementations(), &PreparedCase::run_backward);
}

INSTANTIATE_TEST_SUITE_P(All, RandomCases, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return core::name(info.param); });

using BackendParam = std::tuple<DataType, std::string>;

// One problem in all the layouts it can have.
Case exact_case() {
  return {.name = "exact",
          .num_heads = 4,
          .num_heads_kv = 2,
          .head_dim = 72,
          .lengths_q = {65, 130, 1},
          .lengths_k = {97, 131, 200},
          .causal = true,
          .dropout_p = 0.2};
}

class Backend : public ::testing::TestWithParam<BackendParam> {
 protected:
  void SetUp() override {
    const auto& [dtype, implementation] = GetParam();
    PreparedCase it(exact_case(), dtype);
    it.args().backend = implementation.c_str();
    if (chosen_implementation(it.args()).empty()) {
      GTEST_SKIP() << implementation << " refuses " << core::name(dtype);
    }
  }
};

// The implementations that have a backward.
class BackwardBackend : public Backend {};

std::string backend_name(const ::testing::TestParamInfo<BackendParam>& info) {
  return identifier(core::name(std::get<0>(info.param)) + ("_" + std::get<1>(info.param)));
}

INSTANTIATE_TEST_SUITE_P(All, Backend,
                         ::testing::Combine(::testing::ValuesIn(kDTypes),
                                            ::testing::ValuesIn(available_implementations())),
                         backend_name);
INSTANTIATE_TEST_SUITE_P(All, BackwardBackend,
                         ::testing::Combine(::testing::ValuesIn(kDTypes),
                                            ::testing::ValuesIn(backward_implementations())),
                         backend_name);

// ---- Without tolerance. ----

void append_values(const HostTensor& tensor, std::vector<double>& to) {
  for (int64_t i = 0; i < tensor.num_elements(); ++i) to.push_back(tensor.get(tensor.offset_of(i)));
}

// The values of out and then of lse, in row-major order.
std::vector<double> results(const Case& c, DataType dtype, const std::string& implementation) {
  PreparedCase it(c, dtype);
  it.args().backend = implementation.c_str();
  EXPECT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  std::vector<double> values;
  append_values(it.tensors().out, values);
  append_values(it.tensors().lse, values);
  return values;
}

// Runs forward and backward; the backend is in the arguments.
void run_both(PreparedCase& it) {
  ASSERT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  ASSERT_EQ(fa_backward(&it.args(), &it.gradients()), FA_OK) << fa_last_error_message();
}

// The values of all gradients, in row-major order.
std::vector<double> gradients(const Case& c, DataType dtype, const std::string& implementation,
                              bool deterministic = false) {
  PreparedCase it(c, dtype);
  it.args().backend = implementation.c_str();
  it.gradients().deterministic = deterministic ? 1 : 0;
  run_both(it);
  std::vector<double> values;
  for (const HostTensor* tensor : it.tensors().gradients()) {
    if (tensor->present()) append_values(*tensor, values);
  }
  return values;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

TEST_P(Backend, storage_does_not_change_results) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  const std::vector<double> compact = results(c, dtype, implementation);
  for (Storage storage : {Storage::kHeadsMajor, Storage::kPaddedRows}) {
    c.storage = storage;
    EXPECT_TRUE(same_bits(results(c, dtype, implementation), compact)) << describe(c);
  }
}

TEST_P(Backend, paged_equals_contiguous) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  const std::vector<double> contiguous = results(c, dtype, implementation);
  for (int64_t page_size : {1, 16, 17, 256}) {
    c.page_size = page_size;
    EXPECT_TRUE(same_bits(results(c, dtype, implementation), contiguous)) << describe(c);
  }
}

TEST_P(Backend, max_seqlen_does_not_change_results) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  const std::vector<double> tight = results(c, dtype, implementation);
  c.max_seqlen_slack = 1000;
  EXPECT_TRUE(same_bits(results(c, dtype, implementation), tight));
}

TEST_P(Backend, seqused_k_equals_shorter_sequences) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  const std::vector<double> shorter = results(c, dtype, implementation);
  c.seqused_k = c.lengths_k;
  c.lengths_k = {100, 140, 211};
  EXPECT_TRUE(same_bits(results(c, dtype, implementation), shorter));
}

TEST_P(Backend, varlen_equals_dense) {
  const auto& [dtype, implementation] = GetParam();
  const Case dense{.name = "exact",
                   .batch = 3,
                   .seqlen_q = 97,
                   .seqlen_k = 130,
                   .num_heads = 4,
                   .num_heads_kv = 2,
                   .causal = true,
                   .dropout_p = 0.2};
  Case varlen = dense;
  varlen.lengths_q = {97, 97, 97};
  varlen.lengths_k = {130, 130, 130};
  PreparedCase a(dense, dtype), b(varlen, dtype);
  a.args().backend = b.args().backend = implementation.c_str();
  ASSERT_EQ(fa_forward(&a.args()), FA_OK) << fa_last_error_message();
  ASSERT_EQ(fa_forward(&b.args()), FA_OK) << fa_last_error_message();
  const HostTensor &dense_out = a.tensors().out, &varlen_out = b.tensors().out;
  // Compact both, so that the rows of the batch follow each other in the same order.
  for (int64_t i = 0; i < dense_out.num_elements(); ++i) {
    ASSERT_EQ(dense_out.get(i), varlen_out.get(i)) << "at " << i;
  }
}

// A sequence's result does not depend on what is computed beside it. (Dropout's does: it knows the
// index in the batch.)
TEST_P(Backend, a_sequence_does_not_depend_on_its_batch) {
  const auto& [dtype, implementation] = GetParam();
  Case c{.name = "exact",
         .batch = 1,
         .seqlen_q = 113,
         .seqlen_k = 130,
         .num_heads = 4,
         .num_heads_kv = 1,
         .causal = true};
  PreparedCase alone(c, dtype);
  c.batch = 5;
  PreparedCase among(c, dtype);
  const int64_t per_batch = alone.tensors().q.num_elements();
  const int64_t k_per_batch = alone.tensors().k.num_elements();
  for (int64_t i = 0; i < per_batch; ++i) {
    among.tensors().q.set(3 * per_batch + i, alone.tensors().q.get(i));
  }
  for (int64_t i = 0; i < k_per_batch; ++i) {
    among.tensors().k.set(3 * k_per_batch + i, alone.tensors().k.get(i));
    among.tensors().v.set(3 * k_per_batch + i, alone.tensors().v.get(i));
  }
  alone.args().backend = among.args().backend = implementation.c_str();
  ASSERT_EQ(fa_forward(&alone.args()), FA_OK) << fa_last_error_message();
  ASSERT_EQ(fa_forward(&among.args()), FA_OK) << fa_last_error_message();
  for (int64_t i = 0; i < per_batch; ++i) {
    ASSERT_EQ(alone.tensors().out.get(i), among.tensors().out.get(3 * per_batch + i)) << "at " << i;
  }
}

// A large finite key and value at `poisoned` change no row that does not see it, of out or, with
// the backward, of dq.
void expect_no_leak(const Case& c, DataType dtype, const std::string& implementation,
                    int64_t poisoned, bool backward) {
  PreparedCase it(c, dtype);
  CaseTensors& t = it.tensors();
  it.args().backend = implementation.c_str();
  const auto run = [&] {
    if (backward) return run_both(it);
    ASSERT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  };
  run();
  const HostTensor& rows = backward ? t.dq : t.out;
  std::vector<double> before;
  append_values(rows, before);

  const double large = dtype == DataType::kFloat16 ? 6e4 : 1e30;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t d = 0; d < c.heads_kv() * c.head_dim; ++d) {
      const int64_t at = (b * c.seqlen_k + poisoned) * c.heads_kv() * c.head_dim + d;
      t.k.set(at, d % 2 == 0 ? large : -large);
      t.v.set(at, large);
    }
  }
  run();
  const semantics::MaskBand band = semantics::mask_band(c.causal, c.window_left, c.window_right);
  const int64_t row_elements = c.num_heads * c.head_dim;
  int64_t compared = 0;
  for (int64_t index = 0; index < rows.num_elements(); ++index) {
    const int64_t i = index / row_elements % c.seqlen_q;
    if (semantics::is_visible(i, poisoned, c.seqlen_q, c.seqlen_k, band)) continue;
    ASSERT_EQ(rows.get(index), before[static_cast<size_t>(index)])
        << "key " << poisoned << " leaks into row " << i;
    ++compared;
  }
  EXPECT_GT(compared, 0);
}

void expect_masked_keys_do_not_leak(const BackendParam& param, bool backward) {
  const auto& [dtype, implementation] = param;
  const Case causal{.name = "leak", .seqlen_q = 130, .seqlen_k = 130, .causal = true};
  const Case window{.name = "leak",
                    .seqlen_q = 97,
                    .seqlen_k = 200,
                    .num_heads = 4,
                    .num_heads_kv = 2,
                    .window_left = 17,
                    .window_right = 3};
  for (int64_t key : {1, 15, 16, 63, 64, 65, 100, 127, 128, 129}) {
    expect_no_leak(causal, dtype, implementation, key, backward);
    expect_no_leak(window, dtype, implementation, key, backward);
  }
}

TEST_P(Backend, masked_keys_do_not_leak) { expect_masked_keys_do_not_leak(GetParam(), false); }

TEST_P(BackwardBackend, masked_keys_do_not_leak_into_dq) {
  expect_masked_keys_do_not_leak(GetParam(), true);
}

TEST_P(BackwardBackend, storage_does_not_change_gradients) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  const std::vector<double> compact = gradients(c, dtype, implementation);
  for (Storage storage : {Storage::kHeadsMajor, Storage::kPaddedRows}) {
    c.storage = storage;
    EXPECT_TRUE(same_bits(gradients(c, dtype, implementation), compact)) << describe(c);
  }
}

TEST_P(BackwardBackend, deterministic_gradients_repeat) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  c.bias = Bias::kPerHead;
  c.sink = Sink::kFloat32;
  const std::vector<double> first = gradients(c, dtype, implementation, true);
  for (int repeat = 0; repeat < 3; ++repeat) {
    EXPECT_TRUE(same_bits(gradients(c, dtype, implementation, true), first));
  }
}

// Absent ones change nothing of those that are wanted.
TEST_P(BackwardBackend, gradients_do_not_depend_on_optional_ones) {
  const auto& [dtype, implementation] = GetParam();
  Case c = exact_case();
  c.bias = Bias::kFull;
  c.sink = Sink::kOwn;
  PreparedCase all(c, dtype), few(c, dtype);
  all.args().backend = few.args().backend = implementation.c_str();
  few.gradients().d_attn_bias = few.gradients().d_learnable_sink = nullptr;
  run_both(all);
  run_both(few);
  CaseTensors &a = all.tensors(), &b = few.tensors();
  EXPECT_EQ(a.dq.hash(), b.dq.hash());
  EXPECT_EQ(a.dk.hash(), b.dk.hash());
  EXPECT_EQ(a.dv.hash(), b.dv.hash());
  EXPECT_TRUE(b.d_attn_bias.poisoned());
  EXPECT_TRUE(b.d_learnable_sink.poisoned());
}

TEST_P(Backend, a_key_that_a_boolean_bias_hides_does_not_leak) {
  const auto& [dtype, implementation] = GetParam();
  const Case c{.name = "leak",
               .seqlen_q = 65,
               .seqlen_k = 130,
               .bias = Bias::kPerKey,
               .bias_type = BiasType::kBoolean};
  PreparedCase it(c, dtype);
  CaseTensors& t = it.tensors();
  it.args().backend = implementation.c_str();
  ASSERT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  const uint64_t before = t.out.hash();
  const double large = dtype == DataType::kFloat16 ? 6e4 : 1e30;
  for (int64_t j = 0; j < c.seqlen_k; ++j) {
    if (t.attn_bias.get(j) != 0.0) continue;
    for (int64_t d = 0; d < c.num_heads * c.head_dim; ++d) {
      t.k.set(j * c.num_heads * c.head_dim + d, large);
      t.v.set(j * c.num_heads * c.head_dim + d, -large);
    }
  }
  ASSERT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  EXPECT_EQ(t.out.hash(), before);
}

// Which probabilities are dropped is a matter of the seed, not of the backend.
TEST_P(Backend, dropout_masks_are_those_of_the_reference) {
  const auto& [dtype, implementation] = GetParam();
  const Case c{.name = "mask", .seqlen_q = 65, .seqlen_k = 130, .dropout_p = 0.4, .s_dmask = true};
  PreparedCase it(c, dtype);
  const auto signs = [&](const char* backend) {
    it.args().backend = backend;
    EXPECT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
    const HostTensor& s_dmask = it.tensors().s_dmask;
    std::vector<bool> dropped;
    for (int64_t index = 0; index < s_dmask.num_elements(); ++index) {
      const int64_t j = index % s_dmask.shape()[3];
      const int64_t i = index / s_dmask.shape()[3] % s_dmask.shape()[2];
      if (i >= c.seqlen_q || j >= c.seqlen_k) continue;
      dropped.push_back(s_dmask.get(index) < 0.0);
    }
    return dropped;
  };
  EXPECT_EQ(signs(implementation.c_str()), signs("reference"));
}

TEST(Cases, are_all_taken_by_a_kernel_for_this_processor) {
  for (const Case& c : kCases) {
    for (DataType dtype : kDTypes) {
      PreparedCase it(c, dtype);
      it.args().backend = "cpu";
      EXPECT_EQ(chosen_implementation(it.args()).rfind("cpu:", 0), 0u) << describe(c);
      if (c.page_size > 0) continue;
      it.args().s_dmask = nullptr;
      EXPECT_EQ(chosen_implementation(it.args(), &it.gradients()).rfind("cpu:", 0), 0u)
          << "the backward of " << describe(c);
    }
  }
}

TEST(Cases, have_names_of_their_own) {
  for (const Case& a : kCases) {
    for (const Case& b : kCases) {
      EXPECT_TRUE(&a == &b || std::string{a.name} != b.name) << a.name;
    }
  }
}

TEST(Cases, quick_ones_have_every_option) {
  std::set<int> alibi, bias, bias_type, sink, storage;
  std::set<std::string> options;
  for (const Case& c : kCases) {
    if (c.cost() > kQuickCost) continue;
    alibi.insert(static_cast<int>(c.alibi));
    bias.insert(static_cast<int>(c.bias));
    if (c.bias != Bias::kNone) bias_type.insert(static_cast<int>(c.bias_type));
    sink.insert(static_cast<int>(c.sink));
    storage.insert(static_cast<int>(c.storage));
    const auto note = [&](bool has, const char* option) {
      if (has) options.insert(option);
    };
    note(c.causal, "causal");
    note(c.window_left > 0, "window_left");
    note(c.window_right > 0, "window_right");
    note(c.softcap > 0, "softcap");
    note(c.softmax_scale.has_value(), "softmax_scale");
    note(c.dropout_p > 0, "dropout_p");
    note(c.s_dmask, "s_dmask");
    note(c.heads_kv() < c.num_heads, "gqa");
    note(c.dim_v() != c.head_dim, "head_dim_v");
    note(c.varlen(), "varlen");
    note(c.seqused_k.given(), "seqused_k");
    note(c.max_seqlen_slack > 0, "max_seqlen_slack");
    note(c.page_size > 0, "page_size");
    note(c.bias_with_infinities, "bias_with_infinities");
    note(c.q_gain > 1, "q_gain");
  }
  EXPECT_EQ(alibi.size(), 3u);
  EXPECT_EQ(bias.size(), 6u);
  EXPECT_EQ(bias_type.size(), 3u);
  EXPECT_EQ(sink.size(), 3u);
  EXPECT_EQ(storage.size(), 4u);
  EXPECT_EQ(options.size(), 15u);
}

TEST(Cases, random_cases_repeat) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    EXPECT_EQ(describe(random_case(seed)), describe(random_case(seed)));
  }
  EXPECT_NE(describe(random_case(1)).substr(9), describe(random_case(2)).substr(9));
}

}  // namespace
}  // namespace fa::cases
