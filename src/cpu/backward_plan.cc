#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/element.h"
#include "cpu/pages.h"
#include "cpu/plans.h"
#include "cpu/task_shares.h"

namespace fa::cpu {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Status;

// Each chunk of a key head has a dQ of its own, which bounds their number.
constexpr int64_t kMaxChunks = 8;
// Chunks cost two more phases, 10 us each, where heads are too few for the threads; else next to
// nothing.
constexpr double kMinFlopsPerChunk = 2e7;

// Five products, for each query and key of a head.
double flops_per_pair(const AttentionProblem& problem) {
  return 2.0 * static_cast<double>(3 * problem.head_dim + 2 * problem.head_dim_v);
}

// Chunks of keys, whose tasks many threads share; their number must not depend on the threads.
int64_t num_chunks(const AttentionProblem& problem, const InstructionSet& set) {
  const int64_t sequences = std::max<int64_t>(problem.batch * problem.num_heads_kv, 1);
  const int64_t tiles = ceil_div(problem.seqlen_k, set.backward_tile_keys);
  const double flops = flops_per_pair(problem) * static_cast<double>(problem.seqlen_q) *
                       static_cast<double>(problem.seqlen_k) *
                       static_cast<double>(problem.num_heads / problem.num_heads_kv);
  const auto worth = static_cast<int64_t>(std::min(flops / kMinFlopsPerChunk, 1e6));
  const int64_t wanted = std::min({ceil_div(set.backward_tasks, sequences), kMaxChunks, worth});
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles, 1));
}

// How the workspace is laid out, in floats: what is shared, and then the scratch of each worker.
struct WorkspaceLayout {
  int64_t lse, delta, own_lanes, shared, scratch;
  BackwardBuffersLayout buffers;

  // whole_heads: a task has a key head to itself, and goes through all phases.
  WorkspaceLayout(const AttentionProblem& problem, const InstructionSet& set, int64_t num_chunks,
                  bool whole_heads) {
    const int64_t group = problem.num_heads / problem.num_heads_kv;
    const int64_t queries = std::min(problem.seqlen_q, problem.total_q);
    const int64_t lanes = max_panels(problem, set.panel, false) * set.panel;
    const bool pairs = set.pairs != nullptr;
    own_lanes = whole_heads ? std::max(round_up(queries, set.panel), set.panel) * group : 0;
    Booking book;
    lse = book.take(lanes);
    delta = book.take(lanes);
    buffers =
        BackwardBuffersLayout::book(book, problem, whole_heads ? 0 : lanes, num_chunks, pairs);
    shared = book.total();
    scratch =
        BackwardScratch::layout(problem, set.backward_tile_keys, pairs, {own_lanes, num_chunks})
            .total;
  }
};

// Heaviest first, so that no long task starts last. The order changes no result.
void sort_by_cost(std::vector<BackwardTask>& tasks) {
  const auto heavier = [](const BackwardTask& a, const BackwardTask& b) { return a.cost > b.cost; };
  if (!std::is_sorted(tasks.begin(), tasks.end(), heavier)) {
    std::stable_sort(tasks.begin(), tasks.end(), heavier);
  }
}

void clear_unused_rows(const AttentionArgs& args, const AttentionProblem& problem) {
  if (problem.layout != core::Layout::kVarlen) return;
  const auto* cu_seqlens_q = args.cu_seqlens_q.as<const int32_t>();
  const auto* cu_seqlens_k = args.cu_seqlens_k.as<const int32_t>();
  clear_rows(args.dq, 0, cu_seqlens_q[problem.batch], args.dq.shape[0]);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const core::Sequence sequence = core::sequence(args, problem, b);
    for (const core::TensorView* gradient : {&args.dk, &args.dv}) {
      clear_rows(*gradient, 0, sequence.k_begin + sequence.seqlen_k, cu_seqlens_k[b + 1]);
    }
  }
  for (const core::TensorView* gradient : {&args.dk, &args.dv}) {
    clear_rows(*gradient, 0, cu_seqlens_k[problem.batch], gradient->shape[0]);
  }
}

