// How many processors this process may use.
#pragma once

#include <string>

namespace fa::cpu {

// More than any machine has, and no more than a ThreadPool counts.
inline constexpr int kMaxThreads = 4096;

// Those of the calling thread's affinity mask (taskset), at least 1. Asked anew at each call.
int processors_by_affinity();

// What the control groups of this process (containers, systemd units) allow it, in whole processors
// rounded up; 0: no limit. `root` is where the file system is mounted, "" but in tests.
int processors_by_quota(const std::string& root = "");

}  // namespace fa::cpu
