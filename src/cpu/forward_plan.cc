#include "cpu/plans.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/call.h"
#include "cpu/pages.h"
#include "cpu/task_shares.h"

namespace fa::cpu {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Status;

// Tasks that a call should be cut into, for threads to share, some of which run at half the speed
// of others. Results do not depend on it, but for splits of keys, which begin where those of a
// task's panels do: such tasks are the same for any number of threads. On 16 threads of Sapphire
// Rapids 8 heads of 1024 and 2048 queries took 1.02 to 1.24 times as long with 2 tasks a thread as
// with 4, 16 heads of 128 1.07 times as long with 4 as with 8; and shorter last tasks there took
// bf16's calls of 8 heads of 4096 queries from 10.3 to 9.5 ms, causal ones from 5.9 to 5.1.
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kWantedTasksPerWorker = 8;
constexpr int kFewWorkers = kWantedTasks / kWantedTasksPerWorker;
constexpr int64_t kWantedTasksOfSplits = 32;
// With few queries, about as many key heads share a task; how many, their strides decide.
constexpr int64_t kHeadsPerSplitTask = 8;
// Tasks that share packed tiles need not be large. More than so many bytes are not packed.
constexpr int64_t kPanelsOnPackedTiles = 4;
constexpr int64_t kMaxPackedBytes = int64_t{128} << 20;
// Below this many keys a split costs more than another thread brings.
constexpr int64_t kMinKeysPerSplit = 512;

// How a call is cut. Follows from the problem, the longest sequences, so that a max_seqlen that is
// larger than needed changes nothing, and the number of workers where keys are not split.
struct Cut {
  bool packs_group;         // in all sequences, the queries of a group of heads fit into one panel
  bool few;                 // in all sequences, they are few
  int64_t panels_per_task;  // that share copies of keys and values
  int64_t num_splits;
  PackedTiles packed;  // without its memory; none where a key head has one task

  Cut(const AttentionProblem& problem, const InstructionSet& set, bool packs, bool few,
      int64_t seqlen_k, int num_workers)
      : packs_group(packs), few(few) {
    const int64_t panel = set.panel;
    const int64_t panels = std::max<int64_t>(max_panels(problem, panel, packs), 1);
    const int64_t panel_bytes =
        panel * (problem.head_dim + problem.head_dim_v) * static_cast<int64_t>(sizeof(float));
    // Key heads that share a task count as one.
    const int64_t blocks = few ? std::max<int64_t>(panels / kHeadsPerSplitTask, 1) : panels;
    const int64_t wanted = ceil_div(kWantedTasksOfSplits, blocks);
    num_splits = std::clamp<int64_t>(seqlen_k / kMinKeysPerSplit, 1, wanted);
    if (problem.num_splits > 0) num_splits = problem.num_splits;
    if (problem.wants_s_dmask) num_splits = 1;  // its values need the maximum over all keys
    const int64_t most = std::clamp<int64_t>(set.panel_bytes / panel_bytes, 1, kMaxPanels);
    const int64_t wanted_tasks =
        num_splits > 1 ? kWantedTasks : std::max(kWantedTasks, kWantedTasksPerWorker * num_workers);
    panels_per_task = std::clamp<int64_t>(panels / wanted_tasks, 1, most);
    const int64_t heads = problem.batch * problem.num_heads_kv;
    if (set.forward.pack_tiles == nullptr || few || num_splits > 1 ||
        panels <= heads * panels_per_task) {
      return;
    }
    const PackedTiles tiles{
        nullptr, ceil_div(problem.seqlen_k, set.tile_keys),
        set.tile_keys *
            (round_up(problem.head_dim, kPairDepth) + round_up(problem.head_dim_v, kPairRows)) / 2};
    const int64_t bytes =
        heads * tiles.per_head * tiles.floats * static_cast<int64_t>(sizeof(float));
    if (bytes > kMaxPackedBytes) return;
    packed = tiles;
    panels_per_task = std::min(panels_per_task, kPanelsOnPackedTiles);
  }
};

// Whether to go row by row. Vectors are whole, and each score is used once.
bool few_queries(const AttentionProblem& problem, int64_t seqlen_q) {
  const int64_t group = problem.num_heads / problem.num_heads_kv;
  return seqlen_q * group <= kFewQueries && problem.head_dim % kMaxLanes == 0 &&
         problem.head_dim_v % kMaxLanes == 0 && problem.bias == core::BiasKind::kNone &&
         !problem.dropout && !problem.wants_s_dmask;
}

Cut actual_cut(const AttentionArgs& args, const AttentionProblem& problem,
               const InstructionSet& set, int num_workers) {
  int64_t seqlen_q = 0, seqlen_k = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const core::Sequence sequence = core::sequence(args, problem, b);
    seqlen_q = std::max(seqlen_q, sequence.seqlen_q);
    seqlen_k = std::max(seqlen_k, sequence.seqlen_k);
  }
  return Cut(problem, set,
             packs_group(problem.num_heads / problem.num_heads_kv, set.panel, seqlen_q),
             few_queries(problem, seqlen_q), seqlen_k, num_workers);
}

