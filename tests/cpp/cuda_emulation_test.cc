// Hopper's forward on an emulated GPU: the library launches the kernels as their sources are, on
// fibers of the CPU. What they compute, that they end, and that no order of warps, copies and
// products changes a bit.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "core/half.h"
#include "cuda/device/forward_sm90.h"
#include "cuda/kernel_id.h"
#include "emulation/gpu.h"
#include "flash_attn/flash_attn.h"
#include "stub/stub.h"
#include "testing.h"

namespace fa {
namespace {

using cuda::Element;
using cuda::Loader;
using cuda::Score;

constexpr cuda::KernelSpec spec(Element element, int head_dim, int tile_m, int tile_n,
                                Loader loader, bool varlen, int teams = 1,
                                Score score = Score::kPlain, bool dropout = false) {
  cuda::KernelSpec it;
  it.element = element;
  it.head_dim = it.head_dim_v = head_dim;
  it.tile_m = tile_m;
  it.tile_n = tile_n;
  it.num_warps = 4 * (teams * tile_m / 64 + 1);
  it.teams = teams;
  it.score = score;
  it.dropout = dropout;
  it.loader = loader;
  it.varlen = varlen;
  return it;
}

using Kernel = void (*)(void** arguments);
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
template <cuda::KernelSpec kSpec>
void add_kernel() {
  kernels()[cuda::expression({cuda::Family::kForward90, kSpec})] = [](void** arguments) {
    cuda::forward_sm90<kSpec>(*static_cast<cuda::ForwardArgs*>(arguments[0]),
                              *static_cast<cuda::TensorMaps*>(arguments[1]));
  };
}
void add_kernels() {
  constexpr Element kBF = Element::kBFloat16;
  add_kernel<spec(kBF, 64, 128, 64, Loader::kVector, false, 2)>();
  add_kernel<spec(kBF, 64, 128, 64, Loader::kVector, true, 2)>();
  add_kernel<spec(kBF, 64, 128, 64, Loader::kPagedVector, true, 2)>();
  add_kernel<spec(kBF, 128, 128, 128, Loader::kVector, false)>();
  add_kernel<spec(kBF, 128, 128, 128, Loader::kVector, true)>();
  add_kernel<spec(kBF, 128, 128, 128, Loader::kPagedVector, true)>();
  add_kernel<spec(Element::kFloat16, 256, 128, 80, Loader::kVector, true)>();
}

uint64_t seed;
int launches;
std::string failure, launched;  // of the last launch: what went wrong, and its kernel

void run_kernel(const char* name, unsigned blocks, unsigned threads, void** arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    failure = std::string("not among the emulated kernels: ") + name;
    return;
  }
  ++launches;
  launched = name;
  const std::string error = emulated::run(blocks, threads, seed, [&] { found->second(arguments); });
  if (!error.empty()) failure = error;
}

// 16-bit elements of [rows, heads, head_dim], row-major.
struct Tensor {
  std::vector<uint16_t> data;
  std::vector<int64_t> shape, strides;
  fa_tensor c{};

