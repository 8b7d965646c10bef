// Causal attention of (2, 1024, 16, 64) in fp32: which implementation runs it, how fast, how
// exactly.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "flash_attn/attention.hpp"

namespace {

constexpr std::int64_t kBatch = 2, kSeqlen = 1024, kHeads = 16, kDim = 64;
constexpr std::size_t kElements = kBatch * kSeqlen * kHeads * kDim;

std::vector<float> random_tensor(unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(kElements);
  for (float& value : values) value = normal(engine);
  return values;
}

// max |out - oracle| / sum_j P_ij |v_jd| over a slice: the first head of the first sequence, whose
// strides are the whole tensor's.
double error_of_first_head(const std::vector<float>& q, const std::vector<float>& k,
                           const std::vector<float>& v, const std::vector<float>& out) {
  const auto first_head = [](const std::vector<float>& values) {
    return fa::tensor(values.data(), {1, kSeqlen, 1, kDim},
                      {kSeqlen * kHeads * kDim, kHeads * kDim, kDim, 1});
  };
  std::vector<double> exact(kSeqlen * kDim), bound(kSeqlen * kDim);
  const fa::Status status = fa::forward_oracle(
      {.q = first_head(q), .k = first_head(k), .v = first_head(v), .causal = true},
      fa::tensor(exact.data(), {1, kSeqlen, 1, kDim}), {},
      fa::tensor(bound.data(), {1, kSeqlen, 1, kDim}));
  if (!status.ok()) return NAN;
  double worst = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const std::size_t at = i / kDim * kHeads * kDim + i % kDim;
    worst = std::max(worst, std::abs(static_cast<double>(out[at]) - exact[i]) / bound[i]);
  }
  return worst;
}

}  // namespace

int main() {
  const std::vector<float> q = random_tensor(1), k = random_tensor(2), v = random_tensor(3);
  std::vector<float> out(kElements);
  const auto tensor = [](auto& values) {
    return fa::tensor(values.data(), {kBatch, kSeqlen, kHeads, kDim});
  };
  const fa::ForwardArgs args{
      .q = tensor(q), .k = tensor(k), .v = tensor(v), .out = tensor(out), .causal = true};
  std::printf("FlashAttention-Plus %s\n%s", fa::version(), fa::explain(args).c_str());

  std::vector<double> seconds;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    const fa::Status status = fa::forward(args);
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      return 1;
    }
  }
  const double best = *std::min_element(seconds.begin(), seconds.end());
  // Two products of 2 D operations for each pair, and a causal mask leaves half of the pairs.
  const double operations = 4.0 * kBatch * kHeads * kSeqlen * kSeqlen * kDim / 2;
  const double error = error_of_first_head(q, k, v, out);
  std::printf("\n%.2f ms, %.3f TFLOP/s on %d threads; error against fp64 %.1e\n", 1e3 * best,
              operations / best / 1e12, fa::threads().count, error);
  return error < 1e-5 ? 0 : 1;
}
