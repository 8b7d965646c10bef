// Every environment variable that the library reads, and nothing else reads any.
#pragma once

#include <string>

namespace fa::core::environment {

// FLASH_ATTENTION_BACKEND, or "" (then the best that accepts a problem runs it). Read at each call.
std::string backend();

// FLASH_ATTENTION_VERBOSE contains "dispatch": each decision goes to standard error.
bool verbose_dispatch();

// FLASH_ATTENTION_CACHE_DIR, else flash-attention-plus in XDG_CACHE_HOME or ~/.cache, else ""
// (there is no home).
std::string cache_folder();

// FLASH_ATTENTION_NVRTC: the path of libnvrtc.so; "": wherever it is found.
std::string nvrtc_path();

// FLASH_ATTENTION_NUM_THREADS, else OMP_NUM_THREADS, else 0 (then all processors of the process).
int num_threads();

}  // namespace fa::core::environment
