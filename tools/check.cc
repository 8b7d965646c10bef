#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "command_line.h"
#include "commands.h"
#include "flash_attn/attention.hpp"
#include "tests/case_runner.h"
#include "tests/cases.h"

namespace fa::tools {
namespace {

using cases::Case;
using core::DataType;

struct Request {
  std::string backend;
  std::string filter;
  bool quick = false;
  bool list = false;
  int64_t random = 0;
};

// What one implementation came to, over all cases.
struct Tally {
  struct PerDType {
    int64_t passed = 0;
    int64_t refused = 0;
    double worst = 0.0;  // of error / bound, over out and lse
  };
  struct Failure {
    std::string what;
    std::string why;
  };

  std::string implementation;
  std::vector<PerDType> dtypes = std::vector<PerDType>(std::size(cases::kDTypes));
  std::vector<Failure> failures;

  void add(const cases::Outcome& outcome, const cases::PreparedCase& prepared, size_t dtype) {
    const Case& c = prepared.test_case();
    PerDType& it = dtypes[dtype];
    if (outcome.refused()) {
      ++it.refused;
      return;
    }
    it.worst = std::max({it.worst, outcome.out_error / cases::out_bound(c, prepared.dtype()),
                         outcome.lse_error / cases::kLseBound});
    std::string fault = outcome.fault(c, prepared.dtype());
    if (fault.empty() && outcome.implementation != implementation) {
      fault = "'" + outcome.implementation + "' ran instead";
    }
    if (fault.empty()) {
      ++it.passed;
    } else {
      failures.push_back(
          {std::string{core::name(prepared.dtype())} + ", " + cases::describe(c), fault});
    }
  }
};

// On standard error, and only where somebody watches.
class Progress {
 public:
  explicit Progress(size_t total) : total_(total), visible_(isatty(STDERR_FILENO) != 0) {}
  ~Progress() {
    if (visible_) std::fprintf(stderr, "\r\033[K");
  }
  void step(const std::string& what) {
    ++done_;
    if (!visible_) return;
    constexpr size_t kWidth = 32;
    const size_t filled = total_ == 0 ? kWidth : kWidth * done_ / total_;
    const std::string bar = std::string(filled, '#') + std::string(kWidth - filled, '.');
    std::fprintf(stderr, "\r\033[K[%s] %zu/%zu %s", bar.c_str(), done_, total_, what.c_str());
    std::fflush(stderr);
  }