  Tensor(std::vector<int64_t> of_shape, bool is_half, uint64_t of_seed, double scale = 1.0)
      : shape(std::move(of_shape)), strides(testing::row_major_strides(shape)) {
    const auto count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    testing::Random random(of_seed);
    for (int64_t i = 0; i < count; ++i) {
      const double x = scale * random.normal();
      data.push_back(is_half ? core::round_to<core::Float16>(x).bits
                             : core::round_to<core::BFloat16>(x).bits);
    }
    c.dtype_code = is_half ? FA_FLOAT : FA_BFLOAT;
    c.dtype_bits = 16;
  }
  const fa_tensor* on(int device_type) {
    c.data = data.data();
    c.device_type = device_type;
    c.ndim = static_cast<int32_t>(shape.size());
    c.dtype_lanes = 1;
    c.shape = shape.data();
    c.strides = strides.data();
    return &c;
  }
};

template <class Element>
fa_tensor view(std::vector<Element>& data, const std::vector<int64_t>& shape,
               const std::vector<int64_t>& strides, int device_type, uint8_t code) {
  return {data.data(),
          device_type,
          0,
          static_cast<int32_t>(shape.size()),
          code,
          sizeof(Element) * 8,
          1,
          shape.data(),
          strides.data(),
          0};
}

struct Case {
  std::vector<int64_t> lengths_q, lengths_k;
  int64_t head_dim = 64, num_heads = 2, num_heads_kv = 1;
  bool is_half = false, causal = false;
  int64_t window_left = -1, window_right = -1;
  int64_t head_dim_v = head_dim;
};

std::vector<int32_t> offsets(const std::vector<int64_t>& lengths) {
  std::vector<int32_t> sums{0};
  for (const int64_t length : lengths) sums.push_back(sums.back() + static_cast<int32_t>(length));
  return sums;
}

// Rows of NaN behind the last sequence, which no result may depend on.
constexpr int64_t kSpareRows = 3;

class Varlen {
 public:
  explicit Varlen(const Case& of)
      : it_(of),
        cu_q_(offsets(of.lengths_q)),
        cu_k_(offsets(of.lengths_k)),
        q_({cu_q_.back() + kSpareRows, of.num_heads, of.head_dim}, of.is_half, 1),
        k_({cu_k_.back() + kSpareRows, of.num_heads_kv, of.head_dim}, of.is_half, 2),
        v_({cu_k_.back() + kSpareRows, of.num_heads_kv, of.head_dim_v}, of.is_half, 3),
        out_({cu_q_.back() + kSpareRows, of.num_heads, of.head_dim_v}, of.is_half, 4) {
    for (Tensor* tensor : {&q_, &k_, &v_}) {
      const auto spare = kSpareRows * tensor->strides[0];
      std::fill(tensor->data.end() - spare, tensor->data.end(), 0xFFFF);
    }
    fa_attention_args_init(&args_);
    args_.causal = it_.causal ? 1 : 0;
    args_.window_size_left = it_.window_left;
    args_.window_size_right = it_.window_right;
    args_.max_seqlen_q = *std::max_element(it_.lengths_q.begin(), it_.lengths_q.end());
    args_.max_seqlen_k = *std::max_element(it_.lengths_k.begin(), it_.lengths_k.end());
    args_.workspace_context = &workspace_;
    args_.allocate_workspace = [](void* context, int64_t bytes) {
      auto& words = *static_cast<std::vector<uint64_t>*>(context);
      words.assign(static_cast<size_t>(bytes) / 8 + 1, 0xABCDEF0123456789);
      return static_cast<void*>(words.data());
    };
  }

  void lend_no_memory() { args_.allocate_workspace = nullptr; }

  const std::vector<uint16_t>& run() {
    std::fill(out_.data.begin(), out_.data.end(), 0xFFFF);
    call(*on(FA_CUDA));
    return out_.data;
  }

