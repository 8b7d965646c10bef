// The one table of named attention calls that the tests, the `check` command and the benchmark
// share. A Case says what to compute; case_runner.h builds the tensors for it. Each applies to
// every dtype.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

namespace fa::cases {

enum class Alibi { kNone, kPerHead, kPerBatchAndHead };

// The shape of attn_bias.
enum class Bias {
  kNone,
  kFull,      // [B, H, Sq, Sk]
  kPerKey,    // [1, 1, 1, Sk]
  kPerBatch,  // [B, 1, Sq, Sk]
  kPerHead,   // [H, Sq, Sk]
  kExpanded,  // [B, H, Sq, Sk] of which batch and head have stride 0
};

enum class BiasType { kOwn, kFloat32, kBoolean };  // kOwn: q's dtype

enum class Sink { kNone, kOwn, kFloat32 };

// How q, k, v and out lie in memory.
enum class Storage {
  kCompact,
  kHeadsMajor,  // [B, H, S, D], seen as [B, S, H, D]
  kPaddedRows,  // gaps behind each head's row and each token
  kPackedQkv,   // q, k and v are slices of one [B, S, 3, H, D]
};

// Up to kMax lengths; none: the option is not used.
struct Lengths {
  static constexpr int kMax = 6;
  std::array<int64_t, kMax> at{};
  int count = 0;

  constexpr Lengths() = default;
  constexpr Lengths(std::initializer_list<int64_t> lengths) {
    for (int64_t length : lengths) at[static_cast<size_t>(count++)] = length;
  }
  constexpr bool given() const { return count > 0; }
  constexpr const int64_t* begin() const { return at.data(); }
  constexpr const int64_t* end() const { return at.data() + count; }
  constexpr int64_t longest() const {
    int64_t result = 0;
    for (int64_t length : *this) result = length > result ? length : result;
    return result;
  }
};

struct Case {
  const char* name = "";
  int64_t batch = 2;  // dense; varlen: as many as there are lengths
  int64_t seqlen_q = 64;
  int64_t seqlen_k = 64;
  int64_t num_heads = 2;
  int64_t num_heads_kv = 0;  // 0: num_heads
  int64_t head_dim = 64;
  int64_t head_dim_v = 0;  // 0: head_dim

  // Varlen where given; both of one count.
  Lengths lengths_q{};
  Lengths lengths_k{};
  Lengths seqused_k{};
  int64_t max_seqlen_slack = 0;  // by how much max_seqlen_* exceed the longest sequence
  int64_t page_size = 0;         // 0: not paged

  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double softcap = 0.0;
  std::optional<double> softmax_scale{};
  Alibi alibi = Alibi::kNone;
  Bias bias = Bias::kNone;
  BiasType bias_type = BiasType::kOwn;
  bool bias_with_infinities = false;  // additive, and some entries are -inf
  Sink sink = Sink::kNone;
  double dropout_p = 0.0;
  bool s_dmask = false;
  Storage storage = Storage::kCompact;
  double q_gain = 1.0;  // above 1 makes the softmax peaky
  uint64_t seed = 0;    // of the inputs and of dropout

