// The tensors of a Case: inputs drawn from its seed, everything that is not an input full of NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor_view.h"
#include "flash_attn/flash_attn.h"
#include "tests/cases.h"

namespace fa::cases {

// This byte repeated is a NaN in every floating dtype.
inline constexpr std::byte kPoison{0xFF};

// A tensor in memory of its own, or in a part of a shared one. Starts poisoned. The first element
// is preceded by a guard, so that rows are not aligned by luck, and the last one is followed by
// one.
class HostTensor {
 public:
  using Memory = std::shared_ptr<std::vector<std::byte>>;

  HostTensor() = default;  // absent
  HostTensor(core::DataType dtype, std::vector<int64_t> shape, std::vector<int64_t> strides);
  // A slice of `other`'s memory, `offset` elements behind its first.
  HostTensor(const HostTensor& other, std::vector<int64_t> shape, std::vector<int64_t> strides,
             int64_t offset);

  static HostTensor compact(core::DataType dtype, std::vector<int64_t> shape);
  // Of `other`'s dtype, shape and strides, in memory of its own.
  static HostTensor like(const HostTensor& other);

  bool present() const { return memory_ != nullptr; }
  core::DataType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t stride(size_t dim) const { return strides_[dim]; }
  int64_t num_elements() const;
  // Where the element of this row-major index lies, in elements from the first.
  int64_t offset_of(int64_t index) const;

  // body(index, offset) for each row of the last dimension, whose elements follow each other: the
  // row-major index of its first element, and where that lies.
  template <class Body>
  void for_each_row(Body&& body) const {
    const int64_t count = num_elements();
    for (int64_t index = 0; index < count; index += row_size()) body(index, offset_of(index));
  }
  int64_t row_size() const { return shape_.back(); }

  // Element `offset` from the first; rounds to the dtype.
  void set(int64_t offset, double value);
  double get(int64_t offset) const;

  void poison();           // all the memory
  void poison_elements();  // and these alone
  bool poisoned() const;   // all the memory
  uint64_t hash() const;   // of all the memory

  // Valid while this object neither moves nor dies; null when absent.
  const fa_tensor* c_tensor();
  template <class T>
  T* data() {
    return reinterpret_cast<T*>(first());
  }

 private:
  core::TensorView view() const;
  std::byte* first() const { return memory_->data() + first_byte_; }

  core::DataType dtype_ = core::DataType::kOther;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  Memory memory_;
  int64_t first_byte_ = 0;
  fa_tensor c_{};
};

// Whether nothing but the tensors' own elements was written since they were poisoned. Poisons
// those. Absent tensors may be among them; those that share memory must all be.
bool only_elements_written(const std::vector<HostTensor*>& tensors);

// The usual slopes, 2^(-8 (h + 1) / H), and a little steeper for each further batch.
double alibi_slope(const Case& c, int64_t batch, int64_t head);

// What a Case's calls, forward and backward, read and write. The gradients lie in memory as what
// they belong to does, packed where it is, but for that of a broadcast attn_bias. Cases of one name
// and seed that differ in their layout only (dense, varlen, paged, storage) hold the same values.
struct CaseTensors {
  HostTensor q, k, v, out, lse, s_dmask;
  HostTensor cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  HostTensor alibi_slopes, attn_bias, learnable_sink;
  HostTensor dout, dq, dk, dv, d_attn_bias, d_learnable_sink;

  CaseTensors(const Case& c, core::DataType dtype);
  std::vector<const HostTensor*> inputs() const;
  std::vector<HostTensor*> outputs();    // of the forward
  std::vector<HostTensor*> gradients();  // that the backward writes
};

}  // namespace fa::cases
