// FlashAttention-Plus for C++20: a thin header over the C interface in flash_attn.h.
//
//   fa::Status status =
//       fa::forward({.q = fa::tensor(q, {batch, seqlen_q, num_heads, head_dim}),
//                    .k = fa::tensor(k, {batch, seqlen_k, num_heads_kv, head_dim}),
//                    .v = fa::tensor(v, {batch, seqlen_k, num_heads_kv, head_dim}),
//                    .out = fa::tensor(out, {batch, seqlen_q, num_heads, head_dim}),
//                    .causal = true});
//   if (!status.ok()) std::fputs(status.message().c_str(), stderr);
//
// Nothing here throws but Status::throw_if_error(), and the header compiles with -fno-exceptions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__cpp_exceptions)
#include <stdexcept>
#endif
#if defined(__STDCPP_FLOAT16_T__) || defined(__STDCPP_BFLOAT16_T__)
#include <stdfloat>
#endif

#include "flash_attn/flash_attn.h"

namespace fa {

// ---- Types of elements and devices ----

enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kUInt8, kBool };

enum class DeviceType : std::int32_t { kCpu = FA_CPU, kCuda = FA_CUDA };

// 16-bit storage; no arithmetic.
struct float16 {  // IEEE 754 binary16
  std::uint16_t bits;
};
struct bfloat16 {  // the upper half of an fp32
  std::uint16_t bits;
};

// The DType of a C++ type. Specialise it for a 16-bit type of your own:
//   template <> struct fa::DTypeOf<MyHalf> { static constexpr fa::DType value = ...; };
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<float16> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct DTypeOf<bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::kInt32;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::kUInt8;
};
template <>
struct DTypeOf<bool> {
  static constexpr DType value = DType::kBool;
};
#if defined(__STDCPP_FLOAT16_T__)
template <>
struct DTypeOf<std::float16_t> {
  static constexpr DType value = DType::kFloat16;
};
#endif
#if defined(__STDCPP_BFLOAT16_T__)
template <>
struct DTypeOf<std::bfloat16_t> {
  static constexpr DType value = DType::kBFloat16;
};
#endif

// ---- Tensors ----

// A view of memory that the caller owns. Shape and strides, in elements, are held inline. A default
// Tensor is absent: an option that is not used. A wrong rank is reported by the call it is passed
// to.
class Tensor {
 public:
  static constexpr std::size_t kMaxRank = 5;
  using Extents = std::span<const std::int64_t>;

  Tensor() = default;

  // Without strides: row-major without gaps.
  Tensor(void* data, DType dtype, Extents shape, Extents strides = {})
      : data_(data), dtype_(dtype) {
    set_extents(shape, strides);
  }
  Tensor(const void* data, DType dtype, Extents shape, Extents strides = {})
      : data_(const_cast<void*>(data)), dtype_(dtype), read_only_(true) {
    set_extents(shape, strides);
  }

  // The same tensor on another device: tensor(pointer, {...}).on(fa::DeviceType::kCuda, 0).
  [[nodiscard]] Tensor on(DeviceType type, std::int32_t index = 0) const {
    Tensor moved = *this;
    moved.device_type_ = type;
    moved.device_index_ = index;
    return moved;
  }

  bool present() const { return present_; }
  bool read_only() const { return read_only_; }  // made from a pointer to const
  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  std::size_t rank() const { return rank_; }
  Extents shape() const { return Extents{shape_}.first(rank_); }

  // What makes this no tensor at all, or null.
  const char* defect() const { return defect_; }

  // Points into this object, and is valid as long as it.
  fa_tensor c_tensor() const {
    constexpr struct {
      std::uint8_t code, bits;
    } kCodes[] = {{FA_FLOAT, 32}, {FA_FLOAT, 16}, {FA_BFLOAT, 16}, {FA_FLOAT, 64},
                  {FA_INT, 32},   {FA_UINT, 8},   {FA_BOOL, 8}};
    const auto code = kCodes[static_cast<std::size_t>(dtype_)];
    fa_tensor c{};
    c.data = data_;
    c.device_type = static_cast<std::int32_t>(device_type_);
    c.device_id = device_index_;
    c.ndim = static_cast<std::int32_t>(rank_);
    c.dtype_code = code.code;
    c.dtype_bits = code.bits;
    c.dtype_lanes = 1;
    c.shape = shape_.data();
    c.strides = has_strides_ ? strides_.data() : nullptr;
    return c;
  }

