#include "core/tensor_view.h"

#include "core/status.h"

namespace fa::core {

const char* name(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kFloat64:
      return "float64";
    case DataType::kInt32:
      return "int32";
    case DataType::kInt64:
      return "int64";
    case DataType::kUInt8:
      return "uint8";
    case DataType::kBool:
      return "bool";
    case DataType::kOther:
      break;
  }
  return "an unsupported dtype";
}

std::string name(Device device) {
  switch (device.type) {
    case DeviceType::kCpu:
      return "cpu";
    case DeviceType::kCuda:
      return concat("cuda:", device.index);
  }
  return concat("device type ", static_cast<int>(device.type), ":", device.index);
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) text += concat(d == 0 ? "" : ", ", view.shape[d]);
  return text + "]";
}

}  // namespace fa::core