class BackwardPlan final : public core::Plan {
 public:
  BackwardPlan(const AttentionProblem& problem, const InstructionSet& set)
      : problem_(problem),
        set_(set),
        tile_keys_(set.backward_tile_keys),
        num_chunks_(num_chunks(problem, set)),
        whole_heads_(problem, set, num_chunks_, true),
        phases_(problem, set, num_chunks_, false) {}

  int64_t workspace_bytes(int num_workers) const override {
    const WorkspaceLayout& layout = layout_for(num_workers);
    return (layout.shared + num_workers * layout.scratch) * static_cast<int64_t>(sizeof(float));
  }

  Status run(const AttentionArgs& args, void* workspace,
             const core::Stream& stream) const override {
    float* shared = static_cast<float*>(workspace);
    const WorkspaceLayout& layout = layout_for(stream.num_workers);
    const BackwardCall call{make_call(args, problem_, set_, tile_keys_, false),
                            layout.buffers.at(shared),
                            shared + layout.lse,
                            shared + layout.delta,
                            num_chunks_,
                            layout.own_lanes,
                            static_cast<float>(core::softmax_scale(args)),
                            1.0f / (1.0f - static_cast<float>(args.dropout_p))};
    const auto run_all = [&](const std::vector<BackwardTask>& tasks, auto&& kernel) {
      double flops = 0;
      for (const BackwardTask& task : tasks) flops += task.cost;
      const bool equal = !tasks.empty() && tasks.front().cost == tasks.back().cost;
      const auto num_tasks = static_cast<int64_t>(tasks.size());
      for_each_task(*stream.parallel, num_tasks, useful_workers(flops, stream.num_workers),
                    equal ? num_tasks : 0, [&](int64_t task, int worker) {
                      kernel(call, tasks[task], shared + layout.shared + worker * layout.scratch);
                    });
    };
    for (const core::TensorView* gradient : {&args.dq, &args.dk, &args.dv}) {
      bring_in_pages(*gradient, *stream.parallel);
    }
    clear_unused_rows(args, problem_);
    const BackwardKernels& kernels = set_.backward;
    if (layout.own_lanes > 0) {
      run_all(chunk_tasks(call, true), [&](const auto& same, const auto& task, float* scratch) {
        differentiate_head(same, task, scratch, kernels);
      });
    } else {
      const std::vector<BackwardTask> panels = panel_tasks(call);
      run_all(panels, kernels.prepare);
      run_all(chunk_tasks(call, false), kernels.differentiate);
      run_all(panels, kernels.finish);
    }
    if (problem_.wants_d_attn_bias) run_all(bias_tasks(args), kernels.differentiate_bias);
    if (problem_.wants_d_learnable_sink) differentiate_sink(call);
    return {};
  }

 private:
  // One task for each key head, where that keeps all workers busy: what the phases leave of its
  // panels stays in their caches. Sums are grouped by chunks either way, so that the result is the
  // same for any number of workers.
  const WorkspaceLayout& layout_for(int num_workers) const {
    // The gradient of a bias goes through all panels again.
    if (problem_.wants_d_attn_bias) return phases_;
    if (num_chunks_ == 1) return whole_heads_;
    const int64_t heads = problem_.batch * problem_.num_heads_kv;
    if (problem_.layout == core::Layout::kVarlen) {  // some take longer
      constexpr int64_t kHeadsPerWorker = 8;
      return heads >= kHeadsPerWorker * num_workers ? whole_heads_ : phases_;
    }
    constexpr double kMostIdle = 0.1;
    const int64_t rounds = ceil_div(heads, num_workers);
    // With one head each, the slowest of many cores would decide (16 heads on 16 threads, D 128,
    // 2048 keys: half the speed of 8 heads in phases); of two, phases cost more, 1 to 4%.
    constexpr int kFewWorkers = 4;
    if (rounds == 1 && num_workers > kFewWorkers) return phases_;
    const auto idle = static_cast<double>(rounds * num_workers - heads);
    return idle <= kMostIdle * static_cast<double>(heads) ? whole_heads_ : phases_;
  }