  constexpr bool varlen() const { return lengths_q.given(); }
  constexpr int64_t sequences() const { return varlen() ? lengths_q.count : batch; }
  constexpr int64_t heads_kv() const { return num_heads_kv == 0 ? num_heads : num_heads_kv; }
  constexpr int64_t dim_v() const { return head_dim_v == 0 ? head_dim : head_dim_v; }
  constexpr int64_t max_q() const {
    return varlen() ? lengths_q.longest() + max_seqlen_slack : seqlen_q;
  }
  constexpr int64_t max_k() const {
    if (!varlen()) return seqlen_k;
    return (seqused_k.given() ? seqused_k.longest() : lengths_k.longest()) + max_seqlen_slack;
  }
  // Multiply-adds, masked ones included: how long the fp64 oracle takes.
  constexpr int64_t cost() const {
    return sequences() * num_heads * max_q() * max_k() * (head_dim + dim_v());
  }
};

inline constexpr Case kCases[] = {
    // Head dimensions: the multiples that kernels like, and those between.
    {.name = "head_dim_1", .seqlen_q = 17, .seqlen_k = 63, .head_dim = 1},
    {.name = "head_dim_2", .seqlen_q = 63, .seqlen_k = 65, .head_dim = 2, .causal = true},
    {.name = "head_dim_3", .seqlen_q = 65, .seqlen_k = 17, .head_dim = 3},
    {.name = "head_dim_8", .seqlen_q = 97, .seqlen_k = 97, .head_dim = 8, .causal = true},
    {.name = "head_dim_16", .seqlen_q = 64, .seqlen_k = 128, .head_dim = 16},
    {.name = "head_dim_32", .seqlen_q = 113, .seqlen_k = 127, .head_dim = 32, .causal = true},
    {.name = "head_dim_40", .seqlen_q = 65, .seqlen_k = 113, .head_dim = 40},
    {.name = "head_dim_64", .seqlen_q = 128, .seqlen_k = 128, .head_dim = 64, .causal = true},
    {.name = "head_dim_72", .seqlen_q = 96, .seqlen_k = 97, .head_dim = 72},
    {.name = "head_dim_80", .seqlen_q = 63, .seqlen_k = 96, .head_dim = 80, .causal = true},
    {.name = "head_dim_96", .seqlen_q = 65, .seqlen_k = 65, .head_dim = 96},
    {.name = "head_dim_128", .seqlen_q = 127, .seqlen_k = 128, .head_dim = 128, .causal = true},
    {.name = "head_dim_160", .seqlen_q = 64, .seqlen_k = 65, .head_dim = 160},
    {.name = "head_dim_192", .seqlen_q = 97, .seqlen_k = 113, .head_dim = 192, .causal = true},
    {.name = "head_dim_256", .seqlen_q = 65, .seqlen_k = 97, .head_dim = 256},
    {.name = "head_dim_512", .seqlen_q = 63, .seqlen_k = 64, .head_dim = 512, .causal = true},
    {.name = "head_dim_192_v_128",
     .seqlen_q = 65,
     .seqlen_k = 113,
     .head_dim = 192,
     .head_dim_v = 128,
     .causal = true},
    {.name = "head_dim_64_v_256",
     .seqlen_q = 64,
     .seqlen_k = 65,
     .head_dim = 64,
     .head_dim_v = 256},
    {.name = "head_dim_3_v_5", .seqlen_q = 17, .seqlen_k = 65, .head_dim = 3, .head_dim_v = 5},
    {.name = "head_dim_128_v_1", .seqlen_q = 63, .seqlen_k = 97, .head_dim = 128, .head_dim_v = 1},

    // Sequence lengths.
    {.name = "one_query_one_key", .seqlen_q = 1, .seqlen_k = 1},
    {.name = "one_query_512_keys", .batch = 3, .seqlen_q = 1, .seqlen_k = 512},
    {.name = "one_query_1023_keys_causal",
     .seqlen_q = 1,
     .seqlen_k = 1023,
     .head_dim = 128,
     .causal = true},
    // The last register tile of a panel, of 6 x 10 + 4 queries, in part.
    {.name = "61_queries", .seqlen_q = 61, .seqlen_k = 101, .causal = true},
    {.name = "2_queries_3_keys", .batch = 5, .seqlen_q = 2, .seqlen_k = 3},
    {.name = "3_queries_2_keys_causal", .batch = 5, .seqlen_q = 3, .seqlen_k = 2, .causal = true},
    {.name = "one_query_causal", .seqlen_q = 1, .seqlen_k = 333, .num_heads = 2, .causal = true},
    {.name = "one_query_gqa_8",
     .batch = 3,
     .seqlen_q = 1,
     .seqlen_k = 401,
     .num_heads = 16,
     .num_heads_kv = 2,
     .head_dim = 128},
    {.name = "few_queries_softcap_gqa",
     .seqlen_q = 3,
     .seqlen_k = 250,
     .num_heads = 6,
     .num_heads_kv = 3,
     .causal = true,
     .softcap = 20.0,
     .q_gain = 8.0},
    {.name = "few_queries_alibi_window_sink",
     .seqlen_q = 5,
     .seqlen_k = 211,
     .num_heads = 3,
     .head_dim = 80,
     .head_dim_v = 48,
     .causal = true,
     .window_left = 130,
     .alibi = Alibi::kPerHead,
     .sink = Sink::kFloat32},
    {.name = "one_query_gqa_7_window_sink",
     .seqlen_q = 1,
     .seqlen_k = 333,
     .num_heads = 14,
     .num_heads_kv = 2,
     .head_dim = 112,
     .head_dim_v = 48,
     .window_left = 270,
     .window_right = 0,
     .softcap = 15.0,
     .sink = Sink::kFloat32,
     .q_gain = 4.0},
    {.name = "512_queries_one_key", .seqlen_q = 512, .seqlen_k = 1},
    {.name = "96_queries_97_keys", .seqlen_q = 96, .seqlen_k = 97},
    {.name = "256_queries_200_keys", .batch = 1, .seqlen_q = 256, .seqlen_k = 200},
    {.name = "511_queries_512_keys", .batch = 1, .seqlen_q = 511, .seqlen_k = 512, .num_heads = 1},
    {.name = "1023_queries_1023_keys",
     .batch = 1,
     .seqlen_q = 1023,
     .seqlen_k = 1023,
     .num_heads = 1,
     .head_dim = 32},
    {.name = "no_queries", .seqlen_q = 0, .seqlen_k = 64},
    {.name = "no_queries_heads_major", .seqlen_q = 0, .storage = Storage::kHeadsMajor},
    {.name = "no_keys", .seqlen_q = 64, .seqlen_k = 0},
    {.name = "no_batch", .batch = 0},

    // Causal, aligned to the bottom right corner.
    {.name = "causal_square_1023",
     .batch = 1,
     .seqlen_q = 1023,
     .seqlen_k = 1023,
     .num_heads = 1,
     .causal = true},
    {.name = "causal_fewer_queries", .seqlen_q = 113, .seqlen_k = 200, .causal = true},
    {.name = "causal_rows_without_keys", .seqlen_q = 200, .seqlen_k = 113, .causal = true},
    {.name = "causal_512_queries_3_keys", .seqlen_q = 512, .seqlen_k = 3, .causal = true},

    // Windows.
    {.name = "window_0_0", .seqlen_q = 127, .seqlen_k = 127, .window_left = 0, .window_right = 0},
    {.name = "window_5_left", .seqlen_q = 128, .seqlen_k = 113, .window_left = 5},
    {.name = "window_5_right", .seqlen_q = 113, .seqlen_k = 128, .window_right = 5},
    {.name = "window_17_3", .seqlen_q = 256, .seqlen_k = 256, .window_left = 17, .window_right = 3},
    {.name = "window_17_3_fewer_queries",
     .seqlen_q = 65,
     .seqlen_k = 511,
     .window_left = 17,
     .window_right = 3},
    {.name = "window_17_3_rows_without_keys",
     .seqlen_q = 511,
     .seqlen_k = 65,
     .num_heads = 1,
     .window_left = 17,
     .window_right = 3},
    {.name = "window_wider_than_keys",
     .seqlen_q = 97,
     .seqlen_k = 113,
     .window_left = 1000,
     .window_right = 1000},
    {.name = "window_left_causal",
     .seqlen_q = 256,
     .seqlen_k = 256,
     .causal = true,
     .window_left = 96},
    {.name = "window_causal_overrides_right",
     .seqlen_q = 64,
     .seqlen_k = 97,
     .causal = true,
     .window_left = 40,
     .window_right = 20},
    {.name = "window_0_0_one_query",
     .seqlen_q = 1,
     .seqlen_k = 512,
     .window_left = 0,
     .window_right = 0},

    // Scores.
    {.name = "scale_0", .seqlen_q = 65, .seqlen_k = 97, .softmax_scale = 0.0},
    {.name = "scale_0_3", .seqlen_q = 65, .seqlen_k = 97, .softmax_scale = 0.3},
    {.name = "softcap_30", .seqlen_q = 97, .seqlen_k = 128, .softcap = 30.0, .q_gain = 8.0},
    {.name = "softcap_1_causal", .seqlen_q = 113, .seqlen_k = 113, .causal = true, .softcap = 1.0},
    {.name = "peaky", .seqlen_q = 128, .seqlen_k = 200, .q_gain = 8.0},
    {.name = "peaky_causal_head_dim_128",
     .seqlen_q = 200,
     .seqlen_k = 200,
     .head_dim = 128,
     .causal = true,
     .q_gain = 8.0},
    {.name = "alibi_per_head",
     .seqlen_q = 97,
     .seqlen_k = 128,
     .num_heads = 4,
     .alibi = Alibi::kPerHead},
    {.name = "alibi_per_batch_causal",
     .batch = 2,
     .seqlen_q = 113,
     .seqlen_k = 97,
     .num_heads = 3,
     .causal = true,
     .alibi = Alibi::kPerBatchAndHead},
    {.name = "alibi_softcap_window",
     .seqlen_q = 128,
     .seqlen_k = 128,
     .window_left = 63,
     .window_right = 17,
     .softcap = 20.0,
     .alibi = Alibi::kPerHead,
     .q_gain = 4.0},

    // Heads.
    {.name = "gqa_8_to_1",
     .seqlen_q = 65,
     .seqlen_k = 97,
     .num_heads = 8,
     .num_heads_kv = 1,
     .causal = true},
    {.name = "gqa_6_to_2",
     .batch = 3,
     .seqlen_q = 64,
     .seqlen_k = 113,
     .num_heads = 6,
     .num_heads_kv = 2},
    {.name = "gqa_16_to_2_one_query",
     .batch = 4,
     .seqlen_q = 1,
     .seqlen_k = 511,
     .num_heads = 16,
     .num_heads_kv = 2,
     .head_dim = 128,
     .causal = true},
    {.name = "mqa_5_batches",
     .batch = 5,
     .seqlen_q = 17,
     .seqlen_k = 63,
     .num_heads = 4,
     .num_heads_kv = 1,
     .head_dim = 96},

    // attn_bias.
    {.name = "bias_full", .seqlen_q = 65, .seqlen_k = 97, .bias = Bias::kFull},
    {.name = "bias_full_float32_causal",
     .seqlen_q = 97,
     .seqlen_k = 113,
     .causal = true,
     .bias = Bias::kFull,
     .bias_type = BiasType::kFloat32},
    {.name = "bias_per_key", .batch = 3, .seqlen_q = 63, .seqlen_k = 128, .bias = Bias::kPerKey},
    {.name = "bias_per_batch_gqa",
     .batch = 3,
     .seqlen_q = 64,
     .seqlen_k = 65,
     .num_heads = 4,
     .num_heads_kv = 2,
     .bias = Bias::kPerBatch,
     .bias_type = BiasType::kFloat32},
    {.name = "bias_per_head_softcap",
     .seqlen_q = 97,
     .seqlen_k = 96,
     .num_heads = 3,
     .softcap = 15.0,
     .bias = Bias::kPerHead},
    {.name = "bias_expanded", .seqlen_q = 113, .seqlen_k = 64, .bias = Bias::kExpanded},
    {.name = "bias_with_infinities",
     .seqlen_q = 64,
     .seqlen_k = 200,
     .bias = Bias::kFull,
     .bias_with_infinities = true},
    {.name = "bias_boolean",
     .seqlen_q = 65,
     .seqlen_k = 127,
     .bias = Bias::kFull,
     .bias_type = BiasType::kBoolean},
    {.name = "bias_boolean_rows_without_keys",
     .batch = 3,
     .seqlen_q = 63,
     .seqlen_k = 2,
     .bias = Bias::kPerBatch,
     .bias_type = BiasType::kBoolean},
    {.name = "bias_boolean_per_key_causal",
     .seqlen_q = 128,
     .seqlen_k = 128,
     .causal = true,
     .bias = Bias::kPerKey,
     .bias_type = BiasType::kBoolean},

    // learnable_sink.
    {.name = "sink", .seqlen_q = 97, .seqlen_k = 113, .num_heads = 4, .sink = Sink::kOwn},
    {.name = "sink_float32_window_gqa",
     .seqlen_q = 128,
     .seqlen_k = 128,
     .num_heads = 8,
     .num_heads_kv = 2,
     .causal = true,
     .window_left = 31,
     .sink = Sink::kFloat32},
    {.name = "sink_rows_without_keys",
     .seqlen_q = 113,
     .seqlen_k = 17,
     .causal = true,
     .sink = Sink::kFloat32},
    {.name = "sink_no_keys", .seqlen_q = 17, .seqlen_k = 0, .sink = Sink::kFloat32},

    // Dropout.
    {.name = "dropout_0_1", .seqlen_q = 113, .seqlen_k = 128, .dropout_p = 0.1},
    {.name = "dropout_0_5_causal_gqa",
     .batch = 3,
     .seqlen_q = 97,
     .seqlen_k = 127,
     .num_heads = 4,
     .num_heads_kv = 2,
     .causal = true,
     .dropout_p = 0.5},
    {.name = "dropout_0_9_alibi",
     .seqlen_q = 64,
     .seqlen_k = 200,
     .alibi = Alibi::kPerHead,
     .dropout_p = 0.9},
    {.name = "dropout_1e_30", .seqlen_q = 65, .seqlen_k = 65, .dropout_p = 1e-30},
    {.name = "dropout_s_dmask",
     .seqlen_q = 113,
     .seqlen_k = 200,
     .causal = true,
     .dropout_p = 0.17,
     .s_dmask = true},

    // Varlen.
    {.name = "varlen", .lengths_q = {17, 64, 113}, .lengths_k = {63, 64, 97}},
    {.name = "varlen_causal_one_sequence", .lengths_q = {200}, .lengths_k = {200}, .causal = true},
    {.name = "varlen_causal_empty_sequences",
     .num_heads = 4,
     .num_heads_kv = 2,
     .lengths_q = {0, 65, 17, 3, 128},
     .lengths_k = {5, 0, 97, 2, 128},
     .causal = true},
    {.name = "varlen_all_empty", .lengths_q = {0, 0}, .lengths_k = {0, 0}},
    {.name = "varlen_no_keys", .lengths_q = {3, 17}, .lengths_k = {0, 0}, .causal = true},
    {.name = "varlen_one_query_each",
     .num_heads = 8,
     .num_heads_kv = 2,
     .head_dim = 128,
     .lengths_q = {1, 1, 1, 1},
     .lengths_k = {511, 1, 96, 200},
     .causal = true},
    {.name = "varlen_window_alibi",
     .num_heads = 3,
     .lengths_q = {127, 2, 65},
     .lengths_k = {113, 64, 200},
     .window_left = 17,
     .window_right = 5,
     .alibi = Alibi::kPerBatchAndHead},
    {.name = "varlen_seqused_k",
     .lengths_q = {65, 17, 1},
     .lengths_k = {128, 97, 64},
     .seqused_k = {113, 0, 63},
     .causal = true},
    {.name = "varlen_dropout_slack",
     .lengths_q = {63, 97},
     .lengths_k = {128, 65},
     .max_seqlen_slack = 40,
     .dropout_p = 0.25},
    {.name = "varlen_bias",
     .num_heads = 3,
     .lengths_q = {63, 17},
     .lengths_k = {64, 97},
     .max_seqlen_slack = 3,
     .bias = Bias::kFull},
    {.name = "varlen_everything",
     .num_heads = 6,
     .num_heads_kv = 2,
     .head_dim = 72,
     .head_dim_v = 40,
     .lengths_q = {0, 65, 96, 1},
     .lengths_k = {17, 113, 64, 127},
     .seqused_k = {17, 97, 64, 127},
     .causal = true,
     .window_left = 63,
     .softcap = 25.0,
     .alibi = Alibi::kPerHead,
     .bias = Bias::kPerHead,
     .bias_type = BiasType::kFloat32,
     .sink = Sink::kFloat32,
     .dropout_p = 0.3,
     .q_gain = 2.0},

    // Paged.
    {.name = "paged_1", .lengths_q = {17, 3}, .lengths_k = {63, 17}, .page_size = 1},
    {.name = "paged_16_causal_gqa",
     .num_heads = 8,
     .num_heads_kv = 2,
     .lengths_q = {65, 1, 0},
     .lengths_k = {97, 200, 16},
     .page_size = 16,
     .causal = true},
    {.name = "paged_17_window",
     .lengths_q = {64, 113},
     .lengths_k = {127, 96},
     .page_size = 17,
     .window_left = 40,
     .window_right = 0},
    {.name = "paged_256_one_query",
     .num_heads = 8,
     .num_heads_kv = 1,
     .head_dim = 128,
     .lengths_q = {1, 1, 1},
     .lengths_k = {511, 256, 3},
     .page_size = 256,
     .causal = true},
    {.name = "paged_16_seqused_k",
     .lengths_q = {17, 64, 2},
     .lengths_k = {96, 128, 64},
     .seqused_k = {65, 128, 0},
     .page_size = 16,
     .causal = true},

    // Memory that is not compact.
    {.name = "heads_major",
     .seqlen_q = 97,
     .seqlen_k = 113,
     .num_heads = 4,
     .num_heads_kv = 2,
     .causal = true,
     .storage = Storage::kHeadsMajor},
    {.name = "padded_rows",
     .seqlen_q = 65,
     .seqlen_k = 96,
     .head_dim = 40,
     .storage = Storage::kPaddedRows},
    {.name = "packed_qkv",
     .seqlen_q = 113,
     .seqlen_k = 113,
     .num_heads = 3,
     .causal = true,
     .storage = Storage::kPackedQkv},
    {.name = "varlen_packed_qkv",
     .lengths_q = {63, 0, 128},
     .lengths_k = {63, 0, 128},
     .causal = true,
     .storage = Storage::kPackedQkv},
    {.name = "varlen_padded_rows",
     .head_dim = 80,
     .head_dim_v = 72,
     .lengths_q = {17, 97},
     .lengths_k = {65, 64},
     .storage = Storage::kPaddedRows},
    {.name = "paged_heads_major",
     .num_heads = 4,
     .num_heads_kv = 2,
     .lengths_q = {63, 1},
     .lengths_k = {113, 200},
     .page_size = 16,
     .causal = true,
     .storage = Storage::kHeadsMajor},
};

// Quick are the cases up to this cost: a third of the time for three quarters of the table, in
// which every option still occurs.
inline constexpr int64_t kQuickCost = 12'000'000;

namespace detail {

// SplitMix64 (Steele et al., 2014): each seed its own well-mixed sequence.
class Random {
 public:
  explicit constexpr Random(uint64_t seed) : state_(seed) {}
  constexpr uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  // In [low, high].
  constexpr int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  constexpr bool one_in(int n) { return next() % static_cast<uint64_t>(n) == 0; }
  template <class T, size_t kCount>
  constexpr T of(const T (&choices)[kCount]) {
    return choices[next() % kCount];
  }