  // With k and v in pages in any order, between pages of NaN.
  const std::vector<uint16_t>& run_paged(int64_t page_size) {
    std::fill(out_.data.begin(), out_.data.end(), 0xFFFF);
    const auto num_sequences = static_cast<int64_t>(it_.lengths_k.size());
    const int64_t max_pages = args_.max_seqlen_k / page_size + 1;
    const std::vector<int64_t> shape{2 * num_sequences * max_pages, page_size, it_.num_heads_kv,
                                     it_.head_dim};
    Tensor k(shape, it_.is_half, 5), v(shape, it_.is_half, 6);
    std::vector<int32_t> table;
    for (Tensor* tensor : {&k, &v}) std::fill(tensor->data.begin(), tensor->data.end(), 0xFFFF);
    for (int64_t i = 0; i < num_sequences * max_pages; ++i) {
      table.push_back(static_cast<int32_t>(2 * (i * 7 % (num_sequences * max_pages))));
    }
    for (int64_t i = 0; i < num_sequences; ++i) {
      for (int64_t key = 0; key < it_.lengths_k[static_cast<size_t>(i)]; ++key) {
        const int64_t page = table[static_cast<size_t>(i * max_pages + key / page_size)];
        const int64_t row = cu_k_[static_cast<size_t>(i)] + key, elements = k_.strides[0];
        const int64_t to = page * k.strides[0] + key % page_size * k.strides[1];
        std::copy_n(k_.data.begin() + row * elements, elements, k.data.begin() + to);
        std::copy_n(v_.data.begin() + row * elements, elements, v.data.begin() + to);
      }
    }
    const std::vector<int64_t> table_shape{num_sequences, max_pages}, strides{max_pages, 1};
    const fa_tensor pages = view(table, table_shape, strides, FA_CUDA, FA_INT);
    fa_attention_args args = *on(FA_CUDA);
    args.k = k.on(FA_CUDA);
    args.v = v.on(FA_CUDA);
    args.block_table = &pages;
    call(args);
    return out_.data;
  }

  // With k and v in rows of a cache in another order, behind a padding, and NaN behind them. All
  // sequences have as many queries.
  const std::vector<uint16_t>& run_cached() {
    std::fill(out_.data.begin(), out_.data.end(), 0xFFFF);
    const auto batch = static_cast<int64_t>(it_.lengths_k.size());
    const int64_t capacity = args_.max_seqlen_k + 2 * batch;
    const std::vector<int64_t> shape{batch + 1, capacity, it_.num_heads_kv, it_.head_dim};
    Tensor k(shape, it_.is_half, 5), v(shape, it_.is_half, 6);
    for (Tensor* tensor : {&k, &v}) std::fill(tensor->data.begin(), tensor->data.end(), 0xFFFF);
    std::vector<int32_t> rows, paddings, lengths;
    for (int64_t i = 0; i < batch; ++i) {
      const auto at = static_cast<size_t>(i);
      rows.push_back(static_cast<int32_t>(batch - i));
      paddings.push_back(static_cast<int32_t>(2 * i));
      lengths.push_back(static_cast<int32_t>(it_.lengths_k[at] + 2 * i));
      const int64_t to = (batch - i) * k.strides[0] + 2 * i * k.strides[1];
      const int64_t from = cu_k_[at] * k_.strides[0], count = it_.lengths_k[at] * k_.strides[0];
      std::copy_n(k_.data.begin() + from, count, k.data.begin() + to);
      std::copy_n(v_.data.begin() + from, count, v.data.begin() + to);
    }
    const std::vector<int64_t> per_batch{batch}, stride{1};
    const std::vector<int64_t> shape_q{batch, it_.lengths_q[0], it_.num_heads, it_.head_dim};
    const auto strides_q = testing::row_major_strides(shape_q);
    fa_attention_args args = *on(FA_CUDA);
    fa_tensor q = part(q_, 0), out = part(out_, 0);
    for (fa_tensor* tensor : {&q, &out}) set_shape(*tensor, shape_q, strides_q);
    const fa_tensor cache_seqlens = view(lengths, per_batch, stride, FA_CUDA, FA_INT);
    const fa_tensor batch_idx = view(rows, per_batch, stride, FA_CUDA, FA_INT);
    const fa_tensor leftpad = view(paddings, per_batch, stride, FA_CUDA, FA_INT);
    args.cu_seqlens_q = args.cu_seqlens_k = nullptr;
    args.max_seqlen_q = args.max_seqlen_k = 0;
    args.q = &q;
    args.out = &out;
    args.k = k.on(FA_CUDA);
    args.v = v.on(FA_CUDA);
    args.cache_seqlens = &cache_seqlens;
    args.cache_batch_idx = &batch_idx;
    args.cache_leftpad = &leftpad;
    args.num_splits = 1;
    call(args);
    return out_.data;
  }

