// NVIDIA's run-time compiler, found at run time.
#pragma once

#include <string>
#include <string_view>

#include "core/status.h"

namespace fa::cuda {

// A folder that libnvrtc may lie in, beside those that the system searches: one of NVIDIA's wheels.
void add_nvrtc_folder(std::string folder);

// What tells one NVRTC from another, for keys of caches; or why there is none. Does not load it
// where it lies in a known folder.
core::Result<std::string> nvrtc_identity();

// What NVRTC makes of one kernel.
struct CompiledKernel {
  std::string name;   // of the kernel within the image
  std::string image;  // machine code
  std::string log;    // ptxas's report among it
};

// Compiles `source` and looks up the kernel that `expression` names. `arch` is "sm_80", "sm_90a".
core::Result<CompiledKernel> compile(std::string_view source, std::string_view expression,
                                     std::string_view arch);

// The options of every compilation, as one text; for keys of caches.
std::string compile_options();

}  // namespace fa::cuda
