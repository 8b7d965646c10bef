// The C interface: turns its structs into the core's views, and the core's Status into its codes.
// No exception and no message leaves by another way.
#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "api/known_calls.h"
#include "api/tensors.h"
#include "core/attention_args.h"
#include "core/dispatch.h"
#include "core/environment.h"
#include "core/registry.h"
#include "core/validate.h"
#include "cpu/ceilings.h"
#include "cpu/cpu.h"
#include "cpu/pages.h"
#include "cuda/host_values.h"
#include "cuda/nvrtc.h"
#include "flash_attn/flash_attn.h"
#include "reference/reference.h"

namespace fa::api {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::DataType;
using core::Result;
using core::Status;
using core::StatusCode;
using core::TensorView;
using core::environment::CallSettings;

// ---- Errors ----

// The text of a thread's last failure. Falls back to a literal where keeping a copy fails too.
class LastError {
 public:
  void set(const std::string& message) noexcept {
    try {
      text_ = message;
      current_ = text_.c_str();
    } catch (...) {
      set_literal("out of host memory");
    }
  }
  void set_literal(const char* message) noexcept { current_ = message; }
  const char* get() const noexcept { return current_; }

 private:
  std::string text_;
  const char* current_ = "";
};

LastError& last_error() {
  thread_local LastError error;
  return error;
}

fa_status to_code(const Status& status) {
  if (!status.ok()) last_error().set(status.message());
  return static_cast<fa_status>(status.code());
}

// Runs `body`, which returns a Status, and lets nothing but a code out.
template <class Body>
fa_status guarded(Body&& body) noexcept {
  try {
    return to_code(body());
  } catch (const std::bad_alloc&) {
    last_error().set_literal("out of host memory");
    return FA_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error().set(error.what());
    return FA_INTERNAL;
  } catch (...) {
    last_error().set_literal("an exception of an unknown type");
    return FA_INTERNAL;
  }
}

// ---- Tensors ----

DataType to_dtype(const fa_tensor& tensor) {
  struct Known {
    uint8_t code, bits;
    DataType dtype;
  };
  constexpr Known kKnown[] = {
      {FA_FLOAT, 32, DataType::kFloat32},   {FA_FLOAT, 16, DataType::kFloat16},
      {FA_BFLOAT, 16, DataType::kBFloat16}, {FA_FLOAT, 64, DataType::kFloat64},
      {FA_INT, 32, DataType::kInt32},       {FA_INT, 64, DataType::kInt64},
      {FA_UINT, 8, DataType::kUInt8},       {FA_BOOL, 8, DataType::kBool},
  };
  for (const Known& known : kKnown) {
    if (known.code == tensor.dtype_code && known.bits == tensor.dtype_bits) return known.dtype;
  }
  return DataType::kOther;
}

// As frameworks call it; the formats of 8 and fewer bits, codes 7 to 17, are floats.
std::string dtype_text(const fa_tensor& tensor) {
  constexpr const char* kKinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const int code = tensor.dtype_code, bits = tensor.dtype_bits;
  if (code < 7) return core::concat(kKinds[code], bits);
  if (code <= 17) return core::concat("float", bits);
  return core::concat("of code ", code, " and ", bits, " bits");
}

// The struct's own fields, before any of them is trusted.
Status check_fields(const fa_tensor& tensor, const char* name) {
  if (tensor.ndim < 0 || tensor.ndim > core::kMaxRank) {
    return core::invalid_argument(name, ": ndim is ", tensor.ndim, ", must be 0 to ",
                                  core::kMaxRank);
  }
  if (tensor.dtype_lanes != 1) {
    return core::invalid_argument(name, ": dtype_lanes is ", tensor.dtype_lanes, ", must be 1");
  }
  if (tensor.ndim > 0 && tensor.shape == nullptr) {
    return core::invalid_argument(name, ": shape is NULL, ndim is ", tensor.ndim);
  }
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] < 0) {
      return core::invalid_argument(name, ": shape[", d, "] is ", tensor.shape[d],
                                    ", must not be negative");
    }
  }
  return {};
}

