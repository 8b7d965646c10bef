// What precedes attention over a KV cache: rotary embedding of the queries and the new keys (Su et
// al., "RoFormer", 2021), and the new keys' and values' way into the cache.
#if defined(FA_CPU_CACHE_UPDATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FA_CPU_CACHE_UPDATE_INL_H_
#undef FA_CPU_CACHE_UPDATE_INL_H_
#else
#define FA_CPU_CACHE_UPDATE_INL_H_
#endif

#include "cpu/sequence-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fa::cpu {
namespace HWY_NAMESPACE {

class CacheUpdateRun {
 public:
  CacheUpdateRun(const ForwardCall& call, int64_t batch, float* scratch)
      : call_(call),
        problem_(call.problem),
        args_(call.args),
        sequence_(core::sequence(call.args, call.problem, batch)),
        batch_(batch),
        cached_(args_.cache_seqlens.as<const int32_t>()[batch]),
        row_(scratch),
        cos_(scratch + kMaxRow),
        sin_(scratch + 2 * kMaxRow) {
    static_assert(3 * kMaxRow <= kTileKeys * kMaxPanel, "the scratch of scores holds it all");
  }

  // New token t of k_new and v_new, to position cached + t of the row.
  HWY_INLINE void append(int64_t t) const {
    if (problem_.rotary_dim > 0) load_angles(cached_ + t);
    for (int64_t head = 0; head < problem_.num_heads_kv; ++head) {
      const core::Rows k = core::rows_from(args_.k_new, batch_, t);
      load(args_.k_new, k.offset + head * k.head_stride);
      if (problem_.rotary_dim > 0) rotate();
      store(args_.k, cache_offset(args_.k, cached_ + t, head));
      const core::Rows v = core::rows_from(args_.v_new, batch_, t);
      load(args_.v_new, v.offset + head * v.head_stride);
      store(args_.v, cache_offset(args_.v, cached_ + t, head));
    }
  }

  // Query i, rounded to its dtype, to call.q.
  HWY_INLINE void rotate_query(int64_t i) const {
    load_angles(problem_.band.unbounded() ? cached_ : cached_ + i);
    const core::Rows from = core::rows_from(args_.q, batch_, i);
    const core::Rows to = core::rows_from(call_.q, batch_, i);
    for (int64_t head = 0; head < problem_.num_heads; ++head) {
      load(args_.q, from.offset + head * from.head_stride);
      rotate();
      store(call_.q, to.offset + head * to.head_stride);
    }
  }

 private:
  static constexpr int64_t kMaxRow = 1024;  // at least the largest head_dim, rounded up

  HWY_INLINE void load(const core::TensorView& from, int64_t offset) const {
    SequenceRun::widen(from, offset, from.shape[from.ndim - 1], row_);
  }

  HWY_INLINE void store(const core::TensorView& to, int64_t offset) const {
    SequenceRun::narrow(row_, 1.0f, to, offset);
  }

  HWY_INLINE int64_t cache_offset(const core::TensorView& cache, int64_t position,
                                  int64_t head) const {
    core::Rows rows;
    if (problem_.page_size > 0) {
      const core::PagedRow at =
          core::paged_row(args_.block_table, problem_.page_size, batch_, position);
      rows = core::rows_from(cache, at.page, at.row);
    } else {
      rows = core::rows_from(cache, sequence_.k_batch, position);
    }
    return rows.offset + head * rows.head_stride;
  }

  HWY_INLINE void load_angles(int64_t position) const {
    const int64_t half = problem_.rotary_dim / 2;
    SequenceRun::widen(args_.rotary_cos, position * args_.rotary_cos.strides[0], half, cos_);
    SequenceRun::widen(args_.rotary_sin, position * args_.rotary_sin.strides[0], half, sin_);
  }

  // (x, y) -> (x cos - y sin, x sin + y cos) for each pair of the row.
  HWY_INLINE void rotate() const {
    const int64_t half = problem_.rotary_dim / 2;
    const int64_t step = args_.rotary_interleaved ? 2 : 1;
    const int64_t partner = args_.rotary_interleaved ? 1 : half;
    float* HWY_RESTRICT row = row_;
    for (int64_t d = 0; d < half; ++d) {
      const float x = row[d * step], y = row[d * step + partner];
      row[d * step] = x * cos_[d] - y * sin_[d];
      row[d * step + partner] = x * sin_[d] + y * cos_[d];
    }
  }

  const ForwardCall& call_;
  const core::AttentionProblem& problem_;
  const core::AttentionArgs& args_;
  const core::Sequence sequence_;
  const int64_t batch_;
  const int64_t cached_;  // tokens in the row, before
  float* const row_;
  float* const cos_;
  float* const sin_;
};

// Tokens [first_panel, first_panel + num_panels) of the new keys and of the queries.
void update_cache(const ForwardCall& call, const ForwardTask& task, float* scratch) {
  const CacheUpdateRun run(call, task.batch, scratch);
  const core::AttentionProblem& problem = call.problem;
  for (int64_t t = task.first_panel; t < task.first_panel + task.num_panels; ++t) {
    if (t < problem.seqlen_new) run.append(t);
    if (problem.rotary_dim > 0 && t < problem.seqlen_q) run.rotate_query(t);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fa::cpu
HWY_AFTER_NAMESPACE();
#endif
