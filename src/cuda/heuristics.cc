#include "cuda/heuristics.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "core/arithmetic.h"

namespace fa::cuda {
namespace {

using core::AttentionProblem;
using core::BiasKind;
using core::DataType;
using core::Status;

constexpr int kTuring = 75;  // mma.sync of fp16
constexpr int kAmpere = 80;  // and of bf16, and cp.async
constexpr int kHopper = 90;
constexpr int64_t kMaxHeadDim = 256;
// Rows after which the copy engine's swizzle repeats: pages are moved in boxes of whole periods.
constexpr int64_t kBoxRowsMultiple = 8;

struct HeadDims {
  int qk;
  int v;
};

// What head dimensions are padded to. Unlike ones share the larger's, but for DeepSeek's 192 / 128.
constexpr HeadDims kHeadDims[] = {{32, 32},   {64, 64},   {96, 96},  {128, 128},
                                  {192, 128}, {192, 192}, {256, 256}};

HeadDims padded_dims(int64_t head_dim, int64_t head_dim_v) {
  for (const HeadDims& dims : kHeadDims) {
    if (head_dim <= dims.qk && head_dim_v <= dims.v) return dims;
  }
  return kHeadDims[std::size(kHeadDims) - 1];
}

Element element_of(DataType dtype) {
  if (dtype == DataType::kFloat16) return Element::kFloat16;
  return dtype == DataType::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
}

bool fits(const KernelSpec& spec, const DeviceProperties& properties) {
  constexpr int kStaticBytes = 1024;
  return forward_sm80_shared_bytes(spec) <= properties.max_shared_bytes - kStaticBytes;
}

// Within 64 KiB, which is what Turing has.
void fit_turing(KernelSpec& spec, const DeviceProperties& properties) {
  // With 128 keys, 104 to 160 bytes of registers spill.
  if (properties.compute_capability < kAmpere) spec.tile_n = std::min(spec.tile_n, 64);
  if (!fits(spec, properties)) spec.tile_n = 32;
  if (!fits(spec, properties)) {
    spec.tile_m = 32;
    spec.num_warps = 2;
  }
}

// Two 16-row tiles per warp halve the loads of k and v per product, and fill 255 registers; where
// scores or addresses need more registers than that, or shared memory is short, fewer rows. tile_n
// follows from head_dim alone: it decides in which order a row's keys are summed, and so the bits
// of the result, which are to be the same for dense, varlen and paged calls.
void set_tile_80(KernelSpec& spec, const DeviceProperties& properties) {
  spec.tile_m = 128;
  spec.tile_n = spec.head_dim <= 64 ? 128 : 64;
  spec.num_warps = spec.head_dim <= 128 ? 4 : 8;
  const bool registers_are_short = spec.score == Score::kGeneral || spec.loader != Loader::kVector;
  if (registers_are_short && spec.head_dim <= 128) {
    spec.tile_m = 64;
  }
  if (!fits(spec, properties)) {
    spec.tile_m = 64;
    spec.num_warps = 4;
  }
  fit_turing(spec, properties);
}

KernelSpec spec_80(Element element, HeadDims dims, Score score, bool dropout, Loader loader,
                   const DeviceProperties& properties) {
  KernelSpec spec;
  spec.element = element;
  spec.head_dim = dims.qk;
  spec.head_dim_v = dims.v;
  spec.score = score;
  spec.dropout = dropout;
  spec.loader = loader;
  set_tile_80(spec, properties);
  return spec;
}

// Tiles of Hopper's kernel: as many keys as two stages of k and v leave room for, and as a
// warpgroup's registers hold scores for. At head_dim 64 the exponentials bound it: four warpgroups
// with fewer keys each hide one another's waits best, as two teams. On an H100, bf16, 16384 tokens,
// one team's 256x64 gave 368 and 238 TFLOP/s (causal) at 512 tokens a sequence, 446 and 428 at
// 4096; two teams' 128x64 382 and 277, 441 and 426; and 2048 tokens of 8 heads took 44 and 30 us.
struct Tile90 {
  HeadDims dims;
  int m, n;
  int teams = 1;
};
constexpr Tile90 kTiles90[] = {{{64, 64}, 128, 64, 2},
                               {{128, 128}, 128, 128},
                               {{192, 128}, 128, 128},
                               {{192, 192}, 128, 112},
                               {{256, 256}, 128, 80}};

const Tile90& tile_90(int64_t head_dim, int64_t head_dim_v) {
  for (const Tile90& tile : kTiles90) {
    if (head_dim <= tile.dims.qk && head_dim_v <= tile.dims.v) return tile;
  }
  return kTiles90[std::size(kTiles90) - 1];
}

// Of scores that need more registers than four warpgroups leave each. On an H100, bf16, 512 to 4096
// tokens, TFLOP/s of ALiBi and dropout: 269 to 302 and 185 to 218, of 192x64 243 to 295 and 178 to
// 196.
constexpr Tile90 kGeneralTile64{{64, 64}, 128, 128};

// What a kernel of Hopper's is made for.
struct Features90 {
  Score score;
  bool dropout;
  Loader loader;
  bool varlen;
};

// Kernels that ask at run time for what is rarer serve more than their name says, so that there are
// fewer: pages, of those for them, and all layouts, of those with general scores.
constexpr Features90 kFeatures90[] = {{Score::kPlain, false, Loader::kVector, false},
                                      {Score::kPlain, false, Loader::kVector, true},
                                      {Score::kPlain, false, Loader::kPagedVector, true},
                                      {Score::kSoftcap, false, Loader::kVector, false},
                                      {Score::kSoftcap, false, Loader::kPagedVector, true},
                                      {Score::kGeneral, false, Loader::kPagedVector, true},
                                      {Score::kGeneral, true, Loader::kPagedVector, true}};

KernelSpec spec_90(Element element, const Tile90& of_dims, const Features90& features) {
  const bool is_general = features.score == Score::kGeneral;
  const Tile90& tile = is_general && of_dims.dims.qk == 64 ? kGeneralTile64 : of_dims;
  KernelSpec spec;
  spec.element = element;
  spec.head_dim = tile.dims.qk;
  spec.head_dim_v = tile.dims.v;
  spec.tile_m = tile.m;
  spec.tile_n = tile.n;
  // A warpgroup per 64 rows of each team, and the producers'.
  spec.num_warps = 4 * (tile.teams * tile.m / 64 + 1);
  spec.score = features.score;
  spec.dropout = features.dropout;
  spec.loader = features.loader;
  spec.varlen = features.varlen;
  spec.teams = tile.teams;
  return spec;
}

// Rows of few queries: two warps, and two stages of 16 KiB of keys and of values in most cases, so
// that a multiprocessor has five blocks or six. On an H100 at head_dim 64, twice the keys and half
// the blocks took 304 us for what six blocks of one stage took 203, and of pages at head_dim 128,
// 480 for 378.
KernelSpec spec_packed(Element element, HeadDims dims, Score score, Loader loader,
                       const DeviceProperties& properties) {
  KernelSpec spec;
  spec.element = element;
  spec.head_dim = dims.qk;
  spec.head_dim_v = dims.v;
  spec.tile_m = 32;
  spec.tile_n = dims.qk <= 32 ? 128 : dims.qk <= 64 ? 64 : 32;
  spec.num_warps = 2;
  spec.score = score;
  spec.loader = loader;
  spec.packs = true;
  // Element by element, and on Turing, there is nothing under way that a stage could hold.
  spec.stages = loader == Loader::kElement || properties.compute_capability < kAmpere ? 1 : 2;
  return spec;
}

KernelSpec spec_32(HeadDims dims, const DeviceProperties& properties) {
  KernelSpec spec;
  spec.element = Element::kFloat32;
  spec.head_dim = spec.head_dim_v = std::max(dims.qk, dims.v);
  spec.tile_m = spec.head_dim > 128 ? 32 : 64;  // within 99 KiB
  spec.tile_n = 32;
  if (forward_fp32_shared_bytes(spec) > properties.max_shared_bytes) spec.tile_m = 16;
  spec.num_warps = spec.tile_m / 8;
  spec.score = Score::kGeneral;
  spec.dropout = true;
  spec.loader = Loader::kElement;
  return spec;
}

int64_t blocks_per_multiprocessor(const KernelId& kernel, const DeviceProperties& properties) {
  constexpr int64_t kReserved = 1024;  // shared memory that the system takes of each block
  return std::max<int64_t>(
      (properties.max_shared_bytes + kReserved) / (dynamic_shared_bytes(kernel) + kReserved), 1);
}

int64_t rows_per_query(const AttentionProblem& problem, const KernelSpec& spec) {
  return spec.packs ? problem.num_heads / problem.num_heads_kv : 1;
}

int64_t num_tiles(const AttentionProblem& problem, const KernelSpec& spec) {
  return problem.batch * (spec.packs ? problem.num_heads_kv : problem.num_heads) *
         tiles_m(problem, spec);
}

// Fewer keys take a block of a whole tile about as long as two kernels.
constexpr int64_t kManyKeys = 512;

bool has_few_queries(const AttentionProblem& problem) {
  constexpr int64_t kFewRows = 64;
  return problem.seqlen_q * (problem.num_heads / problem.num_heads_kv) <= kFewRows;
}

// ---- How long attention takes, by a model. ----
//
// Its unit is what 32 KiB of keys and values take at a multiprocessor's share of the bandwidth, 1.4
// us on an H100. There, of 484 problems of 1 to 256 queries, 1024 to 65536 keys, batches of 1 to 16
// and head_dim 64 to 256, what the models choose took 1.01 times as long as the best of 14 numbers
// of splits and Hopper's kernel in the geometric mean, and 1.17 times at most.

constexpr double kUnitBytes = 32768.0;

double units_per_step(const AttentionProblem& problem, const KernelSpec& spec) {
  return static_cast<double>(spec.tile_n * (problem.head_dim + problem.head_dim_v) *
                             core::byte_size(problem.dtype)) /
         kUnitBytes;
}

int64_t num_steps(const AttentionProblem& problem, const KernelSpec& spec) {
  return std::max<int64_t>(core::ceil_div(problem.seqlen_k, spec.tile_n), 1);
}

double ratio_up(int64_t items, int64_t size) {
  return static_cast<double>(core::ceil_div(items, size));
}

// How long `blocks` wait for their loads and products: a step takes 1.25 in a block that has its
// multiprocessor to itself, and for each other block there is 0.25 more.
double waited(int64_t blocks, const KernelId& kernel, const DeviceProperties& properties) {
  const int64_t beside = blocks_per_multiprocessor(kernel, properties);
  const int64_t at_once = properties.multiprocessors * beside;
  const auto step = [](double blocks_beside) { return 1.0 + 0.25 * blocks_beside; };
  const int64_t rest = blocks % at_once;
  return static_cast<double>(blocks / at_once) * step(static_cast<double>(beside)) +
         (rest > 0 ? step(ratio_up(rest, properties.multiprocessors)) : 0.0);
}

struct SplitTime {
  int num_splits;
  double time;
};

// The fewest splits that take about the least time.
SplitTime best_splits(const AttentionProblem& problem, const KernelId& kernel,
                      const DeviceProperties& properties) {
  constexpr int64_t kMaxSplits = 128;
  constexpr double kProducts = 0.5;     // of 32 rows with the keys and values of a unit
  constexpr double kStartAndEnd = 1.5;  // of a block
  constexpr double kWorthIt = 0.97;
  constexpr double kCombine = 2.5;  // and for each 64 splits another 1
  const KernelSpec& spec = kernel.spec;
  const double step = units_per_step(problem, spec);
  const int64_t steps = num_steps(problem, spec), tiles = num_tiles(problem, spec);
  // Keys that several tiles read come from the memory once.
  const double moved =
      spec.packs ? std::max(1.0 / static_cast<double>(tiles_m(problem, spec)), kProducts) : 1.0;
  // What a split leaves, rows of fp32, is written and read.
  const int64_t rows =
      std::min<int64_t>(spec.tile_m, problem.seqlen_q * rows_per_query(problem, spec));
  const double result = static_cast<double>(rows * problem.head_dim_v) * 2.0 * 4.0 / kUnitBytes;
  SplitTime best{1, 0.0};
  for (int64_t splits = 1; splits <= std::min(steps, kMaxSplits); ++splits) {
    const int64_t blocks = tiles * splits;
    const double each = ratio_up(steps, splits) * step;
    const double busy =
        ratio_up(blocks, properties.multiprocessors) * (each * moved + (splits > 1 ? result : 0.0));
    const double idle = waited(blocks, kernel, properties) * (each + kStartAndEnd);
    const double time =
        std::max(busy, idle) + (splits > 1 ? kCombine + static_cast<double>(splits) / 64.0 : 0.0);
    if (splits == 1 || time < kWorthIt * best.time) best = {static_cast<int>(splits), time};
  }
  return best;
}

// How long the kernel of many queries takes, whose tiles have all keys to themselves.
double time_of_whole_tiles(const AttentionProblem& problem, const KernelId& kernel,
                           const DeviceProperties& properties) {
  constexpr int64_t kWarpgroupRows = 64;
  constexpr double kStartAndEnd = 2.0, kLaunch = 2.0;
  const KernelSpec& spec = kernel.spec;
  const double steps = static_cast<double>(num_steps(problem, spec));
  const int64_t tiles = num_tiles(problem, spec);
  const double turns = ratio_up(tiles, num_teams(spec, properties));
  if (kernel.family == Family::kForward90) {
    // A warpgroup's share of a step, and 0.3 of it for each further one.
    const double key = spec.head_dim > 128 ? 0.0095 : 0.0066;
    const double teams = std::min<double>(spec.teams, ratio_up(tiles, properties.multiprocessors));
    const double warpgroups =
        teams * ratio_up(std::min<int64_t>(problem.seqlen_q, spec.tile_m), kWarpgroupRows);
    return turns * (steps * spec.tile_n * key * (0.7 + 0.3 * warpgroups) + kStartAndEnd) + kLaunch;
  }
  // Two blocks on a multiprocessor hide some of each other's waits.
  const double step = turns > 1.0 ? 1.07 * turns : 1.33;
  return steps * units_per_step(problem, spec) * step + kStartAndEnd + kLaunch;
}

// The tiles of few queries, whose keys may be shared among blocks, or those of `whole`.
SplitChoice choose_split_or(const KernelId& whole, const AttentionProblem& problem,
                            const DeviceProperties& properties) {
  const KernelSpec spec = choose_sm80(problem, properties).spec;
  const KernelId packed{Family::kForward80,
                        spec_packed(spec.element, {spec.head_dim, spec.head_dim_v},
                                    spec.score == Score::kPlain ? Score::kPlain : Score::kGeneral,
                                    spec.loader, properties)};
  const bool few = has_few_queries(problem);
  const bool is_alone =
      problem.num_splits == 1 || (problem.num_splits == 0 && problem.seqlen_k < kManyKeys);
  if (is_alone && !few) return {whole, 1};
  if (problem.num_splits > 0) return {packed, static_cast<int>(problem.num_splits)};
  const SplitTime shared = best_splits(problem, packed, properties);
  if (!few && time_of_whole_tiles(problem, whole, properties) <= shared.time) return {whole, 1};
  return {packed, shared.num_splits};
}

// Whether whole boxes of columns are padding: where D and Dv are unlike.
bool lacks_columns(int64_t head_dim, int64_t padded) { return padded - head_dim >= kBlockColumns; }

}  // namespace

Status check_sm80(const AttentionProblem& problem, const DeviceProperties& properties) {
  if (properties.compute_capability < kTuring) {
    return core::unsupported(
        properties.name, " has compute capability ", properties.compute_capability / 10, ".",
        properties.compute_capability % 10, ", must be 7.5 or newer; triton serves older ones");
  }
  if (properties.compute_capability < kAmpere && problem.dtype == DataType::kBFloat16) {
    return core::unsupported("q: dtype is bfloat16, which ", properties.name,
                             " does not multiply; must be float16 or float32");
  }
  if (problem.direction != core::Direction::kForward) {
    return core::unsupported("the backward is not among these kernels; triton serves it");
  }
  if (std::max(problem.head_dim, problem.head_dim_v) > kMaxHeadDim) {
    return core::unsupported("head_dim is ", std::max(problem.head_dim, problem.head_dim_v),
                             ", must be at most ", kMaxHeadDim);
  }
  if (std::max({problem.batch, problem.seqlen_q, problem.seqlen_k, problem.seqlen_new,
                problem.total_q}) > kMaxLength) {
    return core::unsupported("batch, a sequence or total_q is longer than ", kMaxLength);
  }
  return {};
}

Status check_sm90(const AttentionProblem& problem, const DeviceProperties& properties) {
  if (properties.compute_capability != kHopper) {
    return core::unsupported(properties.name, " has compute capability ",
                             properties.compute_capability / 10, ".",
                             properties.compute_capability % 10, ", must be 9.0");
  }
  FA_TRY(check_sm80(problem, properties));
  if (problem.dtype == DataType::kFloat32) {
    return core::unsupported("q: dtype is float32, must be float16 or bfloat16");
  }
  if (problem.page_size % kBoxRowsMultiple != 0) {
    return core::unsupported("block_table: page_block_size is ", problem.page_size,
                             ", must be a multiple of ", kBoxRowsMultiple,
                             ", for the copy engine's swizzle; cuda:sm80 takes any");
  }
  if (!problem.vector_rows) {
    return core::unsupported("rows of q, k, v and out must start at multiples of 16 bytes");
  }
  return {};
}

KernelId choose_sm80(const AttentionProblem& problem, const DeviceProperties& properties) {
  const HeadDims dims = padded_dims(problem.head_dim, problem.head_dim_v);
  if (problem.dtype == DataType::kFloat32) return {Family::kForward32, spec_32(dims, properties)};
  const bool paged = problem.page_size > 0;
  Loader loader = paged ? Loader::kPagedVector : Loader::kVector;
  // Dropout on pages is too rare for a kernel of its own.
  if (!problem.vector_rows || (paged && problem.dropout)) loader = Loader::kElement;
  Score score = problem.softcap ? Score::kSoftcap : Score::kPlain;
  if (problem.alibi || problem.bias != BiasKind::kNone || problem.dropout ||
      loader == Loader::kElement) {
    score = Score::kGeneral;
  }
  return {Family::kForward80,
          spec_80(element_of(problem.dtype), dims, score, problem.dropout, loader, properties)};
}

bool wants_split_plan(const AttentionProblem& problem) {
  if (problem.layout == core::Layout::kCache) return true;
  return problem.dtype != DataType::kFloat32 && !problem.dropout && !problem.wants_s_dmask &&
         problem.seqlen_k >= kManyKeys && has_few_queries(problem);
}

SplitChoice choose_split(const AttentionProblem& problem, const DeviceProperties& properties) {
  const KernelId whole = choose_sm80(problem, properties);
  if (problem.dtype != DataType::kFloat32) return choose_split_or(whole, problem, properties);
  if (problem.num_splits > 0) return {whole, static_cast<int>(problem.num_splits)};
  return {whole, best_splits(problem, whole, properties).num_splits};
}

SplitChoice choose_split_sm90(const AttentionProblem& problem, const DeviceProperties& properties) {
  return choose_split_or(choose_sm90(problem), problem, properties);
}

KernelId choose_around(Family family, const AttentionProblem& problem) {
  KernelSpec spec;
  spec.element = element_of(problem.dtype);
  if (family == Family::kCombineSplits) spec.num_warps = kCombiningWarps;
  return {family, spec};
}

int warps_per_row(int num_splits) {
  constexpr int kSplitsPerWarp = 4;  // whose loads are under way together
  int warps = 1;
  while (warps < kCombiningWarps && warps * kSplitsPerWarp < num_splits) warps *= 2;
  return warps;
}

int64_t tiles_m(const AttentionProblem& problem, const KernelSpec& spec) {
  const int64_t rows = problem.seqlen_q * rows_per_query(problem, spec);
  return std::max<int64_t>(core::ceil_div(rows, spec.tile_m), 1);
}

KernelId choose_sm90(const AttentionProblem& problem) {
  Features90 features{problem.softcap ? Score::kSoftcap : Score::kPlain, problem.dropout,
                      Loader::kVector, problem.layout != core::Layout::kDense};
  if (problem.alibi || problem.bias != BiasKind::kNone || problem.dropout) {
    features.score = Score::kGeneral;
    features.varlen = true;
  }
  const Tile90& tile = tile_90(problem.head_dim, problem.head_dim_v);
  if (problem.page_size > 0 ||
      (features.varlen &&
       (features.score != Score::kPlain || lacks_columns(problem.head_dim, tile.dims.qk) ||
        lacks_columns(problem.head_dim_v, tile.dims.v)))) {
    features.loader = Loader::kPagedVector;
  }
  return {Family::kForward90, spec_90(element_of(problem.dtype), tile, features)};
}

int64_t box_rows(const AttentionProblem& problem, const KernelSpec& spec) {
  return std::gcd(problem.page_size, int64_t{spec.tile_n});
}

KernelId choose_s_dmask(const AttentionProblem& problem) {
  KernelSpec spec;
  spec.element = element_of(problem.dtype);
  spec.score = Score::kGeneral;
  spec.dropout = true;
  spec.loader = Loader::kElement;
  return {Family::kSDmask, spec};
}

int64_t num_teams(const KernelSpec& spec, const DeviceProperties& properties) {
  return int64_t{spec.teams} * properties.multiprocessors;
}

int heads_per_group(const AttentionProblem& problem) {
  // Without a band all tiles of a head take equally long: one head at a time, for the L2 cache.
  // With one, the longest tiles of all heads come first: on an H100, 16384 tokens, head_dim 64,
  // causal, 1, 4 and 32 heads at a time gave 435, 454 and 483 TFLOP/s.
  return problem.band.unbounded() ? 1 : static_cast<int>(problem.num_heads);
}

// On an H100, varlen, head_dim 128, as many heads of keys as of queries, TFLOP/s with all heads
// together, 4, 8 and 16: 128 heads, 8192 tokens 383, 680, 692 and 614, causal 375, 627, 617 and
// 587; 64 heads, 4096 tokens 408, 677, 673 and 658, causal 554, 632, 634 and 630. Where the keys
// and values of more heads fit into L2, more long tiles come before short ones: causal, head_dim
// 64, 512, 1024 and 2048 tokens 275, 349 and 397 with 8 of 32 heads, 285, 360 and 416 with all.
int log2_heads_together(const AttentionProblem& problem) {
  constexpr int64_t kLeast = 8;
  constexpr int64_t kBytesInL2 = 16 << 20;  // of 50
  const int64_t bytes_of_head = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v) *
                                problem.num_heads_kv / problem.num_heads;
  int log2 = 0;
  for (int64_t heads = 2; problem.num_heads % heads == 0; heads *= 2) {
    if (heads > kLeast && heads * bytes_of_head > kBytesInL2) break;
    ++log2;
  }
  return log2;
}

