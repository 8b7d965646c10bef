// tvm-ffi makes an object of each tensor that it hands on. That of four takes longer than all else
// that a known call does before its launch: 0.5 us of 1.9. So these calls have a way of their own:
// a function as Python's stable ABI has it, which asks of Python only what a few functions answer
// whose addresses it is given. No version of Python is compiled against.
#include "bindings/direct_call.h"

#include <dlpack/dlpack.h>
#include <flash_attn/flash_attn.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <variant>

#include "bindings/dlpack_tensor.h"
#include "bindings/workspace.h"

namespace fa::bindings {
namespace {

struct Object;  // PyObject

// Python code fills this in, see _direct_call.py.
struct PythonInterface {
  Object* (*type)(Object*);              // PyObject_Type
  void (*increase_references)(Object*);  // Py_IncRef
  void (*decrease_references)(Object*);  // Py_DecRef
  long long (*to_integer)(Object*);      // PyLong_AsLongLong
  double (*to_real)(Object*);            // PyFloat_AsDouble
  Object* (*raised)();                   // PyErr_Occurred
  void (*forget_raised)();               // PyErr_Clear
  void* (*release_gil)();                // PyEval_SaveThread
  void (*take_gil)(void*);               // PyEval_RestoreThread
  Object *none, *yes, *no, *integer_type, *real_type;
  const DLPackExchangeAPI* tensors;  // of torch.Tensor
};

const PythonInterface* py = nullptr;

// What an argument becomes.
using Tensor = const fa_tensor* fa_attention_args::*;
using Integer = int64_t fa_attention_args::*;
using Word = uint64_t fa_attention_args::*;
using Flag = int32_t fa_attention_args::*;
using Real = double fa_attention_args::*;
struct Scale {};
struct NoBackend {};
using Gradient = const fa_tensor* fa_attention_gradients::*;
using GradientFlag = int32_t fa_attention_gradients::*;
using Field =
    std::variant<Tensor, Integer, Word, Flag, Real, Scale, NoBackend, Gradient, GradientFlag>;

template <class Kind>
constexpr bool kMayBeNone = std::is_same_v<Kind, Tensor> || std::is_same_v<Kind, Scale> ||
                            std::is_same_v<Kind, NoBackend> || std::is_same_v<Kind, Gradient>;

// Those of backward()'s arguments that come before forward()'s, in their order.
constexpr Field kGradientFields[] = {
    &fa_attention_gradients::dout,
    &fa_attention_gradients::dq,
    &fa_attention_gradients::dk,
    &fa_attention_gradients::dv,
    &fa_attention_gradients::d_attn_bias,
    &fa_attention_gradients::d_learnable_sink,
    &fa_attention_gradients::deterministic,
};

// In the order of forward()'s arguments, then of those that forward_with_kvcache() has beside them.
constexpr Field kFields[] = {
    &fa_attention_args::q,
    &fa_attention_args::k,
    &fa_attention_args::v,
    &fa_attention_args::out,
    &fa_attention_args::lse,
    &fa_attention_args::s_dmask,
    &fa_attention_args::cu_seqlens_q,
    &fa_attention_args::cu_seqlens_k,
    &fa_attention_args::seqused_k,
    &fa_attention_args::block_table,
    &fa_attention_args::alibi_slopes,
    &fa_attention_args::attn_bias,
    &fa_attention_args::learnable_sink,
    &fa_attention_args::max_seqlen_q,
    &fa_attention_args::max_seqlen_k,
    Scale{},
    &fa_attention_args::causal,
    &fa_attention_args::window_size_left,
    &fa_attention_args::window_size_right,
    &fa_attention_args::softcap,
    &fa_attention_args::dropout_p,
    &fa_attention_args::dropout_seed,
    &fa_attention_args::dropout_offset,
    NoBackend{},
    &fa_attention_args::cache_seqlens,
    &fa_attention_args::cache_batch_idx,
    &fa_attention_args::cache_leftpad,
    &fa_attention_args::k_new,
    &fa_attention_args::v_new,
    &fa_attention_args::rotary_cos,
    &fa_attention_args::rotary_sin,
    &fa_attention_args::rotary_interleaved,
    &fa_attention_args::num_splits,
};

bool is_of(Object* object, const Object* type) {
  Object* its = py->type(object);
  py->decrease_references(its);  // the object keeps it
  return its == type;
}

// The arguments of one call, which Python keeps alive meanwhile.
class Call {
 public:
  Call() { fa_attention_args_init(&args_); }

