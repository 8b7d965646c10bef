// Attention on any CPU.
#pragma once

#include <vector>

#include "core/implementation.h"

namespace fa::cpu {

// One per instruction set that this library was compiled for, best first; each refuses where the
// processor lacks it.
std::vector<core::Implementation> implementations();

// The threads that CPU calls share.
core::Parallel& default_parallel();

// Where they come from: "own pool" or "OpenMP runtime of the process".
const char* parallel_source();

// From now on runs on the OpenMP runtime in the library at `path`, which the process has loaded.
core::Status use_openmp_runtime(const char* path);

// From now on no call uses more threads than count() says on the calling thread; null: no limit.
void use_thread_count(int (*count)());

}  // namespace fa::cpu