// Pairs cost the same, but the last round of them has idle blocks. On an H100, causal, by turns,
// 16384 tokens in sequences of 512 to 16384, 2048 / head_dim heads: tiles that are counted take 0
// to 4% less time at head_dim 64, from 4% less to 1% more (16384 tokens) at 128, and at 256 3% more
// at 512 tokens and 1 to 3% less beyond; 16 to 128 heads of 128, 1024 to 16384 tokens 1 to 3% less.
// What is unlike those stays with pairs: few tiles, not worth asking the framework for memory, and
// heads of few tiles, where a team looks through entries for its next one.
KernelId choose_counting(const AttentionProblem& problem, const KernelId& kernel,
                         const DeviceProperties& properties) {
  constexpr int64_t kTilesOfTeam = 2, kTilesOfHead = 4;
  constexpr int64_t kMaxEntriesAtOnce = 4;
  const KernelSpec& spec = kernel.spec;
  const bool is_causal = problem.band.left < 0 && problem.band.right >= 0;
  const bool has_kernel = kernel.family == Family::kForward90 && spec.score == Score::kPlain &&
                          spec.loader == Loader::kVector &&
                          !lacks_columns(problem.head_dim, spec.head_dim) &&
                          !lacks_columns(problem.head_dim_v, spec.head_dim_v);
  const int64_t teams = num_teams(spec, properties), tiles = num_tiles(problem, spec);
  const bool has_tiles = tiles > kTilesOfTeam * teams && tiles <= kMaxCountedTiles &&
                         tiles_m(problem, spec) >= kTilesOfHead &&
                         tiles * kMaxEntriesAtOnce >= problem.batch * teams;
  const bool is_long = spec.head_dim <= 128 || problem.seqlen_k >= 1024;
  KernelId counting = kernel;
  if (problem.layout == core::Layout::kDense && is_causal && has_kernel && has_tiles && is_long) {
    counting.spec.varlen = true;
  }
  return counting;
}

