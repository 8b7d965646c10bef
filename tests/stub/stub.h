// What the stand-ins for libcuda and libnvrtc tell of the calls they got.
//
// Environment variables say how they behave, so that a test's child process can be given a machine:
// FA_STUB_DRIVER_VERSION (13000), FA_STUB_COMPUTE_CAPABILITY (90), FA_STUB_MULTIPROCESSORS (132),
// and FA_STUB_FAIL: a call's name, "=" and the code that it returns from then on.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace fa::stub {

// Where memory that is copied to the host seems to lie, so that reading it in place would not do.
inline constexpr uint64_t kDeviceOffset = uint64_t{1} << 50;

inline int number(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

// What FA_STUB_FAIL says that `call` returns; 0 is success.
inline int result_of(const char* call) {
  const char* fails = std::getenv("FA_STUB_FAIL");
  if (fails == nullptr) return 0;
  const char* end = std::strchr(fails, '=');
  if (end == nullptr || std::strlen(call) != static_cast<size_t>(end - fails) ||
      std::strncmp(fails, call, static_cast<size_t>(end - fails)) != 0) {
    return 0;
  }
  return std::atoi(end + 1);
}

// What a tensor map says: sizes, 1 where there are fewer dimensions, and bytes of the strides but
// the first.
struct Map {
  void* address;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t rank;
  uint32_t box_rows;
};

// The last launch, and how often each thing happened.
struct Record {
  int launches;
  int modules;
  int contexts;  // that were retained
  int maps;      // tensor maps that were encoded
  int moved_maps;
  int reads;  // copies to the host
  unsigned grid;
  unsigned threads;
  unsigned shared_bytes;
  void* stream;
  void* q;            // of the kernel's first argument
  void* q_map;        // address in the first map of its second argument
  unsigned box_rows;  // of the last tensor map that was encoded
  // Not null: runs a kernel, by its name.
  void (*run)(const char* kernel, unsigned blocks, unsigned threads, void** arguments);
};

}  // namespace fa::stub

extern "C" fa::stub::Record* fa_stub_record();
