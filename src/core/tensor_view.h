// A non-owning view of a tensor, in the vocabulary of DLPack.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace fa::core {

enum class DataType : uint8_t {
  kOther,  // one that the library has no use for
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kInt32,
  kInt64,
  kUInt8,
  kBool,
};

// Values are DLPack's device type codes.
enum class DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
  bool operator==(const Device&) const = default;
};

inline constexpr int kMaxRank = 5;

struct TensorView {
  void* data = nullptr;
  DataType dtype = DataType::kOther;
  Device device;
  int ndim = -1;                            // -1: absent
  std::array<int64_t, kMaxRank> shape{};    // elements
  std::array<int64_t, kMaxRank> strides{};  // elements

  bool present() const { return ndim >= 0; }
  int64_t num_elements() const {
    int64_t product = 1;
    for (int d = 0; d < ndim; ++d) product *= shape[d];
    return product;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Without gaps. Where the sizes overflow they wrap.
inline std::array<int64_t, kMaxRank> row_major_strides(const TensorView& view) {
  std::array<int64_t, kMaxRank> strides{};
  uint64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    strides[d] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(view.shape[d]);
  }
  return strides;
}

constexpr int64_t byte_size(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat64:
    case DataType::kInt64:
      return 8;
    case DataType::kFloat32:
    case DataType::kInt32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kUInt8:
    case DataType::kBool:
      return 1;
    case DataType::kOther:
      break;
  }
  return 0;
}

const char* name(DataType dtype);
std::string name(Device device);
std::string shape_text(const TensorView& view);  // "[2, 128, 8, 64]"

}  // namespace fa::core
