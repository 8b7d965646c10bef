#include "cuda/driver.h"

#include <dlfcn.h>

namespace fa::cuda {
namespace {

using core::Result;
using core::Status;
using core::StatusCode;

constexpr const char* kLibrary = "libcuda.so.1";
// CUDA 12.0: what NVRTC's machine code and the wheels of today's frameworks ask for as well.
constexpr int kMinVersion = 12000;
constexpr DriverResult kOutOfMemory = 2;

template <class FunctionPointer>
Status find(void* library, const char* name, FunctionPointer& function) {
  function = reinterpret_cast<FunctionPointer>(dlsym(library, name));
  if (function != nullptr) return {};
  return core::unsupported(kLibrary, " has no function ", name, ": the NVIDIA driver is too old");
}

Status find_all(void* library, Driver& driver) {
  FA_TRY(find(library, "cuInit", driver.init));
  FA_TRY(find(library, "cuDriverGetVersion", driver.driver_version));
  FA_TRY(find(library, "cuGetErrorName", driver.error_name));
  FA_TRY(find(library, "cuGetErrorString", driver.error_string));
  FA_TRY(find(library, "cuDeviceGet", driver.device_get));
  FA_TRY(find(library, "cuDeviceGetAttribute", driver.device_attribute));
  FA_TRY(find(library, "cuDeviceGetName", driver.device_name));
  FA_TRY(find(library, "cuDevicePrimaryCtxRetain", driver.retain_primary_context));
  FA_TRY(find(library, "cuCtxGetCurrent", driver.current_context));
  FA_TRY(find(library, "cuCtxSetCurrent", driver.set_current_context));
  FA_TRY(find(library, "cuModuleLoadData", driver.load_module));
  FA_TRY(find(library, "cuModuleGetFunction", driver.get_function));
  FA_TRY(find(library, "cuFuncGetAttribute", driver.function_attribute));
  FA_TRY(find(library, "cuFuncSetAttribute", driver.set_function_attribute));
  FA_TRY(find(library, "cuLaunchKernel", driver.launch));
  FA_TRY(find(library, "cuTensorMapEncodeTiled", driver.encode_tensor_map));
  FA_TRY(find(library, "cuTensorMapReplaceAddress", driver.move_tensor_map));
  FA_TRY(find(library, "cuMemcpyDtoHAsync_v2", driver.copy_to_host));
  FA_TRY(find(library, "cuStreamSynchronize", driver.synchronize));
  return find(library, "cuStreamIsCapturing", driver.is_capturing);
}

Result<Driver> load() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    return core::unsupported("there is no NVIDIA driver: ", why == nullptr ? kLibrary : why);
  }
  Driver driver{};
  FA_TRY(find_all(library, driver));
  int version = 0;
  FA_TRY(driver.check(driver.driver_version(&version), "cuDriverGetVersion"));
  if (version < kMinVersion) {
    return core::unsupported("the NVIDIA driver is for CUDA ", version / 1000, ".",
                             version % 1000 / 10, ", must be for 12.0 or newer");
  }
  const Status status = driver.check(driver.init(0), "cuInit");
  if (!status.ok())
    return core::unsupported("the NVIDIA driver does not start: ", status.message());
  return driver;
}

}  // namespace

Status Driver::check(DriverResult result, const char* call) const {
  if (result == 0) return {};
  const char* name = nullptr;
  const char* text = nullptr;
  error_name(result, &name);
  error_string(result, &text);
  return {result == kOutOfMemory ? StatusCode::kOutOfMemory : StatusCode::kDeviceError,
          core::concat(call, ": ", name == nullptr ? "error" : name, " (", result, ")",
                       text == nullptr ? "" : ": ", text == nullptr ? "" : text)};
}

Result<const Driver*> driver() {
  static const Result<Driver> loaded = load();
  if (!loaded.ok()) return loaded.status();
  return &loaded.value();
}

}  // namespace fa::cuda
