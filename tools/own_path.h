// Where this program lies, and what a Python environment has beside it.
#pragma once

#include <filesystem>

namespace fa::tools {

// The folder of this program; empty where the system does not tell.
std::filesystem::path own_folder();

// Tells the library of the folders in which NVIDIA's wheels, installed into the same environment,
// have put NVRTC. In Python the package does so.
void add_nvrtc_of_wheels();

}  // namespace fa::tools
