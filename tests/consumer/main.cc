// One query over two keys whose scores are equal: the result is the mean of the values.
#include <flash_attn/attention.hpp>

#include <cmath>
#include <cstdio>

int main() {
  const float q[4] = {1, 2, 3, 4}, k[8] = {}, v[8] = {1, 2, 3, 4, 3, 4, 5, 6};
  float out[4] = {};
  const fa::Status status = fa::forward({.q = fa::tensor(q, {1, 1, 1, 4}),
                                         .k = fa::tensor(k, {1, 2, 1, 4}),
                                         .v = fa::tensor(v, {1, 2, 1, 4}),
                                         .out = fa::tensor(out, {1, 1, 1, 4})});
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  for (int d = 0; d < 4; ++d) {
    if (std::abs(out[d] - static_cast<float>(d + 2)) > 1e-6f) return 1;
  }
  std::printf("FlashAttention-Plus %s from C++\n", fa::version());
  return 0;
}