 private:
  void set_extents(Extents shape, Extents strides) {
    present_ = true;
    if (shape.size() > kMaxRank) {
      defect_ = "has more than 5 dimensions";
      return;
    }
    if (!strides.empty() && strides.size() != shape.size()) {
      defect_ = "has strides of another rank than its shape";
      return;
    }
    rank_ = shape.size();
    has_strides_ = !strides.empty();
    for (std::size_t d = 0; d < rank_; ++d) shape_[d] = shape[d];
    for (std::size_t d = 0; d < strides.size(); ++d) strides_[d] = strides[d];
  }

  void* data_ = nullptr;
  const char* defect_ = nullptr;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> strides_{};
  std::size_t rank_ = 0;
  DeviceType device_type_ = DeviceType::kCpu;
  std::int32_t device_index_ = 0;
  DType dtype_ = DType::kFloat32;
  bool present_ = false;
  bool has_strides_ = false;
  bool read_only_ = false;
};

// fa::tensor(pointer, {2, 1024, 16, 64}); the dtype follows from the pointer's type. A pointer to
// const may be read only: calls refuse it as an output.
template <class T>
Tensor tensor(T* data, std::initializer_list<std::int64_t> shape,
              std::initializer_list<std::int64_t> strides = {}) {
  return {data, DTypeOf<std::remove_cv_t<T>>::value, Tensor::Extents{shape.begin(), shape.size()},
          Tensor::Extents{strides.begin(), strides.size()}};
}

// The same for shapes known at run time only.
template <class T>
Tensor tensor(T* data, Tensor::Extents shape, Tensor::Extents strides = {}) {
  return {data, DTypeOf<std::remove_cv_t<T>>::value, shape, strides};
}

// For storage without a type of its own:
//   fa::tensor(bytes, fa::DType::kBFloat16, {2, 1024, 16, 64}).
inline Tensor tensor(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                     std::initializer_list<std::int64_t> strides = {}) {
  return {data, dtype, Tensor::Extents{shape.begin(), shape.size()},
          Tensor::Extents{strides.begin(), strides.size()}};
}
inline Tensor tensor(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                     std::initializer_list<std::int64_t> strides = {}) {
  return {data, dtype, Tensor::Extents{shape.begin(), shape.size()},
          Tensor::Extents{strides.begin(), strides.size()}};
}

// ---- Errors ----

enum class StatusCode : int {
  kOk = FA_OK,
  kInvalidArgument = FA_INVALID_ARGUMENT,  // the caller can mend it: a shape, a value, a name
  kUnsupported = FA_UNSUPPORTED,           // a right request that nothing on this machine serves
  kOutOfMemory = FA_OUT_OF_MEMORY,
  kDeviceError = FA_DEVICE_ERROR,
  kInternal = FA_INTERNAL,
};

inline const char* name(StatusCode code) {
  constexpr const char* kNames[] = {
      "ok", "invalid argument", "unsupported", "out of memory", "device error", "internal error"};
  const auto index = static_cast<std::size_t>(code);
  return index < std::size(kNames) ? kNames[index] : "unknown status";
}