// Row-major without gaps. An empty dimension counts as one, as in DLPack's producers.
Status set_compact_strides(const char* name, TensorView& view) {
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.strides[d] = stride;
    const int64_t extent = view.shape[d] > 1 ? view.shape[d] : 1;
    if (stride > INT64_MAX / extent) {
      return core::invalid_argument(name, ": shape ", core::shape_text(view),
                                    " has more elements than an int64 counts");
    }
    stride *= extent;
  }
  return {};
}

Status to_view(const fa_tensor* tensor, const char* name, TensorView& view) {
  if (tensor == nullptr) return {};  // the view stays absent
  FA_TRY(check_fields(*tensor, name));
  view.dtype = to_dtype(*tensor);
  if (view.dtype == DataType::kOther) {
    return core::invalid_argument(name, ": dtype is ", dtype_text(*tensor),
                                  ", must be one that the library knows: float32, float16, "
                                  "bfloat16; int32 for lengths and indices; bool for a mask");
  }
  const auto type = static_cast<core::DeviceType>(tensor->device_type);
  view.device = {type, type == core::DeviceType::kCpu ? 0 : tensor->device_id};
  view.ndim = tensor->ndim;
  for (int d = 0; d < view.ndim; ++d) view.shape[d] = tensor->shape[d];
  if (tensor->strides == nullptr) {
    FA_TRY(set_compact_strides(name, view));
  } else {
    for (int d = 0; d < view.ndim; ++d) view.strides[d] = tensor->strides[d];
  }
  if (tensor->data != nullptr) view.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  return {};
}

// `given` has struct_size bytes by the caller's header; those that are unknown here become zero.
template <class Struct>
void init_struct(Struct* given, size_t struct_size, Struct defaults) {
  if (given == nullptr) return;
  defaults.struct_size = struct_size;
  std::memset(static_cast<void*>(given), 0, struct_size);
  std::memcpy(static_cast<void*>(given), &defaults, std::min(struct_size, sizeof(Struct)));
}

template <class Struct>
Status check_struct(const Struct* given, const char* name, const char* init) {
  if (given == nullptr) return core::invalid_argument(name, " is NULL");
  if (given->struct_size == sizeof(Struct)) return {};
  return core::invalid_argument(name, ": struct_size is ", given->struct_size,
                                ", this library's is ", sizeof(Struct), "; start from ", init,
                                ", with the header of this library's version");
}

Status check_args(const fa_attention_args* args) {
  return check_struct(args, "args", "fa_attention_args_init()");
}

Status check_gradients(const fa_attention_gradients* gradients, const char* name) {
  return check_struct(gradients, name, "fa_attention_gradients_init()");
}

Status to_core(const fa_attention_args* from, AttentionArgs& to) {
  FA_TRY(check_args(from));
  for (const auto& tensor : kTensors) {
    FA_TRY(to_view(from->*tensor.from, tensor.name, to.*tensor.to));
  }
  to.rotary_interleaved = from->rotary_interleaved != 0;
  to.num_splits = from->num_splits;
  to.max_seqlen_q = from->max_seqlen_q;
  to.max_seqlen_k = from->max_seqlen_k;
  if (from->softmax_scale != nullptr) to.softmax_scale = *from->softmax_scale;
  to.causal = from->causal != 0;
  to.window_left = from->window_size_left;
  to.window_right = from->window_size_right;
  to.softcap = from->softcap;
  to.dropout_p = from->dropout_p;
  to.dropout_seed = from->dropout_seed;
  to.dropout_offset = from->dropout_offset;
  return {};
}

Status to_core(const fa_attention_gradients* from, AttentionArgs& to) {
  FA_TRY(check_gradients(from, "gradients"));
  for (const auto& tensor : kGradients) {
    FA_TRY(to_view(from->*tensor.from, tensor.name, to.*tensor.to));
  }
  to.deterministic = from->deterministic != 0;
  return {};
}

