// The kernels in pairs of bfloat16 that this processor has, against the formulas. Matrices are read
// back by products with the identity, so that nothing here depends on how blocks are laid out.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/arithmetic.h"
#include "cpu/pairs.h"
#include "cpu/row_pairs.h"
#include "tests/cpp/pair_buffers.h"

namespace fa::cpu {
namespace {

using core::round_up;

struct Named {
  const char* name;
  const PairKernels* kernels;
  const RowPairKernels* row_kernels;
};

std::vector<Named> supported_kernels() {
  std::vector<Named> list;
#if defined(__aarch64__)
  if (has_neon_bf16()) list.push_back({"neon", neon_pair_kernels(), neon_row_pair_kernels()});
#else
  if (has_avx512_bf16()) {
    list.push_back({"avx512", avx512_pair_kernels(), avx512_row_pair_kernels()});
  }
  if (has_amx_bf16()) list.push_back({"amx", amx_pair_kernels(), nullptr});
#endif
  return list;
}

double widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t narrow(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Rows of n elements at places of their own, one of them null where there are several.
class Rows {
 public:
  Rows(int64_t count, int64_t n, uint64_t seed) : n_(n), elements_(halves(count * n, seed)) {
    for (int64_t r = 0; r < count; ++r) rows_.push_back(elements_.data + r * n);
    if (count > 2) rows_[1] = nullptr;
  }
  static Rows identity(int64_t n) {
    Rows rows(n, n, 1);
    for (int64_t r = 0; r < n; ++r) {
      rows.rows_[r] = rows.elements_.data + r * n;
      for (int64_t d = 0; d < n; ++d) rows.elements_.data[r * n + d] = narrow(r == d ? 1.0f : 0.0f);
    }
    return rows;
  }
  PairRows view() const { return {rows_.data(), static_cast<int64_t>(rows_.size()), n_}; }
  double at(int64_t row, int64_t d) const {
    const bool inside = row < static_cast<int64_t>(rows_.size()) && d < n_;
    return !inside || rows_[row] == nullptr ? 0.0 : widen(rows_[row][d]);
  }

 private:
  int64_t n_;
  Buffer<uint16_t> elements_;
  std::vector<const uint16_t*> rows_;
};

// Operands as the library lays them out, NaN at first.
struct A {
  A(int64_t rows, int64_t depth)
      : row_step(kPairRows * round_up(depth, kPairDepth)),
        blocks(round_up(rows, kPairRows) / kPairRows * row_step) {
    std::fill_n(blocks.data, blocks.size, uint16_t{0xFFFF});
  }
  int64_t row_step;
  Buffer<uint16_t> blocks;
};
struct B {  // column by column of blocks
  B(int64_t depth, int64_t columns)
      : column_step(round_up(depth, kPairDepth) / 2 * kPairColumns),
        blocks(round_up(columns, 16) / kPairColumns * column_step) {
    std::fill_n(blocks.data, blocks.size, 0xFFFFFFFFu);
  }
  int64_t column_step;
  Buffer<uint32_t> blocks;
};

class Matrix {  // in blocks of C
 public:
  Matrix(int64_t rows, int64_t columns, uint64_t seed)
      : rows_(rows), blocks_(floats(rows * columns, seed)) {}
  int64_t column_step() const { return rows_ * kPairColumns; }
  float* data() const { return blocks_.data; }
  float& at(int64_t row, int64_t column) const {
    return blocks_
        .data[column / kPairColumns * column_step() + row * kPairColumns + column % kPairColumns];
  }

 private:
  int64_t rows_;
  Buffer<float> blocks_;
};

Matrix multiply(const PairKernels& kernels, const A& a, const uint32_t* b, int64_t b_column_step,
                int64_t rows, int64_t columns, int64_t depth, bool accumulate = false) {
  Matrix c(rows, columns, 77);
  kernels.begin();
  kernels.multiply({.a = a.blocks.data,
                    .a_row_step = a.row_step,
                    .b = b,
                    .b_depth_step = kBlockB,
                    .b_column_step = b_column_step,
                    .c = c.data(),
                    .c_column_step = c.column_step(),
                    .rows = rows,
                    .columns = columns,
                    .depth = round_up(depth, kPairDepth),
                    .accumulate = accumulate});
  kernels.end();
  return c;
}

using Formula = std::function<double(int64_t row, int64_t column)>;

// What may be missing of an element that is the formula's, rounded to bfloat16; and of a sum.
double unit_of(double expected) { return 0x1.01p-8 * std::abs(expected) + 1e-30; }
double rest_of_sum(double expected) { return 1e-4 * (1 + std::abs(expected)); }

void expect_matrix(const Matrix& c, int64_t rows, int64_t columns, double (*tolerance)(double),
                   const Formula& formula, const std::string& what) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const double expected = formula(r, j);
      ASSERT_NEAR(c.at(r, j), expected, tolerance(expected))
          << what << ", row " << r << ", column " << j;
    }
  }
}