  // All phases of one key head.
  static void differentiate_head(const BackwardCall& call, const BackwardTask& task, float* scratch,
                                 const BackwardKernels& kernels) {
    BackwardTask part = task;
    kernels.prepare(call, part, scratch);
    for (part.first = 0; part.first < call.num_chunks; ++part.first) {
      kernels.differentiate(call, part, scratch);
    }
    kernels.finish(call, task, scratch);
  }

  std::vector<BackwardTask> panel_tasks(const BackwardCall& call) const {
    constexpr int64_t kPanelsPerTask = 8;
    // Reading and transposing a row costs about as much as this many operations per element.
    constexpr double kFlopsPerElement = 30;
    const double cost = kFlopsPerElement * static_cast<double>(set_.panel * problem_.head_dim);
    std::vector<BackwardTask> tasks;
    for (int32_t b = 0; b < problem_.batch; ++b) {
      const int64_t panels = call.panels_per_head_kv(core::sequence(call.args, problem_, b));
      for (int32_t h = 0; h < problem_.num_heads_kv; ++h) {
        for (int64_t first = 0; first < panels; first += kPanelsPerTask) {
          const int64_t count = std::min(kPanelsPerTask, panels - first);
          tasks.push_back({b, h, first, count, cost * static_cast<double>(count)});
        }
      }
    }
    return tasks;
  }

  // Of all chunks or, where a task takes a whole head, of all heads.
  std::vector<BackwardTask> chunk_tasks(const BackwardCall& call, bool whole_heads) const {
    const int64_t num_chunks = whole_heads ? 1 : num_chunks_;
    std::vector<BackwardTask> tasks;
    for (int32_t b = 0; b < problem_.batch; ++b) {
      const core::Sequence sequence = core::sequence(call.args, problem_, b);
      const int64_t panels = call.panels_per_head_kv(sequence);
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const semantics::Range keys =
            keys_of_chunk(chunk, num_chunks, sequence.seqlen_k, tile_keys_);
        const double cost = pairs(sequence, keys.begin, keys.end) * flops_per_pair(problem_);
        for (int32_t h = 0; h < problem_.num_heads_kv; ++h) {
          tasks.push_back({b, h, chunk, panels, cost * static_cast<double>(call.group)});
        }
      }
    }
    sort_by_cost(tasks);
    return tasks;
  }

  // Query-key pairs of the keys [begin, end) of one head, to within a tile.
  double pairs(const core::Sequence& sequence, int64_t begin, int64_t end) const {
    double sum = 0;
    for (int64_t key = begin; key < end; key += tile_keys_) {
      const int64_t last = std::min(key + tile_keys_, end) - 1;
      const auto seen_by = [&](int64_t j) {
        return semantics::visible_queries(j, sequence.seqlen_q, sequence.seqlen_k, problem_.band);
      };
      const double queries =
          static_cast<double>(std::max<int64_t>(seen_by(last).end - seen_by(key).begin, 0));
      sum += queries * static_cast<double>(last + 1 - key);
    }
    return sum;
  }

  std::vector<BackwardTask> bias_tasks(const AttentionArgs& args) const {
    const core::TensorView& bias = args.d_attn_bias;
    const int64_t num_tiles = ceil_div(problem_.seqlen_k, tile_keys_);
    const int64_t num_blocks = ceil_div(problem_.seqlen_q, set_.panel);
    const int64_t parts = bias_extent(bias, 1) > 1   ? num_tiles
                          : bias_extent(bias, 2) > 1 ? num_blocks
                                                     : 1;
    std::vector<BackwardTask> tasks;
    for (int32_t b = 0; b < bias_extent(bias, 4); ++b) {
      for (int32_t h = 0; h < bias_extent(bias, 3); ++h) {
        for (int64_t part = 0; part < parts; ++part) tasks.push_back({b, h, part, 0, 1e9});
      }
    }
    return tasks;
  }

  // d sink_h = -sum_i exp(sink_h - lse_i) delta_i, over the batch, in order.
  void differentiate_sink(const BackwardCall& call) const {
    const AttentionArgs& args = call.args;
    for (int64_t head = 0; head < problem_.num_heads; ++head) {
      const int64_t head_kv = head / call.group;
      const double sink =
          core::load_element(args.learnable_sink, head * args.learnable_sink.strides[0]);
      double sum = 0;
      for (int64_t b = 0; b < problem_.batch; ++b) {
        const core::Sequence sequence = core::sequence(args, problem_, b);
        const int64_t first = call.first_panel[b] + head_kv * call.panels_per_head_kv(sequence);
        for (int64_t i = 0; i < sequence.seqlen_q; ++i) {
          const int64_t panel = first + i / set_.panel * call.group + head % call.group;
          const int64_t at = panel * set_.panel + i % set_.panel;
          const double lse = call.lse[at] * semantics::kLn2;
          sum -= std::exp(sink - lse) * call.delta[at];
        }
      }
      core::store_element(args.d_learnable_sink, head * args.d_learnable_sink.strides[0],
                          static_cast<float>(sum));
    }
  }

  const AttentionProblem problem_;
  const InstructionSet set_;
  const int64_t tile_keys_;
  const int64_t num_chunks_;
  const WorkspaceLayout whole_heads_;
  const WorkspaceLayout phases_;
};

}  // namespace

