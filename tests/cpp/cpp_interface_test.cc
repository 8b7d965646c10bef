// attention.hpp as its users meet it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "flash_attn/attention.hpp"
#include "tests/case_runner.h"
#include "tests/cases.h"
#include "tests/cpp/testing.h"

namespace fa::cases {
namespace {

using testing::contains;

constexpr int64_t kBatch = 2, kSeqlen = 40, kHeads = 4, kDim = 16;
constexpr size_t kElements = kBatch * kSeqlen * kHeads * kDim;

std::vector<float> normal(uint64_t seed, size_t count = kElements) {
  testing::Random random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

// A dense fp32 call on memory of its own.
struct Example {
  std::vector<float> q = normal(1), k = normal(2), v = normal(3);
  std::vector<float> out = std::vector<float>(kElements, -77.0f);

  ForwardArgs args() {
    return {.q = bshd(q), .k = bshd(k), .v = bshd(v), .out = bshd(out), .causal = true};
  }
  static Tensor bshd(std::vector<float>& values) {
    return tensor(values.data(), {kBatch, kSeqlen, kHeads, kDim});
  }
};

TEST(Cpp, forward_meets_the_oracle) {
  Example example;
  std::vector<float> lse(kBatch * kHeads * kSeqlen);
  ForwardArgs args = example.args();
  args.lse = tensor(lse.data(), {kBatch, kHeads, kSeqlen});
  const Status status = forward(args);
  ASSERT_TRUE(status.ok()) << status.message();

  std::vector<double> out(kElements), bound(kElements), lse64(lse.size());
  const Status oracle = forward_oracle(args, tensor(out.data(), {kBatch, kSeqlen, kHeads, kDim}),
                                       tensor(lse64.data(), {kBatch, kHeads, kSeqlen}),
                                       tensor(bound.data(), {kBatch, kSeqlen, kHeads, kDim}));
  ASSERT_TRUE(oracle.ok()) << oracle.message();
  for (size_t i = 0; i < kElements; ++i) {
    ASSERT_LE(std::abs(static_cast<double>(example.out[i]) - out[i]), kFloat32OutBound * bound[i]);
  }
  for (size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], lse64[i], 1e-5);
}

// A forward of fp32 with attn_bias and learnable_sink, and memory for its gradients.
struct BackwardExample {
  static constexpr size_t kBiasElements = kHeads * kSeqlen * kSeqlen;
  Example forward;
  std::vector<float> lse = std::vector<float>(kBatch * kHeads * kSeqlen);
  std::vector<float> bias = normal(4, kBiasElements), sink = normal(5, kHeads), dout = normal(6);

  ForwardArgs args() {
    ForwardArgs args = forward.args();
    args.lse = tensor(lse.data(), {kBatch, kHeads, kSeqlen});
    args.attn_bias = tensor(bias.data(), {kHeads, kSeqlen, kSeqlen});
    args.learnable_sink = tensor(sink.data(), {kHeads});
    return args;
  }
};

// The gradients of BackwardExample, in float or double.
template <class T>
struct ExampleGradients {
  std::vector<T> dq = std::vector<T>(kElements), dk = dq, dv = dq;
  std::vector<T> bias = std::vector<T>(BackwardExample::kBiasElements),
                 sink = std::vector<T>(kHeads);

