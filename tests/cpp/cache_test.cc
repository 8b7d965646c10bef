// Attention over a KV cache against the fp64 reference over the same keys laid out densely.
#include <gtest/gtest.h>

#include "core/registry.h"
#include "core/validate.h"
#include "cpu/thread_pool.h"
#include "reference/reference.h"
#include "testing.h"

namespace fa {
namespace {

using core::AttentionArgs;
using core::DataType;
using testing::Tensor;

struct Spec {
  DataType dtype = DataType::kFloat32;
  int64_t batch = 2, seqlen_q = 1, seqlen_new = 1, room = 64;
  int64_t num_heads = 2, num_heads_kv = 2, head_dim = 16, head_dim_v = 16;
  std::vector<int64_t> cached{20, 33};
  std::vector<int64_t> leftpad{};
  std::vector<int64_t> rows{};  // cache_batch_idx
  int64_t page_size = 0;
  int64_t rotary_dim = 0;
  bool interleaved = true;
  bool causal = false;
  int64_t window_left = -1;
  double softcap = 0.0;
  bool alibi = false;
  int64_t num_splits = 0;
};

class Call {
 public:
  explicit Call(const Spec& s) : s_(s) {
    q = filled({s.batch, s.seqlen_q, s.num_heads, s.head_dim}, 1);
    out = Tensor(s.dtype, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v});
    lse = Tensor(DataType::kFloat32, {s.batch, s.num_heads, s.seqlen_q});
    if (s.seqlen_new > 0) {
      k_new = filled({s.batch, s.seqlen_new, s.num_heads_kv, s.head_dim}, 2);
      v_new = filled({s.batch, s.seqlen_new, s.num_heads_kv, s.head_dim_v}, 3);
    }
    make_cache();
    cache_seqlens = testing::int32_tensor(s.cached);
    if (!s.leftpad.empty()) cache_leftpad = testing::int32_tensor(s.leftpad);
    if (!s.rows.empty()) cache_batch_idx = testing::int32_tensor(s.rows);
    if (s.rotary_dim > 0) {
      cos = Tensor(s.dtype, {s.room + s.seqlen_q, s.rotary_dim / 2});
      sin = cos;
      cos.fill([&](int64_t i) { return std::cos(angle(i)); });
      sin.fill([&](int64_t i) { return std::sin(angle(i)); });
    }
    if (s.alibi) {
      slopes = Tensor(DataType::kFloat32, {s.num_heads});
      slopes.fill([](int64_t h) { return 0.1 * static_cast<double>(h + 1); });
    }
    out.poison();
    lse.poison();
  }

  AttentionArgs args() const {
    AttentionArgs args;
    args.q = q.view();
    args.k = k.view();
    args.v = v.view();
    args.out = out.view();
    args.lse = lse.view();
    args.cache_seqlens = cache_seqlens.view();
    args.cache_leftpad = cache_leftpad.view();
    args.cache_batch_idx = cache_batch_idx.view();
    args.block_table = block_table.view();
    args.k_new = k_new.view();
    args.v_new = v_new.view();
    args.rotary_cos = cos.view();
    args.rotary_sin = sin.view();
    args.rotary_interleaved = s_.interleaved;
    args.alibi_slopes = slopes.view();
    args.causal = s_.causal;
    args.window_left = s_.window_left;
    args.softcap = s_.softcap;
    args.num_splits = s_.num_splits;
    return args;
  }

  // Row-major number of element (position, head, d) of batch b's row.
  int64_t at(const Tensor& cache, int64_t b, int64_t position, int64_t head, int64_t d) const {
    int64_t row = s_.rows.empty() ? b : s_.rows[b];
    int64_t rows = s_.room;
    if (s_.page_size > 0) {
      row = static_cast<int64_t>(block_table.get(b * pages_per_row() + position / s_.page_size));
      position %= s_.page_size;
      rows = s_.page_size;
    }
    const int64_t dim = cache.view().shape[3];
    return ((row * rows + position) * s_.num_heads_kv + head) * dim + d;
  }

