// Every environment variable that the C++ library reads, and nothing else in it reads any.
#pragma once

#include <string>
#include <string_view>

namespace fa::core::environment {

// What is read at each call.
struct CallSettings {
  std::string_view backend;  // FLASH_ATTENTION_BACKEND; "": the best that accepts a problem runs it
  bool verbose_dispatch = false;  // FLASH_ATTENTION_VERBOSE contains "dispatch": each decision goes
                                  // to standard error
  bool wants_flaggems = false;    // FLASH_ATTENTION_USE_FLAGGEMS: implementations beyond this
                                  // library come first
  bool checks_values = false;     // FLASH_ATTENTION_CHECK: lengths, rows and pages that lie on a
                                  // device are read and checked as well
};
CallSettings call_settings();

bool verbose_dispatch();

// FLASH_ATTENTION_CACHE_DIR, else flash-attention-plus in XDG_CACHE_HOME or ~/.cache, else ""
// (there is no home).
std::string cache_folder();

// FLASH_ATTENTION_NVRTC: the path of libnvrtc.so; "": wherever it is found.
std::string nvrtc_path();

// FLASH_ATTENTION_NUM_THREADS, else OMP_NUM_THREADS, else 0 (then all processors of the process).
int num_threads();

}  // namespace fa::core::environment
