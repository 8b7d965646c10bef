#include "cuda/split_plan.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "cuda/forward_launch.h"
#include "cuda/forward_plan.h"
#include "cuda/kernels.h"

namespace fa::cuda {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Result;
using core::Status;
using core::TensorView;

// What a call keeps on the device until it is done, in bytes from the start of its workspace.
struct Workspace {
  int64_t rotated_q = 0, launch = 0, o = 0, lse = 0, total = 0;
  int64_t num_rows = 0;      // of one split
  int64_t row_elements = 0;  // of a row of o

  Workspace(const AttentionProblem& problem, int num_splits, int64_t launch_bytes) {
    num_rows = problem.batch * problem.num_heads * problem.seqlen_q;
    row_elements = core::round_up(problem.head_dim_v, 8);
    const auto take = [this](int64_t bytes) {
      constexpr int64_t kAlignment = 256;
      const int64_t at = total;
      total += core::round_up(bytes, kAlignment);
      return at;
    };
    if (problem.rotary_dim > 0) {
      rotated_q = take(num_rows * problem.head_dim * core::byte_size(problem.dtype));
    }
    launch = take(launch_bytes);
    if (num_splits == 1) return;
    constexpr int64_t kFloatBytes = sizeof(float);
    o = take(num_splits * num_rows * row_elements * kFloatBytes);
    lse = take(num_splits * num_rows * kFloatBytes);
  }
};

class SplitPlan final : public core::Plan {
 public:
  SplitPlan(const AttentionProblem& problem, int device_index, const Device& device,
            const SplitChoice& choice, const KernelId& otherwise)
      : problem_(problem),
        device_index_(device_index),
        choice_(choice),
        launch_(problem, device_index, device, choice.kernel, otherwise),
        workspace_(problem, choice.num_splits, launch_.workspace_bytes()),
        update_(choose_around(Family::kUpdateCache, problem)),
        forward_(choice.kernel),
        combine_(choose_around(Family::kCombineSplits, problem)) {}

  int64_t workspace_bytes(int) const override { return workspace_.total; }
  // Keys that nobody asked to split need not be.
  bool workspace_is_optional() const override {
    return problem_.rotary_dim == 0 && problem_.num_splits <= 1;
  }

  Status run(const AttentionArgs& args, void* workspace,
             const core::Stream& stream) const override {
    if (choice_.kernel.family == Family::kForward90) return run_whole(args, workspace, stream);
    ForwardArgs launch_args = forward_args(problem_, args, choice_.kernel.spec);
    FA_TRY(prepare(args, query(args, workspace), launch_args, stream));
    if (problem_.total_q == 0) return {};
    const int64_t tiles = num_blocks(problem_, launch_args.schedule);
    launch_args.schedule.num_blocks = launch_args.splits.num_tiles =
        static_cast<int>(std::min(tiles, kMaxBlocks));
    const int num_splits = workspace == nullptr ? 1 : choice_.num_splits;
    launch_args.splits.num_splits = num_splits;
    if (num_splits > 1) set_splits(workspace, launch_args);
    int combining = warps_per_row(num_splits);
    void* arguments[] = {&launch_args, &combining};
    FA_TRY(launch(forward_, tiles * num_splits, arguments, stream));
    if (num_splits == 1) return {};
    return launch(combine_, core::ceil_div(workspace_.num_rows, kCombiningWarps / combining),
                  arguments, stream);
  }

  std::string describe() const override {
    const Result<const LoadedKernel*> kernel = forward_.get(device_index_);
    if (!kernel.ok()) return kernel.status().message();
    return core::concat(describe_kernel(*kernel.value()), ", ", choice_.num_splits,
                        choice_.num_splits == 1 ? " split" : " splits");
  }

 private:
  Status launch(const LazyKernel& lazy, int64_t blocks, void** arguments,
                const core::Stream& stream) const {
    const Result<const LoadedKernel*> kernel = lazy.get(device_index_);
    if (!kernel.ok()) return kernel.status();
    return kernel.value()->launch(blocks, arguments, stream.handle);
  }

  // By a kernel that takes whole tiles and all of their keys.
  Status run_whole(const AttentionArgs& args, void* workspace, const core::Stream& stream) const {
    const Result<const LoadedKernel*> kernel = launch_.kernel_for(args, workspace != nullptr);
    if (!kernel.ok()) return kernel.status();
    const TensorView q = query(args, workspace);
    ForwardArgs launch_args = forward_args(problem_, args, kernel.value()->id.spec);
    FA_TRY(prepare(args, q, launch_args, stream));
    if (problem_.total_q == 0) return {};
    void* counter =
        workspace == nullptr ? nullptr : static_cast<char*>(workspace) + workspace_.launch;
    return launch_.run(*kernel.value(), q, args, launch_args, counter, stream);
  }

