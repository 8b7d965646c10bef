#include "cpu/processors.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

namespace fa::cpu {
namespace {

// ceil(quota / period); 0 where there is no limit.
int whole_processors(double quota, double period) {
  if (!(quota > 0) || !(period > 0)) return 0;
  return std::max(1, static_cast<int>(std::ceil(quota / period - 1e-9)));
}

// "max 100000" or "200000 100000", in microseconds.
int quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max") return 0;
  return whole_processors(std::atof(quota.c_str()), period);
}

// -1: no limit.
int quota_v1(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return whole_processors(quota, period);
}

int stricter(int a, int b) { return a == 0 || b == 0 ? std::max(a, b) : std::min(a, b); }

// A group is bound by its ancestors too. In a container `path` may be the host's, and the group's
// own files then lie at the mount point.
template <class Quota>
int strictest(const std::string& mount, std::string path, Quota quota) {
  int limit = quota(mount);
  while (path.size() > 1) {
    limit = stricter(limit, quota(mount + path));
    path.resize(path.rfind('/'));
  }
  return limit;
}

bool has_cpu_controller(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

int processors_by_affinity() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int processors_by_quota(const std::string& root) {
  int limit = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  // "0::/a/b" is version 2, "3:cpu,cpuacct:/a/b" version 1.
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    const std::string mount = root + "/sys/fs/cgroup";
    if (controllers.empty()) {
      limit = stricter(limit, strictest(mount, path, quota_v2));
    } else if (has_cpu_controller(controllers)) {
      limit = stricter(limit, strictest(mount + "/" + controllers, path, quota_v1));
    }
  }
  return limit;
}

}  // namespace fa::cpu