#if defined(__cpp_exceptions)
class Error : public std::runtime_error {
 public:
  Error(StatusCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  StatusCode code() const { return code_; }

 private:
  StatusCode code_;
};
#endif

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  // Which argument, what it was, what it must be; "" when ok().
  const std::string& message() const { return message_; }

#if defined(__cpp_exceptions)
  void throw_if_error() const {
    if (!ok()) throw Error(code_, message_);
  }
#endif

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// ---- Calls ----

// One attention call; flash_attn.h has the formulas. q, k, v and out are required and share one
// dtype, fp32, fp16 or bf16; strides are at least 0, that of the last dimension is 1; what is
// written must overlap neither itself nor anything else, which is not checked. (B batch, Sq/Sk
// sequence lengths, H/Hk heads of q and of k and v, H % Hk == 0, D/Dv head_dim of q and k and of v
// and out, each in [1, 512] on the CPU, in [1, 256] on a GPU.)
struct ForwardArgs {
  // Dense:  q [B, Sq, H, D]    k [B, Sk, Hk, D]    v [B, Sk, Hk, Dv]    out [B, Sq, H, Dv]
  // Varlen: q [total_q, H, D]  k [total_k, Hk, D]  v [total_k, Hk, Dv]  out [total_q, H, Dv]
  // Paged:  k [num_blocks, page_size, Hk, D], v [num_blocks, page_size, Hk, Dv], with block_table
  Tensor q{};
  Tensor k{};
  Tensor v{};
  Tensor out{};
  Tensor lse{};      // wanted: [B, H, Sq], varlen [H, total_q]; fp32; natural logarithm
  Tensor s_dmask{};  // wanted: [B, H, Sq rounded up to 128, Sk rounded up to 128]; q's dtype

  // Varlen: both cu_seqlens, and max_seqlen at least the longest sequence.
  Tensor cu_seqlens_q{};  // int32 [B + 1]
  Tensor cu_seqlens_k{};  // int32 [B + 1]
  Tensor seqused_k{};     // int32 [B]: keys in use of each sequence
  Tensor block_table{};   // int32 [B, max_blocks]: the pages of each sequence
  std::int64_t max_seqlen_q = 0;
  std::int64_t max_seqlen_k = 0;

  // A KV cache: with cache_seqlens, q is dense and k [B_cache, S_cache, Hk, D] and v are the cache,
  // or its pages with block_table. Batch b attends to the cache_seqlens[b] tokens of its row and to
  // those appended. Forward only.
  Tensor cache_seqlens{};    // int32 [B]: tokens in each row before the call
  Tensor cache_batch_idx{};  // int32 [B]: the row of each batch, else b; no row twice with k_new
  Tensor cache_leftpad{};    // int32 [B]: tokens to skip at the start of each row
  Tensor k_new{};            // [B, Snew, Hk, D]: written to k behind the cached tokens
  Tensor v_new{};            // [B, Snew, Hk, Dv]: written to v
  // [positions, D_rotary / 2], fp32 or q's dtype: rotates k_new at positions cache_seqlens + t, and
  // q there too where causal or windowed, else all of it at cache_seqlens.
  Tensor rotary_cos{};
  Tensor rotary_sin{};
  bool rotary_interleaved = true;  // pairs (0, 1), (2, 3)..., else (d, d + D_rotary / 2)
  std::int64_t num_splits = 0;     // of the keys; 0: chosen, 1: none

  Tensor alibi_slopes{};  // fp32 [H] or [B, H]
  // Broadcastable to [B, H, Sq, Sk]; fp32 or q's dtype; bool: keep where true. Varlen: Sq and Sk
  // are the max_seqlens; over a KV cache Sk is a row's room, and columns begin behind
  // cache_leftpad.
  Tensor attn_bias{};
  Tensor learnable_sink{};  // [H], fp32 or q's dtype

  std::optional<double> softmax_scale{};  // absent: D^-1/2
  bool causal = false;                    // aligned to the bottom right corner
  std::int64_t window_size_left = -1;     // keys seen before a query's own position; -1: all
  std::int64_t window_size_right = -1;    // and after it; causal overrides it
  double softcap = 0.0;                   // s -> softcap * tanh(s / softcap); 0: none
  double dropout_p = 0.0;                 // in [0, 1), to the next 65536th
  std::uint64_t dropout_seed = 0;
  std::uint64_t dropout_offset = 0;