  // False where one is none that a known call has. Needs the GIL.
  bool read(Object* const* objects, int64_t count) {
    return read_fields(kFields, objects, count) && args_.q != nullptr && set_stream();
  }
  bool read_with_gradients(Object* const* objects, int64_t count) {
    constexpr int64_t kGradients = std::size(kGradientFields);
    fa_attention_gradients_init(&gradients_);
    return count > kGradients && read_fields(kGradientFields, objects, kGradients) &&
           read(objects + kGradients, count - kGradients);
  }

  // Whether the call has run. Without the GIL.
  template <bool kBackward>
  bool run() {
    Workspace workspace(py->tensors->managed_tensor_allocator,
                        {static_cast<DLDeviceType>(args_.q->device_type), args_.q->device_id});
    args_.allocate_workspace = workspace.is_lent() ? Workspace::allocate : nullptr;
    args_.workspace_context = &workspace;
    int32_t ran = 0;
    const fa_status status =
        kBackward ? fa_backward_known(&args_, &gradients_, &ran) : fa_forward_known(&args_, &ran);
    return status == FA_OK && ran != 0;
  }

 private:
  template <size_t kCount>
  bool read_fields(const Field (&fields)[kCount], Object* const* objects, int64_t count) {
    if (count > static_cast<int64_t>(kCount)) return false;
    for (int64_t i = 0; i < count; ++i) {
      const auto set = [&](auto field) {
        if (objects[i] != py->none) return this->set(field, objects[i]);
        return kMayBeNone<decltype(field)>;  // as fa_attention_args_init() has it
      };
      if (std::visit(set, fields[i])) continue;
      py->forget_raised();
      return false;
    }
    return true;
  }
  bool set(Tensor to, Object* from) { return read_tensor(from, args_.*to); }
  bool set(Gradient to, Object* from) { return read_tensor(from, gradients_.*to); }
  bool set(Integer to, Object* from) {
    if (!is_of(from, py->integer_type)) return false;
    args_.*to = py->to_integer(from);
    return args_.*to != -1 || py->raised() == nullptr;
  }
  bool set(Word to, Object* from) {
    if (!is_of(from, py->integer_type)) return false;
    args_.*to = static_cast<uint64_t>(py->to_integer(from));
    return py->raised() == nullptr;
  }
  bool set(Flag to, Object* from) { return read_flag(from, args_.*to); }
  bool set(GradientFlag to, Object* from) { return read_flag(from, gradients_.*to); }
  bool set(Real to, Object* from) { return read_real(from, args_.*to); }
  bool set(Scale, Object* from) {
    args_.softmax_scale = &scale_;
    return read_real(from, scale_);
  }
  bool set(NoBackend, Object*) { return false; }

  bool read_tensor(Object* from, const fa_tensor*& to) {
    DLTensor& tensor = tensors_[num_tensors_++];
    to = as_fa_tensor(&tensor);
    return py->tensors->dltensor_from_py_object_no_sync(from, &tensor) == 0;
  }
  static bool read_flag(Object* from, int32_t& to) {
    to = from == py->yes ? 1 : 0;
    return from == py->yes || from == py->no;
  }
  static bool read_real(Object* from, double& to) {
    if (!is_of(from, py->real_type) && !is_of(from, py->integer_type)) return false;
    to = py->to_real(from);
    return to != -1.0 || py->raised() == nullptr;
  }

  bool set_stream() {
    if (args_.q->device_type == FA_CPU) return true;
    const auto device_type = static_cast<DLDeviceType>(args_.q->device_type);
    if (py->tensors->current_work_stream(device_type, args_.q->device_id, &args_.stream) == 0) {
      return true;
    }
    py->forget_raised();
    return false;
  }

  fa_attention_args args_;
  fa_attention_gradients gradients_;  // of a backward
  std::array<DLTensor, std::size(kFields) + std::size(kGradientFields)> tensors_;
  size_t num_tensors_ = 0;
  double scale_ = 0.0;
};

template <bool kBackward>
Object* call_if_known(Object*, Object* const* objects, ptrdiff_t count) noexcept {
  Call call;
  bool ran = false;
  if (kBackward ? call.read_with_gradients(objects, count) : call.read(objects, count)) {
    void* const state = py->release_gil();
    ran = call.run<kBackward>();
    py->take_gil(state);
  }
  Object* result = ran ? py->yes : py->no;
  py->increase_references(result);
  return result;
}

}  // namespace

void* direct_call(const void* python, bool backward) {
  const auto* given = static_cast<const PythonInterface*>(python);
  const DLPackExchangeAPI& tensors = *given->tensors;
  if (tensors.header.version.major != DLPACK_MAJOR_VERSION) return nullptr;
  if (tensors.dltensor_from_py_object_no_sync == nullptr) return nullptr;  // it need not be there
  py = given;
  return reinterpret_cast<void*>(backward ? &call_if_known<true> : &call_if_known<false>);
}

}  // namespace fa::bindings
