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

int num_threads() {
  for (const char* name : {"FLASH_ATTENTION_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const int value = std::atoi(std::string{read(name)}.c_str());
    if (value > 0) return value;
  }
  return 0;
}

}  // namespace fa::core::environment