  // "cpu", "cpu:avx2", "reference" (forward only); null: FLASH_ATTENTION_BACKEND, or else the best;
  // "": the best
  const char* backend = nullptr;
  void* stream = nullptr;  // a CUDA stream; ignored on the CPU
  // Memory on a GPU, which some calls need and others are faster with: see fa_attention_args.
  void* (*allocate_workspace)(void* context, std::int64_t bytes) = nullptr;
  void* workspace_context = nullptr;
};

// What goes with the ForwardArgs of a backward call. Each tensor has the shape and the dtype of
// what it is the gradient of; those that are written must not overlap anything else.
struct Gradients {
  Tensor dout{};  // of out; read
  Tensor dq{};    // of q, k and v; written
  Tensor dk{};
  Tensor dv{};
  Tensor d_attn_bias{};  // wanted: of attn_bias, summed where it was broadcast; not of a bool one
  Tensor d_learnable_sink{};   // wanted: of learnable_sink
  bool deterministic = false;  // bitwise equal from run to run; the CPU always is
};

namespace detail {

inline Status make_status(fa_status code) {
  if (code == FA_OK) return {};
  return {static_cast<StatusCode>(code), fa_last_error_message()};
}

enum class Use { kInput, kOutput };

// The C tensors of a call. They point into the Tensors and into this object.
template <std::size_t kMaxCount>
class CTensors {
 public:
  // The first tensor that is none: its name and why.
  Status check() const {
    if (bad_name_ == nullptr) return {};
    return {StatusCode::kInvalidArgument, std::string{bad_name_} + ": " + bad_reason_};
  }

  const fa_tensor* add(const Tensor& tensor, const char* name, Use use = Use::kInput) {
    if (!tensor.present()) return nullptr;
    const char* reason = tensor.defect();
    if (reason == nullptr && use == Use::kOutput && tensor.read_only()) {
      reason = "is an output, and was made from a pointer to const";
    }
    if (reason != nullptr && bad_name_ == nullptr) {
      bad_name_ = name;
      bad_reason_ = reason;
    }
    tensors_[count_] = tensor.c_tensor();
    return &tensors_[count_++];
  }

 private:
  std::array<fa_tensor, kMaxCount> tensors_;
  std::size_t count_ = 0;
  const char* bad_name_ = nullptr;
  const char* bad_reason_ = nullptr;
};

// The C struct of the ForwardArgs, into which and this object it points. `results`: what out and
// lse are in the call.
class CArgs {
 public:
  explicit CArgs(const ForwardArgs& args, Use results = Use::kOutput) {
    fa_attention_args_init(&c_);
    set_tensors(args, results);
    c_.max_seqlen_q = args.max_seqlen_q;
    c_.max_seqlen_k = args.max_seqlen_k;
    c_.rotary_interleaved = args.rotary_interleaved ? 1 : 0;
    c_.num_splits = args.num_splits;
    c_.softmax_scale = args.softmax_scale ? &*args.softmax_scale : nullptr;
    c_.causal = args.causal ? 1 : 0;
    c_.window_size_left = args.window_size_left;
    c_.window_size_right = args.window_size_right;
    c_.softcap = args.softcap;
    c_.dropout_p = args.dropout_p;
    c_.dropout_seed = args.dropout_seed;
    c_.dropout_offset = args.dropout_offset;
    c_.backend = args.backend;
    c_.stream = args.stream;
    c_.allocate_workspace = args.allocate_workspace;
    c_.workspace_context = args.workspace_context;
  }
  CArgs(const CArgs&) = delete;
  CArgs& operator=(const CArgs&) = delete;

  Status check() const { return tensors_.check(); }
  const fa_attention_args* get() const { return &c_; }

 private:
  void set_tensors(const ForwardArgs& args, Use results) {
    c_.q = tensors_.add(args.q, "q");
    // A cache is written to where there is something to append.
    const Use cache = args.k_new.present() ? Use::kOutput : Use::kInput;
    c_.k = tensors_.add(args.k, "k", cache);
    c_.v = tensors_.add(args.v, "v", cache);
    c_.out = tensors_.add(args.out, "out", results);
    c_.lse = tensors_.add(args.lse, "lse", results);
    c_.s_dmask = tensors_.add(args.s_dmask, "s_dmask", Use::kOutput);
    c_.cu_seqlens_q = tensors_.add(args.cu_seqlens_q, "cu_seqlens_q");
    c_.cu_seqlens_k = tensors_.add(args.cu_seqlens_k, "cu_seqlens_k");
    c_.seqused_k = tensors_.add(args.seqused_k, "seqused_k");
    c_.block_table = tensors_.add(args.block_table, "block_table");
    c_.cache_seqlens = tensors_.add(args.cache_seqlens, "cache_seqlens");
    c_.cache_batch_idx = tensors_.add(args.cache_batch_idx, "cache_batch_idx");
    c_.cache_leftpad = tensors_.add(args.cache_leftpad, "cache_leftpad");
    c_.k_new = tensors_.add(args.k_new, "k_new");
    c_.v_new = tensors_.add(args.v_new, "v_new");
    c_.rotary_cos = tensors_.add(args.rotary_cos, "rotary_cos");
    c_.rotary_sin = tensors_.add(args.rotary_sin, "rotary_sin");
    c_.alibi_slopes = tensors_.add(args.alibi_slopes, "alibi_slopes");
    c_.attn_bias = tensors_.add(args.attn_bias, "attn_bias");
    c_.learnable_sink = tensors_.add(args.learnable_sink, "learnable_sink");
  }

