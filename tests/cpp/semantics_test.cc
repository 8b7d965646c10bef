#include "core/semantics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <set>

namespace fa::semantics {
namespace {

constexpr Index kMaxIndex = std::numeric_limits<Index>::max();
constexpr Index kLengths[] = {0, 1, 2, 3, 5, 8};
constexpr Index kWindows[] = {
    -1, 0, 1, 2, 4, 7, 100, Index{1} << 62, kMaxIndex - 9, kMaxIndex - 1, kMaxIndex};

// Query i sees keys j in [i + o - left, i + o + right] with o = Sk - Sq; -1: no bound. Written
// with differences of positions, so that nothing overflows.
bool sees(Index i, Index j, Index seqlen_q, Index seqlen_k, MaskBand band) {
  const Index behind = i + seqlen_k - seqlen_q - j;
  return (band.left == -1 || behind <= band.left) && (band.right == -1 || -behind <= band.right);
}

template <class Body>
void for_each_band(Body&& body) {
  for (Index seqlen_q : kLengths) {
    for (Index seqlen_k : kLengths) {
      for (Index left : kWindows) {
        for (Index right : kWindows) body(seqlen_q, seqlen_k, MaskBand{left, right});
      }
    }
  }
}

TEST(mask, visible_keys_follow_the_definition) {
  for_each_band([](Index seqlen_q, Index seqlen_k, MaskBand band) {
    for (Index i = 0; i < seqlen_q; ++i) {
      const Range keys = visible_keys(i, seqlen_q, seqlen_k, band);
      EXPECT_GE(keys.begin, 0);
      EXPECT_LE(keys.end, seqlen_k);
      for (Index j = 0; j < seqlen_k; ++j) {
        const bool expected = sees(i, j, seqlen_q, seqlen_k, band);
        EXPECT_EQ(keys.begin <= j && j < keys.end, expected)
            << "i=" << i << " j=" << j << " Sq=" << seqlen_q << " Sk=" << seqlen_k
            << " left=" << band.left << " right=" << band.right;
        EXPECT_EQ(is_visible(i, j, seqlen_q, seqlen_k, band), expected);
      }
    }
  });
}

TEST(mask, visible_queries_transpose_visible_keys) {
  for_each_band([](Index seqlen_q, Index seqlen_k, MaskBand band) {
    for (Index j = 0; j < seqlen_k; ++j) {
      const Range queries = visible_queries(j, seqlen_q, seqlen_k, band);
      EXPECT_GE(queries.begin, 0);
      EXPECT_LE(queries.end, seqlen_q);
      for (Index i = 0; i < seqlen_q; ++i) {
        EXPECT_EQ(queries.begin <= i && i < queries.end, is_visible(i, j, seqlen_q, seqlen_k, band))
            << "i=" << i << " j=" << j << " Sq=" << seqlen_q << " Sk=" << seqlen_k
            << " left=" << band.left << " right=" << band.right;
      }
    }
  });
}

TEST(mask, long_sequences_do_not_overflow) {
  constexpr Index kLong = Index{1} << 61;
  const Range keys = visible_keys(kLong - 1, kLong, kLong, {kMaxIndex, kMaxIndex});
  EXPECT_EQ(keys.begin, 0);
  EXPECT_EQ(keys.end, kLong);
  const Range last = visible_keys(kLong - 1, kLong, kLong, {2, 0});
  EXPECT_EQ(last.begin, kLong - 3);
  EXPECT_EQ(last.end, kLong);
}

TEST(mask, causal_bounds_the_right_and_keeps_the_left) {
  EXPECT_EQ(mask_band(false, -1, -1), (MaskBand{-1, -1}));
  EXPECT_EQ(mask_band(true, -1, -1), (MaskBand{-1, 0}));
  EXPECT_EQ(mask_band(true, 3, 5), (MaskBand{3, 0}));
  EXPECT_EQ(mask_band(false, 3, 5), (MaskBand{3, 5}));
  EXPECT_TRUE((MaskBand{-1, -1}.unbounded()));
  EXPECT_FALSE((MaskBand{-1, 0}.unbounded()));
  EXPECT_FALSE((MaskBand{0, -1}.unbounded()));
}

TEST(mask, the_last_query_stands_at_the_last_key) {
  EXPECT_EQ(visible_keys(2, 3, 10, {-1, 0}).end, 10);
  EXPECT_EQ(visible_keys(0, 3, 10, {-1, 0}).end, 8);
  EXPECT_TRUE(visible_keys(0, 10, 3, {-1, 0}).empty());
  EXPECT_EQ(visible_keys(9, 10, 3, {-1, 0}).end, 3);
}

TEST(alibi, distance_is_from_the_position_of_the_query) {
  EXPECT_EQ(alibi_distance(0, 0, 4, 4), 0);
  EXPECT_EQ(alibi_distance(1, 3, 4, 4), 2);
  EXPECT_EQ(alibi_distance(3, 1, 4, 4), 2);
  EXPECT_EQ(alibi_distance(0, 0, 1, 10), 9);
  EXPECT_EQ(alibi_distance(0, 0, 10, 1), 9);
}

TEST(heads, groups_of_query_heads_share_a_key_head) {
  const Index expected[] = {0, 0, 0, 1, 1, 1};
  for (Index head = 0; head < 6; ++head) EXPECT_EQ(kv_head(head, 6, 2), expected[head]);
}

// ---- Dropout. ----

// Known answers of philox4x32 with 10 rounds, from the Random123 distribution.
TEST(philox, gives_the_known_answers) {
  struct Known {
    Draw counter;
    Word key[2];
    Draw answer;
  };
  constexpr Word kOnes = 0xFFFFFFFFu;
  const Known table[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u}}},
      {{{kOnes, kOnes, kOnes, kOnes}},
       {kOnes, kOnes},
       {{0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu}}},
      {{{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}},
       {0xA4093822u, 0x299F31D0u},
       {{0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u}}},
  };
  for (const Known& known : table) {
    const Draw draw = philox(known.counter, known.key[0], known.key[1]);
    for (int w = 0; w < 4; ++w) EXPECT_EQ(draw.word[w], known.answer.word[w]);
  }
}

