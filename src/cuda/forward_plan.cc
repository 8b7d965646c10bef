#include "cuda/forward_plan.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "core/arithmetic.h"
#include "cuda/device/kernel_args.h"
#include "cuda/forward_launch.h"
#include "cuda/heuristics.h"

namespace fa::cuda {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Result;
using core::Status;
using core::TensorView;

// A window's side, which the kernels count in 32 bits; wider than any sequence is no bound.
int band_side(int64_t side, int64_t longest) {
  return side < 0 || side >= longest ? -1 : static_cast<int>(side);
}

BiasElement element_of(const TensorView& view, core::DataType own) {
  if (!view.present()) return BiasElement::kNone;
  if (view.dtype == core::DataType::kBool || view.dtype == core::DataType::kUInt8) {
    return BiasElement::kBoolean;
  }
  return view.dtype == own ? BiasElement::kOwn : BiasElement::kFloat32;
}

ShapeArgs shape_args(const AttentionProblem& problem) {
  ShapeArgs shape{};
  shape.batch = static_cast<int>(problem.batch);
  shape.num_heads = static_cast<int>(problem.num_heads);
  shape.heads_per_kv = static_cast<int>(problem.num_heads / problem.num_heads_kv);
  shape.seqlen_q = static_cast<int>(problem.seqlen_q);
  shape.seqlen_k = static_cast<int>(problem.seqlen_k);
  shape.head_dim = static_cast<int>(problem.head_dim);
  shape.head_dim_v = static_cast<int>(problem.head_dim_v);
  const int64_t longest = problem.seqlen_q + problem.seqlen_k;
  shape.band_left = band_side(problem.band.left, longest);
  shape.band_right = band_side(problem.band.right, longest);
  return shape;
}

int at_most_int(int64_t value) {
  return static_cast<int>(std::min<int64_t>(value, std::numeric_limits<int>::max()));
}

void set_sequences(const AttentionArgs& args, const AttentionProblem& problem, ForwardArgs& to) {
  const bool has_bias = args.attn_bias.present();
  to.sequences.most_queries = has_bias ? to.shape.seqlen_q : std::numeric_limits<int>::max();
  to.sequences.most_keys = has_bias ? to.shape.seqlen_k : std::numeric_limits<int>::max();
  if (problem.layout == core::Layout::kVarlen) {
    to.sequences.cu_seqlens_q = args.cu_seqlens_q.as<const int>();
    to.sequences.cu_seqlens_k = args.cu_seqlens_k.as<const int>();
    if (args.seqused_k.present()) to.sequences.seqused_k = args.seqused_k.as<const int>();
    to.sequences.total_q = static_cast<int>(problem.total_q);
    to.sequences.total_k = at_most_int(args.k.shape[0]);
  }
  if (problem.page_size > 0) {
    to.pages.block_table = args.block_table.as<const int>();
    to.pages.table_stride = args.block_table.strides[0];
    to.pages.page_size = static_cast<int>(problem.page_size);
    const auto page_size = static_cast<uint64_t>(problem.page_size);
    to.pages.page_shift = std::has_single_bit(page_size) ? std::countr_zero(page_size) : -1;
    to.pages.num_pages = at_most_int(args.k.shape[0]);
    to.pages.max_pages = static_cast<int>(
        std::min(args.block_table.shape[1], core::ceil_div(kMaxLength, problem.page_size)));
  }
}

// Strides of attn_bias as [B, H, Sq, Sk]; 0 along a dimension that it is broadcast along.
std::array<int64_t, 4> bias_strides(const TensorView& bias) {
  std::array<int64_t, 4> strides{};
  for (int d = 0; d < bias.ndim; ++d) {
    const int to = 4 - bias.ndim + d;
    strides[to] = bias.shape[d] == 1 ? 0 : bias.strides[d];
  }
  return strides;
}

// Whether keys 2i and 2i + 1 may be read at once, whatever the row: side by side, both or none of
// them in the same aligned pair.
bool has_pairs(const TensorView& bias, const std::array<int64_t, 4>& strides) {
  const int64_t bytes = core::byte_size(bias.dtype);
  const bool rows_are_even = (strides[0] | strides[1] | strides[2]) % 2 == 0;
  const auto address = reinterpret_cast<uintptr_t>(bias.data);
  return strides[3] == 1 && rows_are_even && address % static_cast<uintptr_t>(2 * bytes) == 0;
}

void set_score(const AttentionArgs& args, const AttentionProblem& problem, Score kind,
               ScoreArgs& to) {
  // A scale of 0 would make NaN of a masked score, -infinity; this makes 0 of any other as well.
  constexpr double kLeastScale = 1e-30;
  const double scale = std::max(core::softmax_scale(args), kLeastScale);
  to.scale = static_cast<float>(kind == Score::kSoftcap ? scale / args.softcap : scale);
  to.scale_log2 =
      static_cast<float>(semantics::kLog2e * (kind == Score::kSoftcap ? args.softcap : scale));
  to.softcap = static_cast<float>(args.softcap);
  if (problem.alibi) {
    to.alibi_slopes = args.alibi_slopes.as<const float>();
    to.alibi_batch_stride = args.alibi_slopes.ndim == 2 ? args.alibi_slopes.strides[0] : 0;
  }
  to.bias_element = element_of(args.attn_bias, problem.dtype);
  if (args.attn_bias.present()) {
    const std::array<int64_t, 4> strides = bias_strides(args.attn_bias);
    to.bias = args.attn_bias.data;
    to.bias_batch_stride = strides[0];
    to.bias_head_stride = strides[1];
    to.bias_row_stride = strides[2];
    to.bias_key_stride = strides[3];
    to.bias_has_pairs = has_pairs(args.attn_bias, strides) ? 1 : 0;
  }
  to.sink_element = element_of(args.learnable_sink, problem.dtype);
  if (args.learnable_sink.present()) to.sink = args.learnable_sink.data;
}

void set_lse(const AttentionArgs& args, const AttentionProblem& problem, ForwardArgs& to) {
  if (!problem.wants_lse) return;
  to.lse = args.lse.as<float>();
  const auto& strides = args.lse.strides;
  if (problem.layout == core::Layout::kVarlen) {
    to.lse_head_stride = strides[0];
    to.lse_row_stride = strides[1];
  } else {
    to.lse_batch_stride = strides[0];
    to.lse_head_stride = strides[1];
    to.lse_row_stride = strides[2];
  }
}

void set_dropout(const AttentionArgs& args, const AttentionProblem& problem, DropoutArgs& to) {
  if (!problem.dropout) return;
  to.key = semantics::dropout_key(args.dropout_seed, args.dropout_offset);
  to.threshold = semantics::dropout_threshold(args.dropout_p);
  to.keep_scale = static_cast<float>(1.0 / (1.0 - args.dropout_p));
}

class ForwardPlan final : public core::Plan {
 public:
  ForwardPlan(const AttentionProblem& problem, int device_index, const Device& device,
              const KernelId& kernel, const KernelId& otherwise)
      : problem_(problem),
        device_index_(device_index),
        launch_(problem, device_index, device, kernel, otherwise) {}