  CTensors<20> tensors_;
  fa_attention_args c_;
};

class CGradients {
 public:
  explicit CGradients(const Gradients& gradients) {
    fa_attention_gradients_init(&c_);
    c_.dout = tensors_.add(gradients.dout, "dout");
    c_.dq = tensors_.add(gradients.dq, "dq", Use::kOutput);
    c_.dk = tensors_.add(gradients.dk, "dk", Use::kOutput);
    c_.dv = tensors_.add(gradients.dv, "dv", Use::kOutput);
    c_.d_attn_bias = tensors_.add(gradients.d_attn_bias, "d_attn_bias", Use::kOutput);
    c_.d_learnable_sink =
        tensors_.add(gradients.d_learnable_sink, "d_learnable_sink", Use::kOutput);
    c_.deterministic = gradients.deterministic ? 1 : 0;
  }
  CGradients(const CGradients&) = delete;
  CGradients& operator=(const CGradients&) = delete;

  Status check() const { return tensors_.check(); }
  const fa_attention_gradients* get() const { return &c_; }

 private:
  CTensors<6> tensors_;
  fa_attention_gradients c_;
};

// Of a backward call, in which out and lse are inputs.
class CBackward {
 public:
  CBackward(const ForwardArgs& args, const Gradients& gradients)
      : args_(args, Use::kInput), gradients_(gradients) {}

  Status check() const {
    if (Status status = args_.check(); !status.ok()) return status;
    return gradients_.check();
  }
  const fa_attention_args* args() const { return args_.get(); }
  const fa_attention_gradients* gradients() const { return gradients_.get(); }

