// flash_attn.h as its users meet it, and where attention.hpp says the same.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "flash_attn/attention.hpp"
#include "tests/case_runner.h"
#include "tests/cases.h"
#include "tests/cpp/testing.h"

namespace fa::cases {
namespace {

using testing::contains;

const Case kCase{.name = "api", .seqlen_q = 50, .seqlen_k = 70, .head_dim = 24};

// The values of out after a call.
std::vector<double> run(PreparedCase& it) {
  EXPECT_EQ(fa_forward(&it.args()), FA_OK) << fa_last_error_message();
  std::vector<double> values;
  const HostTensor& out = it.tensors().out;
  for (int64_t i = 0; i < out.num_elements(); ++i) values.push_back(out.get(out.offset_of(i)));
  return values;
}

TEST(C, tensors_are_those_of_dlpack) {
  EXPECT_EQ(sizeof(fa_tensor), 48u);
  EXPECT_EQ(offsetof(fa_tensor, device_type), 8u);
  EXPECT_EQ(offsetof(fa_tensor, ndim), 16u);
  EXPECT_EQ(offsetof(fa_tensor, dtype_code), 20u);
  EXPECT_EQ(offsetof(fa_tensor, shape), 24u);
  EXPECT_EQ(offsetof(fa_tensor, strides), 32u);
  EXPECT_EQ(offsetof(fa_tensor, byte_offset), 40u);
}

TEST(C, absent_strides_are_compact_and_byte_offsets_count) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  const std::vector<double> expected = run(it);
  fa_tensor q = *it.args().q, out = *it.args().out;
  q.strides = out.strides = nullptr;
  q.data = static_cast<char*>(q.data) - 8;
  q.byte_offset = 8;
  it.args().q = &q;
  it.args().out = &out;
  it.tensors().out.poison();
  EXPECT_EQ(run(it), expected);
}

TEST(C, lse_may_be_absent) {
  PreparedCase it(kCase, core::DataType::kBFloat16);
  const std::vector<double> expected = run(it);
  it.args().lse = nullptr;
  it.tensors().lse.poison();
  const uint64_t before = it.tensors().lse.hash();
  EXPECT_EQ(run(it), expected);
  EXPECT_EQ(it.tensors().lse.hash(), before);
}

TEST(C, defaults_are_plain_attention) {
  fa_attention_args args;
  std::memset(&args, 0x5A, sizeof(args));
  fa_attention_args_init(&args);
  EXPECT_EQ(args.struct_size, sizeof(args));
  EXPECT_EQ(args.window_size_left, -1);
  EXPECT_EQ(args.window_size_right, -1);
  EXPECT_EQ(args.causal, 0);
  EXPECT_EQ(args.softmax_scale, nullptr);
  EXPECT_EQ(args.q, nullptr);
  EXPECT_EQ(args.backend, nullptr);
}

// A caller with an older header has less memory for the struct.
TEST(C, structs_of_other_sizes_are_refused_unharmed) {
  fa_attention_args memory[2];
  std::memset(memory, 0x5A, sizeof(memory));
  const size_t older = sizeof(fa_attention_args) - 2 * sizeof(void*);
  fa_attention_args_init_sized(memory, older);
  EXPECT_EQ(memory->struct_size, older);
  EXPECT_EQ(memory->window_size_left, -1);
  EXPECT_EQ(reinterpret_cast<const unsigned char*>(memory)[older], 0x5A);
  EXPECT_EQ(fa_forward(memory), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "struct_size is " + std::to_string(older)));
  fa_attention_args_init_sized(memory, sizeof(memory));
  EXPECT_EQ(fa_forward(memory), FA_INVALID_ARGUMENT);
  EXPECT_EQ(reinterpret_cast<const unsigned char*>(memory)[sizeof(memory) - 1], 0);
}

