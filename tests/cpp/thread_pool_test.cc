#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/cpu.h"

namespace fa::cpu {
namespace {

TEST(ThreadPool, each_task_runs_exactly_once) {
  ThreadPool pool(4);
  for (int64_t num_tasks : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int max_workers : {1, 2, 3, 4, 9}) {
      std::vector<std::atomic<int>> runs(num_tasks);
      core::parallel_for(pool, num_tasks, max_workers,
                         [&](int64_t task, int) { runs[task].fetch_add(1); });
      for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
    }
  }
}

TEST(ThreadPool, no_two_tasks_share_a_worker_at_the_same_time) {
  ThreadPool pool(4);
  for (int repeat = 0; repeat < 200; ++repeat) {
    const int max_workers = 1 + repeat % 4;
    std::vector<std::atomic<int>> inside(max_workers);
    std::atomic<bool> shared{false};
    core::parallel_for(pool, 64, max_workers, [&](int64_t, int worker) {
      ASSERT_LT(worker, max_workers);
      if (inside[worker].fetch_add(1) != 0) shared = true;
      std::this_thread::yield();
      inside[worker].fetch_sub(1);
    });
    EXPECT_FALSE(shared);
  }
}

TEST(ThreadPool, loops_from_several_threads_at_once_all_finish) {
  ThreadPool pool(3);
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 300; ++repeat) {
        core::parallel_for(pool, 20, 3, [&](int64_t task, int) { total += task; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 4 * 300 * 190);
}

TEST(ThreadPool, a_loop_inside_a_loop_finishes) {
  ThreadPool pool(3);
  std::atomic<int> inner{0};
  core::parallel_for(pool, 8, 3, [&](int64_t, int) {
    core::parallel_for(pool, 8, 3, [&](int64_t, int) { inner.fetch_add(1); });
  });
  EXPECT_EQ(inner.load(), 64);
}

TEST(ThreadPool, works_in_the_child_of_a_fork) {
  core::Parallel& parallel = default_parallel();
  std::atomic<int> before{0};
  core::parallel_for(parallel, 100, 8, [&](int64_t, int) { before.fetch_add(1); });
  EXPECT_EQ(before.load(), 100);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int> count{0};
    core::parallel_for(default_parallel(), 100, 8, [&](int64_t, int) { count.fetch_add(1); });
    _exit(count.load() == 100 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(ThreadPool, an_openmp_runtime_must_be_loaded_already) {
  EXPECT_EQ(use_openmp_runtime("/no/such/libgomp.so.1").code(), core::StatusCode::kUnsupported);
  EXPECT_EQ(use_openmp_runtime(nullptr).code(), core::StatusCode::kInvalidArgument);
  EXPECT_STREQ(parallel_source(), "own pool");
}

}  // namespace
}  // namespace fa::cpu