  // Each sequence as a dense call of its own.
  const std::vector<uint16_t>& run_dense() {
    std::fill(out_.data.begin(), out_.data.end(), 0);
    for (size_t i = 0; i < it_.lengths_q.size(); ++i) {
      const int64_t rows_q = it_.lengths_q[i], rows_k = it_.lengths_k[i];
      if (rows_q == 0 || rows_k == 0) continue;
      fa_attention_args args = args_;
      args.cu_seqlens_q = args.cu_seqlens_k = nullptr;
      fa_tensor q = part(q_, cu_q_[i]), k = part(k_, cu_k_[i]), v = part(v_, cu_k_[i]);
      fa_tensor out = part(out_, cu_q_[i]);
      const auto shape = [&](const Tensor& of, int64_t rows) {
        return std::vector<int64_t>{1, rows, of.shape[1], of.shape[2]};
      };
      const auto shape_q = shape(q_, rows_q), shape_k = shape(k_, rows_k);
      const auto shape_v = shape(v_, rows_k), shape_out = shape(out_, rows_q);
      const auto strides_q = testing::row_major_strides(shape_q);
      const auto strides_k = testing::row_major_strides(shape_k);
      const auto strides_v = testing::row_major_strides(shape_v);
      const auto strides_out = testing::row_major_strides(shape_out);
      set_shape(q, shape_q, strides_q);
      set_shape(k, shape_k, strides_k);
      set_shape(v, shape_v, strides_v);
      set_shape(out, shape_out, strides_out);
      args.q = &q;
      args.k = &k;
      args.v = &v;
      args.out = &out;
      args.max_seqlen_q = args.max_seqlen_k = 0;
      call(args);
    }
    return out_.data;
  }

  // In units of the dtype's rounding, normalised by the formula with absolute values.
  double error() {
    std::vector<double> expected(out_.data.size()), bound(out_.data.size());
    const fa_attention_args* args = on(FA_CPU);
    const fa_tensor to = view(expected, out_.shape, out_.strides, FA_CPU, FA_FLOAT);
    const fa_tensor bounds = view(bound, out_.shape, out_.strides, FA_CPU, FA_FLOAT);
    EXPECT_EQ(fa_forward_oracle(args, &to, nullptr, &bounds), FA_OK) << fa_last_error_message();
    double worst = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double found = it_.is_half ? core::to_float(core::Float16{out_.data[i]})
                                       : core::to_float(core::BFloat16{out_.data[i]});
      if (bound[i] == 0.0) {
        EXPECT_EQ(found, 0.0) << i;
      } else {
        const double off = std::abs(found - expected[i]) / bound[i];
        worst = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(worst, off);
      }
    }
    return worst * (it_.is_half ? 2048 : 256);
  }

 private:
  static void call(const fa_attention_args& args) {
    const int before = launches;
    failure.clear();
    EXPECT_EQ(fa_forward(&args), FA_OK) << fa_last_error_message();
    EXPECT_EQ(failure, "");
    EXPECT_EQ(launches, before + 1);
  }

  const fa_attention_args* on(int device_type) {
    static const std::vector<int64_t> stride{1};
    args_.q = q_.on(device_type);
    args_.k = k_.on(device_type);
    args_.v = v_.on(device_type);
    args_.out = out_.on(device_type);
    offsets_shape_ = {static_cast<int64_t>(cu_q_.size())};
    cu_q_view_ = view(cu_q_, offsets_shape_, stride, device_type, FA_INT);
    cu_k_view_ = view(cu_k_, offsets_shape_, stride, device_type, FA_INT);
    args_.cu_seqlens_q = &cu_q_view_;
    args_.cu_seqlens_k = &cu_k_view_;
    return &args_;
  }

