// What the operating system tells of the processor.
#pragma once

#include <string>
#include <vector>

namespace fa::tools {

struct Processor {
  std::string name;                             // "AMD EPYC 9654"
  std::vector<std::string> instruction_sets{};  // those that attention has a use for
};

Processor processor();

}  // namespace fa::tools
