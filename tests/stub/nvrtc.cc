// Stands in for libnvrtc: its machine code is a line of text.
#include "stub/stub.h"

using fa::stub::result_of;

namespace {

constexpr const char kImage[] = "machine code";
constexpr const char kLog[] = "line 1: the test asked for an error";

}  // namespace

#define FA_STUB extern "C" __attribute__((visibility("default")))

FA_STUB int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
FA_STUB const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_STUB"; }
FA_STUB int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*,
                               const char* const*) {
  *program = program;
  return result_of("nvrtcCreateProgram");
}
FA_STUB int nvrtcDestroyProgram(void**) { return 0; }
FA_STUB int nvrtcAddNameExpression(void*, const char*) { return 0; }
FA_STUB int nvrtcGetLoweredName(void*, const char* expression, const char** name) {
  *name = expression;
  return 0;
}
FA_STUB int nvrtcCompileProgram(void*, int, const char* const*) {
  return result_of("nvrtcCompileProgram");
}
FA_STUB int nvrtcGetProgramLogSize(void*, size_t* bytes) {
  *bytes = sizeof(kLog);
  return 0;
}
FA_STUB int nvrtcGetProgramLog(void*, char* text) {
  std::memcpy(text, kLog, sizeof(kLog));
  return 0;
}
FA_STUB int nvrtcGetCUBINSize(void*, size_t* bytes) {
  *bytes = sizeof(kImage);
  return 0;
}
FA_STUB int nvrtcGetCUBIN(void*, char* image) {
  std::memcpy(image, kImage, sizeof(kImage));
  return 0;
}
