#include "processor.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string_view>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fa::tools {
namespace {

#if defined(__APPLE__)

std::string system_text(const char* key) {
  size_t size = 0;
  if (sysctlbyname(key, nullptr, &size, nullptr, 0) != 0 || size == 0) return {};
  std::string text(size, '\0');
  if (sysctlbyname(key, text.data(), &size, nullptr, 0) != 0) return {};
  text.resize(size - 1);
  return text;
}

bool system_flag(const std::string& key) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(key.c_str(), &value, &size, nullptr, 0) == 0 && value != 0;
}

Processor read_processor() {
  constexpr const char* kArmFeatures[] = {"AdvSIMD", "FP16", "DotProd", "BF16", "I8MM", "SME"};
  constexpr const char* kX86Features[] = {"sse4_1", "avx1_0", "avx2_0", "fma", "f16c", "avx512f"};
  Processor result{system_text("machdep.cpu.brand_string")};
  for (const char* feature : kArmFeatures) {
    if (system_flag(std::string{"hw.optional.arm.FEAT_"} + feature) ||
        system_flag(std::string{"hw.optional."} + feature)) {
      result.instruction_sets.emplace_back(feature);
    }
  }
  for (const char* feature : kX86Features) {
    if (system_flag(std::string{"hw.optional."} + feature)) {
      result.instruction_sets.emplace_back(feature);
    }
  }
  return result;
}

#else

// As Linux spells them: x86, Arm, RISC-V and POWER.
constexpr std::string_view kKnown[] = {
    "sse4_1",   "sse4_2",   "avx",      "f16c",     "fma",         "avx2",        "avx_vnni",
    "avx512f",  "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "amx_fp16", "asimd",    "asimdhp",  "fphp",        "asimdfhm",    "bf16",
    "i8mm",     "sve",      "svebf16",  "sve2",     "sme"};

Processor read_processor() {
  Processor result;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, line.find_first_of("\t:"));
    const std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
    if (result.name.empty() && (key == "model name" || key == "cpu" || key == "uarch")) {
      result.name = value;
    }
    if (!result.instruction_sets.empty() || (key != "flags" && key != "Features")) continue;
    std::istringstream words(value);
    for (std::string word; words >> word;) {
      if (std::find(std::begin(kKnown), std::end(kKnown), word) != std::end(kKnown)) {
        result.instruction_sets.push_back(word);
      }
    }
  }
  return result;
}

#endif

}  // namespace

Processor processor() {
  Processor result = read_processor();
  if (result.name.empty()) {
#if defined(__aarch64__)
    result.name = "an Arm processor";
#else
    result.name = "an unnamed processor";
#endif
  }
  return result;
}

}  // namespace fa::tools
