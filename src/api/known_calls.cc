#include "api/known_calls.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace fa::api {
namespace {

// Rows that start at multiples of this are moved by other kernels than those that do not.
constexpr uintptr_t kAlignment = 16;

// Whether the checks of a call read what its tensors hold: lengths and pages on the CPU, and
// elsewhere where that is asked for.
bool has_checked_values(const fa_attention_args& args, bool on_devices) {
  if (args.cu_seqlens_q == nullptr && args.cu_seqlens_k == nullptr &&
      args.cache_seqlens == nullptr) {
    return false;  // then no other lengths or pages are right
  }
  return args.q == nullptr || args.q->device_type == FA_CPU || on_devices;
}

// A key of rows of one element would be that of a view of negated values as well, as the callers
// of fa_forward_known() cannot tell; such a view of rows of several has no stride of 1.
bool has_long_rows(const fa_attention_args& args) {
  for (const fa_tensor* tensor : {args.q, args.k, args.v}) {
    if (tensor == nullptr || tensor->shape == nullptr) return false;
    if (tensor->ndim < 1 || tensor->ndim > core::kMaxRank) return false;
    if (tensor->shape[tensor->ndim - 1] < 2) return false;
  }
  return true;
}

uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }

}  // namespace

bool CallKey::read(const fa_attention_args& args, const fa_attention_gradients* gradients,
                   std::string_view forced_backend, bool checks_values) {
  if (has_checked_values(args, checks_values) || !has_long_rows(args)) return false;
  add(gradients == nullptr ? 0 : gradients->deterministic != 0 ? 1 : 2);
  if (!add_tensors(args, kTensors)) return false;
  if (gradients != nullptr && !add_tensors(*gradients, kGradients)) return false;
  add_scalars(args);
  return complete_ = add_name(forced_backend);
}

template <class Struct, size_t kCount>
bool CallKey::add_tensors(const Struct& from, const TensorField<Struct> (&fields)[kCount]) {
  uint64_t present = 0;
  for (size_t i = 0; i < kCount; ++i) {
    if (from.*fields[i].from != nullptr) present |= uint64_t{1} << i;
  }
  add(present);
  for (; present != 0; present &= present - 1) {
    const TensorField<Struct>& field = fields[std::countr_zero(present)];
    if (!add_tensor(*(from.*field.from), field.to)) return false;
  }
  return true;
}

bool CallKey::add_tensor(const fa_tensor& tensor, core::TensorView core::AttentionArgs::*to) {
  if (tensor.ndim < 0 || tensor.ndim > core::kMaxRank || tensor.data == nullptr) return false;
  if (tensor.ndim > 0 && (tensor.shape == nullptr || tensor.strides == nullptr)) return false;
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  add(static_cast<uint64_t>(tensor.ndim) | uint64_t{tensor.dtype_code} << 8 |
      uint64_t{tensor.dtype_bits} << 16 | uint64_t{tensor.dtype_lanes} << 24 |
      reinterpret_cast<uintptr_t>(data) % kAlignment << 40);
  add(static_cast<uint64_t>(static_cast<uint32_t>(tensor.device_type)) << 32 |
      static_cast<uint32_t>(tensor.device_id));
  for (int d = 0; d < tensor.ndim; ++d) {
    add(static_cast<uint64_t>(tensor.shape[d]));
    add(static_cast<uint64_t>(tensor.strides[d]));
  }
  places_[num_places_++] = {to, data};
  return true;
}

void CallKey::add_scalars(const fa_attention_args& args) {
  add(static_cast<uint64_t>(args.max_seqlen_q));
  add(static_cast<uint64_t>(args.max_seqlen_k));
  add(static_cast<uint64_t>(args.num_splits));
  add((args.softmax_scale != nullptr ? 1 : 0) | (args.causal != 0 ? 2 : 0) |
      (args.rotary_interleaved != 0 ? 4 : 0));
  add(args.softmax_scale != nullptr ? bits(*args.softmax_scale) : 0);
  add(static_cast<uint64_t>(args.window_size_left));
  add(static_cast<uint64_t>(args.window_size_right));
  add(bits(args.softcap));
  add(bits(args.dropout_p));
}

bool CallKey::add_name(std::string_view name) {
  if (name.size() >= kMaxBackend) return false;
  add(name.size());
  for (size_t at = 0; at < name.size(); at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, name.data() + at, std::min(sizeof(word), name.size() - at));
    add(word);
  }
  return true;
}

bool CallKey::operator==(const CallKey& other) const {
  return count_ == other.count_ &&
         std::memcmp(words_.data(), other.words_.data(), count_ * sizeof(uint64_t)) == 0;
}

void CallKey::place(const fa_attention_args& call, core::AttentionArgs& args) const {
  for (size_t i = 0; i < num_places_; ++i) (args.*places_[i].tensor).data = places_[i].data;
  args.dropout_seed = call.dropout_seed;
  args.dropout_offset = call.dropout_offset;
}

KnownCalls& KnownCalls::of_thread() {
  thread_local KnownCalls calls;
  return calls;
}

KnownCall* KnownCalls::find(const CallKey& key) {
  auto& [last, before] = pair(key);
  if (last != nullptr && last->key == key) return last.get();
  if (before == nullptr || before->key != key) return nullptr;
  std::swap(last, before);
  return last.get();
}

void KnownCalls::insert(const CallKey& key, const core::AttentionArgs& args, core::PlanPtr plan) {
  auto& [last, before] = pair(key);
  std::swap(last, before);
  if (last == nullptr) last = std::make_unique<KnownCall>();
  *last = {key, args, std::move(plan)};
}

}  // namespace fa::api
