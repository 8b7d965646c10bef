// Which threads a CPU call runs on: those that the caller brings, the OpenMP runtime that the
// process has already (PyTorch brings one; two sets of threads in one process take turns in
// milliseconds), or a pool of our own.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <mutex>

#include "core/environment.h"
#include "cpu/cpu.h"
#include "cpu/processors.h"
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

// How many threads the framework of the process wants of a call; null where it has not said.
std::atomic<int (*)()> framework_threads{nullptr};

int at_most_framework_threads(int threads) {
  const auto wanted = framework_threads.load(std::memory_order_acquire);
  return wanted == nullptr ? threads : std::max(1, std::min(threads, wanted()));
}

int at_most_quota(int threads) {
  const int quota = processors_by_quota();
  return quota > 0 ? std::min(threads, quota) : threads;
}

class OpenMpParallel final : public core::Parallel {
 public:
  explicit OpenMpParallel(const OpenMpRuntime& runtime) : runtime_(runtime) {}

  int num_workers() const override {
    if (runtime_.in_parallel() != 0) return 1;
    int threads = wanted_threads();
    // Runtimes count the processors once and know no quota. A number that somebody chose stays.
    if (threads == default_threads_) threads = within_quota_;
    const int processors = processors_by_affinity();
    return processors < processors_then_ ? std::min(threads, processors) : threads;
  }

  // The whole team enters, as in the framework's own regions, and takes no task where it is not
  // wanted: GNU's runtime ends the threads that a smaller team leaves out, and starts them again
  // for the next region.
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    const int workers = static_cast<int>(std::min<int64_t>(max_workers, num_tasks));
    Region region{&runtime_, body, context, num_tasks, workers, {}};
    if (workers <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
    } else {
      runtime_.parallel(&enter, &region, 0, 0);
    }
  }

 private:
  struct Region {
    const OpenMpRuntime* runtime;
    core::ParallelBody body;
    void* context;
    int64_t num_tasks;
    int num_workers;
    std::atomic<int64_t> next_task;
  };

  static void enter(void* data) {
    Region& region = *static_cast<Region*>(data);
    const int worker = region.runtime->thread_num();
    while (worker < region.num_workers) {
      const int64_t task = region.next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= region.num_tasks) return;
      region.body(region.context, task, worker);
    }
  }

  // The framework is asked first: for a new thread that is when it sets the runtime's number.
  int wanted_threads() const {
    const int limit = at_most_framework_threads(std::numeric_limits<int>::max());
    return std::max(1, std::min(limit, runtime_.max_threads()));
  }

  const OpenMpRuntime runtime_;
  const int default_threads_ = wanted_threads();
  const int within_quota_ = at_most_quota(default_threads_);
  const int processors_then_ = processors_by_affinity();
};

std::atomic<OpenMpParallel*> openmp{nullptr};
std::atomic<bool> forked{false};

// The threads of a process that brings none, or that cannot use those it brought.
class OwnThreads final : public core::Parallel {
 public:
  int num_workers() const override {
    int threads = pool_.num_workers();
    if (wanted_ == 0) threads = std::min(threads, processors_by_affinity());
    // In the child of a fork: as many as the runtime would have taken.
    if (const OpenMpParallel* adopted = openmp.load(std::memory_order_acquire)) {
      threads = std::min(threads, adopted->num_workers());
    }
    return at_most_framework_threads(threads);
  }
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    pool_.run(num_tasks, max_workers, body, context);
  }
  void forget_threads() { pool_.forget_threads(); }

 private:
  const int wanted_ = std::min(core::environment::num_threads(), kMaxThreads);
  ThreadPool pool_{wanted_ > 0 ? wanted_ : at_most_quota(processors_by_affinity())};
};

class CallersThreads final : public core::Parallel {
 public:
  explicit CallersThreads(const CallersPool& pool) : pool_(pool) {}

  int num_workers() const override {
    const int threads = std::clamp(pool_.num_threads(pool_.context), 1, kMaxThreads);
    return at_most_framework_threads(threads);
  }
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override {
    const int workers = static_cast<int>(std::min<int64_t>(max_workers, num_tasks));
    if (workers > 1) return pool_.run(pool_.context, num_tasks, workers, body, context);
    for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
  }

 private:
  const CallersPool pool_;
};

std::atomic<CallersThreads*> callers{nullptr};

// Never destroyed: a thread may still be in a call while the process exits.
OwnThreads& own_pool() {
  static OwnThreads& pool = *new OwnThreads;
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
  if (CallersThreads* given = callers.load(std::memory_order_acquire)) return *given;
  watch_forks();
  OpenMpParallel* adopted = openmp.load(std::memory_order_acquire);
  if (adopted != nullptr && !forked.load(std::memory_order_relaxed)) return *adopted;
  return own_pool();
}

const char* parallel_source() {
  if (callers.load(std::memory_order_acquire) != nullptr) return "the caller's pool";
  return &default_parallel() == &own_pool() ? "own pool" : "OpenMP runtime of the process";
}

void use_callers_pool(const CallersPool* pool) {
  // Kept for the life of the process: calls may be running on any of them.
  static std::mutex mutex;
  static auto& kept = *new std::deque<CallersThreads>;
  const std::lock_guard lock(mutex);
  callers.store(pool != nullptr ? &kept.emplace_back(*pool) : nullptr, std::memory_order_release);
}

void use_thread_count(int (*count)()) { framework_threads.store(count, std::memory_order_release); }

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
