// What a caller can get wrong in a call over a cache: see bad_call.h.
#include <gtest/gtest.h>

#include <cstdint>

#include "bad_call.h"

namespace fa::cases {
namespace {

// kDense with make_cache().
const BadCall kCaches[] = {
    {"cache_too_small",
     kDense,
     [](Call& c) { c.cache_seqlens.lengths()[1] = 5; },
     {"cache_seqlens:", "entry 1 is 5", "room for 5"}},
    {"more_new_tokens_than_room",
     kDense,
     [](Call& c) {
       for (Spoilable* it : {&c.k_new, &c.v_new}) it->shape[1] = 6;
     },
     {"k_new:", "seqlen_new is 6", "at most 5"}},
    {"a_cache_and_sequences",
     kDense,
     [](Call& c) {
       c.give_lengths(c.cu_seqlens_q, &c.args.cu_seqlens_q, 0, 4);
       c.give_lengths(c.cu_seqlens_k, &c.args.cu_seqlens_k, 0, 4);
     },
     {"cache_seqlens:", "must not be used with cu_seqlens_q"}},
    {"length_negative",
     kDense,
     [](Call& c) { c.cache_seqlens.lengths()[0] = -1; },
     {"cache_seqlens:", "entry 0 is -1"}},
    {"lengths_int64",
     kDense,
     [](Call& c) { c.cache_seqlens.set_dtype(FA_INT, 64); },
     {"cache_seqlens:", "int64"}},
    {"row_beyond_the_last",
     kDense,
     [](Call& c) { c.give_lengths(c.cache_batch_idx, &c.args.cache_batch_idx, 0, 2); },
     {"cache_batch_idx:", "entry 1 is 2"}},
    {"row_appended_to_twice",
     kDense,
     [](Call& c) { c.give_lengths(c.cache_batch_idx, &c.args.cache_batch_idx, 1, 1); },
     {"cache_batch_idx:", "entries 0 and 1 are both 1", "must differ"}},
    {"row_with_pages",
     kDense,
     [](Call& c) {
       c.give_pages(0, 1);
       c.give_lengths(c.cache_batch_idx, &c.args.cache_batch_idx, 0, 1);
     },
     {"cache_batch_idx:", "block_table"}},
    {"page_of_the_cache_beyond_the_last",
     kDense,
     [](Call& c) { c.give_pages(0, 2); },
     {"block_table:", "entry [1, 0] is 2"}},
    {"page_of_the_cache_negative",
     kDense,
     [](Call& c) { c.give_pages(-1, 1); },
     {"block_table:", "entry [0, 0] is -1"}},
    {"page_appended_to_twice",
     kDense,
     [](Call& c) { c.give_pages(1, 1); },
     {"block_table:", "page 1", "sequences 0 and 1"}},
    {"leftpad_beyond_the_row",
     kDense,
     [](Call& c) { c.give_lengths(c.cache_leftpad, &c.args.cache_leftpad, 4, 0); },
     {"cache_leftpad:", "entry 0 is 4"}},
    {"k_new_alone", kDense, [](Call& c) { c.args.v_new = nullptr; }, {"v_new:", "missing"}},
    {"k_new_head_dim", kDense, [](Call& c) { c.k_new.shape[3] = 7; }, {"k_new:", "[2, 1, 2, 7]"}},
    {"v_new_seqlen", kDense, [](Call& c) { c.v_new.shape[1] = 2; }, {"v_new:", "[2, 2, 2, 8]"}},
    {"v_new_float16",
     kDense,
     [](Call& c) { c.v_new.set_dtype(FA_FLOAT, 16); },
     {"v_new:", "float16"}},
    {"rotary_too_short", kDense, [](Call& c) { c.give_rotary(4, 4); }, {"rotary_cos:", "has 4"}},
    {"rotary_dim_too_large", kDense, [](Call& c) { c.give_rotary(9, 5); }, {"rotary_cos:", "10"}},
    {"rotary_sin_missing",
     kDense,
     [](Call& c) {
       c.give_rotary(9, 4);
       c.args.rotary_sin = nullptr;
     },
     {"rotary_sin:", "missing"}},
    {"splits_negative", kDense, [](Call& c) { c.args.num_splits = -1; }, {"num_splits", "-1"}},
    {"dropout_with_a_cache", kDense, [](Call& c) { c.args.dropout_p = 0.1; }, {"dropout_p", "0.1"}},
};

class BadCacheInput : public ::testing::TestWithParam<BadCall> {};

TEST_P(BadCacheInput, is_named_and_nothing_is_written) {
  expect_refused(
      GetParam(), [](Call& c) { return fa_forward(&c.args); }, [](Call& c) { c.make_cache(); });
}

INSTANTIATE_TEST_SUITE_P(Caches, BadCacheInput, ::testing::ValuesIn(kCaches), name_of);

// What the table spoils is valid before.
TEST(BadCacheInputBase, calls_are_valid_before_they_are_spoiled) {
  for (const bool paged : {false, true}) {
    Call call(kDense);
    call.make_cache();
    call.give_lengths(call.cache_leftpad, &call.args.cache_leftpad, 3, 0);
    call.give_rotary(9, 4);
    if (paged) call.give_pages(1, 0);
    const uint64_t before = call.cache_hash();
    EXPECT_EQ(fa_forward(&call.args), FA_OK) << fa_last_error_message();
    EXPECT_NE(call.cache_hash(), before);
  }
}

TEST(BadCacheInputBase, a_row_or_a_page_may_be_read_twice) {
  for (const bool paged : {false, true}) {
    Call call(kDense);
    call.make_cache();
    call.args.k_new = call.args.v_new = nullptr;
    if (paged) {
      call.give_pages(1, 1);
    } else {
      call.give_lengths(call.cache_batch_idx, &call.args.cache_batch_idx, 1, 1);
    }
    EXPECT_EQ(fa_forward(&call.args), FA_OK) << fa_last_error_message();
  }
}

}  // namespace
}  // namespace fa::cases