Result<AttentionProblem> check_views(const AttentionArgs& args, bool backward) {
  return backward ? core::validate_backward(args) : core::validate_forward(args);
}

// The lengths and pages of a call on a device, whose views have been checked.
Status check_device_values(const AttentionArgs& args, bool backward, void* stream) {
  AttentionArgs readable = args;
  cuda::HostValues values;
  FA_TRY(values.read(readable, stream));
  return check_views(readable, backward).status();
}

// The views of a call, in `args`, and its problem. `c_gradients` is null in the forward.
Result<AttentionProblem> read_call(const fa_attention_args* c_args,
                                   const fa_attention_gradients* c_gradients, bool checks_values,
                                   AttentionArgs& args) {
  FA_TRY(to_core(c_args, args));
  if (c_gradients != nullptr) FA_TRY(to_core(c_gradients, args));
  Result<AttentionProblem> problem = check_views(args, c_gradients != nullptr);
  if (!problem.ok() || !checks_values || !args.values_are_real ||
      args.q.device.type != core::DeviceType::kCuda ||
      problem.value().layout == core::Layout::kDense) {
    return problem;
  }
  FA_TRY(check_device_values(args, c_gradients != nullptr, c_args->stream));
  return problem;
}

Status validate(const fa_attention_args* c_args, const fa_attention_gradients* c_gradients,
                bool values_are_real) {
  AttentionArgs args;
  args.values_are_real = values_are_real;
  const bool checks_values = core::environment::call_settings().checks_values;
  return read_call(c_args, c_gradients, checks_values, args).status();
}

// ---- Running ----