TEST(C, defaults_are_those_of_the_cpp_interface) {
  fa_attention_args c;
  fa_attention_args_init(&c);
  const ForwardArgs cpp;
  EXPECT_EQ(c.window_size_left, cpp.window_size_left);
  EXPECT_EQ(c.window_size_right, cpp.window_size_right);
  EXPECT_EQ(c.causal != 0, cpp.causal);
  EXPECT_EQ(c.rotary_interleaved != 0, cpp.rotary_interleaved);
  EXPECT_EQ(c.num_splits, cpp.num_splits);
  EXPECT_EQ(c.softcap, cpp.softcap);
  EXPECT_EQ(c.dropout_p, cpp.dropout_p);
}

TEST(C, errors_belong_to_their_thread_and_last) {
  fa_attention_args args;
  fa_attention_args_init(&args);
  std::string before, after, survived;
  std::thread other([&] {
    before = fa_last_error_message();
    PreparedCase it(kCase, core::DataType::kFloat32);
    it.args().softcap = -3.0;
    fa_forward(&it.args());
    after = fa_last_error_message();
    it.args().softcap = 0.0;
    fa_forward(&it.args());
    survived = fa_last_error_message();
  });
  EXPECT_EQ(fa_forward(&args), FA_INVALID_ARGUMENT);
  const char* message = fa_last_error_message();
  other.join();
  EXPECT_STREQ(message, "q: is missing, must be given");
  EXPECT_EQ(before, "");
  EXPECT_TRUE(contains(after, "softcap: is -3"));
  EXPECT_EQ(survived, after) << "a call that succeeds leaves the last failure";
}

TEST(C, validation_alone_says_what_the_call_would) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  EXPECT_EQ(fa_validate(&it.args(), nullptr, 1), FA_OK);
  it.args().softcap = -3.0;
  EXPECT_EQ(fa_validate(&it.args(), nullptr, 1), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "softcap: is -3"));
  EXPECT_EQ(fa_validate(nullptr, nullptr, 1), FA_INVALID_ARGUMENT);
}

TEST(C, explain_is_cut_at_the_capacity) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  size_t needed = 0;
  ASSERT_EQ(fa_explain(&it.args(), nullptr, 0, &needed), FA_OK);
  std::string whole(needed, '?');
  ASSERT_EQ(fa_explain(&it.args(), whole.data(), whole.size(), nullptr), FA_OK);
  EXPECT_EQ(whole.find('\0'), needed - 1);
  char text[12];
  std::memset(text, '?', sizeof(text));
  ASSERT_EQ(fa_explain(&it.args(), text, 10, &needed), FA_OK);
  EXPECT_EQ(std::string(text), whole.substr(0, 9));
  EXPECT_EQ(text[10], '?');
  it.args().q = nullptr;
  EXPECT_EQ(fa_explain(&it.args(), text, sizeof(text), &needed), FA_INVALID_ARGUMENT);
  EXPECT_STREQ(text, "");
}

TEST(C, implementations_past_the_end_are_null) {
  int32_t count = 0;
  while (fa_implementation_name(FA_CPU, count) != nullptr) ++count;
  EXPECT_GE(count, 2);
  const char* reason = nullptr;
  for (int32_t index : {-1, count, count + 1000}) {
    EXPECT_EQ(fa_implementation_name(FA_CPU, index), nullptr);
    EXPECT_EQ(fa_implementation_available(FA_CPU, index, &reason), 0);
    EXPECT_STRNE(reason, "");
  }
  EXPECT_EQ(fa_implementation_name(12345, 0), nullptr);
  EXPECT_EQ(fa_implementation_available(12345, 0, nullptr), 0);
}

TEST(C, openmp_runtimes_that_are_not_there_are_named) {
  EXPECT_EQ(fa_use_openmp_runtime("/nowhere/libgomp.so.1"), FA_UNSUPPORTED);
  EXPECT_TRUE(contains(fa_last_error_message(), "/nowhere/libgomp.so.1"));
  EXPECT_EQ(fa_use_openmp_runtime(nullptr), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "path"));
  EXPECT_EQ(fa_add_nvrtc_folder(nullptr), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "folder"));
}

