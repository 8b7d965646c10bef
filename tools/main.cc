// flash-attn-plus: what this machine can do, why it does it, and whether it does it right.
#include <cstdio>
#include <string_view>

#include "command_line.h"
#include "commands.h"
#include "flash_attn/attention.hpp"
#include "own_path.h"

namespace {

struct Command {
  std::string_view name;
  int (*run)(int argc, char** argv);
  const char* summary;
};

constexpr Command kCommands[] = {
    {"info", fa::tools::run_info, "the processor, the implementations and the threads"},
    {"explain", fa::tools::run_explain, "which implementation would run a problem, and why"},
    {"check", fa::tools::run_check, "the accuracy of every implementation against the fp64 oracle"},
    {"bench", fa::tools::run_bench, "speed beside PyTorch's, and the share of what is possible"},
    {"cache", fa::tools::run_cache,
     "the compiled kernels for NVIDIA GPUs: show, clear, compile ahead"},
};

void print_usage(std::FILE* to) {
  std::fprintf(to, "Usage: flash-attn-plus COMMAND [flags]\n\n");
  for (const Command& command : kCommands) {
    std::fprintf(to, "  %-10s %s\n", command.name.data(), command.summary);
  }
  std::fprintf(to, "\n'flash-attn-plus COMMAND --help' tells a command's flags.\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "-h" || name == "help") {
    print_usage(stdout);
    return fa::tools::kSuccess;
  }
  if (name == "--version") {
    std::printf("flash-attn-plus %s\n", fa::version());
    return fa::tools::kSuccess;
  }
  fa::tools::add_nvrtc_of_wheels();
  for (const Command& command : kCommands) {
    if (command.name == name) return command.run(argc - 2, argv + 2);
  }
  if (!name.empty()) {
    std::fprintf(stderr, "flash-attn-plus: there is no command '%s'\n\n", argv[1]);
  }
  print_usage(stderr);
  return fa::tools::kUsage;
}