  int64_t pages_per_row() const { return s_.room / s_.page_size; }

  // Element d of a row that was rotated to `position`.
  double rotated(const std::function<double(int64_t)>& row, int64_t position, int64_t d) const {
    const int64_t half = s_.rotary_dim / 2;
    if (d >= s_.rotary_dim) return row(d);
    const int64_t pair = s_.interleaved ? d / 2 : d % half;
    const bool second = s_.interleaved ? d % 2 == 1 : d >= half;
    const double c = cos.get(position * half + pair), t = sin.get(position * half + pair);
    const int64_t x = s_.interleaved ? pair * 2 : pair;
    const int64_t y = s_.interleaved ? x + 1 : x + half;
    return second ? row(x) * t + row(y) * c : row(x) * c - row(y) * t;
  }

  const Spec& spec() const { return s_; }
  Tensor q, k, v, out, lse, k_new, v_new, cos, sin, slopes;
  Tensor cache_seqlens, cache_leftpad, cache_batch_idx, block_table;

 private:
  double angle(int64_t i) const {
    const int64_t half = s_.rotary_dim / 2;
    return static_cast<double>(i / half) * std::pow(0.5, static_cast<double>(i % half));
  }

  Tensor filled(const std::vector<int64_t>& shape, uint64_t seed) const {
    Tensor tensor(s_.dtype, shape);
    tensor.fill_normal(seed);
    return tensor;
  }

  // NaN but where tokens are cached.
  void make_cache() {
    if (s_.page_size > 0) {
      const int64_t pages = s_.batch * pages_per_row() + 2;
      k = Tensor(s_.dtype, {pages, s_.page_size, s_.num_heads_kv, s_.head_dim});
      v = Tensor(s_.dtype, {pages, s_.page_size, s_.num_heads_kv, s_.head_dim_v});
      block_table = Tensor(DataType::kInt32, {s_.batch, pages_per_row()});
      block_table.fill([&](int64_t i) { return static_cast<double>(pages - 1 - i); });
    } else {
      const int64_t rows = s_.rows.empty() ? s_.batch : s_.batch + 2;
      k = Tensor(s_.dtype, {rows, s_.room, s_.num_heads_kv, s_.head_dim});
      v = Tensor(s_.dtype, {rows, s_.room, s_.num_heads_kv, s_.head_dim_v});
    }
    k.poison();
    v.poison();
    testing::Random random(4);
    for (Tensor* cache : {&k, &v}) {
      for (int64_t b = 0; b < s_.batch; ++b) {
        const int64_t first = s_.leftpad.empty() ? 0 : s_.leftpad[b];
        for (int64_t j = first; j < s_.cached[b]; ++j) {
          for (int64_t h = 0; h < s_.num_heads_kv; ++h) {
            for (int64_t d = 0; d < cache->view().shape[3]; ++d) {
              cache->set(at(*cache, b, j, h, d), random.normal());
            }
          }
        }
      }
    }
  }

  const Spec s_;
};

void run(const core::Implementation& implementation, const Call& call, core::Parallel& parallel) {
  const auto problem = core::validate_forward(call.args());
  ASSERT_TRUE(problem.ok()) << problem.status().message();
  const core::Result<core::PlanPtr> plan = implementation.accept(problem.value(), {});
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  Tensor workspace(DataType::kFloat32, {plan.value()->workspace_bytes(parallel.num_workers()) / 4});
  workspace.poison();
  const auto status = plan.value()->run(call.args(), workspace.view().data, {nullptr, &parallel});
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_TRUE(workspace.canaries_intact());
}

// The cache after the call: new tokens are in place, and nothing else was touched.
void check_cache(const Call& before, const Call& after) {
  const Spec& s = before.spec();
  Call expected = before;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < s.seqlen_new; ++t) {
      const int64_t position = s.cached[b] + t;
      for (int64_t h = 0; h < s.num_heads_kv; ++h) {
        const int64_t row = (b * s.seqlen_new + t) * s.num_heads_kv + h;
        for (int64_t d = 0; d < s.head_dim; ++d) {
          const auto element = [&](int64_t i) { return before.k_new.get(row * s.head_dim + i); };
          const double want = s.rotary_dim > 0 ? before.rotated(element, position, d) : element(d);
          const int64_t at = before.at(before.k, b, position, h, d);
          const double got = after.k.get(at);
          ASSERT_NEAR(got, want, 4 * testing::unit_roundoff(s.dtype) * (1 + std::abs(want)));
          expected.k.set(at, got);
        }
        for (int64_t d = 0; d < s.head_dim_v; ++d) {
          expected.v.set(before.at(before.v, b, position, h, d),
                         before.v_new.get(row * s.head_dim_v + d));
        }
      }
    }
  }
  EXPECT_TRUE(after.k.bitwise_equal(expected.k));
  EXPECT_TRUE(after.v.bitwise_equal(expected.v));
}