 private:
  size_t done_ = 0;
  size_t total_;
  bool visible_;
};

std::vector<Case> chosen_cases(const Request& request) {
  std::vector<Case> chosen(std::begin(cases::kCases), std::end(cases::kCases));
  for (int64_t seed = 0; seed < request.random; ++seed) {
    chosen.push_back(cases::random_case(static_cast<uint64_t>(seed)));
  }
  std::erase_if(chosen, [&](const Case& c) {
    return (request.quick && c.cost() > cases::kQuickCost) ||
           cases::label(c).find(request.filter) == std::string::npos;
  });
  return chosen;
}

// "cpu" names all of its family, "cpu:avx2" one, "" everything.
bool names(const std::string& forced, const std::string& implementation) {
  return forced.empty() || forced == implementation || implementation.rfind(forced + ":", 0) == 0;
}

std::vector<Tally> run_all(const std::vector<Case>& chosen,
                           const std::vector<std::string>& implementations) {
  std::vector<Tally> tallies;
  for (const std::string& name : implementations) tallies.emplace_back().implementation = name;
  Progress progress(chosen.size() * std::size(cases::kDTypes));
  for (const Case& c : chosen) {
    for (size_t dtype = 0; dtype < std::size(cases::kDTypes); ++dtype) {
      progress.step(cases::label(c));
      cases::PreparedCase prepared(c, cases::kDTypes[dtype]);
      for (Tally& tally : tallies) {
        tally.add(prepared.run(tally.implementation.c_str()), prepared, dtype);
      }
    }
  }
  return tallies;
}

std::string cell(const Tally::PerDType& it, int64_t failed) {
  if (it.passed + failed == 0) return "refuses";
  char text[32];
  std::snprintf(text, sizeof(text), it.worst < 10.0 ? "%.3f" : "%.1e", it.worst);
  return text;
}

void print_table(const std::vector<Tally>& tallies, size_t num_cases) {
  std::printf("%-16s %7s  %9s %9s %9s\n", "implementation", "runs", "fp32", "fp16", "bf16");
  for (const Tally& tally : tallies) {
    int64_t runs = 0;
    for (const Tally::PerDType& it : tally.dtypes) runs += it.passed;
    const auto failed = static_cast<int64_t>(tally.failures.size());
    std::printf("%-16s %7lld ", tally.implementation.c_str(),
                static_cast<long long>(runs + failed));
    for (const Tally::PerDType& it : tally.dtypes) std::printf(" %9s", cell(it, failed).c_str());
    if (failed == 0) {
      std::printf("  pass\n");
    } else {
      std::printf("  FAIL (%lld)\n", static_cast<long long>(failed));
    }
  }
  std::printf(
      "\n%zu cases in 3 dtypes. Numbers are the worst error over its bound: 1 is the limit."
      "\n",
      num_cases);
  const Case usual;
  std::printf(
      "Bounds: out %.2g fp32 (more for larger scores), %.2g fp16, %.2g bf16, all of\n"
      "sum_j P_ij |v_jd|; lse %.2g.\n",
      cases::out_bound(usual, DataType::kFloat32), cases::out_bound(usual, DataType::kFloat16),
      cases::out_bound(usual, DataType::kBFloat16), cases::kLseBound);
}

void print_failures(const std::vector<Tally>& tallies) {
  constexpr size_t kShown = 20;
  for (const Tally& tally : tallies) {
    if (tally.failures.empty()) continue;
    std::printf("\n%s\n", tally.implementation.c_str());
    for (size_t i = 0; i < std::min(kShown, tally.failures.size()); ++i) {
      const Tally::Failure& failure = tally.failures[i];
      std::printf("  %s\n    %s\n", failure.what.c_str(), failure.why.c_str());
    }
    if (tally.failures.size() > kShown) {
      std::printf("  and %zu more\n", tally.failures.size() - kShown);
    }
  }
}

CommandLine command_line(Request& request) {
  CommandLine command(
      "check",
      "Runs every implementation that this machine has over the table of cases, in\n"
      "fp32, fp16 and bf16, and holds the results against the fp64 oracle.\n"
      "Exits with 1 where one is out of bounds.");
  command.option("--backend", "NAME", &request.backend, "one ('cpu:avx2') or one family ('cpu')");
  command.option("--filter", "TEXT", &request.filter, "only cases whose name contains it");
  command.flag("--quick", &request.quick, "leave the costly cases out");
  command.option("--random", "N", &request.random, "and N random cases");
  command.flag("--list", &request.list, "print the names of the cases, and stop");
  return command;
}

}  // namespace

int run_check(int argc, char** argv) {
  Request request;
  const CommandLine command = command_line(request);
  if (const auto code = command.parse(argc, argv)) return *code;
  const std::vector<Case> chosen = chosen_cases(request);
  if (chosen.empty()) return command.fail("no case's name contains '" + request.filter + "'");
  if (request.list) {
    for (const Case& c : chosen) std::printf("%s\n", cases::describe(c).c_str());
    return kSuccess;
  }
  std::vector<std::string> selected;
  for (const Implementation& implementation : implementations()) {
    if (!names(request.backend, implementation.name)) continue;
    if (implementation.available) {
      selected.push_back(implementation.name);
    } else {
      std::printf("%s is not here: %s\n", implementation.name.c_str(),
                  implementation.reason.c_str());
    }
  }
  if (selected.empty()) {
    return command.fail("no implementation named '" + request.backend +
                        "' can run here; 'flash-attn-plus info' lists them");
  }
  const std::vector<Tally> tallies = run_all(chosen, selected);
  print_table(tallies, chosen.size());
  print_failures(tallies);
  const bool failed = std::any_of(tallies.begin(), tallies.end(),
                                  [](const Tally& tally) { return !tally.failures.empty(); });
  return failed ? kFailure : kSuccess;
}

}  // namespace fa::tools
