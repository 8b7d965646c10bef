// Which kernel runs a problem on a device, and how its work is ordered. Every constant that was
// measured is here.
#pragma once

#include <vector>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/device.h"
#include "cuda/kernel_id.h"

namespace fa::cuda {

// Positions are 32-bit in the kernels, with room for a window beside them.
inline constexpr int64_t kMaxLength = int64_t{1} << 30;

// Why no kernel of the sm_80 family takes the problem, or ok.
core::Status check_sm80(const core::AttentionProblem& problem, const DeviceProperties& properties);

// The same of Hopper's own kernel.
core::Status check_sm90(const core::AttentionProblem& problem, const DeviceProperties& properties);

// The kernel for a problem that check_sm80() takes.
KernelId choose_sm80(const core::AttentionProblem& problem, const DeviceProperties& properties);

// The kernel for a problem that check_sm90() takes.
KernelId choose_sm90(const core::AttentionProblem& problem);

// Rows of k and v that Hopper's copy engine moves at once: of one page, and of one step.
int64_t box_rows(const core::AttentionProblem& problem, const KernelSpec& spec);

// The kernel that writes S_dmask.
KernelId choose_s_dmask(const core::AttentionProblem& problem);

// Whether the tiles of few queries serve a problem that check_sm80() takes better than those of its
// own kernel, or it has a KV cache.
bool wants_split_plan(const core::AttentionProblem& problem);

// The kernel for such a problem, and among how many blocks the keys of a tile are shared.
struct SplitChoice {
  KernelId kernel;
  int num_splits;
};
SplitChoice choose_split(const core::AttentionProblem& problem, const DeviceProperties& properties);

// The same of a problem that check_sm90() takes as well.
SplitChoice choose_split_sm90(const core::AttentionProblem& problem,
                              const DeviceProperties& properties);

// The kernels around one for a KV cache: Family::kUpdateCache and Family::kCombineSplits.
KernelId choose_around(Family family, const core::AttentionProblem& problem);

// How many warps of a block of Family::kCombineSplits join a row's splits: a divisor.
inline constexpr int kCombiningWarps = 8;
int warps_per_row(int num_splits);

// Tiles of the longest sequence's rows, at least 1.
int64_t tiles_m(const core::AttentionProblem& problem, const KernelSpec& spec);

// forward_sm90: teams that a device has room for, one for each tile at once.
int64_t num_teams(const KernelSpec& spec, const DeviceProperties& properties);

// Heads whose blocks take turns; see ScheduleArgs. Divides num_heads.
int heads_per_group(const core::AttentionProblem& problem);

// forward_sm90: heads whose numbered tiles go together, as a power of two; see ScheduleArgs.
int log2_heads_together(const core::AttentionProblem& problem);

// The kernel that serves as `kernel` does and numbers the tiles, of which free teams take the next,
// where that is faster: it wants memory for its counter. Otherwise `kernel`.
KernelId choose_counting(const core::AttentionProblem& problem, const KernelId& kernel,
                         const DeviceProperties& properties);

// Whether blocks take pairs of tiles; see ScheduleArgs.
bool takes_pairs(const core::AttentionProblem& problem, const KernelId& kernel,
                 const DeviceProperties& properties);

// Blocks to launch for `num_blocks` tiles, or pairs of them.
int64_t num_launched(const KernelId& kernel, int64_t num_blocks,
                     const DeviceProperties& properties);

// Every kernel that these can give on a device.
std::vector<KernelId> reachable_kernels(const DeviceProperties& properties);

}  // namespace fa::cuda