class PairKernelsOf : public ::testing::Test {
 protected:
  void SetUp() override {
    if (list_.empty()) GTEST_SKIP() << "this processor multiplies no bfloat16";
  }
  const std::vector<Named> list_ = supported_kernels();
};

TEST_F(PairKernelsOf, rows_are_multiplied) {
  for (const Named& named : list_) {
    const PairKernels& kernels = *named.kernels;
    for (int64_t rows : {3, 16, 47}) {
      for (int64_t columns : {1, 5, 16, 20, 61}) {
        for (int64_t depth : {7, 32, 50, 128}) {
          for (bool accumulate : {false, true}) {
            const Rows left(rows, depth, 3), right(columns, depth, 4);
            A a(rows, depth);
            B b(depth, columns);
            kernels.pack_a(left.view(), a.blocks.data, a.row_step);
            kernels.pack_b_transposed(right.view(), b.blocks.data, b.column_step);
            const int64_t all_rows = round_up(rows, kPairRows);
            const int64_t all_columns = round_up(columns, kPairColumns);
            const Matrix before(all_rows, all_columns, 77);
            const Matrix c = multiply(kernels, a, b.blocks.data, b.column_step, all_rows,
                                      all_columns, depth, accumulate);
            const auto formula = [&](int64_t r, int64_t j) {
              double sum = accumulate ? before.at(r, j) : 0.0;
              for (int64_t d = 0; d < depth; ++d) sum += left.at(r, d) * right.at(j, d);
              return sum;
            };
            expect_matrix(c, all_rows, all_columns, rest_of_sum, formula, named.name);
          }
        }
      }
    }
  }
}

TEST_F(PairKernelsOf, transposes_are_multiplied) {
  for (const Named& named : list_) {
    const PairKernels& kernels = *named.kernels;
    for (int64_t depth : {5, 32, 75}) {  // rows
      for (int64_t n : {6, 16, 40}) {
        for (int64_t m : {3, 16, 72}) {
          const Rows left(depth, n, 5), right(depth, m, 6);
          A a(n, depth);
          B b(depth, m);
          kernels.pack_a_transposed(left.view(), a.blocks.data, a.row_step);
          kernels.pack_b(right.view(), b.blocks.data, kBlockB, b.column_step);
          const int64_t all_rows = round_up(n, kPairRows), all_columns = round_up(m, 16);
          const Matrix c =
              multiply(kernels, a, b.blocks.data, b.column_step, all_rows, all_columns, depth);
          const auto formula = [&](int64_t r, int64_t j) {
            double sum = 0.0;
            for (int64_t d = 0; d < depth; ++d) sum += left.at(d, r) * right.at(d, j);
            return sum;
          };
          expect_matrix(c, all_rows, all_columns, rest_of_sum, formula, named.name);
        }
      }
    }
  }
}

// a times the identity.
Matrix elements_of(const PairKernels& kernels, const A& a, int64_t rows, int64_t depth) {
  B b(depth, depth);
  const Rows identity = Rows::identity(depth);
  kernels.pack_b_transposed(identity.view(), b.blocks.data, b.column_step);
  return multiply(kernels, a, b.blocks.data, b.column_step, rows, depth, depth);
}

// The identity times a chunk's pairs of keys.
Matrix elements_of_pairs(const PairKernels& kernels, const Buffer<uint32_t>& pairs) {
  A a(kChunkKeys, kChunkKeys);
  const Rows identity = Rows::identity(kChunkKeys);
  kernels.pack_a(identity.view(), a.blocks.data, a.row_step);
  return multiply(kernels, a, pairs.data, kChunkColumn / 2, kChunkKeys, kChunkLanes, kChunkKeys);
}

TEST_F(PairKernelsOf, matrices_are_rounded_to_the_nearest) {
  for (const Named& named : list_) {
    for (int64_t begin : {0, 3}) {
      constexpr int64_t kRows = 32, kColumns = 48, kAll = 64;
      const int64_t end = 30;
      const Matrix from(kRows, kColumns, 8);
      A a(kRows, kAll);
      std::fill_n(a.blocks.data, a.blocks.size, uint16_t{0});
      named.kernels->round_to_a(from.data(), from.column_step(), begin, end, kColumns, kAll,
                                a.blocks.data, a.row_step);
      const Matrix c = elements_of(*named.kernels, a, kRows, kAll);
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t j = 0; j < kAll; ++j) {
          const bool inside = r >= begin && r < end && j < kColumns;
          ASSERT_EQ(c.at(r, j), inside ? widen(narrow(from.at(r, j))) : 0.0)
              << named.name << ", row " << r << ", column " << j;
        }
      }
    }
  }
}

