// What the C++ tests share: tensors that notice writes past their ends, fills, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/element.h"
#include "core/parallel.h"
#include "core/tensor_view.h"

namespace fa::testing {

inline constexpr int64_t kCanaryBytes = 256;
inline constexpr unsigned char kCanary = 0xA5;
inline constexpr int64_t kAlignment = 64;

inline std::vector<int64_t> row_major_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  }
  return strides;
}

// splitmix64 (Steele, Lea and Flood, OOPSLA 2014): the same numbers on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }  // (0, 1)
  int64_t between(int64_t low, int64_t high) {  // both ends included
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  double normal() {  // Box and Muller
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }

 private:
  uint64_t state_;
};

// Whether a message says it.
inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// One element of any dtype but kOther; booleans as 0 and 1.
inline double load(const core::TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case core::DataType::kFloat64:
      return view.as<const double>()[offset];
    case core::DataType::kInt32:
      return view.as<const int32_t>()[offset];
    case core::DataType::kInt64:
      return static_cast<double>(view.as<const int64_t>()[offset]);
    case core::DataType::kUInt8:
    case core::DataType::kBool:
      return view.as<const uint8_t>()[offset];
    default:
      return core::load_element(view, offset);
  }
}

// Rounds floating-point dtypes once, from fp64; truncates to integers.
inline void store(const core::TensorView& view, int64_t offset, double value) {
  switch (view.dtype) {
    case core::DataType::kFloat16:
      view.as<core::Float16>()[offset] = core::round_to<core::Float16>(value);
      break;
    case core::DataType::kBFloat16:
      view.as<core::BFloat16>()[offset] = core::round_to<core::BFloat16>(value);
      break;
    case core::DataType::kFloat64:
      view.as<double>()[offset] = value;
      break;
    case core::DataType::kInt32:
      view.as<int32_t>()[offset] = static_cast<int32_t>(value);
      break;
    case core::DataType::kInt64:
      view.as<int64_t>()[offset] = static_cast<int64_t>(value);
      break;
    case core::DataType::kUInt8:
    case core::DataType::kBool:
      view.as<uint8_t>()[offset] = static_cast<uint8_t>(value);
      break;
    default:
      view.as<float>()[offset] = core::round_to<float>(value);
  }
}

// A tensor that owns its memory, 64-byte aligned, with canaries on both sides.
class Tensor {
 public:
  Tensor() = default;  // absent

  Tensor(core::DataType dtype, std::vector<int64_t> shape)
      : Tensor(dtype, shape, row_major_strides(shape)) {}

