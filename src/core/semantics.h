// The rules of attention, one small function each, for host and device code alike.
//
// No includes and no library types, so that a run-time compiler for GPUs takes this file as it is.
#pragma once

namespace fa::semantics {

using Index = long long;

inline constexpr double kLog2e = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// How far a query sees to either side of its own position; -1: no bound on that side.
struct MaskBand {
  Index left = -1;
  Index right = -1;
  constexpr bool operator==(const MaskBand&) const = default;
  constexpr bool unbounded() const { return left < 0 && right < 0; }
};

// `causal` bounds the right side at the query itself and keeps the left side.
constexpr MaskBand mask_band(bool causal, Index window_left, Index window_right) {
  return {window_left < 0 ? -1 : window_left, causal ? 0 : (window_right < 0 ? -1 : window_right)};
}

// Half-open.
struct Range {
  Index begin;
  Index end;
  constexpr bool empty() const { return begin >= end; }
};

// `value + delta`, held within [low, high] without overflow for any delta >= 0.
constexpr Index add_clamped(Index value, Index delta, Index low, Index high) {
  if (value >= high || delta >= high - value) return high;
  return value + delta < low ? low : value + delta;
}

// `value - delta`, held within [low, high] without overflow for any delta >= 0.
constexpr Index subtract_clamped(Index value, Index delta, Index low, Index high) {
  if (value <= low || delta >= value - low) return low;
  return value - delta > high ? high : value - delta;
}

// The keys that query i sees. Aligned to the bottom right corner: query i stands at key position
// i + seqlen_k - seqlen_q.
constexpr Range visible_keys(Index i, Index seqlen_q, Index seqlen_k, MaskBand band) {
  const Index position = i + seqlen_k - seqlen_q;
  return {band.left < 0 ? 0 : subtract_clamped(position, band.left, 0, seqlen_k),
          band.right < 0 ? seqlen_k : add_clamped(position + 1, band.right, 0, seqlen_k)};
}

// The queries that see key j.
constexpr Range visible_queries(Index j, Index seqlen_q, Index seqlen_k, MaskBand band) {
  const Index row = j - (seqlen_k - seqlen_q);
  return {band.right < 0 ? 0 : subtract_clamped(row, band.right, 0, seqlen_q),
          band.left < 0 ? seqlen_q : add_clamped(row + 1, band.left, 0, seqlen_q)};
}

constexpr bool is_visible(Index i, Index j, Index seqlen_q, Index seqlen_k, MaskBand band) {
  const Range keys = visible_keys(i, seqlen_q, seqlen_k, band);
  return keys.begin <= j && j < keys.end;
}

// The distance that an ALiBi slope multiplies: s_ij -= slope * alibi_distance.
constexpr Index alibi_distance(Index i, Index j, Index seqlen_q, Index seqlen_k) {
  const Index distance = i + seqlen_k - seqlen_q - j;
  return distance < 0 ? -distance : distance;
}

// The head of k and v that query head h reads.
constexpr Index kv_head(Index head, Index num_heads, Index num_heads_kv) {
  return head / (num_heads / num_heads_kv);
}

// ---- Dropout: a pure function of (seed, offset, batch, head, i, j). ----

using Word = unsigned int;
using Seed = unsigned long long;

struct Draw {
  Word word[4];
};

// Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
inline constexpr Word kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr Word kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr Word kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr Word kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

constexpr Draw philox(Draw counter, Word key0, Word key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Seed product0 = static_cast<Seed>(kPhiloxMultiplier0) * counter.word[0];
    const Seed product1 = static_cast<Seed>(kPhiloxMultiplier1) * counter.word[2];
    counter = {
        {static_cast<Word>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<Word>(product1),
         static_cast<Word>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<Word>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// One draw serves this many neighbouring keys, 16 bits each.
inline constexpr int kKeysPerDraw = 8;

struct DropoutKey {
  Word key0;
  Word key1;
  Word counter3;
};

// The offset's low half is a counter word, its high half is folded into the key.
constexpr DropoutKey dropout_key(Seed seed, Seed offset) {
  return {static_cast<Word>(seed), static_cast<Word>(seed >> 32) ^ static_cast<Word>(offset >> 32),
          static_cast<Word>(offset)};
}

constexpr Draw dropout_draw(DropoutKey key, Index batch_head, Index i, Index j) {
  return philox({{static_cast<Word>(j / kKeysPerDraw), static_cast<Word>(i),
                  static_cast<Word>(batch_head), key.counter3}},
                key.key0, key.key1);
}

// The 16 bits of a draw that belong to key j: low half of a word first.
constexpr Word dropout_bits(const Draw& draw, Index j) {
  const int lane = static_cast<int>(j % kKeysPerDraw);
  return (draw.word[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu;
}

// A probability is kept when its bits are below round((1 - p) * 65536), at least 1.
constexpr Word dropout_threshold(double dropout_p) {
  const Word rounded = static_cast<Word>((1.0 - dropout_p) * 65536.0 + 0.5);
  return rounded < 1 ? 1 : rounded;
}

constexpr bool dropout_keeps(DropoutKey key, Word threshold, Index batch_head, Index i, Index j) {
  return dropout_bits(dropout_draw(key, batch_head, i, j), j) < threshold;
}

}  // namespace fa::semantics
