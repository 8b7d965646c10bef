// Rows of keys and values that few queries are about to read, asked for in the order of their
// addresses and by the way: head by head, or many at once, they would find the queue of cache
// misses full, and the processor's own prefetcher would not follow.
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
  static constexpr int64_t kBurst = 8;  // lines

  // What the steps of one loop ask for, without looking where anything ends: an instruction more
  // per line counts. Evenly, two or four lines each, or else eight at some steps, which suits loops
  // whose steps hardly do anything else.
  template <bool kEvenly>
  class Share {
   public:
    FA_ALWAYS_INLINE void step(int64_t number) {
      if constexpr (kEvenly) {
        prefetch<2>(at_);
        if (stride_ > 2 * kLine) prefetch<2>(at_ + 2 * kLine);
      } else {
        if ((number & mask_) != 0) return;
        prefetch<kBurst>(at_);
      }
      at_ += stride_;
    }

   private:
    friend class RowsAhead;
    FA_ALWAYS_INLINE Share(const char* at, int64_t stride, int64_t mask)
        : at_(at), stride_(stride), mask_(mask) {}

    const char* at_;
    const int64_t stride_;
    const int64_t mask_;
  };

  // All heads' rows in [begin, end), which stay where they are until the next start().
  FA_ALWAYS_INLINE void start(const HeadRow* begin, const HeadRow* end, int64_t num_heads) {
    row_ = begin;
    end_ = end;
    num_heads_ = num_heads;
    head_ = 0;
    find_run();
  }

  // Lines that the next loops share out, `per_step` to each of their steps.
  FA_ALWAYS_INLINE void allow(int64_t lines, int64_t per_step) {
    per_step_ = per_step;
    limit(lines);
  }

  // 1, 2, 4 or 8: what so many steps take for so many lines.
  static int64_t per_step(int64_t lines, int64_t steps) {
    int64_t each = 1;
    while (each < kBurst && each * steps < lines) each *= 2;
    return each;
  }

  // For a loop of so many steps. Where a run ends among its lines, they are asked for at once.
  template <bool kEvenly>
  FA_ALWAYS_INLINE Share<kEvenly> share(int64_t steps) {
    const char* at = at_;
    const int64_t lines = steps * per_step_;
    if (limit_ - at < lines * kLine) {
      ask(lines);
      return {reinterpret_cast<const char*>(this), 0, ~int64_t{0}};
    }
    at_ = at + lines * kLine;
    if (kEvenly) return {at, per_step_ * kLine, 0};
    return {at, kBurst * kLine, kBurst / per_step_ - 1};
  }

  // The lines that no step has asked for.
  FA_ALWAYS_INLINE void finish() {
    if (at_ < limit_ || beyond_ > 0) ask((limit_ - at_) / kLine + beyond_);
  }

 private:
  // Into L2: what is on its way would not fit into L1.
  template <int kLines>
  FA_ALWAYS_INLINE static void prefetch(const char* at) {
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + i * kLine, 0, 2);
  }

  FA_ALWAYS_INLINE void ask(int64_t lines) {
    for (; lines >= kBurst && limit_ - at_ >= kBurst * kLine; lines -= kBurst) {
      prefetch<kBurst>(at_);
      at_ += kBurst * kLine;
    }
    for (; lines > 0; --lines) {
      if (at_ >= limit_) {
        if (beyond_ == 0 || row_ == end_) return;
        next_run();
        limit(beyond_);
        if (at_ >= limit_) return;
      }
      prefetch<1>(at_);
      at_ += kLine;
    }
  }

  FA_ALWAYS_INLINE void limit(int64_t lines) {
    const int64_t left = (run_end_ - at_ + kLine - 1) / kLine;  // of the run
    const int64_t here = left < 0 ? 0 : left < lines ? left : lines;
    limit_ = at_ + here * kLine;
    beyond_ = lines - here;
  }

  // A run is the row of one head or, where they adjoin, those of all heads and of the next keys.
  FA_ALWAYS_INLINE void find_run() {
    at_ = run_end_ = nullptr;
    if (row_ == end_) return;
    at_ = row_->data + head_ * row_->head_bytes;
    run_end_ = at_ + row_->bytes;
    if (num_heads_ > 1 && row_->head_bytes != row_->bytes) return;
    head_ = num_heads_ - 1;
    run_end_ = row_->data + num_heads_ * row_->bytes;
    while (row_ + 1 < end_ && row_[1].data == run_end_) {
      ++row_;
      run_end_ += num_heads_ * row_->bytes;
    }
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
  int64_t per_step_ = 1;
};

#undef FA_ALWAYS_INLINE

}  // namespace fa::cpu
