// Which kernels are chosen for NVIDIA GPUs, on a machine that needs none.
#include "cuda/heuristics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <initializer_list>
#include <random>
#include <vector>

namespace fa::cuda {
namespace {

using core::AttentionProblem;
using core::DataType;
using core::Layout;

constexpr int kComputeCapabilities[] = {75, 80, 86, 90, 100, 120};

DeviceProperties hopper() {
  DeviceProperties properties = typical_properties(90);
  properties.multiprocessors = 132;
  return properties;
}

// Decoding over a cache: one query each.
AttentionProblem decoding(int64_t batch, int64_t seqlen_k, int64_t num_heads,
                          int64_t num_heads_kv) {
  AttentionProblem problem;
  problem.dtype = DataType::kBFloat16;
  problem.layout = Layout::kCache;
  problem.batch = problem.total_q = batch;
  problem.seqlen_q = 1;
  problem.seqlen_k = seqlen_k;
  problem.num_heads = num_heads;
  problem.num_heads_kv = num_heads_kv;
  problem.head_dim = problem.head_dim_v = 128;
  return problem;
}

class Draw {
 public:
  explicit Draw(unsigned seed) : engine_(seed) {}
  template <class T>
  T of(std::initializer_list<T> list) {
    return *(list.begin() + engine_() % list.size());
  }
  bool one_in(unsigned n) { return engine_() % n == 0; }

