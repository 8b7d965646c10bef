#include "cuda/device.h"

#include <memory>
#include <mutex>
#include <unordered_map>

namespace fa::cuda {
namespace {

using core::Result;
using core::Status;

Result<Device> open(int index) {
  const Result<const Driver*> found = driver();
  if (!found.ok()) return found.status();
  const Driver& driver = *found.value();
  DeviceHandle handle = 0;
  FA_TRY(driver.check(driver.device_get(&handle, index), "cuDeviceGet"));
  Device device{&driver, nullptr, {}};
  FA_TRY(driver.check(driver.retain_primary_context(&device.context, handle),
                      "cuDevicePrimaryCtxRetain"));
  char name[128] = "";
  FA_TRY(driver.check(driver.device_name(name, sizeof(name) - 1, handle), "cuDeviceGetName"));
  device.properties.name = name;

  const auto attribute = [&](DeviceAttribute which, auto& value) {
    int number = 0;
    const Status status =
        driver.check(driver.device_attribute(&number, which, handle), "cuDeviceGetAttribute");
    value = number;
    return status;
  };
  int major = 0, minor = 0;
  FA_TRY(attribute(DeviceAttribute::kMajor, major));
  FA_TRY(attribute(DeviceAttribute::kMinor, minor));
  FA_TRY(attribute(DeviceAttribute::kMultiprocessors, device.properties.multiprocessors));
  FA_TRY(attribute(DeviceAttribute::kL2Bytes, device.properties.l2_bytes));
  FA_TRY(attribute(DeviceAttribute::kMaxSharedBytes, device.properties.max_shared_bytes));
  device.properties.compute_capability = major * 10 + minor;
  return device;
}

}  // namespace

Result<const Device*> device(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, std::unique_ptr<const Device>> devices;
  const std::lock_guard lock(mutex);
  std::unique_ptr<const Device>& entry = devices[index];
  if (entry == nullptr) {
    Result<Device> opened = open(index);
    if (!opened.ok()) return opened.status();
    entry = std::make_unique<const Device>(std::move(opened.value()));
  }
  return entry.get();
}

DeviceProperties typical_properties(int compute_capability) {
  DeviceProperties properties;
  properties.compute_capability = compute_capability;
  constexpr int64_t kKiB = 1024;
  switch (compute_capability) {
    case 75:
      properties.max_shared_bytes = 64 * kKiB;
      break;
    case 80:
    case 87:
      properties.max_shared_bytes = 163 * kKiB;
      break;
    case 90:
    case 100:
    case 103:
      properties.max_shared_bytes = 227 * kKiB;
      break;
    default:
      properties.max_shared_bytes = 99 * kKiB;
  }
  properties.multiprocessors = 108;
  properties.l2_bytes = int64_t{40} << 20;
  return properties;
}

CurrentContext::CurrentContext(const Device& device) : driver_(*device.driver) {
  status_ = driver_.check(driver_.current_context(&previous_), "cuCtxGetCurrent");
  if (!status_.ok() || previous_ == device.context) return;
  status_ = driver_.check(driver_.set_current_context(device.context), "cuCtxSetCurrent");
  changed_ = status_.ok();
}

CurrentContext::~CurrentContext() {
  if (changed_) driver_.set_current_context(previous_);
}

}  // namespace fa::cuda
