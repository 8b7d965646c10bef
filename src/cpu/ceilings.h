// What this machine's processors and memory can do at most, measured: what the benchmark holds the
// kernels' figures against.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/status.h"

namespace fa::cpu {

// Repeats one kind of work on the calling thread, from registers (or L1) alone; returns the
// floating-point operations done, a multiply-add counting as two.
using ArithmeticLoop = double (*)(int64_t repeats);
// Reads `bytes` bytes, a multiple of 1024, at an address aligned to 64; returns something that
// depends on all.
using ReadLoop = uint64_t (*)(const void* memory, int64_t bytes);

struct CeilingLoops {
  ArithmeticLoop multiply_add;  // fp32
  ReadLoop read;
};

// Operations (memory: bytes) per second of num_threads threads together, the best of several short
// runs; takes about half a second. Kinds: "fp32_fma", "bf16_dot", "amx_bf16", "memory_read". One
// that the machine or this build lacks is unsupported. num_threads 0: as many as a call uses.
core::Result<double> measure_ceiling(std::string_view kind, int num_threads);

// Defined once for each of Highway's targets, by ceilings.cc.
template <int64_t kTarget>
CeilingLoops ceiling_loops();

}  // namespace fa::cpu
