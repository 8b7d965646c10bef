// Threads of our own, for processes that bring none.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace fa::cpu {

// The caller takes part, tasks are claimed from an atomic counter, and nobody waits for a worker
// that has claimed nothing. One loop runs at a time; a second caller meanwhile runs its own alone.
// Workers start with the first loop that wants them, spin shortly between loops, then sleep.
class ThreadPool final : public core::Parallel {
 public:
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {}
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_workers() const override { return num_threads_; }
  void run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) override;

  // In the child of a fork: the threads are gone, whatever they were doing.
  void forget_threads();

 private:
  struct Job {
    core::ParallelBody body;
    void* context;
    int64_t num_tasks;
    int max_workers;
  };

  void start_workers(int count);
  void work();
  bool join_job(int& worker);
  void leave_job();
  void claim_tasks(int worker);

  const int num_threads_;
  std::atomic<bool> busy_{false};  // a loop is running
  std::atomic<int> num_alive_{0};  // workers that have not returned from work()
  int num_started_ = 0;            // guarded by busy_
  Job job_{};                      // written while closed and nobody is in it
  std::atomic<int64_t> next_task_{0};
  // Bit 31: open to be joined. Bits 16 to 30: workers that joined. Bits 0 to 15: those still in it.
  std::atomic<uint32_t> state_{0};
  std::atomic<uint32_t> generation_{0};  // workers wake when it changes
  std::atomic<bool> stopping_{false};
};

}  // namespace fa::cpu
