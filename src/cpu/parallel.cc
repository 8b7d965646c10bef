// Which threads a CPU call runs on: the OpenMP runtime that the process has already (PyTorch brings
// one; two sets of threads in one process take turns in milliseconds), or a pool of our own.
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "core/environment.h"
#include "cpu/cpu.h"
#include "cpu/thread_pool.h"

namespace fa::cpu {
namespace {

// The few entries of the GNU OpenMP ABI that a parallel region needs; LLVM's and Intel's runtimes
// offer them too.
struct OpenMpRuntime {
  void (*parallel)(void (*region)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*max_threads)();
  int (*thread_num)();
  int (*in_parallel)();
};

class OpenMpParallel final : public core::Parallel {
 public:
  explicit OpenMpParallel(const OpenMpRuntime& runtime) : runtime_(runtime) {}

  int num_workers() const override {
    return runtime_.in_parallel() != 0 ? 1 : std::max(1, runtime_.max_threads());
  }

  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    const int workers = static_cast<int>(std::min<int64_t>(max_workers, num_tasks));
    Region region{&runtime_, body, context, num_tasks, {}};
    if (workers <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
    } else {
      runtime_.parallel(&enter, &region, static_cast<unsigned>(workers), 0);
    }
  }

 private:
  struct Region {
    const OpenMpRuntime* runtime;
    core::ParallelBody body;
    void* context;
    int64_t num_tasks;
    std::atomic<int64_t> next_task;
  };

  static void enter(void* data) {
    Region& region = *static_cast<Region*>(data);
    const int worker = region.runtime->thread_num();
    for (;;) {
      const int64_t task = region.next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= region.num_tasks) return;
      region.body(region.context, task, worker);
    }
  }

  const OpenMpRuntime runtime_;
};

int processors_of_this_process() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

std::atomic<OpenMpParallel*> openmp{nullptr};
std::atomic<bool> forked{false};

// Never destroyed: a thread may still be in a call while the process exits.
ThreadPool& own_pool() {
  static ThreadPool& pool = *[] {
    const int wanted = core::environment::num_threads();
    return new ThreadPool(wanted > 0 ? wanted : processors_of_this_process());
  }();
  return pool;
}

// After a fork only the forking thread lives on. Our pool starts anew; an OpenMP runtime may not be
// able to, and would wait for ever, so the child no longer uses it.
void after_fork_in_child() {
  own_pool().forget_threads();
  forked.store(true);
}

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] {
    own_pool();
    pthread_atfork(nullptr, nullptr, &after_fork_in_child);
  });
}

template <class Function>
bool find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

}  // namespace

core::Parallel& default_parallel() {
  watch_forks();
  OpenMpParallel* adopted = openmp.load(std::memory_order_acquire);
  if (adopted != nullptr && !forked.load(std::memory_order_relaxed)) return *adopted;
  return own_pool();
}

const char* parallel_source() {
  return &default_parallel() == &own_pool() ? "own pool" : "OpenMP runtime of the process";
}

core::Status use_openmp_runtime(const char* path) {
  if (path == nullptr) return core::invalid_argument("path: is NULL, must name a shared library");
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    return core::unsupported("path: '", path, "' is not loaded in this process");
  }
  OpenMpRuntime runtime{};
  if (!find(library, "GOMP_parallel", runtime.parallel) ||
      !find(library, "omp_get_max_threads", runtime.max_threads) ||
      !find(library, "omp_get_thread_num", runtime.thread_num) ||
      !find(library, "omp_in_parallel", runtime.in_parallel)) {
    return core::unsupported("path: '", path, "' has no OpenMP runtime that can be shared");
  }
  // Kept for the life of the process: calls may be running on it at any time.
  openmp.store(new OpenMpParallel(runtime), std::memory_order_release);
  return {};
}

}  // namespace fa::cpu
