// Stands in for libcuda.so.1 where there is no GPU: answers every call the library makes, and
// computes nothing. Device memory is host memory, kDeviceOffset further on.
#include <algorithm>
#include <cstdio>
#include <list>
#include <string>

#include "stub/stub.h"

using fa::stub::result_of;

namespace {

constexpr int kInvalidContext = 201;
constexpr int kNotReady = 600;
int contexts[8];
thread_local void* current = nullptr;

}  // namespace

#define FA_STUB extern "C" __attribute__((visibility("default")))

FA_STUB fa::stub::Record* fa_stub_record() {
  static fa::stub::Record record;
  return &record;
}

FA_STUB int cuInit(unsigned) { return result_of("cuInit"); }
FA_STUB int cuDriverGetVersion(int* version) {
  *version = fa::stub::number("FA_STUB_DRIVER_VERSION", 13000);
  return result_of("cuDriverGetVersion");
}
FA_STUB int cuGetErrorName(int, const char** text) {
  *text = "CUDA_ERROR_STUB";
  return 0;
}
FA_STUB int cuGetErrorString(int error, const char** text) {
  *text = error == kNotReady ? "not ready" : "as the test asked";
  return 0;
}
FA_STUB int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 8 ? result_of("cuDeviceGet") : 101;
}
FA_STUB int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = fa::stub::number("FA_STUB_COMPUTE_CAPABILITY", 90);
  switch (attribute) {
    case 16:  // multiprocessors
      *value = fa::stub::number("FA_STUB_MULTIPROCESSORS", 132);
      break;
    case 38:  // bytes of L2
      *value = 50 << 20;
      break;
    case 75:
      *value = capability / 10;
      break;
    case 76:
      *value = capability % 10;
      break;
    case 97:  // shared memory of a block
      *value = 227 << 10;
      break;
    default:
      return 1;
  }
  return result_of("cuDeviceGetAttribute");
}
FA_STUB int cuDeviceGetName(char* name, int length, int) {
  std::snprintf(name, static_cast<size_t>(length), "Stand-in GPU");
  return 0;
}
FA_STUB int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++fa_stub_record()->contexts;
  *context = &contexts[device];
  return result_of("cuDevicePrimaryCtxRetain");
}
FA_STUB int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
FA_STUB int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
FA_STUB int cuModuleLoadData(void** module, const void*) {
  *module = &fa_stub_record()->modules;
  ++fa_stub_record()->modules;
  return result_of("cuModuleLoadData");
}
// A function is its name.
FA_STUB int cuModuleGetFunction(void** function, void*, const char* name) {
  static std::list<std::string> names;
  *function = &names.emplace_back(name);
  return result_of("cuModuleGetFunction");
}
FA_STUB int cuFuncGetAttribute(int* value, int, void*) {
  *value = 0;
  return 0;
}
FA_STUB int cuFuncSetAttribute(void*, int, int) { return result_of("cuFuncSetAttribute"); }

FA_STUB int cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned threads,
                           unsigned, unsigned, unsigned shared_bytes, void* stream,
                           void** arguments, void**) {
  if (current == nullptr) return kInvalidContext;
  fa::stub::Record& record = *fa_stub_record();
  ++record.launches;
  record.grid = grid;
  record.threads = threads;
  record.shared_bytes = shared_bytes;
  record.stream = stream;
  std::memcpy(&record.q, arguments[0], sizeof(void*));
  const bool has_maps =
      static_cast<std::string*>(function)->find("forward_sm90<") != std::string::npos;
  record.q_map = nullptr;
  if (has_maps) std::memcpy(&record.q_map, arguments[1], sizeof(void*));
  if (record.run != nullptr) {
    record.run(static_cast<std::string*>(function)->c_str(), grid, threads, arguments);
  }
  return result_of("cuLaunchKernel");
}
FA_STUB int cuTensorMapEncodeTiled(void* map, int, uint32_t rank, void* address,
                                   const uint64_t* sizes, const uint64_t* strides,
                                   const uint32_t* box, const uint32_t*, int, int, int, int) {
  if (current == nullptr) return kInvalidContext;
  ++fa_stub_record()->maps;
  fa_stub_record()->box_rows = box[1];
  fa::stub::Map encoded{address, {}, {}, rank, box[1]};
  std::fill_n(encoded.sizes, std::size(encoded.sizes), 1);
  std::copy_n(sizes, rank, encoded.sizes);
  std::copy_n(strides, rank - 1, encoded.strides);
  std::memset(map, 0, 128);
  std::memcpy(map, &encoded, sizeof(encoded));
  return result_of("cuTensorMapEncodeTiled");
}
FA_STUB int cuTensorMapReplaceAddress(void* map, void* address) {
  if (current == nullptr) return kInvalidContext;
  ++fa_stub_record()->moved_maps;
  std::memcpy(map, &address, sizeof(address));
  return result_of("cuTensorMapReplaceAddress");
}
FA_STUB int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
  ++fa_stub_record()->reads;
  std::memcpy(to, reinterpret_cast<const void*>(from - fa::stub::kDeviceOffset), bytes);
  return result_of("cuMemcpyDtoHAsync_v2");
}
FA_STUB int cuStreamSynchronize(void*) { return result_of("cuStreamSynchronize"); }
FA_STUB int cuStreamIsCapturing(void*, int* status) {
  *status = fa::stub::number("FA_STUB_CAPTURING", 0);
  return 0;
}
