// What is baked into a forward kernel: the template argument it is compiled for. Shared by host and
// device code.
#pragma once

namespace fa::cuda {

enum class Element : int { kFloat16, kBFloat16, kFloat32 };

// How scores are made of q k^T. kPlain: scaled, inside the exponential. kSoftcap: also capped.
// kGeneral: scale, softcap, ALiBi and attn_bias, each where the arguments say so.
enum class Score : int { kPlain, kSoftcap, kGeneral };

// How rows of q, k, v and out are moved. kVector: 16 bytes at a time, rows at a constant stride.
// kPagedVector: the same with k and v behind a page table; forward_sm90: where there is one.
// kElement: any alignment, paged or not.
enum class Loader : int { kVector, kPagedVector, kElement };

struct KernelSpec {
  Element element = Element::kBFloat16;
  int head_dim = 64;    // padded: a multiple of 32
  int head_dim_v = 64;  // padded: a multiple of 32, at most head_dim
  int tile_m = 128;     // queries of a block
  int tile_n = 64;      // keys of a step
  int num_warps = 4;
  Score score = Score::kPlain;
  bool dropout = false;
  Loader loader = Loader::kVector;
  // For few queries: the heads of a group are rows of one tile, so that a block reads its keys once
  // for all of them, and blocks may share the keys of a tile among them (SplitArgs).
  bool packs = false;
  int stages = 1;  // forward_sm80: of k and v in shared memory
  // forward_sm90: whichever team is free takes the next tile, and sequences may have lengths of
  // their own; other features are asked for at run time.
  bool varlen = false;
  // forward_sm90: teams of warpgroups in a block, each with tiles and stages of its own.
  int teams = 1;

  constexpr bool operator==(const KernelSpec&) const = default;
};

// forward_sm90: columns of 16-bit elements that the copy engine moves at once.
inline constexpr int kBlockColumns = 64;

// Shared memory that a launch asks for. forward_sm80: q, and stages of k and v.
constexpr int forward_sm80_shared_bytes(const KernelSpec& spec) {
  return 2 * (spec.tile_m * spec.head_dim +
              spec.stages * spec.tile_n * (spec.head_dim + spec.head_dim_v));
}

// forward_sm90: stages of q, and of k and v; aligned to what the copy engine's swizzle repeats
// after. Warpgroups are up to so many steps apart, and a tile's first loads as many ahead: as many
// stages as each team has room for, less what a block keeps of its tiles and barriers.
inline constexpr int kSharedAlignment = 1024;
inline constexpr int kSm90SharedBytes = 225 * 1024;  // of 227 KiB
constexpr int sm90_q_stages(const KernelSpec& spec) { return spec.head_dim <= 64 ? 2 : 1; }
constexpr int sm90_q_bytes(const KernelSpec& spec) {
  return sm90_q_stages(spec) * 2 * spec.tile_m * spec.head_dim;
}
constexpr int sm90_stage_bytes(const KernelSpec& spec) {
  return 2 * spec.tile_n * (spec.head_dim + spec.head_dim_v);
}
constexpr int sm90_stages(const KernelSpec& spec) {
  return ((kSm90SharedBytes - kSharedAlignment) / spec.teams - sm90_q_bytes(spec)) /
         sm90_stage_bytes(spec);
}
constexpr int sm90_team_bytes(const KernelSpec& spec) {
  return sm90_q_bytes(spec) + sm90_stages(spec) * sm90_stage_bytes(spec);
}
constexpr int forward_sm90_shared_bytes(const KernelSpec& spec) {
  return kSharedAlignment + spec.teams * sm90_team_bytes(spec);
}

// forward_sm90: whether keys, as varlen's values always do, end with their sequence. Where boxes
// may be wholly outside, of pages or of columns, k's map is a plain one, through which all such are
// read.
constexpr bool keys_end(const KernelSpec& spec) {
  return spec.varlen && spec.loader != Loader::kPagedVector;
}

// forward_fp32: q, k or v in turn, and probabilities; rows with a gap of 4 floats behind each put
// what 8 lanes read at a time on different banks.
inline constexpr int kFloatRowGap = 4;
constexpr int forward_fp32_shared_bytes(const KernelSpec& spec) {
  return 4 * ((spec.tile_m + spec.tile_n) * (spec.head_dim + kFloatRowGap) +
              spec.tile_m * (spec.tile_n + kFloatRowGap));
}

}  // namespace fa::cuda