 private:
  std::mt19937 engine_;
};

AttentionProblem random_problem(Draw& draw) {
  AttentionProblem problem;
  problem.dtype = draw.of({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16});
  problem.layout = draw.of({Layout::kDense, Layout::kVarlen, Layout::kCache});
  const bool may_page = problem.layout != Layout::kDense;
  problem.page_size = may_page ? draw.of<int64_t>({0, 0, 1, 16, 24, 256}) : 0;
  problem.batch = draw.of<int64_t>({1, 2, 64});
  problem.seqlen_q = draw.of<int64_t>({1, 4, 300, 5000});
  problem.total_q = problem.batch * problem.seqlen_q;
  problem.seqlen_k = draw.of<int64_t>({1, 300, 5000, 70000});
  problem.num_heads_kv = draw.of<int64_t>({1, 8});
  problem.num_heads = problem.num_heads_kv * draw.of<int64_t>({1, 4, 32});
  problem.head_dim = draw.of<int64_t>({1, 40, 64, 96, 128, 192, 256});
  problem.head_dim_v = draw.of<int64_t>({problem.head_dim, 64, 128});
  if (draw.one_in(2)) problem.band.right = 0;
  problem.softcap = draw.one_in(3);
  problem.alibi = draw.one_in(4);
  problem.bias = draw.one_in(4) ? core::BiasKind::kAdditive : core::BiasKind::kNone;
  problem.dropout = problem.layout != Layout::kCache && draw.one_in(4);
  problem.vector_rows = !draw.one_in(4);
  problem.num_splits = problem.layout == Layout::kCache ? draw.of<int64_t>({0, 0, 1, 7}) : 0;
  return problem;
}

bool is_among(const KernelId& id, const std::vector<KernelId>& list) {
  return std::find(list.begin(), list.end(), id) != list.end();
}

TEST(CudaHeuristics, whatever_is_chosen_is_reachable) {
  for (const int capability : kComputeCapabilities) {
    DeviceProperties properties = typical_properties(capability);
    properties.multiprocessors = 100;
    const std::vector<KernelId> reachable = reachable_kernels(properties);
    Draw draw(static_cast<unsigned>(capability));
    for (int i = 0; i < 3000; ++i) {
      const AttentionProblem problem = random_problem(draw);
      if (capability == 75 && problem.dtype == DataType::kBFloat16) {
        ASSERT_FALSE(check_sm80(problem, properties).ok());
        continue;
      }
      ASSERT_TRUE(check_sm80(problem, properties).ok());
      const KernelId kernel = wants_split_plan(problem) ? choose_split(problem, properties).kernel
                                                        : choose_sm80(problem, properties);
      ASSERT_TRUE(is_among(kernel, reachable)) << to_string(problem) << ": " << to_string(kernel);
      if (check_sm90(problem, properties).ok()) {
        ASSERT_TRUE(is_among(choose_sm90(problem), reachable)) << to_string(problem);
        if (!wants_split_plan(problem)) continue;
        const SplitChoice choice = choose_split_sm90(problem, properties);
        ASSERT_TRUE(is_among(choice.kernel, reachable)) << to_string(problem);
        ASSERT_TRUE(choice.kernel.spec.packs || choice.num_splits == 1) << to_string(problem);
      }
    }
  }
}

TEST(CudaHeuristics, reachable_kernels_fit_into_shared_memory) {
  for (const int capability : kComputeCapabilities) {
    const DeviceProperties properties = typical_properties(capability);
    for (const KernelId& kernel : reachable_kernels(properties)) {
      // What a block knows of its tile, or of the next ones as well, and barriers.
      const int static_bytes = kernel.family == Family::kForward90 ? 2048 : 512;
      EXPECT_LE(dynamic_shared_bytes(kernel) + static_bytes, properties.max_shared_bytes)
          << capability << ": " << to_string(kernel);
    }
  }
}

TEST(CudaHeuristics, hoppers_kernel_takes_all_but_what_the_copy_engine_cannot) {
  Draw draw(1);
  int taken = 0;
  for (int i = 0; i < 1000; ++i) {
    const AttentionProblem problem = random_problem(draw);
    const core::Status status = check_sm90(problem, hopper());
    const bool odd = problem.page_size % 8 != 0;
    ASSERT_EQ(status.ok(), problem.dtype != DataType::kFloat32 && problem.vector_rows && !odd)
        << to_string(problem) << status.message();
    taken += status.ok() ? 1 : 0;
    if (odd && problem.dtype != DataType::kFloat32) {
      EXPECT_NE(status.message().find("block_table: page_block_size is 1"), std::string::npos);
    }
  }
  EXPECT_GT(taken, 100);
}

TEST(CudaHeuristics, a_step_of_hoppers_kernel_is_whole_boxes_of_whole_pages) {
  AttentionProblem problem = decoding(2, 4096, 32, 8);
  for (const int64_t head_dim : {64, 128, 192, 256}) {
    problem.head_dim = problem.head_dim_v = head_dim;
    const KernelSpec spec = choose_sm90(problem).spec;
    for (const int64_t page_size : {0, 8, 16, 24, 48, 64, 128, 256, 4096}) {
      problem.page_size = page_size;
      const int64_t rows = box_rows(problem, spec);
      EXPECT_EQ(rows % 8, 0);
      EXPECT_EQ(page_size % rows, 0);
      EXPECT_EQ(spec.tile_n % rows, 0);
      EXPECT_LE(rows, 256);  // what the copy engine takes
    }
  }
}

TEST(CudaHeuristics, layouts_share_a_kernels_order_of_keys) {
  for (const int64_t head_dim : {64, 128, 192, 256}) {
    for (const bool general : {false, true}) {
      AttentionProblem problem = decoding(2, 4096, 32, 8);
      problem.dtype = DataType::kFloat16;
      problem.head_dim = problem.head_dim_v = head_dim;
      problem.alibi = general;
      const int tile_n = choose_sm90(problem).spec.tile_n;
      for (const Layout layout : {Layout::kDense, Layout::kVarlen, Layout::kCache}) {
        problem.layout = layout;
        EXPECT_EQ(choose_sm90(problem).spec.tile_n, tile_n);
        EXPECT_EQ(choose_sm90(problem).spec.varlen, general || layout != Layout::kDense);
      }
      problem.page_size = 16;
      EXPECT_EQ(choose_sm90(problem).spec.tile_n, tile_n);
      EXPECT_EQ(choose_sm90(problem).spec.loader, Loader::kPagedVector);
    }
  }
}

TEST(CudaHeuristics, chunks_of_a_prompt_take_hoppers_kernel_and_steps_of_decoding_do_not) {
  const auto chosen = [](int64_t seqlen_q, int64_t num_splits) {
    AttentionProblem problem = decoding(1, 32768, 32, 8);
    problem.seqlen_q = problem.total_q = seqlen_q;
    problem.num_splits = num_splits;
    return choose_split_sm90(problem, hopper()).kernel.family;
  };
  for (const int64_t few : {1, 16, 64}) EXPECT_EQ(chosen(few, 0), Family::kForward80) << few;
  for (const int64_t many : {256, 4096}) EXPECT_EQ(chosen(many, 0), Family::kForward90);
  EXPECT_EQ(chosen(4096, 1), Family::kForward90);
  EXPECT_EQ(chosen(4096, 2), Family::kForward80);  // splits that were asked for
}

TEST(CudaHeuristics, tiles_that_all_run_at_once_are_not_paired) {
  const auto paired = [](int64_t seqlen_q, int64_t right) {
    AttentionProblem problem = decoding(1, 16384, 16, 16);
    problem.layout = Layout::kDense;
    problem.seqlen_q = problem.total_q = seqlen_q;
    problem.band.right = right;
    return takes_pairs(problem, choose_sm90(problem), hopper());
  };
  EXPECT_FALSE(paired(256, 0));
  EXPECT_FALSE(paired(1024, 0));  // 128 tiles for 132 multiprocessors
  EXPECT_TRUE(paired(2048, 0));
  EXPECT_FALSE(paired(2048, -1));  // all equally long
}

TEST(CudaHeuristics, many_causal_tiles_are_counted) {
  const auto counted = [](AttentionProblem problem) {
    problem.layout = Layout::kDense;
    const KernelId kernel = choose_sm90(problem);
    const KernelId counting = choose_counting(problem, kernel, hopper());
    KernelSpec same = counting.spec;
    same.varlen = kernel.spec.varlen;
    EXPECT_EQ(same, kernel.spec);
    const std::vector<KernelId> reachable = reachable_kernels(hopper());
    EXPECT_TRUE(is_among(counting, reachable)) << to_string(counting);
    return counting.spec.varlen;
  };
  AttentionProblem causal = decoding(4, 4096, 16, 16);
  causal.seqlen_q = 4096;
  causal.total_q = 4 * 4096;
  causal.band.right = 0;
  EXPECT_TRUE(counted(causal));
  AttentionProblem other = causal;
  other.band.right = -1;
  EXPECT_FALSE(counted(other));  // all equally long
  other = causal;
  other.band.left = 512;
  EXPECT_FALSE(counted(other));
  other = causal;
  other.softcap = true;
  EXPECT_FALSE(counted(other));
  other = causal;
  other.head_dim_v = 48;  // boxes would lie outside
  EXPECT_FALSE(counted(other));
  other = causal;
  other.batch = 1;
  other.seqlen_q = other.total_q = 2048;  // 256 tiles for 132 multiprocessors
  EXPECT_FALSE(counted(other));
  other = causal;
  other.num_heads = other.num_heads_kv = 128;
  EXPECT_TRUE(counted(other));
  other = causal;
  other.batch = 1000;
  other.seqlen_q = 384;  // three tiles a head
  EXPECT_FALSE(counted(other));
  other.seqlen_q = 512;
  EXPECT_TRUE(counted(other));
  other.num_heads = other.num_heads_kv = 2;  // 17 entries' tiles at once
  EXPECT_FALSE(counted(other));
  other.num_heads = other.num_heads_kv = 16;
  other.batch = 10000;  // 640000 tiles
  EXPECT_FALSE(counted(other));
}

TEST(CudaHeuristics, heads_that_go_together_divide_the_heads) {
  const auto together = [](int64_t num_heads, int64_t num_heads_kv, int64_t seqlen) {
    return 1 << log2_heads_together(decoding(1, seqlen, num_heads, num_heads_kv));
  };
  EXPECT_EQ(together(1, 1, 8192), 1);
  EXPECT_EQ(together(7, 7, 8192), 1);
  EXPECT_EQ(together(14, 14, 8192), 2);
  EXPECT_EQ(together(12, 12, 8192), 4);
  EXPECT_EQ(together(40, 40, 8192), 8);
  EXPECT_EQ(together(128, 128, 8192), 8);
  EXPECT_EQ(together(128, 128, 2048), 16);  // whose keys and values are 16 MiB
  EXPECT_EQ(together(128, 16, 2048), 128);
  EXPECT_EQ(together(40, 40, 128), 8);
}

TEST(CudaHeuristics, few_queries_pack_the_heads_of_a_group) {
  for (const Layout layout : {Layout::kCache, Layout::kDense, Layout::kVarlen}) {
    AttentionProblem problem = decoding(64, 4096, 32, 8);
    problem.layout = layout;
    ASSERT_TRUE(wants_split_plan(problem));
    EXPECT_TRUE(choose_split(problem, hopper()).kernel.spec.packs);
    problem.seqlen_q = 4096;
    problem.total_q = 64 * 4096;
    EXPECT_EQ(wants_split_plan(problem), layout == Layout::kCache);
    EXPECT_FALSE(choose_split(problem, hopper()).kernel.spec.packs);
    EXPECT_EQ(choose_split(problem, hopper()).num_splits, 1);
  }
}

TEST(CudaHeuristics, what_the_tiles_of_few_queries_lack_goes_to_the_others) {
  for (const auto change : {+[](AttentionProblem& problem) { problem.dropout = true; },
                            +[](AttentionProblem& problem) { problem.wants_s_dmask = true; },
                            +[](AttentionProblem& problem) { problem.dtype = DataType::kFloat32; },
                            +[](AttentionProblem& problem) { problem.seqlen_k = 300; }}) {
    AttentionProblem problem = decoding(64, 4096, 32, 8);
    problem.layout = Layout::kDense;
    change(problem);
    EXPECT_FALSE(wants_split_plan(problem));
  }
}

TEST(CudaHeuristics, splits_fill_the_device_and_no_more) {
  // Blocks of a whole batch: enough without splits.
  EXPECT_EQ(choose_split(decoding(2048, 4096, 32, 8), hopper()).num_splits, 1);
  // 8 tiles for 132 multiprocessors.
  const SplitChoice one = choose_split(decoding(1, 65536, 32, 8), hopper());
  EXPECT_GE(one.num_splits * 8, 132);
  EXPECT_LE(choose_split(decoding(1, 1024, 32, 8), hopper()).num_splits, 1024 / 32);
  EXPECT_EQ(choose_split(decoding(1, 100, 32, 8), hopper()).num_splits, 1);
}

TEST(CudaHeuristics, queries_that_share_their_keys_split_them_for_the_sake_of_products) {
  const auto chosen = [](AttentionProblem problem, int64_t seqlen_q) {
    problem.seqlen_q = seqlen_q;
    problem.total_q = problem.batch * seqlen_q;
    return choose_split(problem, hopper());
  };
  // 128 tiles, for 132 multiprocessors that hold five each. An H100 took 474 us of 16384 keys
  // without splits, 185 with 4.
  const SplitChoice prompt = chosen(decoding(1, 16384, 32, 8), 128);
  EXPECT_TRUE(prompt.kernel.spec.packs);
  EXPECT_GE(prompt.num_splits, 4);
  EXPECT_LE(prompt.num_splits, 8);
  // 64 tiles of 128 rows each that few multiprocessors would have: 945 us, of 182 with 8.
  const SplitChoice group = chosen(decoding(16, 32768, 8, 1), 16);
  EXPECT_TRUE(group.kernel.spec.packs);
  EXPECT_GE(group.num_splits, 6);
  // Enough tiles of 128 rows: a step of these costs less.
  EXPECT_FALSE(chosen(decoding(4, 16384, 32, 8), 256).kernel.spec.packs);
}

TEST(CudaHeuristics, a_number_of_splits_that_is_asked_for_is_taken) {
  for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16}) {
    for (const int64_t seqlen_q : {int64_t{1}, int64_t{5000}}) {
      AttentionProblem problem = decoding(2, 5000, 8, 8);
      problem.dtype = dtype;
      problem.seqlen_q = seqlen_q;
      for (const int64_t splits : {1, 2, 7, 256}) {
        problem.num_splits = splits;
        EXPECT_EQ(choose_split(problem, hopper()).num_splits, splits);
      }
    }
  }
}

}  // namespace
}  // namespace fa::cuda