  static fa_tensor part(Tensor& of, int64_t first_row) {
    fa_tensor tensor = *of.on(FA_CUDA);
    tensor.data = of.data.data() + first_row * of.strides[0];
    return tensor;
  }
  static void set_shape(fa_tensor& tensor, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides) {
    tensor.ndim = 4;
    tensor.shape = shape.data();
    tensor.strides = strides.data();
  }

  const Case it_;
  std::vector<int32_t> cu_q_, cu_k_;
  Tensor q_, k_, v_, out_;
  std::vector<int64_t> offsets_shape_;
  fa_tensor cu_q_view_{}, cu_k_view_{};
  std::vector<uint64_t> workspace_;
  fa_attention_args args_;
};

class CudaEmulation : public ::testing::Test {
 protected:
  void SetUp() override { seed = 1; }
  static void SetUpTestSuite() {
    folder_ = (std::filesystem::temp_directory_path() / "cuda_emulation_XXXXXX").string();
    ASSERT_NE(mkdtemp(folder_.data()), nullptr);
    setenv("FLASH_ATTENTION_CACHE_DIR", folder_.c_str(), 1);
    setenv("FLASH_ATTENTION_NVRTC", FA_STUB_NVRTC, 1);
    setenv("FLASH_ATTENTION_BACKEND", "cuda:sm90", 1);
    setenv("FA_STUB_MULTIPROCESSORS", "2", 1);
    ASSERT_NE(dlopen(FA_STUB_DRIVER, RTLD_NOW | RTLD_GLOBAL), nullptr) << dlerror();
    using Get = stub::Record* (*)();
    reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "fa_stub_record"))()->run = run_kernel;
    add_kernels();
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(folder_); }

 private:
  static inline std::string folder_;
};

// By what is next to each other: tiles and steps that are whole, cut, single and none.
std::vector<Case> cases() {
  return {
      {.lengths_q = {70, 0, 257, 1, 128}, .lengths_k = {33, 5, 130, 0, 64}},
      {.lengths_q = {300, 65}, .lengths_k = {300, 129}, .causal = true},
      {.lengths_q = {200, 90}, .lengths_k = {150, 200}, .window_left = 40, .window_right = 10},
      {.lengths_q = {129, 0, 100, 1}, .lengths_k = {129, 7, 700, 0}, .head_dim = 128},
      {.lengths_q = {200, 100}, .lengths_k = {260, 70}, .head_dim = 128, .causal = true},
      {.lengths_q = {130, 60}, .lengths_k = {90, 161}, .head_dim = 256, .is_half = true},
      {.lengths_q = {129, 40}, .lengths_k = {160, 90}, .head_dim = 128, .head_dim_v = 48},
      {.lengths_q = {40, 129}, .lengths_k = {90, 160}, .head_dim = 40, .head_dim_v = 128},
  };
}

TEST_F(CudaEmulation, results_are_right) {
  for (const Case& of : cases()) {
    Varlen it(of);
    it.run();
    EXPECT_LT(it.error(), 2.0) << of.head_dim;
  }
}

TEST_F(CudaEmulation, no_order_changes_a_bit) {
  for (const Case& of : cases()) {
    if (of.head_dim > 128) continue;
    Varlen it(of);
    const std::vector<uint16_t> first = it.run();
    for (const uint64_t other : {2, 3, 4}) {
      seed = other;
      EXPECT_EQ(it.run(), first) << of.head_dim;
    }
  }
}

TEST_F(CudaEmulation, varlen_equals_dense_bitwise) {
  for (const Case& of : cases()) {
    if (of.head_dim > 128) continue;
    Varlen it(of);
    const std::vector<uint16_t> varlen = it.run();
    EXPECT_EQ(it.run_dense(), varlen) << of.head_dim;
  }
}

TEST_F(CudaEmulation, pages_equal_contiguous_bitwise) {
  for (const Case& of : cases()) {
    if (of.head_dim != 64) continue;
    Varlen it(of);
    const std::vector<uint16_t> contiguous = it.run();
    for (const int64_t page_size : {8, 24, 64}) {
      EXPECT_EQ(it.run_paged(page_size), contiguous) << page_size;
    }
  }
}

