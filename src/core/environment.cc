#include "core/environment.h"

#include <cstdlib>
#include <string_view>

namespace fa::core::environment {
namespace {

std::string_view read(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view{} : std::string_view{value};
}

}  // namespace

std::string backend() { return std::string{read("FLASH_ATTENTION_BACKEND")}; }

bool verbose_dispatch() {
  return read("FLASH_ATTENTION_VERBOSE").find("dispatch") != std::string_view::npos;
}

std::string cache_folder() {
  const std::string folder{read("FLASH_ATTENTION_CACHE_DIR")};
  if (!folder.empty()) return folder;
  const std::string caches{read("XDG_CACHE_HOME")};
  if (!caches.empty()) return caches + "/flash-attention-plus";
  const std::string home{read("HOME")};
  return home.empty() ? "" : home + "/.cache/flash-attention-plus";
}

std::string nvrtc_path() { return std::string{read("FLASH_ATTENTION_NVRTC")}; }

int num_threads() {
  for (const char* name : {"FLASH_ATTENTION_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const int value = std::atoi(std::string{read(name)}.c_str());
    if (value > 0) return value;
  }
  return 0;
}

}  // namespace fa::core::environment
