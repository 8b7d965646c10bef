// Which worker takes which task.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/parallel.h"

namespace fa::cpu {

// Hands tasks out in shares of neighbours: a worker goes through its own in order, and then helps
// with the others'. So a head stays with one core from call to call, with what the processor
// fetched unasked of the next one (backward at 128 keys, head_dim 64: 497 -> 435 us). Tasks behind
// those are taken last, by whoever is free.
class TaskShares {
 public:
  TaskShares(int64_t num_tasks, int64_t num_shares)
      : shares_(static_cast<size_t>(num_shares)), next_behind_(num_tasks) {
    for (int64_t s = 0; s < num_shares; ++s) {
      shares_[s].next.store(s * num_tasks / num_shares, std::memory_order_relaxed);
      shares_[s].end = (s + 1) * num_tasks / num_shares;
    }
  }

  // A task that nobody has; to be called as often as there are tasks.
  int64_t take(int worker) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(static_cast<size_t>(worker) + i) % shares_.size()];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      if (task < share.end) return task;
    }
    return next_behind_.fetch_add(1, std::memory_order_relaxed);
  }

 private:
  struct alignas(64) Share {  // a cache line of its own
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares_;
  alignas(64) std::atomic<int64_t> next_behind_;
};

// Calls body(task, worker) for each task. The first num_equal take about as long as each other. The
// others are taken one by one in their order, for the heaviest to start first.
template <class Body>
void for_each_task(core::Parallel& parallel, int64_t num_tasks, int max_workers, int64_t num_equal,
                   Body&& body) {
  if (num_equal <= 1 || max_workers <= 1) {
    core::parallel_for(parallel, num_tasks, max_workers, body);
    return;
  }
  TaskShares shares(num_equal, std::min<int64_t>(max_workers, num_equal));
  core::parallel_for(parallel, num_tasks, max_workers,
                     [&](int64_t, int worker) { body(shares.take(worker), worker); });
}

}  // namespace fa::cpu