core::PlanPtr make_backward_plan(const AttentionProblem& problem, const InstructionSet& set) {
  return std::make_shared<BackwardPlan>(problem, set);
}

BackwardBuffersLayout BackwardBuffersLayout::book(Booking& book, const AttentionProblem& problem,
                                                  int64_t lanes, int64_t num_chunks, bool pairs) {
  // Packed pairs take no more than floats do, but for what fills up a row.
  const int64_t k_row = round_up(problem.head_dim, kMaxLanes);
  const int64_t v_row = round_up(problem.head_dim_v, kMaxLanes);
  return {book.take(lanes * k_row), book.take(lanes * v_row), book.take(lanes * num_chunks * k_row),
          book.take(pairs ? lanes / 2 * k_row : lanes * padded_row(problem.head_dim)),
          book.take(pairs ? lanes / 2 * v_row : lanes * padded_row(problem.head_dim_v))};
}

BackwardScratch BackwardScratch::layout(const AttentionProblem& problem, int64_t tile_keys,
                                        bool pairs, OwnPanels own) {
  BackwardScratch layout{};
  Booking book;
  const int64_t k_row = padded_row(problem.head_dim);
  const int64_t v_row = padded_row(problem.head_dim_v);
  layout.k = book.take(tile_keys * k_row);
  layout.v = book.take(tile_keys * v_row);
  layout.dk = book.take(tile_keys * k_row);
  layout.dv = book.take(tile_keys * v_row);
  layout.probabilities = book.take(tile_keys * kMaxPanel);
  layout.score_gradients = book.take(tile_keys * kMaxPanel);
  layout.softcap_derivatives = book.take(problem.softcap ? tile_keys * kMaxPanel : 0);
  layout.bias_sums =
      book.take(problem.wants_d_attn_bias ? tile_keys * kMaxPanel + tile_keys + kMaxPanel : 0);
  if (pairs) {  // two 16-bit elements to a float
    layout.k_transposed = book.take(k_row * tile_keys / 2);
    layout.gathered_p = book.take(tile_keys * kGatheredPanels * kMaxPanel / 2);
    layout.gathered_ds = book.take(tile_keys * kGatheredPanels * kMaxPanel / 2);
    layout.rows = book.take(std::max(kMaxPanel * k_row, v_row));
  }
  layout.panels = BackwardBuffersLayout::book(book, problem, own.lanes, own.dq_slots(), pairs);
  layout.total = book.total();
  return layout;
}

}  // namespace fa::cpu