class EnvironmentVariable {
 public:
  EnvironmentVariable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~EnvironmentVariable() { unsetenv(name_); }

 private:
  const char* name_;
};

TEST(C, the_environment_forces_a_backend_and_the_call_overrides_it) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  const EnvironmentVariable forced("FLASH_ATTENTION_BACKEND", "reference");
  EXPECT_EQ(chosen_implementation(it.args()), "reference");
  it.args().backend = "cpu";
  EXPECT_EQ(chosen_implementation(it.args()).rfind("cpu:", 0), 0u);
  it.args().backend = "";
  EXPECT_NE(chosen_implementation(it.args()), "reference");
}

TEST(C, an_unknown_backend_in_the_environment_is_an_error) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  const EnvironmentVariable forced("FLASH_ATTENTION_BACKEND", "cpu:abacus");
  EXPECT_EQ(fa_forward(&it.args()), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "cpu:abacus"));
  char text[8];
  EXPECT_EQ(fa_explain(&it.args(), text, sizeof(text), nullptr), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "cpu:abacus"));
}

// Of each batch its row, and no tokens to append.
TEST(C, the_oracle_reads_a_cache) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  std::vector<int32_t> lengths(kCase.batch, static_cast<int32_t>(kCase.seqlen_k));
  const std::vector<int64_t> shape{kCase.batch}, strides{1};
  const fa_tensor cache_seqlens{lengths.data(), FA_CPU,         0, 1, FA_INT, 32, 1,
                                shape.data(),   strides.data(), 0};
  const std::vector<int64_t>& out_shape = it.tensors().out.shape();
  HostTensor whole = HostTensor::compact(core::DataType::kFloat64, out_shape);
  HostTensor cached = HostTensor::compact(core::DataType::kFloat64, out_shape);
  ASSERT_EQ(fa_forward_oracle(&it.args(), whole.c_tensor(), nullptr, nullptr), FA_OK);
  it.args().cache_seqlens = &cache_seqlens;
  ASSERT_EQ(fa_forward_oracle(&it.args(), cached.c_tensor(), nullptr, nullptr), FA_OK);
  EXPECT_EQ(cached.hash(), whole.hash());
  it.args().k_new = it.args().k;
  it.args().v_new = it.args().v;
  lengths.assign(lengths.size(), 0);
  EXPECT_EQ(fa_forward_oracle(&it.args(), cached.c_tensor(), nullptr, nullptr), FA_UNSUPPORTED);
}

TEST(C, the_oracle_checks_its_results) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  const std::vector<int64_t>& shape = it.tensors().out.shape();
  HostTensor out = HostTensor::compact(core::DataType::kFloat64, shape);
  EXPECT_EQ(fa_forward_oracle(&it.args(), out.c_tensor(), nullptr, nullptr), FA_OK);
  EXPECT_TRUE(only_elements_written({&out}));
  EXPECT_EQ(fa_forward_oracle(&it.args(), nullptr, nullptr, nullptr), FA_OK);

  HostTensor narrow = HostTensor::compact(core::DataType::kFloat32, shape);
  EXPECT_EQ(fa_forward_oracle(&it.args(), nullptr, nullptr, narrow.c_tensor()),
            FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "bound: dtype is float32"));
  EXPECT_EQ(fa_forward_oracle(&it.args(), nullptr, out.c_tensor(), nullptr), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "lse: shape is [2, 50, 2, 24]"));
  HostTensor gaps(core::DataType::kFloat64, shape, {10000, 100, 30, 1});
  EXPECT_EQ(fa_forward_oracle(&it.args(), gaps.c_tensor(), nullptr, nullptr), FA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fa_last_error_message(), "strides"));
  it.args().softcap = -1.0;
  EXPECT_EQ(fa_forward_oracle(&it.args(), out.c_tensor(), nullptr, nullptr), FA_INVALID_ARGUMENT);
}

