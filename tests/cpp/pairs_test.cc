// The kernels of AMX, on tiles that are emulated, against those of AVX512-BF16.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/pairs.h"
#include "tests/cpp/pair_buffers.h"

namespace fa::cpu {

const PairKernels* emulated_pair_kernels();

namespace {

// The dot products sum in another order.
void expect_near(const Buffer<float>& one, const Buffer<float>& other, const char* what) {
  for (int64_t i = 0; i < one.size; ++i) {
    ASSERT_NEAR(one.data[i], other.data[i], 1e-4 * (1.0 + std::abs(other.data[i])))
        << what << "[" << i << "]";
  }
}

// A product with room and random contents of its own for C.
struct Operands {
  Operands(int64_t rows, int64_t columns, int64_t depth, uint64_t seed)
      : a(halves(rows * depth, seed)),
        b(halves(columns * depth, seed + 1)),
        c(floats(rows * columns, seed + 2)),
        product{.a = a.data,
                .a_row_step = kPairRows * depth,
                .b = reinterpret_cast<const uint32_t*>(b.data),
                .b_depth_step = kBlockB,
                .b_column_step = kPairColumns * depth / 2,
                .c = c.data,
                .c_column_step = rows * kPairColumns,
                .rows = rows,
                .columns = columns,
                .depth = depth,
                .accumulate = true} {}
  Buffer<uint16_t> a, b;
  Buffer<float> c;
  PairProduct product;
};

class Pairs : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_avx512_bf16()) GTEST_SKIP() << "needs AVX512-BF16";
  }
  const PairKernels& amx() { return *emulated_pair_kernels(); }
  const PairKernels& avx512() { return *avx512_pair_kernels(); }
};

TEST_F(Pairs, products_of_any_number_of_blocks_agree) {
  for (int64_t rows : {16, 32, 48}) {
    for (int64_t columns : {16, 32, 48, 64}) {
      for (int64_t depth : {32, 96}) {
        for (bool accumulate : {false, true}) {
          Operands one(rows, columns, depth, 7), other(rows, columns, depth, 7);
          one.product.accumulate = other.product.accumulate = accumulate;
          amx().multiply(one.product);
          avx512().multiply(other.product);
          expect_near(one.c, other.c, "c");
        }
      }
    }
  }
}

TEST_F(Pairs, probabilities_and_the_product_beside_them_agree) {
  constexpr int64_t kPairs = kChunkKeys / 2 * kChunkLanes;
  for (int64_t depth : {32, 64, 96, 128, 256}) {
    const Buffer<float> scores = floats(kChunkKeys * kChunkLanes, 3);
    const Buffer<float> maximum = floats(kChunkLanes, 4);
    const Buffer<char> ahead(kChunkAhead);
    const auto run = [&](const PairKernels& kernels, int beside, Operands(&operands)[2]) {
      const PairProduct products[2] = {operands[0].product, operands[1].product};
      Buffer<uint32_t> pairs(kPairs);
      Buffer<float> sum = floats(kChunkLanes, 5);
      kernels.exponentiate({scores.data, 0.7f, maximum.data, sum.data, pairs.data,
                            kChunkKeys / 2 * kPairColumns, ahead.data},
                           products, beside);
      std::vector<uint32_t> result(pairs.data, pairs.data + kPairs);
      for (int64_t i = 0; i < kChunkLanes; ++i) {
        result.push_back(std::bit_cast<uint32_t>(sum.data[i]));
      }
      return result;
    };
    for (int beside : {0, 1, 2}) {
      // What is left of a chunk's products differs in shape, and is added to.
      Operands one[2] = {{kChunkKeys, kChunkLanes, depth, 9}, {2 * kBesideRows, 32, 96, 19}};
      Operands other[2] = {{kChunkKeys, kChunkLanes, depth, 9}, {2 * kBesideRows, 32, 96, 19}};
      one[1].product.accumulate = other[1].product.accumulate = true;
      EXPECT_EQ(run(amx(), beside, one), run(avx512(), beside, other))
          << "depth " << depth << ", " << beside << " products";
      for (int i = 0; i < 2; ++i) expect_near(one[i].c, other[i].c, "c");
    }
  }
}

TEST_F(Pairs, gradients_and_the_products_beside_them_agree) {
  constexpr int64_t kCount = kChunkKeys * kChunkLanes;
  for (int64_t depth : {32, 96, 128}) {
    const Buffer<float> scores = floats(kCount, 3), dp = floats(kCount, 4);
    const Buffer<float> lse = floats(kChunkLanes, 5), delta = floats(kChunkLanes, 6);
    const auto run = [&](const PairKernels& kernels, Operands(&operands)[2]) {
      const PairProduct products[2] = {operands[0].product, operands[1].product};
      Buffer<uint16_t> p(kCount), ds(kCount);
      Buffer<uint32_t> pairs(kCount / 2);
      kernels.differentiate({scores.data, dp.data, 0.7f, lse.data, delta.data, p.data, ds.data,
                             kPairRows * kChunkLanes, pairs.data, kChunkKeys / 2 * kPairColumns},
                            products, 2);
      std::vector<uint32_t> result(p.data, p.data + kCount);
      result.insert(result.end(), ds.data, ds.data + kCount);
      result.insert(result.end(), pairs.data, pairs.data + kCount / 2);
      return result;
    };
    Operands one[2] = {{kChunkKeys, kChunkLanes, depth, 9}, {kChunkKeys, kChunkLanes, 64, 19}};
    Operands other[2] = {{kChunkKeys, kChunkLanes, depth, 9}, {kChunkKeys, kChunkLanes, 64, 19}};
    EXPECT_EQ(run(amx(), one), run(avx512(), other)) << "depth " << depth;
    for (int i = 0; i < 2; ++i) expect_near(one[i].c, other[i].c, "c");
  }
}

}  // namespace
}  // namespace fa::cpu