  // Strides in elements, not negative.
  Tensor(core::DataType dtype, const std::vector<int64_t>& shape,
         const std::vector<int64_t>& strides) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view_.shape.begin());
    std::copy(strides.begin(), strides.end(), view_.strides.begin());
    int64_t reach = view_.num_elements() == 0 ? 0 : 1;
    for (int d = 0; d < view_.ndim && reach > 0; ++d) reach += (shape[d] - 1) * strides[d];
    bytes_ = reach * core::byte_size(dtype);
    memory_.assign(bytes_ + 2 * kCanaryBytes + kAlignment, kCanary);
    std::memset(data(), 0, bytes_);
  }

  Tensor(const Tensor& other) { *this = other; }
  Tensor& operator=(const Tensor& other) {
    if (this == &other) return *this;
    view_ = other.view_;
    bytes_ = other.bytes_;
    memory_.assign(other.memory_.size(), kCanary);
    if (!memory_.empty()) std::memcpy(data(), other.data(), bytes_);
    return *this;
  }
  Tensor(Tensor&&) = default;  // a vector's memory does not move with it
  Tensor& operator=(Tensor&&) = default;

  bool present() const { return view_.present(); }
  int64_t bytes() const { return bytes_; }

  core::TensorView view() const {
    core::TensorView result = view_;
    if (present()) result.data = data();
    return result;
  }

  // Where the element of row-major number `index` lies, in elements from the data.
  int64_t offset(int64_t index) const {
    int64_t offset = 0;
    for (int d = view_.ndim; d-- > 0;) {
      offset += index % view_.shape[d] * view_.strides[d];
      index /= view_.shape[d];
    }
    return offset;
  }

  int64_t num_elements() const { return present() ? view_.num_elements() : 0; }
  double get(int64_t index) const { return load(view(), offset(index)); }
  void set(int64_t index, double value) { store(view(), offset(index), value); }

  void fill(const std::function<double(int64_t index)>& value) {
    for (int64_t index = 0; index < num_elements(); ++index) set(index, value(index));
  }
  void fill(double value) {
    fill([&](int64_t) { return value; });
  }
  void fill_normal(uint64_t seed, double scale = 1.0) {
    Random random(seed);
    fill([&](int64_t) { return scale * random.normal(); });
  }
  // Each byte 0xFF, gaps between strides too: NaN in every floating-point dtype.
  void poison() { std::memset(data(), 0xFF, bytes_); }

  bool canaries_intact() const {
    if (!present()) return true;
    const unsigned char* begin = memory_.data();
    const unsigned char* used = static_cast<const unsigned char*>(data());
    const auto intact = [](unsigned char byte) { return byte == kCanary; };
    return std::all_of(begin, used, intact) &&
           std::all_of(used + bytes_, begin + memory_.size(), intact);
  }

  // Element by element; for NaN too.
  bool bitwise_equal(const Tensor& other) const {
    if (view_.dtype != other.view_.dtype || num_elements() != other.num_elements()) return false;
    const int64_t size = core::byte_size(view_.dtype);
    const auto* mine = static_cast<const unsigned char*>(data());
    const auto* others = static_cast<const unsigned char*>(other.data());
    for (int64_t index = 0; index < num_elements(); ++index) {
      if (std::memcmp(mine + offset(index) * size, others + other.offset(index) * size,
                      static_cast<size_t>(size)) != 0) {
        return false;
      }
    }
    return true;
  }

 private:
  void* data() const {
    auto* base = const_cast<unsigned char*>(memory_.data()) + kCanaryBytes;
    const auto address = reinterpret_cast<uintptr_t>(base);
    return base + (kAlignment - address % kAlignment) % kAlignment;
  }

  core::TensorView view_;
  int64_t bytes_ = 0;
  std::vector<unsigned char> memory_;
};

inline Tensor int32_tensor(const std::vector<int64_t>& values) {
  Tensor tensor(core::DataType::kInt32, {static_cast<int64_t>(values.size())});
  tensor.fill([&](int64_t index) { return static_cast<double>(values[index]); });
  return tensor;
}

// Unit round-off: half the distance from 1 to the next number.
inline double unit_roundoff(core::DataType dtype) {
  switch (dtype) {
    case core::DataType::kBFloat16:
      return 0x1p-8;
    case core::DataType::kFloat16:
      return 0x1p-11;
    case core::DataType::kFloat64:
      return 0x1p-53;
    default:
      return 0x1p-24;
  }
}

// Below this a result may be 0: the least subnormal fp16; for the others, a sum of probabilities
// that are flushed to 0 below the least normal fp32.
inline double underflow(core::DataType dtype) {
  return dtype == core::DataType::kFloat16 ? 0x1p-24 : 0x1p-112;
}

// |actual - expected| / bound of one number, of which the dtype's underflow is for free. Infinite
// where a NaN or an infinity stands on one side only, or where a bound of 0 is not met exactly.
inline double normalised_error(double actual, double expected, double bound, core::DataType dtype) {
  constexpr double kWrong = std::numeric_limits<double>::infinity();
  if (actual == expected || (std::isnan(actual) && std::isnan(expected))) return 0.0;
  if (!std::isfinite(actual) || !std::isfinite(expected) || bound == 0.0) return kWrong;
  return std::max(0.0, std::abs(actual - expected) - underflow(dtype)) / bound;
}

// The greatest over all elements, the arrays row-major in actual's shape.
inline double normalised_error(const Tensor& actual, const double* reference, const double* bound) {
  double worst = 0.0;
  for (int64_t index = 0; index < actual.num_elements(); ++index) {
    worst = std::max(worst, normalised_error(actual.get(index), reference[index], bound[index],
                                             actual.view().dtype));
  }
  return worst;
}

// A loop in the calling thread, from the last task to the first, on behalf of `num_workers`.
class SerialParallel final : public core::Parallel {
 public:
  explicit SerialParallel(int num_workers = 1) : num_workers_(num_workers) {}
  int num_workers() const override { return num_workers_; }
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    const int workers = std::min(num_workers_, max_workers);
    for (int64_t task = num_tasks; task-- > 0;) {
      body(context, task, static_cast<int>(task % workers));
    }
  }

 private:
  int num_workers_;
};

}  // namespace fa::testing
