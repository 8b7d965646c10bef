#include "cuda/forward_launch.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/arithmetic.h"
#include "cuda/forward_plan.h"
#include "cuda/heuristics.h"
#include "cuda/tensor_map.h"

namespace fa::cuda {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::Result;
using core::Status;
using core::TensorView;

constexpr int kRowsPerWarpgroup = 64;

Status make_tensor_maps(const Driver& driver, const TensorView& q, const AttentionArgs& args,
                        int box_rows, const KernelSpec& spec, TensorMaps& maps) {
  maps.key_rows = static_cast<int>(args.k.shape[args.k.ndim - 3]);
  FA_TRY(make_tensor_map(driver, q, kRowsPerWarpgroup, false, maps.q));
  FA_TRY(make_tensor_map(driver, args.k, box_rows, keys_end(spec), maps.k));
  return make_tensor_map(driver, args.v, box_rows, spec.varlen, maps.v);
}

// Of a launch: high bits that memory holds by chance once in 2^44 times, if it is random.
unsigned long long next_ticket() {
  static const uint64_t seed =
      static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  static std::atomic<uint64_t> count{0};
  // SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
  uint64_t x = seed + (count.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  x ^= x >> 31;
  return std::max<uint64_t>(x >> kTileBits, 1) << kTileBits;
}

// Whatever `counter` holds: the ticket tells the kernel whether it is a count of this launch.
void set_counter(void* counter, int64_t blocks, ScheduleArgs& to) {
  if (blocks > kMaxCountedTiles) return;
  to.counter = static_cast<unsigned long long*>(counter);
  to.ticket = next_ticket();
}

// Hopper's varlen kernel: as many tiles as there may be of sequences that share total_q rows.
int64_t varlen_blocks(const AttentionProblem& problem, const KernelSpec& spec,
                      int64_t num_tiles_m) {
  const int64_t tiles =
      std::min(problem.batch * num_tiles_m, problem.total_q / spec.tile_m + problem.batch);
  return problem.num_heads * tiles;
}

// Keys behind a padding on the left begin anywhere within a page, and a box must not.
bool has_boxes(const AttentionArgs& args) {
  return !args.block_table.present() || !args.cache_leftpad.present();
}

}  // namespace

ForwardLaunch::ForwardLaunch(const AttentionProblem& problem, int device_index,
                             const Device& device, const KernelId& kernel,
                             const KernelId& otherwise)
    : problem_(problem),
      device_index_(device_index),
      device_(device),
      uses_maps_(kernel.family == Family::kForward90),
      counting_(choose_counting(problem, kernel, device.properties)),
      counts_tiles_(counting_.spec().varlen &&
                    varlen_blocks(problem, kernel.spec, tiles_m(problem, kernel.spec)) >
                        num_teams(kernel.spec, device.properties)),
      kernel_(kernel),
      otherwise_(otherwise) {}

Result<const LoadedKernel*> ForwardLaunch::kernel_for(const AttentionArgs& args,
                                                      bool has_workspace) const {
  const LazyKernel& kernel = has_workspace ? counting_ : kernel_;
  const KernelSpec& spec = kernel.spec();
  const bool maps = uses_maps_ && has_tensor_map(args.q, false) &&
                    has_tensor_map(args.k, keys_end(spec)) && has_tensor_map(args.v, spec.varlen) &&
                    has_boxes(args);
  return (uses_maps_ && !maps ? otherwise_ : kernel).get(device_index_);
}

Status ForwardLaunch::run(const LoadedKernel& kernel, const TensorView& q,
                          const AttentionArgs& args, ForwardArgs& launch_args, void* workspace,
                          const core::Stream& stream) const {
  const KernelSpec& spec = kernel.id.spec;
  TensorMaps maps;
  if (kernel.id.family == Family::kForward90) {
    // The driver makes and moves maps only for a thread with a context; a new one has none.
    const CurrentContext current(device_);
    FA_TRY(current.status());
    launch_args.pages.box_rows = static_cast<int>(box_rows(problem_, spec));
    FA_TRY(make_tensor_maps(*device_.driver, q, args, launch_args.pages.box_rows, spec, maps));
  }
  if (takes_pairs(problem_, kernel.id, device_.properties)) {
    launch_args.schedule.paired = 1;
    launch_args.schedule.num_tiles_m = (launch_args.schedule.num_tiles_m + 1) / 2;
    launch_args.schedule.heads_per_group = 1;
  }
  const int64_t blocks = spec.varlen
                             ? varlen_blocks(problem_, spec, launch_args.schedule.num_tiles_m)
                             : num_blocks(problem_, launch_args.schedule);
  if (counts_tiles_ && workspace != nullptr) set_counter(workspace, blocks, launch_args.schedule);
  launch_args.schedule.num_blocks = static_cast<int>(std::min(blocks, kMaxBlocks));
  launch_args.splits.num_tiles = launch_args.schedule.num_blocks;
  int64_t launched = num_launched(kernel.id, blocks, device_.properties);
  const bool one_each =
      blocks > kMaxBlocks || (spec.varlen && launch_args.schedule.counter == nullptr);
  if (one_each) launched = std::max(launched, core::ceil_div(blocks, int64_t{spec.teams}));
  void* arguments[] = {&launch_args, &maps};
  return kernel.launch(launched, arguments, stream.handle);
}

std::string ForwardLaunch::describe() const {
  const Result<const LoadedKernel*> kernel = counting_.get(device_index_);
  if (!kernel.ok()) return kernel.status().message();
  std::string text = describe_kernel(*kernel.value());
  if (counting_.id() != kernel_.id()) {
    text += "; without memory for a counter of tiles " + to_string(kernel_.id());
  }
  return text;
}

}  // namespace fa::cuda
