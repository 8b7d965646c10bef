// Calls of a kind that this thread has made before: they are neither checked nor planned again.
//
// Two calls are of one kind where they differ in nothing but where their tensors lie, what those
// hold, the seed of dropout and the stream. Whatever the checks and the plan depend on is part of
// the key; calls whose checks read values have none.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string_view>

#include "api/tensors.h"
#include "core/attention_args.h"
#include "core/implementation.h"
#include "flash_attn/flash_attn.h"

namespace fa::api {

// What a kind of call is known by, and where the tensors of one call lie.
class CallKey {
 public:
  // False where the call has no key, or its arguments are wrong in a way that the checks will say;
  // the key is not complete then.
  // `gradients` is null in the forward.
  bool read(const fa_attention_args& args, const fa_attention_gradients* gradients,
            std::string_view forced_backend, bool checks_values);
  bool complete() const { return complete_; }

  bool operator==(const CallKey& other) const;
  uint64_t hash() const { return hash_; }

  // Makes `args`, which an equal key's call has left, those of this call.
  void place(const fa_attention_args& call, core::AttentionArgs& args) const;

 private:
  static constexpr size_t kMaxTensors = std::size(kTensors) + std::size(kGradients);
  static constexpr size_t kMaxScalars = 16;
  static constexpr size_t kMaxBackend = 32;  // bytes of its name
  static constexpr size_t kMaxWords =
      kMaxTensors * (2 + 2 * core::kMaxRank) + kMaxScalars + kMaxBackend / sizeof(uint64_t);

  void add(uint64_t word) {
    words_[count_++] = word;
    // Mixed by pair(): a product for each word would be waited for.
    hash_ = std::rotl(hash_, 9) ^ word;
  }
  template <class Struct, size_t kCount>
  bool add_tensors(const Struct& from, const TensorField<Struct> (&fields)[kCount]);
  bool add_tensor(const fa_tensor& tensor, core::TensorView core::AttentionArgs::*to);
  void add_scalars(const fa_attention_args& args);
  bool add_name(std::string_view name);

  struct Place {
    core::TensorView core::AttentionArgs::*tensor;
    void* data;
  };
  std::array<uint64_t, kMaxWords> words_;
  std::array<Place, kMaxTensors> places_;
  size_t count_ = 0;
  size_t num_places_ = 0;
  uint64_t hash_ = 0;
  bool complete_ = false;
};

struct KnownCall {
  CallKey key;
  core::AttentionArgs args;
  core::PlanPtr plan;
};

// The calling thread's, of the kinds it has met last.
class KnownCalls {
 public:
  static KnownCalls& of_thread();
  KnownCall* find(const CallKey& key);
  void insert(const CallKey& key, const core::AttentionArgs& args, core::PlanPtr plan);

 private:
  // A model has a few kinds of calls; one that meets a new shape at every call keeps these. Of the
  // kinds that share a pair, the two that were met last.
  static constexpr size_t kPairs = 16;
  using Pair = std::array<std::unique_ptr<KnownCall>, 2>;
  // The upper bits of a product depend on every bit of the hash.
  Pair& pair(const CallKey& key) {
    return pairs_[key.hash() * 0x9E3779B97F4A7C15 >> (64 - std::countr_zero(kPairs))];
  }
  std::array<Pair, kPairs> pairs_;
};

}  // namespace fa::api
