#include <cstdio>
#include <string>

#include "command_line.h"
#include "commands.h"
#include "core/environment.h"
#include "flash_attn/attention.hpp"
#include "processor.h"

namespace fa::tools {
namespace {

void print_processor() {
  const Processor cpu = processor();
  std::printf("Processor\n  %s\n ", cpu.name.c_str());
  if (cpu.instruction_sets.empty()) std::printf(" (the system names no instruction sets)");
  for (const std::string& set : cpu.instruction_sets) std::printf(" %s", set.c_str());
  std::printf("\n\n");
}

void print_implementations(DeviceType device) {
  for (const Implementation& implementation : implementations(device)) {
    if (implementation.available) {
      std::printf("  %-16s available\n", implementation.name.c_str());
    } else {
      std::printf("  %-16s not here: %s\n", implementation.name.c_str(),
                  implementation.reason.c_str());
    }
  }
}

void print_environment() {
  namespace environment = core::environment;
  const std::string backend{environment::call_settings().backend};
  const int wanted = environment::num_threads();
  std::printf("Environment\n");
  std::printf("  FLASH_ATTENTION_BACKEND      %s\n",
              backend.empty() ? "not set: the best that accepts a call runs it" : backend.c_str());
  std::printf("  FLASH_ATTENTION_NUM_THREADS  %s\n",
              wanted == 0 ? "not set, nor OMP_NUM_THREADS: every processor of the process"
                          : (std::to_string(wanted) + " (or from OMP_NUM_THREADS)").c_str());
  const std::string nvrtc = environment::nvrtc_path();
  std::printf("  FLASH_ATTENTION_NVRTC        %s\n",
              nvrtc.empty() ? "not set: NVRTC is searched for" : nvrtc.c_str());
  std::printf("  FLASH_ATTENTION_CACHE_DIR    kernels are kept in %s\n",
              environment::cache_folder().c_str());
  std::printf("  FLASH_ATTENTION_VERBOSE      %s\n",
              environment::verbose_dispatch() ? "dispatch: decisions go to standard error"
                                              : "without 'dispatch'");
}

}  // namespace

int run_info(int argc, char** argv) {
  const CommandLine command("info", "Tells what this machine offers to attention.");
  if (const auto code = command.parse(argc, argv)) return *code;
  std::printf("FlashAttention-Plus %s\n\n", version());
  print_processor();
  std::printf("On the CPU, best first\n");
  print_implementations(DeviceType::kCpu);
  std::printf("\nOn CUDA\n");
  if (implementations(DeviceType::kCuda).empty()) std::printf("  not in this build\n");
  print_implementations(DeviceType::kCuda);
  const Threads running = threads();
  std::printf("\nThreads\n  %d, %s\n\n", running.count, running.source.c_str());
  print_environment();
  return kSuccess;
}

}  // namespace fa::tools