// One batch of the call as a dense problem, read from the cache as the call left it.
void check_batch(const Call& call, int64_t b) {
  const Spec& s = call.spec();
  const int64_t first = s.leftpad.empty() ? 0 : s.leftpad[b];
  const int64_t n = s.cached[b] + s.seqlen_new - first;
  Tensor q(s.dtype, {1, s.seqlen_q, s.num_heads, s.head_dim});
  Tensor k(s.dtype, {1, n, s.num_heads_kv, s.head_dim});
  Tensor v(s.dtype, {1, n, s.num_heads_kv, s.head_dim_v});
  const int64_t q_size = s.seqlen_q * s.num_heads * s.head_dim;
  const bool by_position = s.causal || s.window_left >= 0;
  q.fill([&](int64_t i) {
    const int64_t d = i % s.head_dim, query = i / (s.num_heads * s.head_dim);
    const auto element = [&](int64_t e) { return call.q.get(b * q_size + i - d + e); };
    const int64_t position = s.cached[b] + (by_position ? query : 0);
    return s.rotary_dim > 0 ? call.rotated(element, position, d) : element(d);
  });
  for (const auto& [dense, cache] : {std::pair{&k, &call.k}, std::pair{&v, &call.v}}) {
    const int64_t dim = cache->view().shape[3];
    dense->fill([&, cache = cache](int64_t i) {
      return cache->get(call.at(*cache, b, first + i / (s.num_heads_kv * dim),
                                i / dim % s.num_heads_kv, i % dim));
    });
  }
  Tensor out(s.dtype, {1, s.seqlen_q, s.num_heads, s.head_dim_v});
  AttentionArgs args = call.args();
  for (core::TensorView* unused :
       {&args.lse, &args.cache_seqlens, &args.cache_leftpad, &args.cache_batch_idx,
        &args.block_table, &args.k_new, &args.v_new, &args.rotary_cos, &args.rotary_sin}) {
    *unused = {};
  }
  args.q = q.view();
  args.k = k.view();
  args.v = v.view();
  args.out = out.view();
  const auto problem = core::validate_forward(args);
  ASSERT_TRUE(problem.ok()) << problem.status().message();
  std::vector<double> value(out.num_elements()), bound(value.size());
  std::vector<double> lse(s.num_heads * s.seqlen_q);
  reference::forward(args, problem.value(), {value.data(), lse.data(), bound.data()});
  for (int64_t i = 0; i < out.num_elements(); ++i) {
    out.set(i, call.out.get(b * out.num_elements() + i));
  }
  const double limit = s.dtype == DataType::kFloat32 ? 4e-6 : 2 * testing::unit_roundoff(s.dtype);
  EXPECT_LE(testing::normalised_error(out, value.data(), bound.data()), limit);
  for (size_t i = 0; i < lse.size(); ++i) {
    const double got = call.lse.get(b * static_cast<int64_t>(lse.size()) + static_cast<int64_t>(i));
    if (std::isinf(lse[i])) {
      EXPECT_EQ(got, lse[i]);
    } else {
      EXPECT_NEAR(got, lse[i], s.rotary_dim > 0 ? 20 * testing::unit_roundoff(s.dtype) : 2e-5);
    }
  }
}