constexpr float kScale = 0.7f;

TEST_F(PairKernelsOf, probabilities_are_those_of_the_formula) {
  const Matrix scores(kChunkKeys, kChunkLanes, 3);
  scores.at(0, 0) = -std::numeric_limits<float>::infinity();
  scores.at(5, 17) = -1000.0f;
  const Buffer<float> maximum = floats(kChunkLanes, 4);
  const Buffer<char> ahead(kChunkAhead);
  const auto p = [&](int64_t key, int64_t lane) {
    return std::exp2(double{scores.at(key, lane)} * kScale - maximum.data[lane]);
  };
  for (const Named& named : list_) {
    const Buffer<float> sum(kChunkLanes);
    const Buffer<uint32_t> pairs(kChunkKeys / 2 * kChunkLanes);
    for (int64_t lane = 0; lane < kChunkLanes; ++lane) sum.data[lane] = 3.0f;
    named.kernels->begin();
    named.kernels->exponentiate(
        {scores.data(), kScale, maximum.data, sum.data, pairs.data, kChunkColumn / 2, ahead.data},
        nullptr, 0);
    named.kernels->end();
    expect_matrix(elements_of_pairs(*named.kernels, pairs), kChunkKeys, kChunkLanes, unit_of, p,
                  named.name);
    for (int64_t lane = 0; lane < kChunkLanes; ++lane) {
      double expected = 3.0;
      for (int64_t key = 0; key < kChunkKeys; ++key) expected += p(key, lane);
      EXPECT_NEAR(sum.data[lane], expected, expected * 1e-6) << named.name << ", lane " << lane;
    }
  }
}

TEST_F(PairKernelsOf, gradients_are_those_of_the_formula) {
  const Matrix scores(kChunkKeys, kChunkLanes, 3), dp(kChunkKeys, kChunkLanes, 4);
  scores.at(7, 9) = -std::numeric_limits<float>::infinity();
  dp.at(7, 9) = std::numeric_limits<float>::quiet_NaN();  // undefined where a key is masked
  const Buffer<float> lse = floats(kChunkLanes, 5), delta = floats(kChunkLanes, 6);
  const auto p = [&](int64_t key, int64_t lane) {
    return std::exp2(double{scores.at(key, lane)} * kScale - lse.data[lane]);
  };
  const auto ds = [&](int64_t key, int64_t lane) {
    if (p(key, lane) == 0.0) return 0.0;
    return p(key, lane) * (double{dp.at(key, lane)} - delta.data[lane]);
  };
  for (const Named& named : list_) {
    const PairKernels& kernels = *named.kernels;
    A p_rows(kChunkKeys, kChunkLanes), ds_rows(kChunkKeys, kChunkLanes);
    const Buffer<uint32_t> pairs(kChunkKeys / 2 * kChunkLanes);
    // Beside a product, which is done as well.
    const Rows left(kChunkKeys, 64, 7), right(kChunkLanes, 64, 8);
    A a(kChunkKeys, 64);
    B b(64, kChunkLanes);
    kernels.pack_a(left.view(), a.blocks.data, a.row_step);
    kernels.pack_b_transposed(right.view(), b.blocks.data, b.column_step);
    const Matrix c(kChunkKeys, kChunkLanes, 9);
    const PairProduct beside{.a = a.blocks.data,
                             .a_row_step = a.row_step,
                             .b = b.blocks.data,
                             .b_depth_step = kBlockB,
                             .b_column_step = b.column_step,
                             .c = c.data(),
                             .c_column_step = c.column_step(),
                             .rows = kChunkKeys,
                             .columns = kChunkLanes,
                             .depth = 64,
                             .accumulate = false};
    kernels.begin();
    kernels.differentiate(
        {scores.data(), dp.data(), kScale, lse.data, delta.data, p_rows.blocks.data,
         ds_rows.blocks.data, p_rows.row_step, pairs.data, kChunkColumn / 2},
        &beside, 1);
    kernels.end();
    const std::string name = named.name;
    expect_matrix(elements_of(kernels, p_rows, kChunkKeys, kChunkLanes), kChunkKeys, kChunkLanes,
                  unit_of, p, name + ", p");
    expect_matrix(elements_of(kernels, ds_rows, kChunkKeys, kChunkLanes), kChunkKeys, kChunkLanes,
                  unit_of, ds, name + ", ds");
    expect_matrix(elements_of_pairs(kernels, pairs), kChunkKeys, kChunkLanes, unit_of, ds,
                  name + ", ds in pairs");
    const auto product = [&](int64_t r, int64_t j) {
      double sum = 0.0;
      for (int64_t d = 0; d < 64; ++d) sum += left.at(r, d) * right.at(j, d);
      return sum;
    };
    expect_matrix(c, kChunkKeys, kChunkLanes, rest_of_sum, product, name + ", the product beside");
  }
}