// A thread keeps this much between calls; the pages of more are the system's to take, so that one
// long sequence does not hold its memory for the life of the thread.
constexpr int64_t kMaxRetainedWorkspace = int64_t{64} << 20;
// From here on, in pages of 2 MiB: with small ones the first touch of 118 MiB took 27000 faults, a
// tenth of a backward on 16 threads, call after call.
constexpr int64_t kLargeWorkspace = int64_t{4} << 20;

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(); }

  // At least `bytes`, or null where there is no memory. What was in it is lost.
  void* reserve(int64_t bytes) {
    used_ = bytes;
    if (bytes <= capacity_) return data_;
    release();
    alignment_ = bytes < kLargeWorkspace ? kCacheLine : kHugePage;
    data_ = ::operator new(static_cast<size_t>(bytes), alignment_, std::nothrow);
    capacity_ = data_ == nullptr ? 0 : bytes;
    if (data_ != nullptr && alignment_ == kHugePage) cpu::prefer_huge_pages(data_, bytes);
    return data_;
  }

  void trim() {
    if (used_ <= kMaxRetainedWorkspace) return;
    if (!cpu::give_pages_back_lazily(data_, capacity_)) release();
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  static constexpr std::align_val_t kHugePage{cpu::kHugePageBytes};

  void release() {
    ::operator delete(data_, alignment_);
    data_ = nullptr;
    capacity_ = 0;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;  // by the call in work
  std::align_val_t alignment_ = kCacheLine;
};

Status no_workspace(int64_t bytes) {
  return {StatusCode::kOutOfMemory, core::concat("no memory for ", bytes, " bytes of workspace")};
}

Status run_on_device(const core::Plan& plan, const AttentionArgs& args,
                     const fa_attention_args& c_args) {
  const int64_t bytes = plan.workspace_bytes(0);
  void* scratch = nullptr;
  const bool is_needed = bytes > 0 && !plan.workspace_is_optional();
  if (is_needed && c_args.allocate_workspace == nullptr) {
    return core::unsupported("allocate_workspace: is NULL, the call needs ", bytes,
                             " bytes of memory on ", core::name(args.q.device),
                             "; PyTorch lends its allocator from 2.10 on");
  }
  if (bytes > 0 && c_args.allocate_workspace != nullptr) {
    scratch = c_args.allocate_workspace(c_args.workspace_context, bytes);
  }
  if (is_needed && scratch == nullptr) return no_workspace(bytes);
  return plan.run(args, scratch, {c_args.stream, nullptr});
}

Status run_plan(const core::Plan& plan, const AttentionArgs& args,
                const fa_attention_args& c_args) {
  if (args.q.device.type != core::DeviceType::kCpu) return run_on_device(plan, args, c_args);
  thread_local Workspace workspace;
  const core::Stream stream{c_args.stream, &cpu::default_parallel()};
  const int64_t bytes = plan.workspace_bytes(stream.num_workers);
  void* scratch = workspace.reserve(bytes);
  if (bytes > 0 && scratch == nullptr) return no_workspace(bytes);
  Status status = plan.run(args, scratch, stream);
  workspace.trim();
  return status;
}

std::string_view forced_backend(const fa_attention_args& args, const CallSettings& settings) {
  return args.backend != nullptr ? std::string_view{args.backend} : settings.backend;
}

// The call of this kind that the thread has made before, given this call's tensors; null where it
// has made none. Decisions that are to be told, or that other libraries have a part in, are taken
// anew. Reads `key` unless the call can have none.
KnownCall* find_known(const fa_attention_args& args, const fa_attention_gradients* gradients,
                      const CallSettings& settings, CallKey& key) {
  if (settings.verbose_dispatch || settings.wants_flaggems) return nullptr;
  if (!key.read(args, gradients, forced_backend(args, settings), settings.checks_values)) {
    return nullptr;
  }
  KnownCall* known = KnownCalls::of_thread().find(key);
  if (known != nullptr) key.place(args, known->args);
  return known;
}

// The forward, or with `c_gradients` the backward.
Status run(const fa_attention_args* c_args, const fa_attention_gradients* c_gradients) {
  FA_TRY(check_args(c_args));
  const CallSettings settings = core::environment::call_settings();
  CallKey key;
  if (const KnownCall* known = find_known(*c_args, c_gradients, settings, key)) {
    return run_plan(*known->plan, known->args, *c_args);
  }
  AttentionArgs args;
  const Result<AttentionProblem> problem =
      read_call(c_args, c_gradients, settings.checks_values, args);
  if (!problem.ok()) return problem.status();
  const Result<core::Choice> choice =
      core::choose(problem.value(), args.q.device, forced_backend(*c_args, settings));
  if (!choice.ok()) return choice.status();
  FA_TRY(run_plan(*choice.value().plan, args, *c_args));
  if (key.complete()) KnownCalls::of_thread().insert(key, args, choice.value().plan);
  return {};
}

// run(), of a known call.
Status run_known(const fa_attention_args* c_args, const fa_attention_gradients* c_gradients,
                 int32_t* ran) {
  if (ran == nullptr) return core::invalid_argument("ran is NULL");
  *ran = 0;
  FA_TRY(check_args(c_args));
  CallKey key;
  const KnownCall* known =
      find_known(*c_args, c_gradients, core::environment::call_settings(), key);
  if (known == nullptr) return {};
  *ran = 1;
  return run_plan(*known->plan, known->args, *c_args);
}

// Where a text goes, as fa_explain() takes it.
struct TextBuffer {
  char* text;
  size_t capacity;
  size_t* needed;

  void clear() const {
    if (text != nullptr && capacity > 0) *text = '\0';
    if (needed != nullptr) *needed = 0;
  }
  void write(const std::string& from) const {
    if (needed != nullptr) *needed = from.size() + 1;
    if (text == nullptr || capacity == 0) return;
    const size_t length = from.size() < capacity ? from.size() : capacity - 1;
    std::memcpy(text, from.data(), length);
    text[length] = '\0';
  }
};

Status explain(const Result<AttentionProblem>& problem, const AttentionArgs& args,
               const fa_attention_args* c_args, const TextBuffer& to) {
  if (!problem.ok()) return problem.status();
  const CallSettings settings = core::environment::call_settings();
  const std::string_view forced = forced_backend(*c_args, settings);
  FA_TRY(core::check_forced(args.q.device, forced));
  to.write(core::to_string(core::explain(problem.value(), args.q.device, forced)));
  return {};
}

// ---- The oracle ----

// Stand-ins for what the checks of a whole call ask for and the oracle does not: outputs, or, for
// the backward, inputs that it computes itself.
TensorView stand_in(const TensorView& like) {
  TensorView view = like;
  view.strides = core::row_major_strides(view);
  return view;
}

TensorView out_stand_in(const AttentionArgs& args) {
  if (args.q.ndim < 1 || args.v.ndim < 1) return stand_in(args.q);  // the checks refuse q or v
  TensorView view = args.q;
  view.shape[view.ndim - 1] = args.v.shape[args.v.ndim - 1];
  view.strides = core::row_major_strides(view);
  return view;
}

TensorView lse_stand_in(const AttentionArgs& args, const AttentionProblem& problem) {
  static float none;
  TensorView view;
  view.data = &none;
  view.dtype = DataType::kFloat32;
  view.device = args.q.device;
  if (problem.layout == core::Layout::kVarlen) {
    view.ndim = 2;
    view.shape = {problem.num_heads, args.q.shape[0]};
  } else {
    view.ndim = 3;
    view.shape = {problem.batch, problem.num_heads, problem.seqlen_q};
  }
  view.strides = core::row_major_strides(view);
  return view;
}

// An fp64 result, row-major in the shape of `like`.
Status check_result(const TensorView& view, const char* name, const TensorView& like) {
  if (!view.present()) return {};
  if (view.dtype != DataType::kFloat64) {
    return core::invalid_argument(name, ": dtype is ", core::name(view.dtype), ", must be float64");
  }
  if (view.device.type != core::DeviceType::kCpu) {
    return core::invalid_argument(name, ": lies on ", core::name(view.device), ", must be on cpu");
  }
  bool same = view.ndim == like.ndim;
  for (int d = 0; same && d < like.ndim; ++d) same = view.shape[d] == like.shape[d];
  if (!same) {
    return core::invalid_argument(name, ": shape is ", core::shape_text(view), ", must be ",
                                  core::shape_text(like));
  }
  if (view.num_elements() == 0) return {};
  const auto strides = core::row_major_strides(view);
  for (int d = 0; d < view.ndim; ++d) {
    if (view.shape[d] > 1 && view.strides[d] != strides[d]) {
      return core::invalid_argument(name, ": strides[", d, "] is ", view.strides[d], ", must be ",
                                    strides[d], " (row-major without gaps)");
    }
  }
  if (view.data == nullptr) {
    return core::invalid_argument(name, ": data is NULL, shape is ", core::shape_text(view));
  }
  return {};
}

// The inputs of the forward, with a stand-in for out.
Result<AttentionProblem> read_oracle(const fa_attention_args* c_args, AttentionArgs& args) {
  FA_TRY(check_args(c_args));
  fa_attention_args inputs = *c_args;
  inputs.out = inputs.lse = inputs.s_dmask = nullptr;
  FA_TRY(to_core(&inputs, args));
  args.out = out_stand_in(args);
  Result<AttentionProblem> problem = core::validate_forward(args);
  if (problem.ok() && problem.value().appends) {
    return core::unsupported("k_new: is given; the oracle reads a KV cache and appends nothing");
  }
  if (problem.ok() && args.q.device.type != core::DeviceType::kCpu) {
    return core::unsupported("q: lies on ", core::name(args.q.device),
                             "; the oracle reads tensors on cpu only");
  }
  return problem;
}

Status forward_oracle(const fa_attention_args* c_args, const fa_tensor* c_out,
                      const fa_tensor* c_lse, const fa_tensor* c_bound) {
  AttentionArgs args;
  const Result<AttentionProblem> problem = read_oracle(c_args, args);
  if (!problem.ok()) return problem.status();
  TensorView out, lse, bound;
  FA_TRY(to_view(c_out, "out", out));
  FA_TRY(to_view(c_lse, "lse", lse));
  FA_TRY(to_view(c_bound, "bound", bound));
  FA_TRY(check_result(out, "out", args.out));
  FA_TRY(check_result(lse, "lse", lse_stand_in(args, problem.value())));
  FA_TRY(check_result(bound, "bound", args.out));
  reference::forward(args, problem.value(),
                     {out.as<double>(), lse.as<double>(), bound.as<double>()});
  return {};
}

// Where a gradient of the oracle and its bound are found, and where they go.
struct OracleGradient {
  const char* name;
  const fa_tensor* fa_attention_gradients::*field;
  TensorView AttentionArgs::*of;
  TensorView AttentionArgs::*gradient;
  double* reference::BackwardResult::*value;
  double* reference::BackwardResult::*bound;
  bool optional = false;
};

constexpr OracleGradient kOracleGradients[] = {
    {"dq", &fa_attention_gradients::dq, &AttentionArgs::q, &AttentionArgs::dq,
     &reference::BackwardResult::dq, &reference::BackwardResult::dq_bound},
    {"dk", &fa_attention_gradients::dk, &AttentionArgs::k, &AttentionArgs::dk,
     &reference::BackwardResult::dk, &reference::BackwardResult::dk_bound},
    {"dv", &fa_attention_gradients::dv, &AttentionArgs::v, &AttentionArgs::dv,
     &reference::BackwardResult::dv, &reference::BackwardResult::dv_bound},
    {"d_attn_bias", &fa_attention_gradients::d_attn_bias, &AttentionArgs::attn_bias,
     &AttentionArgs::d_attn_bias, &reference::BackwardResult::d_attn_bias,
     &reference::BackwardResult::d_attn_bias_bound, true},
    {"d_learnable_sink", &fa_attention_gradients::d_learnable_sink, &AttentionArgs::learnable_sink,
     &AttentionArgs::d_learnable_sink, &reference::BackwardResult::d_learnable_sink,
     &reference::BackwardResult::d_learnable_sink_bound, true}};

Status backward_oracle(const fa_attention_args* c_args, const fa_attention_gradients* c_gradients,
                       const fa_attention_gradients* c_bounds) {
  AttentionArgs args;
  const Result<AttentionProblem> forward = read_oracle(c_args, args);
  if (!forward.ok()) return forward.status();
  if (forward.value().layout == core::Layout::kCache) {
    return core::unsupported("cache_seqlens: is given; there is no backward through a KV cache");
  }
  FA_TRY(check_gradients(c_gradients, "gradients"));
  if (c_bounds != nullptr) FA_TRY(check_gradients(c_bounds, "bounds"));
  FA_TRY(to_view(c_gradients->dout, "dout", args.dout));
  args.lse = lse_stand_in(args, forward.value());

  reference::BackwardResult result;
  for (const OracleGradient& it : kOracleGradients) {
    const TensorView& of = args.*it.of;
    const std::string bound_name = core::concat("bounds.", it.name);
    TensorView value, bound;
    FA_TRY(to_view(c_gradients->*it.field, it.name, value));
    if (c_bounds != nullptr) FA_TRY(to_view(c_bounds->*it.field, bound_name.c_str(), bound));
    if (it.optional && !value.present() && !bound.present()) continue;
    args.*it.gradient = stand_in(of);
    if (!of.present()) {
      (args.*it.gradient).ndim = 0;  // given, which the checks below refuse
      continue;
    }
    FA_TRY(check_result(value, it.name, of));
    FA_TRY(check_result(bound, bound_name.c_str(), of));
    result.*it.value = value.as<double>();
    result.*it.bound = bound.as<double>();
  }
  const Result<AttentionProblem> problem = core::validate_backward(args);
  if (!problem.ok()) return problem.status();
  reference::backward(args, problem.value(), args.dout, result);
  return {};
}

// ---- Implementations ----

// A problem that an implementation refuses only where it cannot run on this machine at all.
AttentionProblem trivial_problem() {
  AttentionProblem problem;
  problem.batch = problem.seqlen_q = problem.seqlen_k = 1;
  problem.num_heads = problem.num_heads_kv = 1;
  problem.head_dim = problem.head_dim_v = 64;
  return problem;
}

// Per implementation the reason why this machine cannot run it; "" where it can. It tries each
// dtype, since an instruction set may serve one of them only.
std::vector<std::string> probe(core::DeviceType device_type) {
  std::vector<std::string> reasons;
  for (const core::Implementation& implementation : core::implementations(device_type)) {
    std::string reason;
    for (DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
      AttentionProblem problem = trivial_problem();
      problem.dtype = dtype;
      const Result<core::PlanPtr> plan = implementation.accept(problem, {device_type, 0});
      if (plan.ok()) {
        reason.clear();
        break;
      }
      if (reason.empty()) reason = plan.status().message();
    }
    reasons.push_back(std::move(reason));
  }
  return reasons;
}

const std::vector<std::string>& unavailability(core::DeviceType device_type) {
  // Only what is asked for: probing CUDA starts it.
  if (device_type == core::DeviceType::kCpu) {
    static const std::vector<std::string> cpu = probe(core::DeviceType::kCpu);
    return cpu;
  }
  if (device_type == core::DeviceType::kCuda) {
    static const std::vector<std::string> cuda = probe(core::DeviceType::kCuda);
    return cuda;
  }
  static const std::vector<std::string> none;
  return none;
}

const char* why_unavailable(core::DeviceType device_type, int32_t index) {
  const std::vector<std::string>& reasons = unavailability(device_type);
  if (index < 0 || static_cast<size_t>(index) >= reasons.size()) {
    return "there is no implementation of this index";
  }
  return reasons[static_cast<size_t>(index)].c_str();
}

}  // namespace
}  // namespace fa::api