TEST(C, gradients_are_absent_by_default) {
  fa_attention_gradients gradients;
  std::memset(&gradients, 0x5A, sizeof(gradients));
  fa_attention_gradients_init(&gradients);
  EXPECT_EQ(gradients.struct_size, sizeof(gradients));
  EXPECT_EQ(gradients.dout, nullptr);
  EXPECT_EQ(gradients.d_learnable_sink, nullptr);
  EXPECT_EQ(gradients.deterministic, 0);
}

TEST(C, the_backward_oracle_checks_its_results) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  const std::vector<int64_t>& shape = it.tensors().dk.shape();
  HostTensor dk = HostTensor::compact(core::DataType::kFloat64, shape);
  fa_attention_gradients gradients, bounds;
  fa_attention_gradients_init(&gradients);
  fa_attention_gradients_init(&bounds);
  const auto expect_refused = [&](const char* part) {
    EXPECT_EQ(fa_backward_oracle(&it.args(), &gradients, &bounds), FA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(fa_last_error_message(), part)) << fa_last_error_message();
  };
  expect_refused("dout: is missing");
  gradients.dout = it.tensors().dout.c_tensor();
  gradients.dk = dk.c_tensor();
  EXPECT_EQ(fa_backward_oracle(&it.args(), &gradients, nullptr), FA_OK);
  EXPECT_TRUE(only_elements_written({&dk}));

  gradients.dq = dk.c_tensor();
  expect_refused("dq: shape is [2, 70, 2, 24], must be [2, 50, 2, 24]");
  gradients.dq = nullptr;
  bounds.dk = it.tensors().dk.c_tensor();
  expect_refused("bounds.dk: dtype is float32");
  bounds.dk = nullptr;
  bounds.d_learnable_sink = dk.c_tensor();
  expect_refused("d_learnable_sink: is given, but learnable_sink is not");
  bounds.struct_size = 3;
  expect_refused("bounds: struct_size is 3");
}

TEST(C, the_backward_is_explained) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  it.args().backend = "cpu";
  EXPECT_EQ(chosen_implementation(it.args(), &it.gradients()).rfind("cpu:", 0), 0u);
  char text[8] = "before";
  size_t needed = 1;
  it.gradients().dv = nullptr;
  EXPECT_EQ(fa_explain_backward(&it.args(), &it.gradients(), text, sizeof(text), &needed),
            FA_INVALID_ARGUMENT);
  EXPECT_STREQ(text, "");
  EXPECT_EQ(needed, 0u);
}

// As autograd gives it for a sum over the batch.
TEST(C, a_broadcast_dout_is_taken) {
  PreparedCase it(kCase, core::DataType::kFloat32);
  CaseTensors& t = it.tensors();
  run(it);
  const int64_t per_batch = t.dout.num_elements() / kCase.batch;
  for (int64_t i = 0; i < per_batch; ++i) t.dout.set(per_batch + i, t.dout.get(i));
  ASSERT_EQ(fa_backward(&it.args(), &it.gradients()), FA_OK) << fa_last_error_message();
  const uint64_t dq = t.dq.hash(), dk = t.dk.hash(), dv = t.dv.hash();
  fa_tensor dout = *it.gradients().dout;
  const std::vector<int64_t> strides{0, t.dout.stride(1), t.dout.stride(2), 1};
  dout.strides = strides.data();
  it.gradients().dout = &dout;
  for (HostTensor* gradient : t.gradients()) {
    if (gradient->present()) gradient->poison();
  }
  ASSERT_EQ(fa_backward(&it.args(), &it.gradients()), FA_OK) << fa_last_error_message();
  EXPECT_EQ(t.dq.hash(), dq);
  EXPECT_EQ(t.dk.hash(), dk);
  EXPECT_EQ(t.dv.hash(), dv);
}