std::vector<core::Implementation> cpu_implementations(DataType dtype) {
  std::vector<core::Implementation> list;
  core::AttentionProblem trivial;
  trivial.dtype = dtype;
  trivial.head_dim = trivial.head_dim_v = trivial.num_heads = trivial.num_heads_kv = 1;
  for (const core::Implementation& it : core::implementations(core::DeviceType::kCpu)) {
    if (std::string(it.name).starts_with("cpu:") && it.accept(trivial, {}).ok()) {
      list.push_back(it);
    }
  }
  return list;
}

void check(const Spec& spec) {
  cpu::ThreadPool pool(2);
  for (const core::Implementation& implementation : cpu_implementations(spec.dtype)) {
    SCOPED_TRACE(implementation.name);
    const Call before(spec);
    Call after(spec);
    run(implementation, after, pool);
    if (::testing::Test::HasFatalFailure()) return;
    check_cache(before, after);
    for (int64_t b = 0; b < spec.batch; ++b) check_batch(after, b);
    for (const Tensor* tensor : {&after.out, &after.lse, &after.k, &after.v}) {
      EXPECT_TRUE(tensor->canaries_intact());
    }
  }
}

TEST(Cache, one_token_is_appended_and_seen) { check({}); }
TEST(Cache, nothing_may_be_appended) { check({.seqlen_q = 3, .seqlen_new = 0}); }
TEST(Cache, an_empty_row_has_no_output) { check({.seqlen_new = 0, .cached = {0, 5}}); }
TEST(Cache, pages_of_one_token) { check({.cached = {20, 33}, .page_size = 1}); }
TEST(Cache, rows_are_found_by_index) { check({.rows = {3, 1}}); }
TEST(Cache, left_padding_is_skipped) { check({.cached = {20, 33}, .leftpad = {7, 0}}); }
TEST(Cache, rotary_both_ways) {
  check({.seqlen_q = 2, .seqlen_new = 2, .rotary_dim = 8, .interleaved = true, .causal = true});
  check({.seqlen_q = 2, .seqlen_new = 2, .rotary_dim = 16, .interleaved = false});
}

Spec random_spec(uint64_t seed) {
  testing::Random random(seed);
  const auto sometimes = [&](int percent) { return random.between(1, 100) <= percent; };
  Spec s;
  s.dtype = static_cast<DataType>(
      random.between(static_cast<int>(DataType::kFloat32), static_cast<int>(DataType::kBFloat16)));
  s.batch = random.between(1, 4);
  s.num_heads_kv = random.between(1, 3);
  s.num_heads = s.num_heads_kv * random.between(1, 8);
  s.head_dim = random.between(1, 40) * 2;
  s.head_dim_v = sometimes(70) ? s.head_dim : random.between(1, 80);
  s.seqlen_q = sometimes(50) ? 1 : random.between(1, 70);
  s.seqlen_new = sometimes(20) ? 0 : sometimes(50) ? s.seqlen_q : random.between(1, 20);
  s.page_size = sometimes(50) ? std::vector<int64_t>{1, 16, 7, 64}[random.between(0, 3)] : 0;
  s.room = (sometimes(30) ? 1200 : 200) / 7 / 64 * 7 * 64 + 448;
  s.cached.clear();
  for (int64_t b = 0; b < s.batch; ++b) {
    s.cached.push_back(sometimes(10) ? 0 : random.between(0, s.room - s.seqlen_new));
  }
  if (sometimes(30)) {
    for (int64_t length : s.cached) s.leftpad.push_back(random.between(0, length));
  }
  if (s.page_size == 0 && sometimes(30)) {
    for (int64_t b = 0; b < s.batch; ++b) s.rows.push_back(s.batch + 1 - b);
  }
  if (s.seqlen_new > 0 && sometimes(50)) s.rotary_dim = 2 * random.between(1, s.head_dim / 2);
  s.interleaved = sometimes(50);
  s.causal = sometimes(60);
  if (sometimes(30)) s.window_left = random.between(0, 300);
  if (sometimes(20)) s.softcap = 10.0;
  if (sometimes(20)) s.alibi = true;
  s.num_splits = std::vector<int64_t>{0, 0, 1, 2, 3, 7}[random.between(0, 5)];
  return s;
}