using fa::api::guarded;

extern "C" {

void fa_attention_args_init_sized(fa_attention_args* args, size_t struct_size) {
  fa_attention_args defaults{};
  defaults.window_size_left = -1;
  defaults.window_size_right = -1;
  defaults.rotary_interleaved = 1;
  fa::api::init_struct(args, struct_size, defaults);
}

fa_status fa_forward(const fa_attention_args* args) {
  return guarded([&] { return fa::api::run(args, nullptr); });
}

fa_status fa_forward_known(const fa_attention_args* args, int32_t* ran) {
  return guarded([&] { return fa::api::run_known(args, nullptr, ran); });
}

fa_status fa_forward_oracle(const fa_attention_args* args, const fa_tensor* out,
                            const fa_tensor* lse, const fa_tensor* bound) {
  return guarded([&] { return fa::api::forward_oracle(args, out, lse, bound); });
}

fa_status fa_explain(const fa_attention_args* args, char* text, size_t capacity, size_t* needed) {
  const fa::api::TextBuffer to{text, capacity, needed};
  to.clear();
  return guarded([&] {
    fa::core::AttentionArgs views;
    return fa::api::explain(fa::api::read_call(args, nullptr, false, views), views, args, to);
  });
}

fa_status fa_validate(const fa_attention_args* args, const fa_attention_gradients* gradients,
                      int32_t values_are_real) {
  return guarded([&] { return fa::api::validate(args, gradients, values_are_real != 0); });
}

void fa_attention_gradients_init_sized(fa_attention_gradients* gradients, size_t struct_size) {
  fa::api::init_struct(gradients, struct_size, fa_attention_gradients{});
}

fa_status fa_backward(const fa_attention_args* args, const fa_attention_gradients* gradients) {
  return guarded([&]() -> fa::core::Status {
    FA_TRY(fa::api::check_args(args));
    FA_TRY(fa::api::check_gradients(gradients, "gradients"));
    return fa::api::run(args, gradients);
  });
}

fa_status fa_backward_known(const fa_attention_args* args, const fa_attention_gradients* gradients,
                            int32_t* ran) {
  return guarded([&]() -> fa::core::Status {
    if (ran != nullptr) *ran = 0;
    FA_TRY(fa::api::check_gradients(gradients, "gradients"));
    return fa::api::run_known(args, gradients, ran);
  });
}

fa_status fa_backward_oracle(const fa_attention_args* args, const fa_attention_gradients* gradients,
                             const fa_attention_gradients* bounds) {
  return guarded([&] { return fa::api::backward_oracle(args, gradients, bounds); });
}

fa_status fa_explain_backward(const fa_attention_args* args,
                              const fa_attention_gradients* gradients, char* text, size_t capacity,
                              size_t* needed) {
  const fa::api::TextBuffer to{text, capacity, needed};
  to.clear();
  return guarded([&]() -> fa::core::Status {
    FA_TRY(fa::api::check_args(args));
    FA_TRY(fa::api::check_gradients(gradients, "gradients"));
    fa::core::AttentionArgs views;
    return fa::api::explain(fa::api::read_call(args, gradients, false, views), views, args, to);
  });
}

const char* fa_implementation_name(int32_t device_type, int32_t index) {
  const char* name = nullptr;
  const fa_status status = guarded([&]() -> fa::core::Status {
    const auto list = fa::core::implementations(static_cast<fa::core::DeviceType>(device_type));
    if (index >= 0 && static_cast<size_t>(index) < list.size()) {
      name = list[static_cast<size_t>(index)].name;
    }
    return {};
  });
  return status == FA_OK ? name : nullptr;
}

int32_t fa_implementation_available(int32_t device_type, int32_t index, const char** reason) {
  const char* why = "";
  const fa_status status = guarded([&]() -> fa::core::Status {
    why = fa::api::why_unavailable(static_cast<fa::core::DeviceType>(device_type), index);
    return {};
  });
  if (status != FA_OK) why = "asking it failed; fa_last_error_message() says how";
  if (reason != nullptr) *reason = why;
  return *why == '\0' ? 1 : 0;
}

int32_t fa_num_threads(const char** source) {
  int32_t threads = 1;
  const char* from = "";
  const fa_status status = guarded([&]() -> fa::core::Status {
    threads = fa::cpu::default_parallel().num_workers();
    from = fa::cpu::parallel_source();
    return {};
  });
  if (source != nullptr) *source = status == FA_OK ? from : "";
  return threads;
}

fa_status fa_use_openmp_runtime(const char* path) {
  return guarded([&] { return fa::cpu::use_openmp_runtime(path); });
}

fa_status fa_use_thread_pool(const fa_thread_pool* pool) {
  return guarded([&]() -> fa::core::Status {
    if (pool == nullptr) {
      fa::cpu::use_callers_pool(nullptr);
      return {};
    }
    if (pool->num_threads == nullptr || pool->run == nullptr) {
      return fa::core::invalid_argument("pool: num_threads and run must not be NULL");
    }
    const fa::cpu::CallersPool given{pool->context, pool->num_threads, pool->run};
    fa::cpu::use_callers_pool(&given);
    return {};
  });
}

void fa_use_thread_count(int32_t (*count)(void)) { fa::cpu::use_thread_count(count); }

fa_status fa_measure_ceiling(const char* kind, int32_t num_threads, double* per_second) {
  return guarded([&]() -> fa::core::Status {
    if (kind == nullptr) return fa::core::invalid_argument("kind: is NULL");
    if (per_second == nullptr) return fa::core::invalid_argument("per_second: is NULL");
    const fa::core::Result<double> result = fa::cpu::measure_ceiling(kind, num_threads);
    if (result.ok()) *per_second = result.value();
    return result.status();
  });
}

fa_status fa_add_nvrtc_folder(const char* folder) {
  return guarded([&]() -> fa::core::Status {
    if (folder == nullptr) return fa::core::invalid_argument("folder is NULL");
    fa::cuda::add_nvrtc_folder(folder);
    return {};
  });
}

const char* fa_last_error_message(void) { return fa::api::last_error().get(); }

const char* fa_version(void) { return FA_VERSION; }

}  // extern "C"