  Gradients tensors(const std::vector<float>& dout) {
    const auto bshd = [](auto& values) {
      return tensor(values.data(), {kBatch, kSeqlen, kHeads, kDim});
    };
    return {.dout = bshd(dout),
            .dq = bshd(dq),
            .dk = bshd(dk),
            .dv = bshd(dv),
            .d_attn_bias = tensor(bias.data(), {kHeads, kSeqlen, kSeqlen}),
            .d_learnable_sink = tensor(sink.data(), {kHeads})};
  }
  std::vector<const std::vector<T>*> all() const { return {&dq, &dk, &dv, &bias, &sink}; }
};

TEST(Cpp, backward_meets_the_oracle) {
  BackwardExample example;
  ForwardArgs args = example.args();
  Status status = forward(args);
  ASSERT_TRUE(status.ok()) << status.message();
  // What the backward reads, out and lse too, may be constant.
  const std::vector<float>&out = example.forward.out, &lse = example.lse;
  args.out = tensor(out.data(), {kBatch, kSeqlen, kHeads, kDim});
  args.lse = tensor(lse.data(), {kBatch, kHeads, kSeqlen});
  ExampleGradients<float> gradients;
  status = backward(args, gradients.tensors(example.dout));
  ASSERT_TRUE(status.ok()) << status.message();

  ExampleGradients<double> expected, bounds;
  status = backward_oracle(args, expected.tensors(example.dout), bounds.tensors({}));
  ASSERT_TRUE(status.ok()) << status.message();
  for (size_t g = 0; g < gradients.all().size(); ++g) {
    const std::vector<float>& values = *gradients.all()[g];
    for (size_t i = 0; i < values.size(); ++i) {
      ASSERT_LE(std::abs(static_cast<double>(values[i]) - (*expected.all()[g])[i]),
                kFloat32GradientBound * (*bounds.all()[g])[i])
          << "gradient " << g << " at " << i;
    }
  }
}

TEST(Cpp, backward_names_what_it_cannot_use) {
  BackwardExample example;
  ForwardArgs args = example.args();
  ASSERT_TRUE(forward(args).ok());
  ExampleGradients<float> memory;
  const Gradients good = memory.tensors(example.dout);
  Gradients gradients = good;
  gradients.dk = tensor(std::as_const(memory.dk).data(), {kBatch, kSeqlen, kHeads, kDim});
  EXPECT_TRUE(contains(backward(args, gradients).message(), "dk: is an output"));
  gradients = good;
  gradients.dv = tensor(memory.dv.data(), {1, 1, 1, 1, 1, 1});
  EXPECT_TRUE(contains(backward(args, gradients).message(), "dv: has more than 5 dimensions"));
  gradients = good;
  gradients.dq = {};
  EXPECT_TRUE(contains(backward(args, gradients).message(), "dq: is missing"));
  args.v = tensor(example.forward.v.data(), {kBatch, kSeqlen, kHeads, kDim}, {kDim, 1});
  EXPECT_TRUE(contains(backward(args, good).message(), "v:"));
  EXPECT_EQ(memory.dq, std::vector<float>(kElements)) << "nothing is written";
}

TEST(Cpp, backward_is_explained) {
  BackwardExample example;
  ForwardArgs args = example.args();
  ExampleGradients<float> memory;
  const Gradients gradients = memory.tensors(example.dout);
  std::string text;
  ASSERT_TRUE(explain(args, gradients, &text).ok());
  EXPECT_TRUE(contains(text, "chosen")) << text;
  args.lse = {};
  const Status status = explain(args, gradients, &text);
  EXPECT_TRUE(contains(status.message(), "lse: is missing")) << status.message();
  EXPECT_EQ(text, "");
}

// Token by token through a cache, and at once.
TEST(Cpp, decoding_is_the_forward_of_the_whole) {
  Example example;
  ASSERT_TRUE(forward(example.args()).ok());
  std::vector<float> k_cache(kElements), v_cache(kElements), out(kElements, -77.0f);
  const auto token = [](std::vector<float>& values, int64_t t) {
    return tensor(values.data() + t * kHeads * kDim, {kBatch, 1, kHeads, kDim},
                  {kSeqlen * kHeads * kDim, kHeads * kDim, kDim, 1});
  };
  // The rows of the cache are the batch, the other way round.
  const std::array<int32_t, kBatch> rows{1, 0};
  for (int64_t t = 0; t < kSeqlen; ++t) {
    const std::array<int32_t, kBatch> lengths{static_cast<int32_t>(t), static_cast<int32_t>(t)};
    const Status status = forward({.q = token(example.q, t),
                                   .k = Example::bshd(k_cache),
                                   .v = Example::bshd(v_cache),
                                   .out = token(out, t),
                                   .cache_seqlens = tensor(lengths.data(), {kBatch}),
                                   .cache_batch_idx = tensor(rows.data(), {kBatch}),
                                   .k_new = token(example.k, t),
                                   .v_new = token(example.v, t),
                                   .num_splits = t % 3,
                                   .causal = true});
    ASSERT_TRUE(status.ok()) << status.message();
  }
  for (size_t i = 0; i < kElements; ++i) ASSERT_NEAR(out[i], example.out[i], 2e-6) << i;
  EXPECT_TRUE(std::equal(example.k.begin() + kElements / 2, example.k.end(), k_cache.begin()));
}

TEST(Cpp, the_cache_rotates_as_the_c_interface_does) {
  Example example;
  const std::array<int32_t, kBatch> lengths{3, 9};
  const std::vector<float> cos = normal(7, kSeqlen * kDim / 2), sin = normal(8, cos.size());
  std::vector<float> q = normal(9, kBatch * kHeads * kDim), k = normal(10, q.size());
  const auto one = [](std::vector<float>& x) {
    return tensor(x.data(), {kBatch, 1, kHeads, kDim});
  };
  const std::array<int32_t, kBatch> padding{0, 2};
  std::vector<float> caches[2] = {example.k, example.k}, outs[2] = {q, q};
  for (const bool interleaved : {false, true}) {
    std::vector<float>& cache = caches[interleaved ? 1 : 0];
    const Status status = forward({.q = one(q),
                                   .k = Example::bshd(cache),
                                   .v = Example::bshd(example.v),
                                   .out = one(outs[interleaved ? 1 : 0]),
                                   .cache_seqlens = tensor(lengths.data(), {kBatch}),
                                   .cache_leftpad = tensor(padding.data(), {kBatch}),
                                   .k_new = one(k),
                                   .v_new = one(k),
                                   .rotary_cos = tensor(cos.data(), {kSeqlen, kDim / 2}),
                                   .rotary_sin = tensor(sin.data(), {kSeqlen, kDim / 2}),
                                   .rotary_interleaved = interleaved});
    ASSERT_TRUE(status.ok()) << status.message();
    // Element 0 of the first row's new key, at position 3: x0 cos - x1 sin.
    const size_t other = interleaved ? 1 : kDim / 2, angle = 3 * kDim / 2;
    EXPECT_NEAR(cache[3 * kHeads * kDim], k[0] * cos[angle] - k[other] * sin[angle], 1e-6);
  }
  EXPECT_NE(outs[0], outs[1]);
}

TEST(Cpp, a_constant_cache_is_read_and_not_appended_to) {
  Example example;
  const std::array<int32_t, kBatch> lengths{kSeqlen - 1, 7};
  const Example constant = example;
  ForwardArgs args = example.args();
  args.k = tensor(constant.k.data(), {kBatch, kSeqlen, kHeads, kDim});
  args.cache_seqlens = tensor(lengths.data(), {kBatch});
  EXPECT_TRUE(forward(args).ok());
  args.q = args.out = tensor(example.out.data(), {kBatch, 1, kHeads, kDim});
  args.k_new = args.v_new = tensor(constant.v.data(), {kBatch, 1, kHeads, kDim});
  const Status status = forward(args);
  EXPECT_EQ(status.message(), "k: is an output, and was made from a pointer to const");
}

TEST(Cpp, dtypes_follow_from_pointers) {
  std::array<float16, 4> half{};
  std::array<bfloat16, 4> brain{};
  const std::array<double, 4> wide{};
  EXPECT_EQ(tensor(half.data(), {4}).dtype(), DType::kFloat16);
  EXPECT_EQ(tensor(brain.data(), {2, 2}).dtype(), DType::kBFloat16);
  EXPECT_EQ(tensor(wide.data(), {4}).dtype(), DType::kFloat64);
  EXPECT_TRUE(tensor(wide.data(), {4}).read_only());
  EXPECT_FALSE(tensor(half.data(), {4}).read_only());
  EXPECT_EQ(tensor(static_cast<void*>(half.data()), DType::kInt32, {2}).dtype(), DType::kInt32);
  EXPECT_FALSE(Tensor{}.present());
}

TEST(Cpp, constant_inputs_are_taken_and_constant_outputs_refused) {
  Example example;
  ForwardArgs args = example.args();
  const std::vector<float>& q = example.q;
  args.q = tensor(q.data(), {kBatch, kSeqlen, kHeads, kDim});
  EXPECT_TRUE(forward(args).ok());
  args.out = tensor(q.data(), {kBatch, kSeqlen, kHeads, kDim});
  const Status status = forward(args);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(contains(status.message(), "out:")) << status.message();
}

TEST(Cpp, tensors_that_are_none_are_named) {
  Example example;
  ForwardArgs args = example.args();
  args.k = tensor(example.k.data(), {1, 1, 1, 1, 1, 1});
  EXPECT_TRUE(contains(forward(args).message(), "k:"));
  args = example.args();
  args.v = tensor(example.v.data(), {kBatch, kSeqlen, kHeads, kDim}, {kDim, 1});
  EXPECT_TRUE(contains(forward(args).message(), "v:"));
  args = example.args();
  args.q = Tensor{};
  EXPECT_TRUE(contains(forward(args).message(), "q: is missing"));
  EXPECT_EQ(example.out[0], -77.0f);
}

TEST(Cpp, errors_are_thrown_where_asked) {
  EXPECT_NO_THROW(Status{}.throw_if_error());
  Example example;
  ForwardArgs args = example.args();
  args.softcap = -1.0;
  try {
    forward(args).throw_if_error();
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), StatusCode::kInvalidArgument);
    EXPECT_TRUE(contains(error.what(), "softcap"));
  }
}