// What the tasks of a call share: PartialResults and rotated queries, in floats from the start of
// the workspace.
struct SharedLayout {
  int64_t o = 0, running_max = 0, running_sum = 0, q = 0, tiles = 0, total = 0;

  SharedLayout(const AttentionProblem& problem, int64_t panel, const Cut& cut) {
    Booking book;
    if (problem.rotary_dim > 0) {  // 16-bit queries take half of it
      q = book.take(problem.total_q * problem.num_heads * problem.head_dim);
    }
    tiles =
        book.take(problem.batch * problem.num_heads_kv * cut.packed.per_head * cut.packed.floats);
    total = book.total();
    if (cut.num_splits == 1) return;
    const int64_t lanes = max_panels(problem, panel, cut.packs_group) * cut.num_splits * panel;
    o = book.take(lanes * round_up(problem.head_dim_v, kMaxLanes));
    running_max = book.take(lanes);
    running_sum = book.take(lanes);
    total = book.total();
  }
};

// Rows of q past the last sequence belong to none: out = 0, lse = +inf, as for any row that sees
// no key.
void fill_rows_past_the_end(const AttentionArgs& args, const AttentionProblem& problem) {
  if (problem.layout != core::Layout::kVarlen) return;
  const int64_t end = args.cu_seqlens_q.as<const int32_t>()[problem.batch];
  clear_rows(args.out, 0, end, problem.total_q);
  if (!problem.wants_lse) return;
  for (int64_t head = 0; head < problem.num_heads; ++head) {
    for (int64_t row = end; row < problem.total_q; ++row) {
      args.lse.as<float>()[head * args.lse.strides[0] + row * args.lse.strides[1]] =
          __builtin_inff();
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
      : problem_(problem), set_(set) {
    // A call's keys may be fewer than the problem has room for, so that they are not split; then
    // their tiles may be packed, which those of splits are not. More workers have smaller tasks, so
    // that more of them may share packed tiles.
    for (const bool many : {false, true}) {
      for (const int64_t seqlen_k : {problem.seqlen_k, int64_t{0}}) {
        for (const int kind : {0, 1, 2, 3}) {
          const Cut cut(problem, set, kind % 2 != 0, kind / 2 != 0, seqlen_k,
                        many ? std::numeric_limits<int>::max() : 1);
          shared_floats_[many] =
              std::max(shared_floats_[many], SharedLayout(problem, set.panel, cut).total);
          scratch_floats_ =
              std::max(scratch_floats_,
                       ForwardScratch::layout(problem, cut.panels_per_task, set.tile_keys).total);
        }
      }
    }
    scratch_floats_ = std::max(scratch_floats_,
                               kMaxHeadsTogether * ForwardScratch::for_few_queries(problem).total);
  }

  int64_t workspace_bytes(int num_workers) const override {
    return (shared_floats(num_workers) + num_workers * scratch_floats_) *
           static_cast<int64_t>(sizeof(float));
  }

  Status run(const AttentionArgs& args, void* workspace,
             const core::Stream& stream) const override {
    float* shared = static_cast<float*>(workspace);
    const int num_workers = stream.num_workers;
    float* const scratch = shared + shared_floats(num_workers);
    const Cut cut = actual_cut(args, problem_, set_, num_workers);
    const SharedLayout layout(problem_, set_.panel, cut);
    ForwardCall call{make_call(args, problem_, set_, set_.tile_keys, true),
                     cut.num_splits,
                     {shared + layout.o, shared + layout.running_max, shared + layout.running_sum},
                     problem_.rotary_dim > 0 ? rotated_queries(args.q, shared + layout.q) : args.q,
                     cut.packed};
    if (cut.packed.per_head > 0) call.packed.tiles = shared + layout.tiles;
    bring_in_pages(args.out, *stream.parallel);
    fill_rows_past_the_end(args, problem_);
    if (problem_.wants_s_dmask) clear_s_dmask(args.s_dmask);

    const auto run_all = [&](const std::vector<ForwardTask>& tasks, ForwardKernel kernel) {
      double flops = 0;
      for (const ForwardTask& task : tasks) {
        flops += 2.0 * task.cost * static_cast<double>(problem_.head_dim + problem_.head_dim_v);
      }
      const auto first_unlike =
          std::find_if(tasks.begin(), tasks.end(),
                       [&](const ForwardTask& task) { return task.order != tasks.front().order; });
      for_each_task(*stream.parallel, static_cast<int64_t>(tasks.size()),
                    useful_workers(flops, stream.num_workers), first_unlike - tasks.begin(),
                    [&](int64_t task, int worker) {
                      kernel(call, tasks[task], scratch + worker * scratch_floats_);
                    });
    };
    if (problem_.appends) run_all(update_tasks(), set_.forward.update_cache);
    if (cut.packed.per_head > 0) run_all(pack_tasks(call), set_.forward.pack_tiles);
    run_all(attend_tasks(call, cut, num_workers), set_.forward.attend);
    if (cut.num_splits > 1) run_all(combine_tasks(call, cut), set_.forward.combine);
    return {};
  }

 private:
  // In floats.
  int64_t shared_floats(int num_workers) const { return shared_floats_[num_workers > kFewWorkers]; }

  // A compact tensor of q's shape and dtype.
  static core::TensorView rotated_queries(const core::TensorView& q, void* data) {
    core::TensorView view = q;
    view.data = data;
    view.strides = core::row_major_strides(view);
    return view;
  }

  // Runs of tokens, by their number in k_new and in q.
  std::vector<ForwardTask> update_tasks() const {
    constexpr int64_t kTokensPerTask = 16;
    const int64_t tokens = problem_.rotary_dim > 0
                               ? std::max(problem_.seqlen_new, problem_.seqlen_q)
                               : problem_.seqlen_new;
    std::vector<ForwardTask> tasks;
    for (int32_t b = 0; b < problem_.batch; ++b) {
      for (int64_t first = 0; first < tokens; first += kTokensPerTask) {
        const int64_t count = std::min(kTokensPerTask, tokens - first);
        tasks.push_back({b, 0, first, count, 0, static_cast<double>(count * problem_.num_heads)});
      }
    }
    return tasks;
  }

  // One for each tile of keys.
  std::vector<ForwardTask> pack_tasks(const ForwardCall& call) const {
    // Packing an element costs about as much as this many operations.
    constexpr double kFlopsPerElement = 30;
    std::vector<ForwardTask> tasks;
    for (int32_t b = 0; b < problem_.batch; ++b) {
      const int64_t keys = core::sequence(call.args, problem_, b).seqlen_k;
      for (int32_t h = 0; h < problem_.num_heads_kv; ++h) {
        for (int64_t tile = 0; tile * set_.tile_keys < keys; ++tile) {
          tasks.push_back(
              {b, h, tile, 1, 0, kFlopsPerElement * static_cast<double>(set_.tile_keys)});
        }
      }
    }
    return tasks;
  }

  std::vector<ForwardTask> attend_tasks(const ForwardCall& call, const Cut& cut,
                                        int num_workers) const {
    const int32_t few_together = heads_together(call.args.k, cut.num_splits, num_workers);
    std::vector<ForwardTask> tasks;
    for_each_block(call, cut, [&](ForwardTask task, const core::Sequence& sequence) {
      task.few_queries = few_queries(problem_, sequence.seqlen_q);
      const int32_t together = task.few_queries ? few_together : 1;
      if (task.head_kv % together != 0) return;
      task.num_heads_kv =
          static_cast<int32_t>(std::min<int64_t>(together, problem_.num_heads_kv - task.head_kv));
      task.cost =
          task.num_heads_kv * pairs(call, task, sequence) / static_cast<double>(cut.num_splits);
      for (task.split = 0; task.split < cut.num_splits; ++task.split) tasks.push_back(task);
    });
    sort_heads(tasks);
    if (cut.num_splits == 1 && !cut.few && num_workers > kFewWorkers) {
      shorten_last(tasks, num_workers);
    }
    return tasks;
  }

  // Cuts the last tasks into pieces, so that workers end together where some run at half the speed
  // of others: what has several panels is at most half of a worker's part of what is left.
  static void shorten_last(std::vector<ForwardTask>& tasks, int num_workers) {
    double left = 0.0;
    for (const ForwardTask& task : tasks) left += task.cost;
    std::vector<ForwardTask> pieces;
    pieces.reserve(2 * tasks.size());
    for (const ForwardTask& task : tasks) {
      const double of_panel = task.cost / static_cast<double>(task.num_panels);
      const double most = std::max(left / (2.0 * num_workers), of_panel);
      left -= task.cost;
      if (task.cost <= most) {
        pieces.push_back(task);
        continue;
      }
      const int64_t count = std::min(task.num_panels, static_cast<int64_t>(task.cost / most) + 1);
      for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t begin = task.num_panels * i / count, end = task.num_panels * (i + 1) / count;
        ForwardTask piece = task;
        piece.first_panel += begin;
        piece.num_panels = end - begin;
        piece.cost = piece.order = of_panel * static_cast<double>(piece.num_panels);
        pieces.push_back(piece);
      }
    }
    tasks = std::move(pieces);
  }

  // Heaviest heads first. Those of a head stay together, so that a thread finds the keys and values
  // of its last task in its caches.
  static void sort_heads(std::vector<ForwardTask>& tasks) {
    const auto same_head = [](const ForwardTask& a, const ForwardTask& b) {
      return a.batch == b.batch && a.head_kv == b.head_kv;
    };
    double heaviest = 0.0;
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (i == 0 || !same_head(tasks[i], tasks[i - 1])) {
        heaviest = 0.0;
        for (size_t j = i; j < tasks.size() && same_head(tasks[i], tasks[j]); ++j) {
          heaviest = std::max(heaviest, tasks[j].cost);
        }
      }
      tasks[i].order = heaviest;
    }
    const auto before = [](const ForwardTask& a, const ForwardTask& b) {
      return a.order > b.order;
    };
    if (!std::is_sorted(tasks.begin(), tasks.end(), before)) {
      std::stable_sort(tasks.begin(), tasks.end(), before);
    }
  }

  // Key heads of few queries that share a task, whose rows lie end to end: read in the order of
  // their addresses, each page of memory is looked up once. But there is a task for each worker,
  // unless it would read less than is worth waking one for.
  int32_t heads_together(const core::TensorView& k, int64_t num_splits, int num_workers) const {
    constexpr int64_t kBytesTogether = 16384;
    constexpr int64_t kMinBytesOfTask = 128 << 10;
    const int64_t head_stride = k.strides[k.ndim - 2], row_stride = k.strides[k.ndim - 3];
    if (head_stride <= 0 || head_stride >= row_stride) return 1;
    const int64_t element = core::byte_size(k.dtype);
    const int64_t at_most =
        std::clamp<int64_t>(kBytesTogether / (head_stride * element), 1, kMaxHeadsTogether);
    const int64_t heads = problem_.batch * problem_.num_heads_kv * num_splits;
    const int64_t bytes_of_head =
        problem_.seqlen_k * (problem_.head_dim + problem_.head_dim_v) * element / num_splits;
    const int64_t at_least = ceil_div(kMinBytesOfTask, std::max<int64_t>(bytes_of_head, 1));
    return static_cast<int32_t>(std::min(at_most, std::max(heads / num_workers, at_least)));
  }

  std::vector<ForwardTask> combine_tasks(const ForwardCall& call, const Cut& cut) const {
    std::vector<ForwardTask> tasks;
    for_each_block(call, cut, [&](ForwardTask task, const core::Sequence&) {
      task.cost = static_cast<double>(task.num_panels * set_.panel * cut.num_splits);
      tasks.push_back(task);
    });
    return tasks;
  }

  // Calls body(task, sequence) for each run of panels, the last of a head first: under a causal
  // mask it is the heaviest.
  template <class Body>
  void for_each_block(const ForwardCall& call, const Cut& cut, Body&& body) const {
    for (int32_t b = 0; b < problem_.batch; ++b) {
      const core::Sequence sequence = core::sequence(call.args, problem_, b);
      const int64_t panels = call.panels_per_head_kv(sequence);
      const int64_t blocks = ceil_div(panels, cut.panels_per_task);
      for (int32_t h = 0; h < problem_.num_heads_kv; ++h) {
        for (int64_t block = blocks - 1; block >= 0; --block) {
          const int64_t first = block * cut.panels_per_task;
          const int64_t count = std::min(cut.panels_per_task, panels - first);
          body(ForwardTask{b, h, first, count, 0, 0.0}, sequence);
        }
      }
    }
  }

  // Query-key pairs of a run of panels, to within the corners that the band cuts off.
  double pairs(const ForwardCall& call, const ForwardTask& task,
               const core::Sequence& sequence) const {
    const auto visible = [&](int64_t query) {
      return semantics::visible_keys(query, sequence.seqlen_q, sequence.seqlen_k, problem_.band);
    };
    const int64_t first =
        call.packs_group(sequence) ? 0 : task.first_panel / call.group * call.panel;
    const int64_t end =
        call.packs_group(sequence)
            ? sequence.seqlen_q
            : ((task.first_panel + task.num_panels - 1) / call.group + 1) * call.panel;
    const int64_t last = std::min(end, sequence.seqlen_q) - 1;
    const int64_t keys = std::max<int64_t>(visible(last).end - visible(first).begin, 0);
    return static_cast<double>(task.num_panels * call.panel) * static_cast<double>(keys);
  }

  const AttentionProblem problem_;
  const InstructionSet set_;
  int64_t shared_floats_[2]{};  // by whether there are more than kFewWorkers
  int64_t scratch_floats_ = 0;
};

}  // namespace

