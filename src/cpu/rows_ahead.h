// Rows of keys and values that few queries are about to read, asked for in the order of their
// addresses and a few lines at a time: in bursts, or head by head, they would find the queue of
// cache misses full, and the processor's own prefetcher would not follow.
#pragma once

#include <cstdint>

namespace fa::cpu {

// Always inlined: sources with other compiler flags must share no code.
#define FA_ALWAYS_INLINE inline __attribute__((always_inline))

// One row of the first of some heads.
struct HeadRow {
  const char* data;
  int64_t bytes;
  int64_t head_bytes;  // to the next head's row
};

class RowsAhead {
 public:
  static constexpr int64_t kLine = 64;  // bytes
  static constexpr int64_t kBurst = 8;  // lines of a step

  // All heads' rows in [begin, end), which stay where they are until the next start().
  FA_ALWAYS_INLINE void start(const HeadRow* begin, const HeadRow* end, int64_t num_heads) {
    row_ = begin;
    end_ = end;
    num_heads_ = num_heads;
    head_ = 0;
    find_run();
  }

  // Lines that the next `steps` ask for.
  FA_ALWAYS_INLINE void allow(int64_t lines, int64_t mask) {
    mask_ = mask;
    limit(lines);
  }

  // Which steps ask, of so many that share out the lines: every one, second, fourth, ...
  static int64_t mask(int64_t lines, int64_t steps) {
    int64_t interval = 1;
    while (interval * 2 * lines <= steps * kBurst) interval *= 2;
    return interval - 1;
  }

  FA_ALWAYS_INLINE void step(int64_t number) {
    if ((number & mask_) == 0) burst();
  }

  // The lines that no step has asked for.
  FA_ALWAYS_INLINE void finish() {
    while (at_ + kBurst * kLine <= limit_) burst();
    if (at_ < limit_ || beyond_ > 0) ask((limit_ - at_) / kLine + beyond_);
  }

 private:
  // Into L2: what is on its way would not fit into L1.
  FA_ALWAYS_INLINE static void prefetch(const char* at) { __builtin_prefetch(at, 0, 2); }

  FA_ALWAYS_INLINE void burst() {
    if (at_ + kBurst * kLine > limit_) return ask(kBurst);
    const char* at = at_;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBurst; ++i) prefetch(at + i * kLine);
    at_ = at + kBurst * kLine;
  }

  FA_ALWAYS_INLINE void ask(int64_t lines) {
    for (; lines > 0; --lines) {
      if (at_ >= limit_) {
        if (beyond_ == 0 || row_ == end_) return;
        next_run();
        limit(beyond_);
        if (at_ >= limit_) return;
      }
      prefetch(at_);
      at_ += kLine;
    }
  }

  FA_ALWAYS_INLINE void limit(int64_t lines) {
    const int64_t left = (run_end_ - at_ + kLine - 1) / kLine;  // of the run
    const int64_t here = left < 0 ? 0 : left < lines ? left : lines;
    limit_ = at_ + here * kLine;
    beyond_ = lines - here;
  }

  // A run is the row of one head, or of all where they adjoin.
  FA_ALWAYS_INLINE void find_run() {
    at_ = run_end_ = nullptr;
    if (row_ == end_) return;
    const bool adjoin = row_->head_bytes == row_->bytes;
    at_ = row_->data + head_ * row_->head_bytes;
    run_end_ = at_ + (adjoin ? num_heads_ : 1) * row_->bytes;
    if (adjoin) head_ = num_heads_ - 1;
  }

  FA_ALWAYS_INLINE void next_run() {
    if (++head_ == num_heads_) {
      head_ = 0;
      ++row_;
    }
    find_run();
  }

  const HeadRow* row_ = nullptr;
  const HeadRow* end_ = nullptr;
  int64_t num_heads_ = 0;
  int64_t head_ = 0;
  const char* at_ = nullptr;       // the next line
  const char* run_end_ = nullptr;  // of the rows that lie end to end
  const char* limit_ = nullptr;    // of the lines allowed there
  int64_t beyond_ = 0;             // lines allowed in later runs
  int64_t mask_ = 0;
};

#undef FA_ALWAYS_INLINE

}  // namespace fa::cpu
