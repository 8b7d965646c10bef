// Compiles the loops once per instruction set, and times them on threads of their own.
#include "cpu/ceilings.h"

#include "cpu/call.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/ceilings.cc"
#include <hwy/foreach_target.h>

#include "cpu/ceilings-inl.h"

namespace fa::cpu {

template <>
CeilingLoops ceiling_loops<HWY_TARGET>() {
  return {HWY_NAMESPACE::multiply_add_loop, HWY_NAMESPACE::read_loop};
}

}  // namespace fa::cpu

#if HWY_ONCE

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/pages.h"
#include "cpu/processors.h"

namespace fa::cpu {
namespace {

using Clock = std::chrono::steady_clock;

enum : int { kClosed, kOpen, kAbandoned };

constexpr int kRuns = 6;  // the best is the ceiling
constexpr auto kRunTime = std::chrono::milliseconds(60);

// Calls work(thread) over and over on num_threads threads at once, for the time of one run; the sum
// of what the calls return, per second of the best run.
template <class Work>
double best_rate(int num_threads, Work&& work) {
  std::barrier start(num_threads);
  std::atomic<int> gate{kClosed};  // opened once all threads are there
  std::vector<double> amounts(num_threads * kRuns), seconds(num_threads * kRuns);
  const auto measure = [&](int thread) {
    gate.wait(kClosed);
    if (gate.load() == kAbandoned) return;
    for (int run = 0; run < kRuns; ++run) {
      start.arrive_and_wait();
      double amount = 0;
      const Clock::time_point begin = Clock::now();
      do amount += work(thread);
      while (Clock::now() - begin < kRunTime);
      amounts[run * num_threads + thread] = amount;
      seconds[run * num_threads + thread] =
          std::chrono::duration<double>(Clock::now() - begin).count();
    }
  };
  std::vector<std::jthread> others;
  const auto set_gate = [&](int state) {
    gate.store(state);
    gate.notify_all();
  };
  try {
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(measure, thread);
  } catch (...) {
    set_gate(kAbandoned);
    throw;
  }
  set_gate(kOpen);
  measure(0);
  others.clear();
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    double rate = 0;
    for (int thread = 0; thread < num_threads; ++thread) {
      const int at = run * num_threads + thread;
      rate += amounts[at] / seconds[at];
    }
    best = std::max(best, rate);
  }
  return best;
}

double measure_arithmetic(ArithmeticLoop loop, int num_threads) {
  constexpr int64_t kRepeats = 20000;  // tens of microseconds between looks at the clock
  return best_rate(num_threads, [loop](int) { return loop(kRepeats); });
}

// Several times the last cache, which on a rented machine is larger than it says; at most an eighth
// of the memory.
int64_t bytes_beyond_caches() {
  constexpr int64_t kLeast = int64_t{256} << 20;
  int64_t bytes = kLeast;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  bytes = std::max(bytes, 4 * static_cast<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
  const int64_t memory =
      static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  return memory > 0 ? std::min(bytes, memory / 8) : bytes;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Written to, so that each page is there; in huge pages where the system has them.
Memory touched_memory(int64_t bytes) {
  constexpr auto kAlignment = static_cast<size_t>(kHugePageBytes);
  Memory memory(static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes))));
  if (memory == nullptr) return memory;
  prefer_huge_pages(memory.get(), bytes);
  std::fill_n(memory.get(), bytes, char{1});
  return memory;
}

core::Result<double> measure_memory(ReadLoop loop, int num_threads) {
  constexpr int64_t kUnit = int64_t{2} << 20;
  const int64_t share = round_up(bytes_beyond_caches() / num_threads, kUnit);
  std::vector<Memory> parts(num_threads);
  {  // Each by its own thread, for it to lie near that thread's processor.
    std::vector<std::jthread> writers;
    for (Memory& part : parts) writers.emplace_back([&] { part = touched_memory(share); });
  }
  for (const Memory& part : parts) {
    if (part == nullptr) {
      return core::Status(core::StatusCode::kOutOfMemory, "no memory to measure its speed with");
    }
  }
  constexpr int64_t kPiece = int64_t{1} << 20;
  std::vector<int64_t> at(num_threads, 0);
  std::atomic<uint64_t> sink{0};
  return best_rate(num_threads, [&](int thread) {
    sink.fetch_xor(loop(parts[thread].get() + at[thread], kPiece), std::memory_order_relaxed);
    at[thread] = (at[thread] + kPiece) % share;
    return static_cast<double>(kPiece);
  });
}

