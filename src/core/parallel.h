// The parallel loop that the core is given; it owns no threads itself.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fa::core {

// Calls body(context, task, worker) once for each task in [0, num_tasks), in any order.
// `worker` is in [0, num_workers()), and no two calls share one at the same time.
using ParallelBody = void (*)(void* context, int64_t task, int worker);

class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int num_workers() const = 0;
  // At most max_workers take part, the caller among them.
  virtual void run(int64_t num_tasks, int max_workers, ParallelBody body, void* context) = 0;
};

// Calls body(task, worker) for each task.
template <class Body>
void parallel_for(Parallel& parallel, int64_t num_tasks, int max_workers, Body&& body) {
  if (num_tasks <= 0) return;
  const ParallelBody call = [](void* context, int64_t task, int worker) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(task, worker);
  };
  parallel.run(num_tasks, max_workers, call, &body);
}

}  // namespace fa::core