 private:
  CArgs args_;
  CGradients gradients_;
};

// The text of fa_explain() or of its like, which `call` passes (text, capacity, &needed) to.
template <class Call>
Status explain(Call&& call, std::string* text) {
  std::size_t needed = 0;
  text->assign(1024, '\0');
  fa_status code = call(text->data(), text->size(), &needed);
  if (code == FA_OK && needed > text->size()) {
    text->resize(needed);
    code = call(text->data(), text->size(), &needed);
  }
  text->resize(needed > 0 ? needed - 1 : 0);
  return make_status(code);
}

}  // namespace detail

// out = softmax(scale * q k^T + bias, masked) v, after Dao et al., "FlashAttention" (2022). Returns
// when the result is written (CPU) or enqueued (GPU). kInvalidArgument and kUnsupported leave the
// outputs untouched.
inline Status forward(const ForwardArgs& args) {
  const detail::CArgs c_args(args);
  if (Status status = c_args.check(); !status.ok()) return status;
  return detail::make_status(fa_forward(c_args.get()));
}

// The fp64 oracle: the same call straight from the formula, on the CPU, slowly. out, lse and bound
// are fp64 tensors in the shapes of out, lse and out, row-major; any may be absent. bound is
// sum_j P_ij |v_jd|: the error of an output is told relative to it. The outputs in `args` are
// ignored.
inline Status forward_oracle(const ForwardArgs& args, const Tensor& out, const Tensor& lse = {},
                             const Tensor& bound = {}) {
  const detail::CArgs c_args(args, detail::Use::kInput);
  if (Status status = c_args.check(); !status.ok()) return status;
  detail::CTensors<3> results;
  const fa_tensor* c_out = results.add(out, "out", detail::Use::kOutput);
  const fa_tensor* c_lse = results.add(lse, "lse", detail::Use::kOutput);
  const fa_tensor* c_bound = results.add(bound, "bound", detail::Use::kOutput);
  if (Status status = results.check(); !status.ok()) return status;
  return detail::make_status(fa_forward_oracle(c_args.get(), c_out, c_lse, c_bound));
}

// The gradients of sum(dout * out) by q, k, v, attn_bias and learnable_sink, after Dao,
// "FlashAttention-2" (2023); flash_attn.h has the formulas. `args` is what forward() was called
// with; out and lse, both required, are as it wrote them, and are only read. Memory grows linearly
// with the sequence lengths.
//
//   Status status = fa::backward(args, {.dout = ..., .dq = ..., .dk = ..., .dv = ...});
inline Status backward(const ForwardArgs& args, const Gradients& gradients) {
  const detail::CBackward call(args, gradients);
  if (Status status = call.check(); !status.ok()) return status;
  return detail::make_status(fa_backward(call.args(), call.gradients()));
}

// The fp64 oracle of the backward, on the CPU, slowly. But for dout the gradients are fp64 tensors,
// row-major; any may be absent. `bounds` alike: by them the errors of the gradients are normalised.
// The outputs in `args` are ignored.
inline Status backward_oracle(const ForwardArgs& args, const Gradients& gradients,
                              const Gradients& bounds = {}) {
  const detail::CBackward call(args, gradients);
  if (Status status = call.check(); !status.ok()) return status;
  const detail::CGradients c_bounds(bounds);
  if (Status status = c_bounds.check(); !status.ok()) return status;
  return detail::make_status(fa_backward_oracle(call.args(), call.gradients(), c_bounds.get()));
}

// Into *text a line per implementation: which one would run the call, and why each other one would
// not. Fails where the call is not valid.
inline Status explain(const ForwardArgs& args, std::string* text) {
  const detail::CArgs c_args(args);
  if (Status status = c_args.check(); !status.ok()) return status;
  return detail::explain(
      [&](char* to, std::size_t capacity, std::size_t* needed) {
        return fa_explain(c_args.get(), to, capacity, needed);
      },
      text);
}

// The same of a call of backward().
inline Status explain(const ForwardArgs& args, const Gradients& gradients, std::string* text) {
  const detail::CBackward call(args, gradients);
  if (Status status = call.check(); !status.ok()) return status;
  return detail::explain(
      [&](char* to, std::size_t capacity, std::size_t* needed) {
        return fa_explain_backward(call.args(), call.gradients(), to, capacity, needed);
      },
      text);
}

// For a forward call, as text; for one that is not valid, the message that forward() would give.
inline std::string explain(const ForwardArgs& args) {
  std::string text;
  const Status status = explain(args, &text);
  return status.ok() ? text : status.message();
}

// ---- The library and this machine ----

inline const char* version() { return fa_version(); }

struct Implementation {
  std::string name;
  bool available = false;
  std::string reason{};  // why it is not available
};

// The implementations for a device, best first.
inline std::vector<Implementation> implementations(DeviceType device = DeviceType::kCpu) {
  const auto type = static_cast<std::int32_t>(device);
  std::vector<Implementation> list;
  for (std::int32_t i = 0; const char* name = fa_implementation_name(type, i); ++i) {
    const char* reason = "";
    const bool available = fa_implementation_available(type, i, &reason) != 0;
    list.push_back({name, available, reason});
  }
  return list;
}

struct Threads {
  int count = 1;
  std::string source{};  // "own pool", "OpenMP runtime of the process", "the caller's pool"
};

// What a CPU call uses at most.
inline Threads threads() {
  const char* source = "";
  const int count = fa_num_threads(&source);
  return {count, source};
}

// From now on calls on the CPU run on the caller's threads, see fa_thread_pool; null: on the
// library's own again.
inline Status use_thread_pool(const fa_thread_pool* pool) {
  return detail::make_status(fa_use_thread_pool(pool));
}

}  // namespace fa
