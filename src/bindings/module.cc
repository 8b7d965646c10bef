// The door to Python: the C interface as tvm-ffi functions. Nothing here knows what attention is.
//
// A status code becomes a Python exception of the built-in kind: ValueError, NotImplementedError,
// MemoryError, RuntimeError.
#include <flash_attn/flash_attn.h>
#include <tvm/ffi/base_details.h>
// With it the text of a function's signature is built in place for each of its arguments, in case
// that is wrong: of functions of 30 arguments that took the compiler minutes.
#undef TVM_FFI_INLINE
#define TVM_FFI_INLINE inline
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/direct_call.h"
#include "bindings/dlpack_tensor.h"
#include "bindings/workspace.h"

namespace {

namespace ffi = tvm::ffi;

using fa::bindings::Workspace;

using OptionalTensor = ffi::Optional<DLTensor*>;

const fa_tensor* as_fa_tensor(OptionalTensor tensor) {
  return fa::bindings::as_fa_tensor(tensor.value_or(nullptr));
}

const char* python_exception(fa_status status) {
  switch (status) {
    case FA_INVALID_ARGUMENT:
      return "ValueError";
    case FA_UNSUPPORTED:
      return "NotImplementedError";
    case FA_OUT_OF_MEMORY:
      return "MemoryError";
    default:
      return "RuntimeError";
  }
}

// No backtrace: a wrong argument is the caller's matter, not one of the frames below.
void check(fa_status status) {
  if (status != FA_OK) throw ffi::Error(python_exception(status), fa_last_error_message(), "");
}

// The stream that tvm-ffi took from the framework of the arguments; null on the CPU.
void* current_stream(const fa_tensor* tensor) {
  if (tensor == nullptr || tensor->device_type == FA_CPU) return nullptr;
  return TVMFFIEnvGetStream(tensor->device_type, tensor->device_id);
}

// A function of one attention call: `call` takes its arguments after those in Extra, which are
// kBody's.
template <auto kBody, class... Extra>
struct AttentionCall {
  static auto call(Extra... extra, DLTensor* q, DLTensor* k, DLTensor* v, OptionalTensor out,
                   OptionalTensor lse, OptionalTensor s_dmask, OptionalTensor cu_seqlens_q,
                   OptionalTensor cu_seqlens_k, OptionalTensor seqused_k,
                   OptionalTensor block_table, OptionalTensor alibi_slopes,
                   OptionalTensor attn_bias, OptionalTensor learnable_sink, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, ffi::Optional<double> softmax_scale, bool causal,
                   int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                   int64_t seed, int64_t offset, ffi::Optional<ffi::String> backend) {
    fa_attention_args args;
    fa_attention_args_init(&args);
    args.q = as_fa_tensor(q);
    args.k = as_fa_tensor(k);
    args.v = as_fa_tensor(v);
    args.out = as_fa_tensor(out);
    args.lse = as_fa_tensor(lse);
    args.s_dmask = as_fa_tensor(s_dmask);
    args.cu_seqlens_q = as_fa_tensor(cu_seqlens_q);
    args.cu_seqlens_k = as_fa_tensor(cu_seqlens_k);
    args.seqused_k = as_fa_tensor(seqused_k);
    args.block_table = as_fa_tensor(block_table);
    args.max_seqlen_q = max_seqlen_q;
    args.max_seqlen_k = max_seqlen_k;
    args.alibi_slopes = as_fa_tensor(alibi_slopes);
    args.attn_bias = as_fa_tensor(attn_bias);
    args.learnable_sink = as_fa_tensor(learnable_sink);
    const double scale = softmax_scale.value_or(0.0);
    args.softmax_scale = softmax_scale.has_value() ? &scale : nullptr;
    args.causal = causal ? 1 : 0;
    args.window_size_left = window_left;
    args.window_size_right = window_right;
    args.softcap = softcap;
    args.dropout_p = dropout_p;
    args.dropout_seed = static_cast<uint64_t>(seed);
    args.dropout_offset = static_cast<uint64_t>(offset);
    args.backend = backend.has_value() ? backend.value().c_str() : nullptr;
    args.stream = current_stream(args.q);
    Workspace workspace(TVMFFIEnvGetDLPackManagedTensorAllocator(), q->device);
    args.allocate_workspace = workspace.is_lent() ? Workspace::allocate : nullptr;
    args.workspace_context = &workspace;
    return kBody(args, extra...);
  }
};

void run_forward(const fa_attention_args& args) { check(fa_forward(&args)); }

// A body over a KV cache, from one over the call's other arguments.
template <auto kBody>
struct WithKvcache {
  static auto call(fa_attention_args& args, DLTensor* cache_seqlens, OptionalTensor cache_batch_idx,
                   OptionalTensor cache_leftpad, OptionalTensor k_new, OptionalTensor v_new,
                   OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool rotary_interleaved,
                   int64_t num_splits) {
    args.cache_seqlens = as_fa_tensor(cache_seqlens);
    args.cache_batch_idx = as_fa_tensor(cache_batch_idx);
    args.cache_leftpad = as_fa_tensor(cache_leftpad);
    args.k_new = as_fa_tensor(k_new);
    args.v_new = as_fa_tensor(v_new);
    args.rotary_cos = as_fa_tensor(rotary_cos);
    args.rotary_sin = as_fa_tensor(rotary_sin);
    args.rotary_interleaved = rotary_interleaved ? 1 : 0;
    args.num_splits = num_splits;
    return kBody(args);
  }
};

fa_attention_gradients gradients_of(OptionalTensor dout, OptionalTensor dq, OptionalTensor dk,
                                    OptionalTensor dv, OptionalTensor d_attn_bias,
                                    OptionalTensor d_learnable_sink) {
  fa_attention_gradients gradients;
  fa_attention_gradients_init(&gradients);
  gradients.dout = as_fa_tensor(dout);
  gradients.dq = as_fa_tensor(dq);
  gradients.dk = as_fa_tensor(dk);
  gradients.dv = as_fa_tensor(dv);
  gradients.d_attn_bias = as_fa_tensor(d_attn_bias);
  gradients.d_learnable_sink = as_fa_tensor(d_learnable_sink);
  return gradients;
}

// A body of a backward call, from one over its arguments and its gradients.
template <auto kBody>
struct WithGradients {
  static auto call(const fa_attention_args& args, OptionalTensor dout, OptionalTensor dq,
                   OptionalTensor dk, OptionalTensor dv, OptionalTensor d_attn_bias,
                   OptionalTensor d_learnable_sink, bool deterministic) {
    fa_attention_gradients gradients =
        gradients_of(dout, dq, dk, dv, d_attn_bias, d_learnable_sink);
    gradients.deterministic = deterministic ? 1 : 0;
    return kBody(args, gradients);
  }
};

void run_backward(const fa_attention_args& args, const fa_attention_gradients& gradients) {
  check(fa_backward(&args, &gradients));
}

void run_oracle(const fa_attention_args& args, OptionalTensor out, OptionalTensor lse,
                OptionalTensor bound) {
  check(fa_forward_oracle(&args, as_fa_tensor(out), as_fa_tensor(lse), as_fa_tensor(bound)));
}

// The gradients in fp64, and the bounds that normalise their errors, in the same order.
void run_backward_oracle(const fa_attention_args& args, OptionalTensor dout, OptionalTensor dq,
                         OptionalTensor dk, OptionalTensor dv, OptionalTensor d_attn_bias,
                         OptionalTensor d_learnable_sink, OptionalTensor dq_bound,
                         OptionalTensor dk_bound, OptionalTensor dv_bound,
                         OptionalTensor d_attn_bias_bound, OptionalTensor d_learnable_sink_bound) {
  const fa_attention_gradients gradients =
      gradients_of(dout, dq, dk, dv, d_attn_bias, d_learnable_sink);
  const fa_attention_gradients bounds = gradients_of(std::nullopt, dq_bound, dk_bound, dv_bound,
                                                     d_attn_bias_bound, d_learnable_sink_bound);
  check(fa_backward_oracle(&args, &gradients, &bounds));
}

// The text that `write(text, capacity, &needed)` gives.
template <class Write>
ffi::String text_of(Write&& write) {
  size_t needed = 0;
  check(write(nullptr, 0, &needed));
  std::string text(needed, '\0');
  check(write(text.data(), text.size(), &needed));
  return ffi::String(text.c_str());
}

ffi::String explain_forward(const fa_attention_args& args) {
  return text_of([&](char* text, size_t capacity, size_t* needed) {
    return fa_explain(&args, text, capacity, needed);
  });
}

ffi::String explain_backward(const fa_attention_args& args,
                             const fa_attention_gradients& gradients) {
  return text_of([&](char* text, size_t capacity, size_t* needed) {
    return fa_explain_backward(&args, &gradients, text, capacity, needed);
  });
}

// The checks alone. Of tensors that stand for others, or of those on a device, no data is read.
template <bool kReal>
void validate_forward(const fa_attention_args& args) {
  check(fa_validate(&args, nullptr, kReal ? 1 : 0));
}

template <bool kReal>
void validate_backward(const fa_attention_args& args, const fa_attention_gradients& gradients) {
  check(fa_validate(&args, &gradients, kReal ? 1 : 0));
}

using Availability = ffi::Tuple<ffi::String, bool, ffi::String>;

// (name, whether this machine runs it, why not) of each, best first.
ffi::Array<Availability> list_implementations(int64_t device_type) {
  ffi::Array<Availability> list;
  const int32_t device = static_cast<int32_t>(device_type);
  for (int32_t index = 0; fa_implementation_name(device, index) != nullptr; ++index) {
    const char* reason = nullptr;
    const bool available = fa_implementation_available(device, index, &reason) != 0;
    list.push_back(Availability(fa_implementation_name(device, index), available,
                                available || reason == nullptr ? "" : reason));
  }
  return list;
}

// (threads that a CPU call uses at most, where they come from).
ffi::Tuple<int64_t, ffi::String> count_threads() {
  const char* source = nullptr;
  const int64_t threads = fa_num_threads(&source);
  return ffi::Tuple<int64_t, ffi::String>(threads, source == nullptr ? "" : source);
}

void adopt_openmp_runtime(const ffi::String& path) { check(fa_use_openmp_runtime(path.c_str())); }

// `count`: the address of an int(); null ends it.
void adopt_thread_count(void* count) {
  fa_use_thread_count(reinterpret_cast<int32_t (*)()>(count));
}

double measured_ceiling(const ffi::String& kind, int64_t num_threads) {
  double per_second = 0.0;
  const auto threads = static_cast<int32_t>(std::clamp<int64_t>(num_threads, -1, INT32_MAX));
  check(fa_measure_ceiling(kind.c_str(), threads, &per_second));
  return per_second;
}

void name_nvrtc_folder(const ffi::String& folder) { check(fa_add_nvrtc_folder(folder.c_str())); }

ffi::String library_version() { return fa_version(); }

void* function_for_direct_calls(void* python, bool backward) {
  return fa::bindings::direct_call(python, backward);
}

// AttentionCall of a body, whose parameters after the first are Extra.
template <auto kBody, class Result, class First, class... Extra>
AttentionCall<kBody, Extra...> deduce(Result (*)(First, Extra...));
template <auto kBody>
using CallOf = decltype(deduce<kBody>(kBody));

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, CallOf<run_forward>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_with_kvcache, CallOf<WithKvcache<run_forward>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward, CallOf<WithGradients<run_backward>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_oracle, CallOf<run_oracle>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_oracle, CallOf<run_backward_oracle>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain, CallOf<explain_forward>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain_with_kvcache,
                              CallOf<WithKvcache<explain_forward>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain_backward, CallOf<WithGradients<explain_backward>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate, CallOf<validate_forward<true>>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_with_kvcache,
                              CallOf<WithKvcache<validate_forward<true>>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_backward,
                              CallOf<WithGradients<validate_backward<true>>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_stand_ins, CallOf<validate_forward<false>>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_stand_ins_with_kvcache,
                              CallOf<WithKvcache<validate_forward<false>>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(validate_stand_ins_backward,
                              CallOf<WithGradients<validate_backward<false>>::call>::call)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(implementations, list_implementations)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_threads, count_threads)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_openmp_runtime, adopt_openmp_runtime)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_thread_count, adopt_thread_count)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(measure_ceiling, measured_ceiling)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_nvrtc_folder, name_nvrtc_folder)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, library_version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(direct_call, function_for_direct_calls)