  int64_t workspace_bytes(int) const override { return launch_.workspace_bytes(); }
  bool workspace_is_optional() const override { return true; }

  Status run(const AttentionArgs& args, void* workspace,
             const core::Stream& stream) const override {
    if (problem_.total_q == 0) return {};
    const Result<const LoadedKernel*> kernel = launch_.kernel_for(args, workspace != nullptr);
    if (!kernel.ok()) return kernel.status();
    ForwardArgs launch_args = forward_args(problem_, args, kernel.value()->id.spec);
    FA_TRY(launch_.run(*kernel.value(), args.q, args, launch_args, workspace, stream));
    return problem_.wants_s_dmask ? run_s_dmask(args, launch_args, stream) : Status{};
  }

  std::string describe() const override { return launch_.describe(); }

 private:
  Status run_s_dmask(const AttentionArgs& args, ForwardArgs& launch_args,
                     const core::Stream& stream) const {
    const KernelId id = choose_s_dmask(problem_);
    const Result<const LoadedKernel*> kernel = load_kernel(device_index_, id);
    if (!kernel.ok()) return kernel.status();
    set_score(args, problem_, Score::kGeneral, launch_args.score);
    const TensorView& s = args.s_dmask;
    SDmaskArgs to{s.data,
                  s.strides[0],
                  s.strides[1],
                  s.strides[2],
                  static_cast<int>(s.shape[2]),
                  static_cast<int>(s.shape[3])};
    const int64_t rows = s.shape[0] * s.shape[1] * s.shape[2];
    void* arguments[] = {&launch_args, &to};
    return kernel.value()->launch(core::ceil_div(rows, id.spec.num_warps), arguments,
                                  stream.handle);
  }

  const AttentionProblem problem_;
  const int device_index_;
  const ForwardLaunch launch_;
};

}  // namespace

TensorArgs tensor_args(const TensorView& view) {
  if (view.ndim == 4) return {view.data, view.strides[0], view.strides[1], view.strides[2]};
  return {view.data, 0, view.strides[0], view.strides[1]};
}

ForwardArgs forward_args(const AttentionProblem& problem, const AttentionArgs& args,
                         const KernelSpec& spec) {
  ForwardArgs to{};
  to.q = tensor_args(args.q);
  to.k = tensor_args(args.k);
  to.v = tensor_args(args.v);
  to.out = tensor_args(args.out);
  to.shape = shape_args(problem);
  to.schedule.num_tiles_m = static_cast<int>(tiles_m(problem, spec));
  to.schedule.num_heads = static_cast<int>(spec.packs ? problem.num_heads_kv : problem.num_heads);
  to.schedule.heads_per_group = spec.packs ? 1 : heads_per_group(problem);
  to.schedule.log2_heads_together = log2_heads_together(problem);
  to.splits.num_splits = 1;
  set_lse(args, problem, to);
  set_sequences(args, problem, to);
  set_score(args, problem, spec.score, to.score);
  set_dropout(args, problem, to.dropout);
  return to;
}

int64_t num_blocks(const AttentionProblem& problem, const ScheduleArgs& schedule) {
  const int64_t entries = problem.batch + (problem.layout == core::Layout::kVarlen ? 1 : 0);
  return entries * schedule.num_heads * schedule.num_tiles_m;
}

core::PlanPtr make_forward_plan(const AttentionProblem& problem, int device_index,
                                const Device& device, const KernelId& kernel,
                                const KernelId& otherwise) {
  return std::make_shared<ForwardPlan>(problem, device_index, device, kernel, otherwise);
}

}  // namespace fa::cuda
