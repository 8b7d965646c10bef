#include "cpu/thread_pool.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "cpu/spin.h"

namespace fa::cpu {
namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr uint32_t kJoined = 1u << 16;
constexpr uint32_t kActiveMask = kJoined - 1;
constexpr uint32_t kJoinedMask = kOpen - kJoined;

// Long enough to bridge the gap between two layers' attention, short enough not to be noticed:
// about 20 us.
constexpr int kSpins = 1000;

// Waits until `value` no longer is `old`: spins, then sleeps.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    spin_pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (int alive = num_alive_.load(); alive != 0; alive = num_alive_.load()) {
    num_alive_.wait(alive);
  }
}

void ThreadPool::run(int64_t num_tasks, int max_workers, core::ParallelBody body, void* context) {
  max_workers = static_cast<int>(std::min<int64_t>({max_workers, num_threads_, num_tasks}));
  bool idle = false;
  if (max_workers <= 1 || !busy_.compare_exchange_strong(idle, true, std::memory_order_acquire)) {
    for (int64_t task = 0; task < num_tasks; ++task) body(context, task, 0);
    return;
  }
  start_workers(max_workers - 1);
  job_ = {body, context, num_tasks, max_workers};
  next_task_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();

  claim_tasks(0);

  uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  while ((state & kActiveMask) != 0) {
    wait_while(state_, state);
    state = state_.load(std::memory_order_acquire);
  }
  busy_.store(false, std::memory_order_release);
}

void ThreadPool::start_workers(int count) {
  for (; num_started_ < count; ++num_started_) {
    num_alive_.fetch_add(1);
    try {
      std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: those there are suffice
      num_alive_.fetch_sub(1);
      return;
    }
  }
}

void ThreadPool::work() {
  uint32_t seen = generation_.load(std::memory_order_acquire);
  while (!stopping_.load(std::memory_order_acquire)) {
    int worker = 0;
    if (join_job(worker)) {
      claim_tasks(worker);
      leave_job();
    }
    wait_while(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
  }
  if (num_alive_.fetch_sub(1) == 1) num_alive_.notify_all();
}

// Workers are numbered from 1 in the order of joining; the caller is 0.
bool ThreadPool::join_job(int& worker) {
  uint32_t state = state_.load(std::memory_order_acquire);
  while ((state & kOpen) != 0) {
    const int joined = static_cast<int>((state & kJoinedMask) / kJoined);
    // max_workers may be read only once joined; the tasks bound it from above until then.
    if (state_.compare_exchange_weak(state, state + kJoined + 1, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      worker = joined + 1;
      if (worker < job_.max_workers) return true;
      leave_job();
      return false;
    }
  }
  return false;
}

void ThreadPool::leave_job() {
  const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kOpen) == 0) state_.notify_all();
}

void ThreadPool::claim_tasks(int worker) {
  const Job job = job_;
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.num_tasks) return;
    job.body(job.context, task, worker);
  }
}

void ThreadPool::forget_threads() {
  num_started_ = 0;
  num_alive_.store(0);
  state_.store(0);
  busy_.store(false);
}

}  // namespace fa::cpu