AttentionCall make_call(const AttentionArgs& args, const AttentionProblem& problem,
                        const InstructionSet& set, int64_t tile_keys, bool may_pack) {
  AttentionCall call{
      .args = args,
      .problem = problem,
      .scale_log2 = static_cast<float>(core::softmax_scale(args) * semantics::kLog2e),
      .group = problem.num_heads / problem.num_heads_kv,
      .panel = set.panel,
      .tile_keys = tile_keys,
      .pairs = set.pairs,
      .row_pairs = set.row_pairs,
      .may_pack = may_pack,
      .dropout_key = semantics::dropout_key(args.dropout_seed, args.dropout_offset),
      .dropout_threshold = semantics::dropout_threshold(args.dropout_p),
      .first_panel = {}};
  int64_t next = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    call.first_panel.push_back(next);
    next += call.panels_per_head_kv(core::sequence(args, problem, b)) * problem.num_heads_kv;
  }
  return call;
}

core::PlanPtr make_forward_plan(const AttentionProblem& problem, const InstructionSet& set) {
  return std::make_shared<ForwardPlan>(problem, set);
}

ForwardScratch ForwardScratch::for_few_queries(const AttentionProblem& problem) {
  ForwardScratch layout{};
  Booking book;
  layout.q = book.take(kFewQueries * round_up(problem.head_dim, kMaxLanes));
  layout.o = book.take(kFewQueries * round_up(problem.head_dim_v, kMaxLanes));
  layout.running_max = book.take(kMaxPanel);
  layout.running_sum = book.take(kMaxPanel);
  layout.scores = book.take(kFewQueries * kLongTileKeys);
  layout.total = book.total();
  return layout;
}

// Pairs take half the space of floats, and fill up a row further.
ForwardScratch ForwardScratch::layout(const AttentionProblem& problem, int64_t max_panels,
                                      int64_t tile_keys) {
  ForwardScratch layout{};
  Booking book;
  const int64_t k_row = round_up(problem.head_dim, kMaxLanes);
  const int64_t v_row = round_up(problem.head_dim_v, kMaxLanes);
  layout.q = book.take(max_panels * kMaxPanel * k_row);
  layout.o = book.take(max_panels * kMaxPanel * v_row);
  layout.running_max = book.take(max_panels * kMaxPanel);
  layout.running_sum = book.take(max_panels * kMaxPanel);
  layout.k = book.take(tile_keys * padded_row(problem.head_dim));
  layout.v = book.take(tile_keys * padded_row(problem.head_dim_v));
  // Pairs have two chunks of them, and the tile's probabilities in half the size.
  static_assert(2 * kChunkKeys + kPairTileKeys / 2 <= kPairTileKeys);
  layout.scores = book.take(tile_keys * kMaxPanel);
  layout.rows = book.take(kMaxPanel * v_row);
  layout.total = book.total();
  return layout;
}

}  // namespace fa::cpu