// Under a causal mask a tile's cost grows with its row; pairs cost the same. On an H100, head_dim
// 128, 512, 1024 and 4096 tokens: 289, 399 and 536 TFLOP/s, a block per tile 241, 354 and 525.
bool takes_pairs(const AttentionProblem& problem, const KernelId& kernel,
                 const DeviceProperties& properties) {
  // Tiles that run at once end with the longest: 256 queries of 16 heads over 16384 keys took 375
  // us in pairs, each of them alone 190.
  return kernel.family == Family::kForward90 && !kernel.spec.varlen && !problem.band.unbounded() &&
         num_tiles(problem, kernel.spec) > num_teams(kernel.spec, properties);
}

int64_t num_launched(const KernelId& kernel, int64_t num_blocks,
                     const DeviceProperties& properties) {
  // Blocks that stay start a tile while they finish the one before: the difference above.
  const bool stays = kernel.family == Family::kForward90;
  return stays ? std::min<int64_t>(num_blocks, properties.multiprocessors) : num_blocks;
}

std::vector<KernelId> reachable_kernels(const DeviceProperties& properties) {
  struct Features {
    Score score;
    bool dropout;
    Loader loader;
  };
  constexpr Features kFeatures[] = {
      {Score::kPlain, false, Loader::kVector},    {Score::kPlain, false, Loader::kPagedVector},
      {Score::kSoftcap, false, Loader::kVector},  {Score::kSoftcap, false, Loader::kPagedVector},
      {Score::kGeneral, false, Loader::kVector},  {Score::kGeneral, false, Loader::kPagedVector},
      {Score::kGeneral, false, Loader::kElement}, {Score::kGeneral, true, Loader::kVector},
      {Score::kGeneral, true, Loader::kElement}};
  std::vector<Element> elements{Element::kFloat16};
  if (properties.compute_capability >= kAmpere) elements.push_back(Element::kBFloat16);
  std::vector<KernelId> list;
  for (const HeadDims& dims : kHeadDims) {
    for (const Element element : elements) {
      for (const Features& it : kFeatures) {
        list.push_back({Family::kForward80,
                        spec_80(element, dims, it.score, it.dropout, it.loader, properties)});
      }
      for (const Loader loader : {Loader::kVector, Loader::kPagedVector, Loader::kElement}) {
        for (const Score score : {Score::kPlain, Score::kGeneral}) {
          if (loader == Loader::kElement && score == Score::kPlain) continue;
          list.push_back(
              {Family::kForward80, spec_packed(element, dims, score, loader, properties)});
        }
      }
    }
    const KernelId fp32{Family::kForward32, spec_32(dims, properties)};
    if (std::find(list.begin(), list.end(), fp32) == list.end()) list.push_back(fp32);
  }
  std::vector<Tile90> tiles(std::begin(kTiles90), std::end(kTiles90));
  if (properties.compute_capability != kHopper) tiles.clear();
  for (const Tile90& tile : tiles) {
    for (const Element element : {Element::kBFloat16, Element::kFloat16}) {
      for (const Features90& features : kFeatures90) {
        list.push_back({Family::kForward90, spec_90(element, tile, features)});
      }
    }
  }
  for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    AttentionProblem problem;
    problem.dtype = dtype;
    if (!check_sm80(problem, properties).ok()) continue;
    list.push_back(choose_s_dmask(problem));
    list.push_back(choose_around(Family::kUpdateCache, problem));
    list.push_back(choose_around(Family::kCombineSplits, problem));
  }
  return list;
}

}  // namespace fa::cuda