TEST(Cpp, strides_say_where_elements_lie) {
  Example example;
  ASSERT_TRUE(forward(example.args()).ok());
  const std::vector<float> expected = example.out;
  // [B, H, S, D], seen as [B, S, H, D].
  std::vector<float> transposed(kElements);
  const Tensor out = tensor(transposed.data(), {kBatch, kSeqlen, kHeads, kDim},
                            {kHeads * kSeqlen * kDim, kDim, kSeqlen * kDim, 1});
  ForwardArgs args = example.args();
  args.out = out;
  ASSERT_TRUE(forward(args).ok());
  for (int64_t s = 0; s < kSeqlen; ++s) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const size_t at = static_cast<size_t>((h * kSeqlen + s) * kDim);
      const size_t from = static_cast<size_t>((s * kHeads + h) * kDim);
      ASSERT_EQ(transposed[at], expected[from]);
    }
  }
}

TEST(Cpp, explain_names_the_choice_and_the_mistake) {
  Example example;
  ForwardArgs args = example.args();
  args.backend = "reference";
  std::string text;
  ASSERT_TRUE(explain(args, &text).ok());
  EXPECT_TRUE(contains(text, "reference")) << text;
  EXPECT_TRUE(contains(text, "chosen")) << text;
  EXPECT_TRUE(contains(text, "'reference' is forced")) << text;
  EXPECT_EQ(text, explain(args));
  for (const Implementation& implementation : implementations()) {
    EXPECT_TRUE(contains(text, implementation.name.c_str())) << text;
  }
  args.dropout_p = 1.5;
  EXPECT_FALSE(explain(args, &text).ok());
  EXPECT_TRUE(contains(explain(args), "dropout_p: is 1.5"));
  EXPECT_EQ(example.out[0], -77.0f);
}

TEST(Cpp, implementations_end_with_the_reference) {
  const std::vector<Implementation> list = implementations();
  ASSERT_GE(list.size(), 2u);
  EXPECT_EQ(list.back().name, "reference");
  for (const Implementation& it : list) EXPECT_EQ(it.available, it.reason.empty()) << it.name;
  EXPECT_TRUE(list.back().available);
}

TEST(Cpp, version_has_three_numbers) {
  int major = -1, minor = -1, patch = -1;
  char rest = 0;
  EXPECT_EQ(std::sscanf(version(), "%d.%d.%d%c", &major, &minor, &patch, &rest), 3);
}

TEST(Cpp, threads_are_told) {
  EXPECT_GE(threads().count, 1);
  EXPECT_FALSE(threads().source.empty());
  EXPECT_GE(fa_num_threads(nullptr), 1);
}

}  // namespace
}  // namespace fa::cases