  // What precedes attention to `q`.
  Status prepare(const AttentionArgs& args, const TensorView& q, ForwardArgs& launch_args,
                 const core::Stream& stream) const {
    launch_args.q = tensor_args(q);
    if (problem_.layout == core::Layout::kCache) set_cache(args, launch_args);
    return update(args, launch_args, stream);
  }

  // A cache without room is one without keys, whatever its lengths say.
  void set_cache(const AttentionArgs& args, ForwardArgs& to) const {
    const auto data = [](const TensorView& vector) {
      return vector.present() ? vector.as<const int>() : nullptr;
    };
    to.cache = {data(args.cache_seqlens), data(args.cache_batch_idx), data(args.cache_leftpad),
                static_cast<int>(problem_.seqlen_new), static_cast<int>(args.k.shape[0])};
    if (args.k.shape[0] > 0) return;
    to.shape.seqlen_k = 0;
    to.pages.max_pages = 0;
  }

  // The queries, where they are rotated.
  TensorView query(const AttentionArgs& args, void* workspace) const {
    TensorView q = args.q;
    if (problem_.rotary_dim == 0) return q;
    const int64_t row = problem_.num_heads * problem_.head_dim;
    q.data = static_cast<char*>(workspace) + workspace_.rotated_q;
    q.strides = {problem_.seqlen_q * row, row, problem_.head_dim, 1};
    return q;
  }

  void set_splits(void* workspace, ForwardArgs& to) const {
    char* const start = static_cast<char*>(workspace);
    to.splits.o = reinterpret_cast<float*>(start + workspace_.o);
    to.splits.lse = reinterpret_cast<float*>(start + workspace_.lse);
    to.splits.num_rows = workspace_.num_rows;
    to.splits.row_elements = static_cast<int>(workspace_.row_elements);
    to.sequences.most_queries = to.shape.seqlen_q;
  }

  // Appends, and rotates. `launch_args` say where the rotated queries go.
  Status update(const AttentionArgs& args, ForwardArgs& launch_args,
                const core::Stream& stream) const {
    if (!problem_.appends) return {};
    UpdateArgs to{};
    to.k_new = tensor_args(args.k_new);
    to.v_new = tensor_args(args.v_new);
    to.q = tensor_args(args.q);
    to.num_heads_kv = static_cast<int>(problem_.num_heads_kv);
    to.num_tokens = static_cast<int>(problem_.seqlen_new);
    int64_t rows_per_token = 2 * problem_.num_heads_kv;
    if (problem_.rotary_dim > 0) {
      to.cos = args.rotary_cos.data;
      to.sin = args.rotary_sin.data;
      to.cos_stride = args.rotary_cos.strides[0];
      to.sin_stride = args.rotary_sin.strides[0];
      to.num_positions = static_cast<int>(args.rotary_cos.shape[0]);
      to.rotary_dim = static_cast<int>(problem_.rotary_dim);
      to.rotary_element =
          args.rotary_cos.dtype == problem_.dtype ? BiasElement::kOwn : BiasElement::kFloat32;
      to.interleaved = args.rotary_interleaved ? 1 : 0;
      to.queries_advance = problem_.band.unbounded() ? 0 : 1;
      to.num_tokens = static_cast<int>(std::max(problem_.seqlen_new, problem_.seqlen_q));
      rows_per_token += problem_.num_heads;
    }
    const int64_t rows = problem_.batch * to.num_tokens * rows_per_token;
    void* arguments[] = {&launch_args, &to};
    return launch(update_, core::ceil_div(rows, KernelSpec{}.num_warps), arguments, stream);
  }

  const AttentionProblem problem_;
  const int device_index_;
  const SplitChoice choice_;
  const ForwardLaunch launch_;
  const Workspace workspace_;
  const LazyKernel update_;
  const LazyKernel forward_;
  const LazyKernel combine_;
};

}  // namespace

core::PlanPtr make_split_plan(const AttentionProblem& problem, int device_index,
                              const Device& device, const SplitChoice& choice,
                              const KernelId& otherwise) {
  return std::make_shared<SplitPlan>(problem, device_index, device, choice, otherwise);
}

}  // namespace fa::cuda
