// A decoder's attention: two sequences whose keys and values lie in pages of one pool, given out as
// they grow. Each step appends a token of each, and attends to all so far; the last step agrees
// with attention to the whole sequence.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "flash_attn/attention.hpp"

namespace {

constexpr std::int64_t kBatch = 2, kSteps = 40, kHeads = 8, kKeyHeads = 2, kDim = 64;
constexpr std::int64_t kPageSize = 16, kMaxPages = 3, kPages = kBatch * kMaxPages;

std::vector<float> random_rows(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

bool succeeded(const fa::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return status.ok();
}

// Token `t` of each sequence of [kBatch, kSteps, heads, kDim].
fa::Tensor token(std::vector<float>& rows, std::int64_t heads, std::int64_t t) {
  return fa::tensor(rows.data() + t * heads * kDim, {kBatch, 1, heads, kDim},
                    {kSteps * heads * kDim, heads * kDim, kDim, 1});
}

}  // namespace

int main() {
  std::vector<float> q = random_rows(kBatch * kSteps * kHeads * kDim, 1);
  std::vector<float> k = random_rows(kBatch * kSteps * kKeyHeads * kDim, 2);
  std::vector<float> v = random_rows(k.size(), 3), out(q.size()), whole(q.size());

  std::vector<float> k_pool(kPages * kPageSize * kKeyHeads * kDim), v_pool(k_pool.size());
  const auto pages = [](std::vector<float>& pool) {
    return fa::tensor(pool.data(), {kPages, kPageSize, kKeyHeads, kDim});
  };
  std::array<std::int32_t, kBatch * kMaxPages> table{};
  std::array<std::int32_t, kBatch> lengths{};  // tokens in the cache before a step
  std::int32_t next_page = kPages;
  for (std::int64_t t = 0; t < kSteps; ++t) {
    for (std::int64_t b = 0; t % kPageSize == 0 && b < kBatch; ++b) {
      table[b * kMaxPages + t / kPageSize] = --next_page;  // any that is free
    }
    lengths.fill(static_cast<std::int32_t>(t));
    const fa::Status status =
        fa::forward({.q = token(q, kHeads, t),
                     .k = pages(k_pool),
                     .v = pages(v_pool),
                     .out = token(out, kHeads, t),
                     .block_table = fa::tensor(table.data(), {kBatch, kMaxPages}),
                     .cache_seqlens = fa::tensor(lengths.data(), {kBatch}),
                     .k_new = token(k, kKeyHeads, t),
                     .v_new = token(v, kKeyHeads, t),
                     .causal = true});
    if (!succeeded(status)) return 1;
  }

  const auto sequence = [](std::vector<float>& rows, std::int64_t heads) {
    return fa::tensor(rows.data(), {kBatch, kSteps, heads, kDim});
  };
  if (!succeeded(fa::forward({.q = sequence(q, kHeads),
                              .k = sequence(k, kKeyHeads),
                              .v = sequence(v, kKeyHeads),
                              .out = sequence(whole, kHeads),
                              .causal = true}))) {
    return 1;
  }
  float worst = 0.0f;
  for (std::size_t i = 0; i < out.size(); ++i) worst = std::max(worst, std::abs(out[i] - whole[i]));
  std::printf("%d steps of %d sequences in pages of %d, off from the whole by %.1e\n",
              static_cast<int>(kSteps), static_cast<int>(kBatch), static_cast<int>(kPageSize),
              static_cast<double>(worst));
  return worst < 1e-5f ? 0 : 1;
}