TEST(Cache, agrees_with_the_reference_on_random_problems) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    check(random_spec(seed));
  }
}

// What kernels for few queries take: whole vectors of head_dim, at most 8 queries of a key head.
Spec few_queries_spec(uint64_t seed) {
  Spec s = random_spec(seed);
  testing::Random random(seed);
  s.dtype = static_cast<DataType>(static_cast<int>(DataType::kFloat32) + seed % 3);
  const int64_t group = random.between(1, 8);
  s.num_heads_kv = random.between(1, 5);
  s.num_heads = s.num_heads_kv * group;
  s.seqlen_q = random.between(1, 8 / group);
  if (s.seqlen_new > 0) s.seqlen_new = s.seqlen_q;
  s.head_dim = 16 * random.between(1, 11);
  s.head_dim_v = 16 * random.between(1, 11);
  s.rotary_dim = 0;
  return s;
}

TEST(Cache, few_queries_agree_with_the_reference) {
  for (uint64_t seed = 200; seed < 224; ++seed) {
    SCOPED_TRACE(seed);
    check(few_queries_spec(seed));
  }
}

TEST(Cache, an_infinite_value_stays_infinite_for_few_queries) {
  for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    const Spec spec{.dtype = dtype, .seqlen_new = 0, .cached = {1, 3}};
    for (const core::Implementation& implementation : cpu_implementations(dtype)) {
      SCOPED_TRACE(implementation.name);
      Call call(spec);
      call.v.set(call.at(call.v, 0, 0, 0, 5), INFINITY);
      call.v.set(call.at(call.v, 1, 2, 0, 5), INFINITY);
      testing::SerialParallel serial;
      run(implementation, call, serial);
      for (int64_t b = 0; b < 2; ++b) {
        EXPECT_EQ(call.out.get(b * spec.num_heads * spec.head_dim_v + 5), INFINITY);
        EXPECT_TRUE(std::isfinite(call.out.get(b * spec.num_heads * spec.head_dim_v + 6)));
      }
    }
  }
}

TEST(Cache, results_do_not_depend_on_the_number_of_threads) {
  for (uint64_t seed = 100; seed < 120; ++seed) {
    const Spec spec = seed < 110 ? random_spec(seed) : few_queries_spec(seed);
    for (const core::Implementation& implementation : cpu_implementations(spec.dtype)) {
      Call expected(spec), got(spec);
      testing::SerialParallel serial;
      cpu::ThreadPool pool(3);
      run(implementation, expected, serial);
      run(implementation, got, pool);
      EXPECT_TRUE(got.out.bitwise_equal(expected.out));
      EXPECT_TRUE(got.lse.bitwise_equal(expected.lse));
      EXPECT_TRUE(got.k.bitwise_equal(expected.k));
    }
  }
}

// Splits begin where the keys of a task's panels do, so that its panels must be the same ones.
TEST(Cache, splits_do_not_depend_on_the_number_of_workers) {
  Spec spec;
  spec.batch = 1;
  spec.num_heads = spec.num_heads_kv = 14;
  spec.seqlen_q = spec.seqlen_new = 330;
  spec.room = 600;
  spec.cached = {200};
  spec.causal = true;
  for (int64_t num_splits : {1, 2, 3}) {
    spec.num_splits = num_splits;
    for (const core::Implementation& implementation : cpu_implementations(spec.dtype)) {
      Call expected(spec), got(spec);
      testing::SerialParallel one(1), many(64);
      run(implementation, expected, one);
      run(implementation, got, many);
      EXPECT_TRUE(got.out.bitwise_equal(expected.out)) << num_splits << ' ' << implementation.name;
      EXPECT_TRUE(got.lse.bitwise_equal(expected.lse)) << num_splits << ' ' << implementation.name;
    }
  }
}

}  // namespace
}  // namespace fa
