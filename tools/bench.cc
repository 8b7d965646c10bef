// Starts the benchmark, which is in Python: its first peer is PyTorch.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "command_line.h"
#include "commands.h"
#include "own_path.h"

namespace fa::tools {
namespace {

// The interpreter that this program was installed beside, else the one on PATH.
std::string find_python() {
  const std::filesystem::path folder = own_folder();
  for (const char* name : {"python3", "python"}) {
    const std::filesystem::path beside = folder / name;
    if (!folder.empty() && access(beside.c_str(), X_OK) == 0) return beside.string();
  }
  return "python3";
}

}  // namespace

int run_bench(int argc, char** argv) {
  std::string python = find_python();
  // Not -m flash_attn.bench: the error of a Python without the package would be a stack of frames.
  std::string program =
      "import sys\n"
      "try:\n"
      "    import flash_attn.bench\n"
      "except ModuleNotFoundError:\n"
      "    sys.exit('flash-attn-plus bench: the Python package is not installed for '\n"
      "             + sys.executable + ': pip install the wheel that make wheel leaves in dist/')\n"
      "import runpy\n"
      "runpy.run_module('flash_attn.bench', run_name='__main__')\n";
  std::string flag = "-c";
  std::vector<char*> command = {python.data(), flag.data(), program.data()};
  command.insert(command.end(), argv, argv + argc);
  command.push_back(nullptr);
  execvp(python.c_str(), command.data());
  std::fprintf(stderr, "flash-attn-plus bench: cannot start %s: %s\n", python.c_str(),
               std::strerror(errno));
  return kUsage;
}

}  // namespace fa::tools
