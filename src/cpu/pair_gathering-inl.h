// P and dS of neighbouring panels, rounded to bfloat16, until dV and dK take them together: their
// sums are read and written once per product.
#if defined(FA_CPU_PAIR_GATHERING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_PAIR_GATHERING_INL_H_
#undef FA_CPU_PAIR_GATHERING_INL_H_
#else
#define FA_CPU_PAIR_GATHERING_INL_H_
#endif

#include "cpu/pair_parts-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

// Between blocks of rows of what is gathered.
inline constexpr int64_t kGatheredStep = kGatheredPanels * kPanel * kPairRows;

class GatheredPanels {
 public:
  // p, ds: [tile_keys][kGatheredPanels * kPanel], in blocks.
  GatheredPanels(const PairKernels& kernels, uint16_t* p, uint16_t* ds)
      : kernels_(kernels), p_(p), ds_(ds) {}

  HWY_INLINE void start_tile(int64_t num_rows) {
    num_rows_ = num_rows;
    forget();
  }
  HWY_INLINE void forget() { panels_ = {0, 0}; }
  HWY_INLINE bool empty() const { return panels_.empty(); }

  // Those that are gathered follow each other.
  HWY_INLINE bool has_room(int64_t number) const {
    return panels_.empty() || (number == panels_.end && number < panels_.begin + kGatheredPanels);
  }
  // A panel that sees the rows of `tile`, for which there is room.
  HWY_INLINE void add(int64_t number, const ScoreTile& tile) {
    if (panels_.empty()) panels_ = {number, number};
    panels_.end = number + 1;
    seen_[number - panels_.begin] = {tile.begin / kChunkKeys * kChunkKeys,
                                     round_up(tile.end, kChunkKeys)};
  }

  // A panel's columns.
  HWY_INLINE uint16_t* p(int64_t number) const { return p_ + offset(number); }
  HWY_INLINE uint16_t* ds(int64_t number) const { return ds_ + offset(number); }

  // Rounds a panel's P or dS: zero where it sees no key or has no query.
  HWY_INLINE void round(const BackwardPanel& panel, const ScoreTile& from,
                        uint16_t* columns) const {
    clear_outside(columns, {from.begin, from.end});
    kernels_.round_to_a(from.scores, from.column_step, from.begin, from.end,
                        panel.vectors() * kLanes, kPanel, columns, kGatheredStep);
  }

  // Clears the other rows of a panel's columns.
  HWY_INLINE void clear_outside(uint16_t* columns, const semantics::Range& rows) const {
    clear(columns, 0, rows.begin);
    clear(columns, rows.end, num_rows_);
  }

  // The tile's rows in runs that the same panels see, from the first such panel to the last.
  template <class Run>
  HWY_INLINE void for_each_run(Run&& run) const {
    for (int64_t first = 0, end; first < num_rows_; first = end) {
      const semantics::Range panels = panels_that_see(first);
      semantics::Range others = panels;
      end = first;
      while (end < num_rows_ && others.begin == panels.begin && others.end == panels.end) {
        end = std::min(end + kChunkKeys, num_rows_);
        others = panels_that_see(end);
      }
      run(semantics::Range{first, end}, panels);
    }
  }

 private:
  HWY_INLINE int64_t offset(int64_t number) const {
    return (number - panels_.begin) * kPanel / kPairDepth * kBlockA;
  }

  // Rows [begin, end) of one panel's columns.
  HWY_INLINE static void clear(uint16_t* columns, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint16_t* blocks = columns + row / kPairRows * kGatheredStep;
      for (int64_t c = 0; c < kPanel; c += kRunOfA) {
        std::fill_n(
            blocks + c / kPairDepth * kBlockA + place_in_block_a(row % kPairRows, c % kPairDepth),
            kRunOfA, uint16_t{0});
      }
    }
  }

  HWY_INLINE semantics::Range panels_that_see(int64_t row) const {
    semantics::Range panels{panels_.begin, panels_.begin};
    for (int64_t number = panels_.begin; number < panels_.end; ++number) {
      const semantics::Range& seen = seen_[number - panels_.begin];
      if (row < seen.begin || row >= seen.end) continue;
      if (panels.empty()) panels.begin = number;
      panels.end = number + 1;
    }
    return panels;
  }

  const PairKernels& kernels_;
  uint16_t* const p_;
  uint16_t* const ds_;
  int64_t num_rows_ = 0;                         // of the tile, filled up
  semantics::Range panels_{0, 0};                // by number
  semantics::Range seen_[kGatheredPanels] = {};  // their rows, in whole chunks
};

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
