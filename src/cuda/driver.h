// The CUDA driver, found at run time: the few functions that are needed, under their own names.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/kernel_args.h"

namespace fa::cuda {

using DriverResult = int;  // CUresult: 0 is success
using DeviceHandle = int;  // CUdevice
using Context = struct ContextTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using StreamHandle = struct StreamTag*;

enum class DeviceAttribute : int {
  kMultiprocessors = 16,
  kL2Bytes = 38,
  kMajor = 75,
  kMinor = 76,
  kMaxSharedBytes = 97,  // of a block that opts in
};

enum class FunctionAttribute : int {
  kLocalBytes = 3,
  kRegisters = 4,
  kMaxDynamicSharedBytes = 8,
};

struct Driver {
  DriverResult (*init)(unsigned flags);
  DriverResult (*driver_version)(int* version);
  DriverResult (*error_name)(DriverResult error, const char** text);
  DriverResult (*error_string)(DriverResult error, const char** text);
  DriverResult (*device_get)(DeviceHandle* device, int ordinal);
  DriverResult (*device_attribute)(int* value, DeviceAttribute attribute, DeviceHandle device);
  DriverResult (*device_name)(char* name, int length, DeviceHandle device);
  DriverResult (*retain_primary_context)(Context* context, DeviceHandle device);
  DriverResult (*current_context)(Context* context);
  DriverResult (*set_current_context)(Context context);
  DriverResult (*load_module)(Module* module, const void* image);
  DriverResult (*get_function)(Function* function, Module module, const char* name);
  DriverResult (*function_attribute)(int* value, FunctionAttribute attribute, Function function);
  DriverResult (*set_function_attribute)(Function function, FunctionAttribute attribute, int value);
  DriverResult (*launch)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                         unsigned block_x, unsigned block_y, unsigned block_z,
                         unsigned shared_bytes, StreamHandle stream, void** arguments,
                         void** extra);
  DriverResult (*encode_tensor_map)(TensorMap* map, int dtype, uint32_t rank, void* address,
                                    const uint64_t* sizes, const uint64_t* strides,
                                    const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int l2_promotion, int fill);

  // Gives a map of the same tensor elsewhere.
  DriverResult (*move_tensor_map)(TensorMap* map, void* address);
  DriverResult (*copy_to_host)(void* to, uint64_t from, size_t bytes, StreamHandle stream);
  DriverResult (*synchronize)(StreamHandle stream);
  DriverResult (*is_capturing)(StreamHandle stream, int* status);

  // What `result` of `call` says; success gives an ok Status.
  core::Status check(DriverResult result, const char* call) const;
};

// The driver, loaded and initialised once per process; or why there is none.
core::Result<const Driver*> driver();

}  // namespace fa::cuda
