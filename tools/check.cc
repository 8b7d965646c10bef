#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <iterator>
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

// One direction of a call.
struct Pass {
  const char* name;
  cases::Outcome (cases::PreparedCase::*run)(const char* backend);
};

constexpr Pass kPasses[] = {{"forward", &cases::PreparedCase::run},
                            {"backward", &cases::PreparedCase::run_backward}};

// What one implementation came to, over all cases.
struct Tally {
  struct Column {  // of one pass and dtype
    int64_t runs = 0;
    double worst = 0.0;  // error over its bound
  };
  struct Failure {
    std::string what;
    std::string why;
  };

  std::string implementation;
  std::array<std::array<Column, std::size(cases::kDTypes)>, std::size(kPasses)> passes;
  std::vector<Failure> failures;

  void run(cases::PreparedCase& prepared, size_t pass, size_t dtype) {
    const auto run_pass = kPasses[pass].run;
    const cases::Outcome outcome = (prepared.*run_pass)(implementation.c_str());
    if (outcome.refused()) return;
    Column& column = passes[pass][dtype];
    ++column.runs;
    column.worst = std::max(column.worst, outcome.worst());
    std::string fault = outcome.fault();
    if (fault.empty() && outcome.implementation != implementation) {
      fault = "'" + outcome.implementation + "' ran instead";
    }
    if (fault.empty()) return;
    failures.push_back({std::string{kPasses[pass].name} + ", " + core::name(prepared.dtype()) +
                            ", " + cases::describe(prepared.test_case()),
                        fault});
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
      for (size_t pass = 0; pass < std::size(kPasses); ++pass) {
        for (Tally& tally : tallies) tally.run(prepared, pass, dtype);
      }
    }
  }
  return tallies;
}

std::string cell(const Tally::Column& column) {
  if (column.runs == 0) return "refuses";
  char text[32];
  std::snprintf(text, sizeof(text), column.worst < 10.0 ? "%.3f" : "%.1e", column.worst);
  return text;
}

void print_row(const Tally& tally) {
  std::printf("%-13s", tally.implementation.c_str());
  for (const auto& columns : tally.passes) {
    int64_t runs = 0;
    for (const Tally::Column& column : columns) runs += column.runs;
    std::printf("%6lld", static_cast<long long>(runs));
    for (const Tally::Column& column : columns) std::printf("%8s", cell(column).c_str());
  }
  if (tally.failures.empty()) {
    std::printf("  pass\n");
  } else {
    std::printf("  FAIL (%zu)\n", tally.failures.size());
  }
}

void print_bounds(const char* of, double (*bound)(const Case&, DataType), const char* measure) {
  const Case usual;
  std::printf(
      "  %-10s fp32 %.2g, more for larger scores; fp16 %.2g; bf16 %.2g\n             of %s\n", of,
      bound(usual, DataType::kFloat32), bound(usual, DataType::kFloat16),
      bound(usual, DataType::kBFloat16), measure);
}

void print_table(const std::vector<Tally>& tallies, size_t num_cases) {
  std::printf("%-13s  %-28s  %s\n%-13s", "", kPasses[0].name, kPasses[1].name, "implementation");
  for (size_t i = 0; i < std::size(kPasses); ++i) {
    std::printf("%*s%8s%8s%8s", i == 0 ? 5 : 6, "runs", "fp32", "fp16", "bf16");
  }
  std::printf("\n");
  for (const Tally& tally : tallies) print_row(tally);
  std::printf(
      "\n%zu cases in 3 dtypes; paged ones have no backward. Numbers are the worst error\n"
      "over its bound, 1 is the limit. Bounds:\n",
      num_cases);
  print_bounds("out", cases::out_bound, "sum_j P_ij |v_jd|");
  print_bounds("gradients", cases::gradient_bound, "their formulas with absolute values");
  std::printf("  %-10s %.2g of max(1, |lse|)\n", "lse", cases::kLseBound);
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
      "Runs every implementation that this machine has over the table of cases, forward\n"
      "and backward, in fp32, fp16 and bf16, and holds the results against the fp64\n"
      "oracle.\n"
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