 private:
  uint64_t state_;
};

// Short lengths and those around the sizes of tiles.
constexpr int64_t random_length(Random& random) {
  constexpr int64_t kEdges[] = {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129};
  return random.one_in(2) ? random.of(kEdges) : random.between(0, 150);
}

constexpr void random_layout(Random& random, Case& c) {
  if (random.one_in(2)) {
    c.batch = random.between(1, 3);
    c.seqlen_q = random_length(random);
    c.seqlen_k = random_length(random);
    return;
  }
  const int64_t sequences = random.between(1, 4);
  const bool seqused = random.one_in(3);
  for (int64_t b = 0; b < sequences; ++b) {
    const size_t at = static_cast<size_t>(b);
    c.lengths_q.at[at] = random_length(random);
    c.lengths_k.at[at] = random_length(random);
    c.lengths_q.count = c.lengths_k.count = static_cast<int>(b) + 1;
    if (!seqused) continue;
    c.seqused_k.at[at] = random.between(0, c.lengths_k.at[at]);
    c.seqused_k.count = static_cast<int>(b) + 1;
  }
  if (random.one_in(4)) c.max_seqlen_slack = random.between(1, 70);
  if (random.one_in(3)) c.page_size = random.between(1, 40);
}

constexpr void random_scores(Random& random, Case& c) {
  constexpr int64_t kWindows[] = {-1, -1, -1, 0, 1, 7, 16, 40, 100, 1000};
  constexpr double kSoftcaps[] = {0.5, 5.0, 30.0};
  constexpr double kScales[] = {0.0, 0.05, 0.25};
  constexpr double kDropouts[] = {1e-30, 0.1, 0.5, 0.8};
  constexpr double kGains[] = {1.0, 1.0, 3.0, 8.0};
  c.causal = random.one_in(2);
  c.window_left = random.of(kWindows);
  c.window_right = random.of(kWindows);
  if (random.one_in(4)) c.softcap = random.of(kSoftcaps);
  if (random.one_in(4)) c.softmax_scale = random.of(kScales);
  if (random.one_in(4)) c.alibi = static_cast<Alibi>(random.between(1, 2));
  if (random.one_in(4)) c.bias = static_cast<Bias>(random.between(1, 5));
  c.bias_type = static_cast<BiasType>(random.between(0, 2));
  if (random.one_in(4)) c.sink = static_cast<Sink>(random.between(1, 2));
  if (random.one_in(4)) c.dropout_p = random.of(kDropouts);
  c.q_gain = random.of(kGains);
}

}  // namespace detail

// A valid case, the same for the same seed.
constexpr Case random_case(uint64_t seed) {
  constexpr int64_t kDims[] = {8, 16, 32, 40, 64, 64, 80, 96, 128, 128};
  detail::Random random(seed);
  Case c;
  c.name = "random";
  c.seed = seed;
  c.num_heads_kv = random.between(1, 3);
  c.num_heads = c.num_heads_kv * random.between(1, 4);
  c.head_dim = random.one_in(3) ? random.between(1, 160) : random.of(kDims);
  if (random.one_in(4)) c.head_dim_v = random.between(1, 160);
  detail::random_layout(random, c);
  detail::random_scores(random, c);
  c.storage = static_cast<Storage>(random.between(0, 2));
  return c;
}

}  // namespace fa::cases
