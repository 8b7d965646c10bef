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

// Where they come from: "own pool", "OpenMP runtime of the process" or "the caller's pool".
const char* parallel_source();

// A pool of the caller's: see fa_thread_pool.
struct CallersPool {
  void* context;
  int (*num_threads)(void* context);
  void (*run)(void* context, int64_t num_tasks, int max_threads, core::ParallelBody body,
              void* body_context);
};

// From now on runs on it; null: on the threads that it ran on before.
void use_callers_pool(const CallersPool* pool);

// From now on runs on the OpenMP runtime in the library at `path`, which the process has loaded.
core::Status use_openmp_runtime(const char* path);

// From now on no call uses more threads than count() says on the calling thread; null: no limit.
void use_thread_count(int (*count)());

}  // namespace fa::cpu
