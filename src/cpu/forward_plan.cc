#include "cpu/plans.h"

#include <algorithm>
#include <cstring>

#include "cpu/call.h"

namespace fa::cpu {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Status;

// Half of a small core's L2; the other half is for keys, values and scores.
constexpr int64_t kPanelBytes = 256 * 1024;

// Rows of q past the last sequence belong to none: out = 0, lse = +inf, as for any row that sees
// no key.
void fill_rows_past_the_end(const AttentionArgs& args, const AttentionProblem& problem) {
  if (problem.layout != core::Layout::kVarlen) return;
  const int64_t end = args.cu_seqlens_q.as<const int32_t>()[problem.batch];
  const int64_t row_bytes = problem.head_dim_v * core::byte_size(args.out.dtype);
  for (int64_t row = end; row < args.out.shape[0]; ++row) {
    for (int64_t head = 0; head < problem.num_heads; ++head) {
      const int64_t at = row * args.out.strides[0] + head * args.out.strides[1];
      std::memset(args.out.as<char>() + at * core::byte_size(args.out.dtype), 0, row_bytes);
      if (problem.wants_lse) {
        args.lse.as<float>()[head * args.lse.strides[0] + row * args.lse.strides[1]] =
            __builtin_inff();
      }
    }
  }
}

// Masked and padding entries are zero; the kernel writes the visible ones.
void clear_s_dmask(const core::TensorView& s) {
  for (int64_t b = 0; b < s.shape[0]; ++b) {
    for (int64_t h = 0; h < s.shape[1]; ++h) {
      for (int64_t i = 0; i < s.shape[2]; ++i) {
        const int64_t at = b * s.strides[0] + h * s.strides[1] + i * s.strides[2];
        std::memset(s.as<char>() + at * core::byte_size(s.dtype), 0,
                    s.shape[3] * core::byte_size(s.dtype));
      }
    }
  }
}

class ForwardPlan final : public core::Plan {
 public:
  ForwardPlan(const AttentionProblem& problem, const InstructionSet& set)
      : problem_(problem),
        set_(set),
        max_panels_(panels_per_task(problem, set.panel)),
        scratch_floats_(ForwardScratch::layout(problem, max_panels_).total) {}

  int64_t workspace_bytes(int num_workers) const override {
    return num_workers * scratch_floats_ * static_cast<int64_t>(sizeof(float));
  }

  Status run(const AttentionArgs& args, void* workspace,
             const core::Stream& stream) const override {
    const AttentionCall call = make_call(args, problem_, set_);
    fill_rows_past_the_end(args, problem_);
    if (problem_.wants_s_dmask) clear_s_dmask(args.s_dmask);

    const std::vector<ForwardTask> tasks = cut_forward(call, max_panels_);
    double flops = 0;
    for (const ForwardTask& task : tasks) {
      flops += 2.0 * task.cost * static_cast<double>(problem_.head_dim + problem_.head_dim_v);
    }
    const int workers = useful_workers(flops, *stream.parallel);
    float* scratch = static_cast<float*>(workspace);
    core::parallel_for(*stream.parallel, static_cast<int64_t>(tasks.size()), workers,
                       [&](int64_t task, int worker) {
                         set_.forward(call, tasks[task], scratch + worker * scratch_floats_);
                       });
    return {};
  }

 private:
  const AttentionProblem problem_;
  const InstructionSet set_;
  const int64_t max_panels_;
  const int64_t scratch_floats_;
};

}  // namespace

AttentionCall make_call(const AttentionArgs& args, const AttentionProblem& problem,
                        const InstructionSet& set) {
  return {.args = args,
          .problem = problem,
          .scale_log2 = static_cast<float>(core::softmax_scale(args) * semantics::kLog2e),
          .group = problem.num_heads / problem.num_heads_kv,
          .panel = set.panel,
          .dropout_key = semantics::dropout_key(args.dropout_seed, args.dropout_offset),
          .dropout_threshold = semantics::dropout_threshold(args.dropout_p)};
}

core::PlanPtr make_forward_plan(const AttentionProblem& problem, const InstructionSet& set) {
  return std::make_shared<ForwardPlan>(problem, set);
}

ForwardScratch ForwardScratch::layout(const AttentionProblem& problem, int64_t max_panels) {
  ForwardScratch layout{};
  Booking book;
  const int64_t k_row = round_up(problem.head_dim, kMaxLanes);
  const int64_t v_row = round_up(problem.head_dim_v, kMaxLanes);
  layout.q = book.take(max_panels * kMaxPanel * problem.head_dim);
  layout.o = book.take(max_panels * kMaxPanel * v_row);
  layout.running_max = book.take(max_panels * kMaxPanel);
  layout.running_sum = book.take(max_panels * kMaxPanel);
  layout.k = book.take(kTileKeys * k_row);
  layout.v = book.take(kTileKeys * v_row);
  layout.scores = book.take(kTileKeys * kMaxPanel);
  layout.total = book.total();
  return layout;
}

int64_t panels_per_task(const AttentionProblem& problem, int64_t panel) {
  const int64_t panel_bytes =
      panel * (problem.head_dim + problem.head_dim_v) * static_cast<int64_t>(sizeof(float));
  const int64_t in_cache = std::clamp<int64_t>(kPanelBytes / panel_bytes, 1, kMaxPanels);
  // A fixed number of tasks, enough for many threads to share, whatever their number.
  constexpr int64_t kWantedTasks = 64;
  const int64_t group = problem.num_heads / problem.num_heads_kv;
  const int64_t panels_per_head_kv = (problem.seqlen_q + panel - 1) / panel * group;
  const int64_t panels = problem.batch * problem.num_heads_kv * panels_per_head_kv;
  return std::clamp<int64_t>(panels / kWantedTasks, 1, in_cache);
}

std::vector<ForwardTask> cut_forward(const AttentionCall& call, int64_t max_panels) {
  const AttentionProblem& problem = call.problem;
  std::vector<ForwardTask> tasks;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const core::Sequence sequence = core::sequence(call.args, problem, b);
    const int64_t panels = (sequence.seqlen_q + call.panel - 1) / call.panel * call.group;
    for (int64_t first = 0; first < panels; first += max_panels) {
      const int64_t count = std::min(max_panels, panels - first);
      const int64_t last_query =
          std::min((first + count - 1) / call.group * call.panel + call.panel, sequence.seqlen_q) -
          1;
      const auto visible = [&](int64_t query) {
        return semantics::visible_keys(query, sequence.seqlen_q, sequence.seqlen_k, problem.band);
      };
      const int64_t begin = visible(first / call.group * call.panel).begin;
      const int64_t end = visible(last_query).end;
      const double pairs = static_cast<double>(count * call.panel) *
                           static_cast<double>(std::max<int64_t>(end - begin, 0));
      for (int64_t h = 0; h < problem.num_heads_kv; ++h) {
        tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), first, count, pairs});
      }
    }
  }
  sort_by_cost(tasks);
  return tasks;
}

}  // namespace fa::cpu