TEST(dropout, neighbouring_keys_take_the_halves_of_one_draw_in_order) {
  const DropoutKey key = dropout_key(42, 7);
  const Draw draw = dropout_draw(key, 3, 5, 16);
  for (Index j = 16; j < 24; ++j) {
    const Draw same = dropout_draw(key, 3, 5, j);
    for (int w = 0; w < 4; ++w) EXPECT_EQ(same.word[w], draw.word[w]);
    const Word word = draw.word[(j - 16) / 2];
    EXPECT_EQ(dropout_bits(draw, j), j % 2 == 0 ? word & 0xFFFFu : word >> 16);
  }
  EXPECT_NE(dropout_draw(key, 3, 5, 24).word[0], draw.word[0]);
}

TEST(dropout, every_coordinate_changes_the_draw) {
  constexpr Seed kHigh = Seed{1} << 32;
  std::set<Word> first_words;
  int draws = 0;
  const auto add = [&](Seed seed, Seed offset, Index batch_head, Index i, Index j) {
    first_words.insert(dropout_draw(dropout_key(seed, offset), batch_head, i, j).word[0]);
    ++draws;
  };
  add(1, 1, 1, 1, 8);
  add(2, 1, 1, 1, 8);
  add(1 + kHigh, 1, 1, 1, 8);
  add(1, 2, 1, 1, 8);
  add(1, 1 + 2 * kHigh, 1, 1, 8);
  add(1, 1, 2, 1, 8);
  add(1, 1, 1, 2, 8);
  add(1, 1, 1, 1, 16);
  EXPECT_EQ(static_cast<int>(first_words.size()), draws);
}

TEST(dropout, threshold_is_the_rounded_probability_of_keeping) {
  EXPECT_EQ(dropout_threshold(0.0), 65536u);
  EXPECT_EQ(dropout_threshold(1e-30), 65536u);  // keeps all
  EXPECT_EQ(dropout_threshold(0.5), 32768u);
  EXPECT_EQ(dropout_threshold(0.25), 49152u);
  EXPECT_EQ(dropout_threshold(1.0 - 1.0 / 65536.0), 1u);
  EXPECT_EQ(dropout_threshold(std::nextafter(1.0, 0.0)), 1u);  // at least 1
  for (double p = 0.0; p < 0.999; p += 0.0137) {
    EXPECT_NEAR(dropout_threshold(p) / 65536.0, 1.0 - p, 0.5 / 65536.0) << p;
  }
}

TEST(dropout, tiny_probability_keeps_all) {
  const DropoutKey key = dropout_key(1, 0);
  const Word threshold = dropout_threshold(1e-30);
  for (Index i = 0; i < 64; ++i) {
    for (Index j = 0; j < 512; ++j) EXPECT_TRUE(dropout_keeps(key, threshold, 0, i, j));
  }
}

TEST(dropout, kept_fraction_is_near_its_probability) {
  constexpr Index kRows = 256;
  constexpr Index kKeys = 1024;
  for (double p : {0.1, 0.17, 0.5, 0.9}) {
    const Word threshold = dropout_threshold(p);
    for (Seed seed : {Seed{0}, Seed{1}, Seed{0x123456789ABCDEF}}) {
      const DropoutKey key = dropout_key(seed, 0);
      Index kept = 0;
      for (Index i = 0; i < kRows; ++i) {
        for (Index j = 0; j < kKeys; ++j) kept += dropout_keeps(key, threshold, 2, i, j) ? 1 : 0;
      }
      const double draws = kRows * kKeys;
      const double deviation = std::sqrt(p * (1.0 - p) / draws);
      EXPECT_NEAR(kept / draws, 1.0 - p, 5.0 * deviation) << "p=" << p << " seed=" << seed;
    }
  }
}

// A mask that repeated along i, j or heads would agree with its shifted self more often.
TEST(dropout, shifted_masks_are_uncorrelated) {
  constexpr Index kRows = 128;
  constexpr Index kKeys = 1024;
  const DropoutKey key = dropout_key(7, 9);
  const Word threshold = dropout_threshold(0.5);
  struct Shift {
    Index head, i, j;
  };
  for (const Shift& shift : {Shift{1, 0, 0}, Shift{0, 1, 0}, Shift{0, 0, 1}, Shift{0, 0, 2},
                             Shift{0, 0, 8}, Shift{1, 1, 8}}) {
    Index equal = 0;
    for (Index i = 0; i < kRows; ++i) {
      for (Index j = 0; j < kKeys; ++j) {
        const bool a = dropout_keeps(key, threshold, 0, i, j);
        equal += a == dropout_keeps(key, threshold, shift.head, i + shift.i, j + shift.j) ? 1 : 0;
      }
    }
    const double draws = kRows * kKeys;
    EXPECT_NEAR(equal / draws, 0.5, 5.0 * 0.5 / std::sqrt(draws));
  }
}

}  // namespace
}  // namespace fa::semantics