// Kernels for few queries have nothing to ask for here.
RowsAhead nothing_ahead() {
  RowsAhead ahead;
  ahead.start(nullptr, nullptr, 1);
  ahead.allow(0, 1);
  return ahead;
}

TEST_F(PairKernelsOf, rows_are_multiplied_where_they_lie) {
  for (const Named& named : list_) {
    if (named.row_kernels == nullptr) continue;
    for (int64_t lanes = 1; lanes <= 8; ++lanes) {
      for (int64_t n : {16, 48, 64, 112, 128, 256}) {
        const int64_t q_row = round_up(n, kPairDepth);
        const Buffer<uint16_t> q = halves(lanes * q_row, 1), keys = halves(kRowPairKeys * n, 2);
        const void* rows[kRowPairKeys];
        for (int64_t k = 0; k < kRowPairKeys; ++k) rows[k] = keys.data + k * n;
        Buffer<float> scores(lanes * kRowPairKeys);
        RowsAhead ahead = nothing_ahead();
        named.row_kernels->scores({.q = q.data,
                                   .q_row = q_row,
                                   .lanes = lanes,
                                   .rows = rows,
                                   .n = n,
                                   .scale = kScale,
                                   .to = scores.data,
                                   .to_row = kRowPairKeys,
                                   .ahead = &ahead});
        for (int64_t i = 0; i < lanes * kRowPairKeys; ++i) {
          double sum = 0.0;
          for (int64_t d = 0; d < n; ++d) {
            sum += widen(q.data[i / kRowPairKeys * q_row + d]) *
                   widen(keys.data[i % kRowPairKeys * n + d]);
          }
          ASSERT_NEAR(scores.data[i], kScale * sum, 1e-4 * (1 + std::abs(sum)))
              << named.name << ", lane " << i / kRowPairKeys << " of " << lanes << ", n " << n;
        }
      }
    }
  }
}

TEST_F(PairKernelsOf, values_are_added_where_they_lie) {
  constexpr int64_t kMost = 9;
  for (const Named& named : list_) {
    if (named.row_kernels == nullptr) continue;
    for (int64_t lanes = 1; lanes <= 8; ++lanes) {
      for (int64_t n : {16, 48, 64, 112, 128, 256}) {
        for (int64_t count : {1, 4, 9}) {
          const Buffer<float> weights = floats(lanes * 16, 3);
          const Buffer<uint16_t> p(lanes * 16), values = halves(kMost * n, 4);
          const Buffer<float> o = floats(lanes * n, 5), before = floats(lanes * n, 5);
          for (int64_t i = 0; i < lanes * 16; ++i) {
            if (i % 16 >= count) weights.data[i] = 0.0f;
          }
          for (int64_t i = 0; i < lanes; ++i) {
            named.row_kernels->round(weights.data + i * 16, 16, p.data + i * 16);
          }
          const void* rows[kMost];
          for (int64_t r = 0; r < kMost; ++r) rows[r] = values.data + r * n;
          RowsAhead ahead = nothing_ahead();
          named.row_kernels->values({.p = p.data,
                                     .p_row = 16,
                                     .lanes = lanes,
                                     .rows = rows,
                                     .count = count,
                                     .n = n,
                                     .o = o.data,
                                     .o_row = n,
                                     .ahead = &ahead});
          for (int64_t i = 0; i < lanes * n; ++i) {
            double sum = before.data[i];
            for (int64_t r = 0; r < count; ++r) {
              sum +=
                  widen(narrow(weights.data[i / n * 16 + r])) * widen(values.data[r * n + i % n]);
            }
            ASSERT_NEAR(o.data[i], sum, 1e-5 * (1 + std::abs(sum)))
                << named.name << ", lane " << i / n << " of " << lanes << ", n " << n << ", "
                << count << " rows";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fa::cpu