// The loops of the best instruction set of this processor.
CeilingLoops best_loops() {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.ceilings.multiply_add != nullptr && set.supported()) return set.ceilings;
  }
  return {};
}

#if FA_CPU_HAS_PAIRS
constexpr int64_t kPairLoopDepth = 512;

// Factors like data's: on zeros AMX was 7% faster.
struct PairFactors {
  alignas(64) uint16_t a[2 * kPairRows * kPairLoopDepth];
  alignas(64) uint32_t b[4 * kBlockB];

  PairFactors() {
    uint32_t state = 1;
    const auto next = [&state] {  // of either sign, between 1 and 2
      constexpr uint32_t kOne = 0x3F80, kSignAndMantissa = 0x807F;
      state = state * 1664525 + 1013904223;
      return kOne | (state >> 16 & kSignAndMantissa);
    };
    for (uint16_t& x : a) x = static_cast<uint16_t>(next());
    for (uint32_t& pair : b) {
      pair = next();
      pair |= next() << 16;
    }
  }
};

// Products of one strip, over and over: operands come from L1, sums stay in registers but for the
// strip's ends. Returns the operations.
double multiply_pairs(const PairKernels& pairs, int64_t rows, int64_t columns, int64_t repeats) {
  constexpr int64_t kDepth = kPairLoopDepth;
  static const PairFactors factors;
  alignas(64) float c[4 * kBlockC] = {};
  const PairProduct product{.a = factors.a,
                            .a_row_step = kPairRows * kDepth,
                            .b = factors.b,
                            .b_depth_step = 0,
                            .b_column_step = kBlockB,
                            .c = c,
                            .c_column_step = rows * kPairColumns,
                            .rows = rows,
                            .columns = columns,
                            .depth = kDepth,
                            .accumulate = true};
  constexpr int64_t kStepsPerProduct = 64;  // a step of the other loops is that much shorter
  pairs.begin();
  for (int64_t i = 0; i < repeats; i += kStepsPerProduct) pairs.multiply(product);
  pairs.end();
  const double products = static_cast<double>(ceil_div(repeats, kStepsPerProduct));
  return 2.0 * products * static_cast<double>(rows * columns * kDepth);
}

#if HWY_ARCH_X86
double dot_loop(int64_t repeats) {
  return multiply_pairs(*avx512_pair_kernels(), kPairRows, 4 * kPairColumns, repeats);
}
double tile_loop(int64_t repeats) {
  return multiply_pairs(*amx_pair_kernels(), 2 * kPairRows, 2 * kPairColumns, repeats);
}
#else
double dot_loop(int64_t repeats) {
  return multiply_pairs(*neon_pair_kernels(), kPairRows, 2 * kPairColumns, repeats);
}
#endif
#endif

// The loop behind a kind; null where this processor or this build has none.
core::Result<ArithmeticLoop> arithmetic_loop(std::string_view kind) {
  if (kind == "fp32_fma") return best_loops().multiply_add;
  if (kind == "bf16_dot" || kind == "amx_bf16") {
#if FA_CPU_HAS_PAIRS && HWY_ARCH_X86
    if (kind == "bf16_dot" && has_avx512_bf16()) return ArithmeticLoop{dot_loop};
    if (kind == "amx_bf16" && has_amx_bf16()) return ArithmeticLoop{tile_loop};
#elif FA_CPU_HAS_PAIRS
    if (kind == "bf16_dot" && has_neon_bf16()) return ArithmeticLoop{dot_loop};
#endif
    return ArithmeticLoop{nullptr};
  }
  return core::invalid_argument("kind: is '", kind,
                                "', must be fp32_fma, bf16_dot, amx_bf16 or memory_read");
}

}  // namespace

core::Result<double> measure_ceiling(std::string_view kind, int num_threads) {
  if (num_threads < 0 || num_threads > kMaxThreads) {
    return core::invalid_argument("num_threads: is ", num_threads, ", must be 0 to ", kMaxThreads);
  }
  if (num_threads == 0) num_threads = default_parallel().num_workers();
  try {
    if (kind == "memory_read") return measure_memory(best_loops().read, num_threads);
    const core::Result<ArithmeticLoop> loop = arithmetic_loop(kind);
    if (!loop.ok()) return loop.status();
    if (loop.value() == nullptr) {
      return core::unsupported("kind: '", kind, "' is not on this machine or not in this build");
    }
    return measure_arithmetic(loop.value(), num_threads);
  } catch (const std::system_error&) {
    return core::unsupported("num_threads: the system does not start ", num_threads, " threads");
  }
}

}  // namespace fa::cpu
#endif  // HWY_ONCE
