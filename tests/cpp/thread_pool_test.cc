#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/processors.h"
#include "cpu/task_shares.h"

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

TEST(TaskShares, each_task_runs_exactly_once) {
  ThreadPool pool(4);
  for (int64_t num_tasks : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int max_workers : {1, 2, 3, 4, 9}) {
      for (int64_t num_equal : {int64_t{0}, num_tasks / 3, num_tasks}) {
        std::vector<std::atomic<int>> runs(num_tasks);
        for_each_task(pool, num_tasks, max_workers, num_equal,
                      [&](int64_t task, int) { runs[task].fetch_add(1); });
        for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
      }
    }
  }
}

TEST(TaskShares, a_worker_goes_through_its_neighbours_and_then_helps) {
  TaskShares shares(10, 2);
  const std::vector<int> workers{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0};
  std::vector<int64_t> tasks;
  for (const int worker : workers) tasks.push_back(shares.take(worker));
  EXPECT_EQ(tasks, (std::vector<int64_t>{5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11}));
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

int one_thread() { return 1; }

TEST(ThreadPool, no_call_uses_more_threads_than_the_framework_wants) {
  use_thread_count(&one_thread);
  EXPECT_EQ(default_parallel().num_workers(), 1);
  use_thread_count(nullptr);
  EXPECT_GE(default_parallel().num_workers(), 1);
}

#if defined(__linux__)
TEST(ThreadPool, a_thread_confined_to_one_processor_works_alone) {
  if (std::getenv("OMP_NUM_THREADS") != nullptr ||
      std::getenv("FLASH_ATTENTION_NUM_THREADS") != nullptr) {
    GTEST_SKIP() << "a number that somebody chose holds";
  }
  default_parallel();
  std::thread([] {
    cpu_set_t set;
    ASSERT_EQ(sched_getaffinity(0, sizeof(set), &set), 0);
    int first = 0;
    while (!CPU_ISSET(first, &set)) ++first;
    CPU_ZERO(&set);
    CPU_SET(first, &set);
    ASSERT_EQ(sched_setaffinity(0, sizeof(set), &set), 0);
    EXPECT_EQ(processors_by_affinity(), 1);
    EXPECT_EQ(default_parallel().num_workers(), 1);
  }).join();
}
#endif

// A tree of files as Linux shows control groups.
class ControlGroups : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::temp_directory_path() /
            ("fa_groups_" + std::to_string(getpid()) + "_" +
             ::testing::UnitTest::GetInstance()->current_test_info()->name());
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_.string() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  int quota() const { return processors_by_quota(root_.string()); }

 private:
  std::filesystem::path root_;
};

TEST_F(ControlGroups, without_a_quota_there_is_no_limit) {
  EXPECT_EQ(quota(), 0);
  write("/proc/self/cgroup", "0::/service\n");
  EXPECT_EQ(quota(), 0);
  write("/sys/fs/cgroup/service/cpu.max", "max 100000\n");
  EXPECT_EQ(quota(), 0);
}

TEST_F(ControlGroups, the_strictest_of_a_group_and_its_ancestors_holds) {
  write("/proc/self/cgroup", "0::/slice/service\n");
  write("/sys/fs/cgroup/slice/service/cpu.max", "450000 100000\n");
  EXPECT_EQ(quota(), 5);  // 4.5, rounded up
  write("/sys/fs/cgroup/slice/cpu.max", "200000 100000\n");
  EXPECT_EQ(quota(), 2);
  write("/sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(quota(), 1);
}

TEST_F(ControlGroups, version_1_is_read_too) {
  write("/proc/self/cgroup", "4:memory:/m\n3:cpu,cpuacct:/docker/a\n0::/\n");
  write("/sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us", "100000\n");
  write("/sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(quota(), 0);
  write("/sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us", "300000\n");
  EXPECT_EQ(quota(), 3);
}

TEST_F(ControlGroups, in_a_container_the_groups_files_are_at_the_mount_point) {
  write("/proc/self/cgroup", "0::/../../host/path\n");
  write("/sys/fs/cgroup/cpu.max", "100000 100000\n");
  EXPECT_EQ(quota(), 1);
}

TEST(ThreadPool, an_openmp_runtime_must_be_loaded_already) {
  EXPECT_EQ(use_openmp_runtime("/no/such/libgomp.so.1").code(), core::StatusCode::kUnsupported);
  EXPECT_EQ(use_openmp_runtime(nullptr).code(), core::StatusCode::kInvalidArgument);
  EXPECT_STREQ(parallel_source(), "own pool");
}

}  // namespace
}  // namespace fa::cpu