// A thread knows the calls that it has made, and of each kind those with other memory.
TEST(C, known_calls_run_and_others_do_nothing) {
  std::thread([] {
    PreparedCase first(kCase, core::DataType::kFloat32), it(kCase, core::DataType::kFloat32);
    CaseTensors& t = it.tensors();
    const auto known_forward = [&] {
      int32_t ran = -1;
      EXPECT_EQ(fa_forward_known(&it.args(), &ran), FA_OK) << fa_last_error_message();
      return ran;
    };
    const auto known_backward = [&] {
      int32_t ran = -1;
      EXPECT_EQ(fa_backward_known(&it.args(), &it.gradients(), &ran), FA_OK)
          << fa_last_error_message();
      return ran;
    };
    const auto hashes = [&] {
      return std::array{t.out.hash(), t.dq.hash(), t.dk.hash(), t.dv.hash()};
    };
    const auto before = hashes();
    EXPECT_EQ(known_forward(), 0);
    EXPECT_EQ(known_backward(), 0);
    EXPECT_EQ(hashes(), before);

    run(first);
    EXPECT_EQ(known_forward(), 1);
    EXPECT_EQ(known_backward(), 0) << "a forward makes no backward known";
    ASSERT_EQ(fa_backward(&first.args(), &first.gradients()), FA_OK) << fa_last_error_message();
    EXPECT_EQ(known_backward(), 1);
    const CaseTensors& expected = first.tensors();
    EXPECT_EQ(hashes(), (std::array{expected.out.hash(), expected.dq.hash(), expected.dk.hash(),
                                    expected.dv.hash()}));

    it.args().causal = 1 - it.args().causal;
    EXPECT_EQ(known_forward() + known_backward(), 0);
    int32_t ran = -1;
    EXPECT_EQ(fa_backward_known(&it.args(), nullptr, &ran), FA_INVALID_ARGUMENT);
    EXPECT_EQ(ran, 0);
    EXPECT_EQ(fa_forward_known(&it.args(), nullptr), FA_INVALID_ARGUMENT);
    EXPECT_EQ(fa_backward_known(&it.args(), &it.gradients(), nullptr), FA_INVALID_ARGUMENT);
  }).join();
}

TEST(C, workspace_grows_and_shrinks_between_calls) {
  const Case small{.name = "small", .seqlen_q = 3, .seqlen_k = 5, .head_dim = 8};
  const Case large{.name = "large", .batch = 1, .seqlen_q = 300, .seqlen_k = 300, .head_dim = 256};
  PreparedCase a(small, core::DataType::kFloat32), b(large, core::DataType::kFloat32);
  const std::vector<double> first = run(a);
  run(b);
  EXPECT_EQ(run(a), first);
  run(b);
}

// Threads that are started for each region and counted.
struct CountedPool {
  int32_t num_threads = 3;
  std::atomic<int64_t> regions{0}, tasks{0};

  fa_thread_pool c() {
    return {this, [](void* pool) { return static_cast<CountedPool*>(pool)->num_threads; }, run};
  }