TEST_F(CudaEmulation, caches_equal_dense_bitwise) {
  for (const int64_t head_dim : {64, 128}) {
    Varlen it({.lengths_q = {80, 80, 80}, .lengths_k = {130, 64, 257}, .head_dim = head_dim});
    std::vector<uint16_t> cached = it.run_cached();
    const std::vector<uint16_t> dense = it.run_dense();
    // Rows behind the last sequence are not the cache's.
    cached.resize(static_cast<size_t>(240 * 2 * head_dim));
    EXPECT_TRUE(std::equal(cached.begin(), cached.end(), dense.begin())) << head_dim;
  }
}

// Boxes that the copy engine moves without a mask, if every tile is taken once.
int64_t boxes(const Case& of) {
  constexpr int64_t kRows = 128, kWarpgroups = 2, kColumns = 64;
  const int64_t keys = of.head_dim == 64 ? 64 : 128;
  int64_t count = 0;
  for (size_t i = 0; i < of.lengths_q.size(); ++i) {
    const int64_t tiles = (of.lengths_q[i] + kRows - 1) / kRows;
    count += tiles * (kWarpgroups + 2 * ((of.lengths_k[i] + keys - 1) / keys));
  }
  return of.num_heads * of.head_dim / kColumns * count;
}

// More tiles of a block than it keeps descriptions of.
TEST_F(CudaEmulation, blocks_take_tile_after_tile) {
  for (const int64_t head_dim : {64, 128}) {
    Case of{.lengths_q = {}, .lengths_k = {}, .head_dim = head_dim};
    for (int64_t i = 0; i < 24; ++i) {
      of.lengths_q.push_back(20 + i * 7 % 90);
      of.lengths_k.push_back(10 + i * 11 % 80);
    }
    Varlen it(of);
    const int64_t before = emulated::num_copies();
    it.run();
    EXPECT_EQ(emulated::num_copies() - before, boxes(of)) << head_dim;
    EXPECT_LT(it.error(), 2.0) << head_dim;
  }
  const Case of{.lengths_q = {700}, .lengths_k = {100}, .num_heads = 4};
  Varlen it(of);
  const int64_t before = emulated::num_copies();
  it.run_dense();
  EXPECT_EQ(emulated::num_copies() - before, boxes(of));
}

// Three runs of 8 heads, of 4, and of one.
TEST_F(CudaEmulation, heads_that_go_together_leave_no_tile_out) {
  for (const int64_t num_heads : {24, 12, 3}) {
    const Case of{.lengths_q = {130, 40, 300}, .lengths_k = {70, 20, 90}, .num_heads = num_heads};
    Varlen it(of);
    const int64_t before = emulated::num_copies();
    it.run();
    EXPECT_EQ(emulated::num_copies() - before, boxes(of)) << num_heads;
    EXPECT_LT(it.error(), 2.0) << num_heads;
  }
}

// Dense tiles that cost unlike much: by a counter where there is memory for it, else by pairs.
TEST_F(CudaEmulation, causal_tiles_are_the_same_by_either_schedule) {
  for (const int64_t head_dim : {64, 128}) {
    Varlen it({.lengths_q = {400},
               .lengths_k = {400},
               .head_dim = head_dim,
               .num_heads = 4,
               .causal = true});
    const std::vector<uint16_t> varlen = it.run();
    EXPECT_EQ(it.run_dense(), varlen) << head_dim;
    EXPECT_NE(launched.find(".varlen = true"), std::string::npos) << launched;
    it.lend_no_memory();
    EXPECT_EQ(it.run_dense(), varlen) << head_dim;
    EXPECT_NE(launched.find(".varlen = false"), std::string::npos) << launched;
  }
}

}  // namespace
}  // namespace fa