 private:
  static void run(void* pool, int64_t num_tasks, int32_t max_threads,
                  void (*body)(void*, int64_t, int32_t), void* context) {
    auto& it = *static_cast<CountedPool*>(pool);
    EXPECT_GT(max_threads, 1);
    EXPECT_LE(max_threads, it.num_threads);
    ++it.regions;
    it.tasks += num_tasks;
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int32_t t = 0; t < max_threads; ++t) {
      threads.emplace_back([&, t] {
        for (int64_t task = next++; task < num_tasks; task = next++) body(context, task, t);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(C, calls_run_on_the_callers_threads) {
  const Case large{.name = "large", .batch = 2, .seqlen_q = 300, .seqlen_k = 500, .head_dim = 64};
  PreparedCase it(large, core::DataType::kFloat32);
  const std::vector<double> expected = run(it);
  ASSERT_EQ(fa_backward(&it.args(), &it.gradients()), FA_OK) << fa_last_error_message();
  const uint64_t dq = it.tensors().dq.hash();
  CountedPool pool;
  const fa_thread_pool c = pool.c();
  ASSERT_EQ(fa_use_thread_pool(&c), FA_OK);
  EXPECT_EQ(threads().source, "the caller's pool");
  EXPECT_EQ(threads().count, 3);
  it.tensors().out.poison();
  EXPECT_EQ(run(it), expected);
  EXPECT_GT(pool.tasks.load(), pool.regions.load());
  const int64_t regions = pool.regions;
  EXPECT_GT(regions, 0);
  it.tensors().dq.poison();
  ASSERT_EQ(fa_backward(&it.args(), &it.gradients()), FA_OK) << fa_last_error_message();
  EXPECT_EQ(it.tensors().dq.hash(), dq);
  EXPECT_GT(pool.regions, regions);

  const int64_t before = pool.regions;
  pool.num_threads = -5;  // counts as one, which needs no pool
  EXPECT_EQ(run(it), expected);
  EXPECT_EQ(pool.regions, before);

  const fa_thread_pool without{nullptr, nullptr, c.run};
  EXPECT_EQ(fa_use_thread_pool(&without), FA_INVALID_ARGUMENT);
  EXPECT_EQ(threads().source, "the caller's pool");
  ASSERT_EQ(fa_use_thread_pool(nullptr), FA_OK);
  EXPECT_NE(threads().source, "the caller's pool");
  EXPECT_EQ(run(it), expected);
}

// One sequence of too few keys to be split.
TEST(C, heads_of_few_queries_are_shared_among_threads) {
  const Case decoding{
      .name = "step", .batch = 1, .seqlen_q = 1, .seqlen_k = 512, .num_heads = 16, .head_dim = 64};
  PreparedCase it(decoding, core::DataType::kFloat32);
  const std::vector<double> expected = run(it);
  CountedPool pool;
  pool.num_threads = 4;
  const fa_thread_pool c = pool.c();
  ASSERT_EQ(fa_use_thread_pool(&c), FA_OK);
  it.tensors().out.poison();
  EXPECT_EQ(run(it), expected);
  EXPECT_GE(pool.tasks.load(), 4);
  ASSERT_EQ(fa_use_thread_pool(nullptr), FA_OK);
}

TEST(C, concurrent_calls_agree_with_those_made_alone) {
  constexpr int kThreads = 6, kCalls = 20;
  const std::vector<double> expected = [] {
    PreparedCase it(kCase, core::DataType::kFloat32);
    return run(it);
  }();
  std::vector<std::thread> threads;
  std::vector<int> wrong(kThreads, 0);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      PreparedCase it(kCase, core::DataType::kFloat32);
      // Shapes of their own too, so that plans are made while others run.
      const Case other{.name = "other", .seqlen_q = 7 + t, .seqlen_k = 30, .head_dim = 24};
      PreparedCase own(other, core::DataType::kFloat32);
      const std::vector<double> own_expected = run(own);
      for (int call = 0; call < kCalls; ++call) {
        it.tensors().out.poison();
        if (run(it) != expected || run(own) != own_expected) {
          ++wrong[static_cast<size_t>(t)];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(kThreads, 0));
}

TEST(C, ceilings_are_measured_or_refused) {
  for (const char* kind : {"fp32_fma", "memory_read"}) {
    double per_second = 0;
    EXPECT_EQ(fa_measure_ceiling(kind, 1, &per_second), FA_OK) << fa_last_error_message();
    EXPECT_GT(per_second, 1e6) << kind;
    EXPECT_LT(per_second, 1e13) << kind;
  }
  double per_second = 7;
  EXPECT_EQ(fa_measure_ceiling("fp8", 1, &per_second), FA_INVALID_ARGUMENT);
  EXPECT_EQ(fa_measure_ceiling("fp32_fma", -1, &per_second), FA_INVALID_ARGUMENT);
  EXPECT_EQ(fa_measure_ceiling(nullptr, 1, &per_second), FA_INVALID_ARGUMENT);
  EXPECT_EQ(fa_measure_ceiling("fp32_fma", 1, nullptr), FA_INVALID_ARGUMENT);
  EXPECT_EQ(per_second, 7);
}

}  // namespace
}  // namespace fa::cases
