// The layouts that the kernels for NVIDIA GPUs are made of, each on its own: tiles in shared
// memory, fragments of mma.sync, boxes of the copy engine, descriptors of wgmma.
//
// Small kernels write what a layout makes of known numbers. They are compiled wherever there is
// NVRTC, and run where there is a GPU; small integers make products exact.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/tensor_view.h"
#include "cuda/device.h"
#include "cuda/nvrtc.h"
#include "cuda/tensor_map.h"

namespace fa::cuda {
namespace {

constexpr const char* kKernels = R"cuda(
#include "cuda/device/copy.h"
#include "cuda/device/score.h"
#include "cuda/device/bulk_copy.h"

namespace fa::cuda {

// Of each chunk of a tile, and of the chunk `kDistance` behind those of the first ones.
template <int kRows, int kColumns, int kDistance>
__global__ void addresses(unsigned* to) {
  using Tile = SharedTile<kRows, kColumns>;
  constexpr int kChunks = kColumns / 8;
  const Tile tile{0};
  for (int i = threadIdx.x; i < kRows * kChunks; i += blockDim.x) {
    to[i] = tile.address(i / kChunks, i % kChunks);
    const bool shares_no_bit = i % kChunks < Tile::kGroupChunks && (i % kChunks & kDistance) == 0;
    to[kRows * kChunks + i] =
        shares_no_bit && i % kChunks + kDistance < kChunks
            ? Tile::advance(tile.address(i / kChunks, i % kChunks), kDistance)
            : tile.address(i / kChunks, (i % kChunks + kDistance) % kChunks);
  }
}

// Rows [first, end) and `columns` columns into a tile, and what the tile holds, by its addresses,
// and what store_tile() makes of it.
template <Loader kLoader, int kThreads, int kRows, int kColumns>
__global__ void copies(Half* from, Half* held, Half* stored, int first, int end, int columns) {
  extern __shared__ __align__(128) unsigned char shared[];
  const SharedTile<kRows, kColumns> tile{shared_address(shared)};
  load_tile<Element::kFloat16, kLoader, kThreads>(tile, first, end, columns, threadIdx.x,
                                                  StridedRows{from, kColumns});
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns / 8; i += kThreads) {
    Word words[4];
    load_shared_16(words, tile.address(i / (kColumns / 8), i % (kColumns / 8)));
    store_global_16(held + i * 8, words);
  }
  store_tile<kLoader, kThreads>(tile, StridedRows{stored, kColumns}, first, end, columns,
                                threadIdx.x);
}

template <Element kElement, int kRows, int kColumns>
__device__ SharedTile<kRows, kColumns> whole_tile(SharedAddress at, Half* from) {
  const SharedTile<kRows, kColumns> tile{at};
  load_tile<kElement, Loader::kVector, 64>(tile, 0, kRows, kColumns, threadIdx.x,
                                           StridedRows{from, kColumns});
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  return tile;
}

// to = q k^T: q of 32 rows, two warps of 16.
template <Element kElement, int kDepth, int kN>
__global__ void scores(Half* q, Half* k, float* to) {
  extern __shared__ __align__(128) unsigned char shared[];
  const SharedAddress at = shared_address(shared);
  const auto q_tile = whole_tile<kElement, 32, kDepth>(at, q);
  const auto k_tile = whole_tile<kElement, kN, kDepth>(at + q_tile.kBytes, k);
  Accumulator<1, kN / 8> s;
  const int warp_row = threadIdx.x / 32 * 16;
  multiply_q_k<kElement, kDepth>(s, q_tile, warp_row, k_tile, threadIdx.x % 32);
  for_each_score(s, warp_row, 0, threadIdx.x % 32,
                 [&](float& value, int row, int key) { to[row * kN + key] = value; });
}

// to = p v: p of 32 rows, two warps of 16.
template <Element kElement, int kDepth, int kN>
__global__ void outputs(float* p, Half* v, float* to) {
  extern __shared__ __align__(128) unsigned char shared[];
  const auto v_tile = whole_tile<kElement, kDepth, kN>(shared_address(shared), v);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  Accumulator<1, kDepth / 8> probabilities;
  for_each_score(probabilities, warp_row, 0, lane,
                 [&](float& value, int row, int key) { value = p[row * kDepth + key]; });
  Accumulator<1, kN / 8> o;
  o.clear();
  multiply_p_v<kElement>(o, probabilities, v_tile, lane);
  for_each_score(o, warp_row, 0, lane,
                 [&](float& value, int row, int column) { to[row * kN + column] = value; });
}
}  // namespace fa::cuda
)cuda";

constexpr const char* kKernels90 = R"cuda(
#include "cuda/device/score.h"
#include "cuda/device/bulk_copy.h"
#include "cuda/device/wgmma.h"

namespace fa::cuda {

// Blocks of 64 columns of the rows from `row` on, one block behind another.
template <int kRows, int kColumns>
__device__ void load_boxes(SharedAddress to, const TensorMap& map, int row, Barrier full) {
  if (threadIdx.x == 0) {
    full.arrive_and_expect(kRows * kColumns * 2);
    for (int column = 0; column < kColumns; column += kBlockColumns) {
      copy_box(to + column * kRows * 2, map, column, row, 1, 1, full);
    }
  }
}

struct Start {
  SharedAddress shared;
  Barrier full;
};

__device__ Start start(unsigned char* unaligned, unsigned long long* barrier) {
  const Start it{(shared_address(unaligned) + 1023) / 1024 * 1024, {shared_address(barrier)}};
  if (threadIdx.x == 0) {
    it.full.init(1);
    barriers_fence();
  }
  __syncthreads();
  return it;
}

// What a box holds, read as a tile of mma.sync's.
template <int kRows>
__device__ void store_box(Half* to, const Start& it) {
  it.full.wait(0);
  const SharedTile<kRows, kBlockColumns> tile{it.shared};
  for (int i = threadIdx.x; i < kRows * 8; i += blockDim.x) {
    Word words[4];
    load_shared_16(words, tile.address(i / 8, i % 8));
    store_global_16(to + i * 8, words);
  }
}

template <int kRows>
__global__ void boxes(const __grid_constant__ TensorMap map, Half* to, int row) {
  extern __shared__ unsigned char unaligned[];
  __shared__ unsigned long long barrier;
  const Start it = start(unaligned, &barrier);
  load_boxes<kRows, kBlockColumns>(it.shared, map, row, it.full);
  store_box<kRows>(to, it);
}

// `num_rows` rows from `row` on of a tensor of `rows`.
template <int kRows>
__global__ void ended_boxes(const __grid_constant__ TensorMap map, Half* to, int rows, int row,
                            int num_rows) {
  extern __shared__ unsigned char unaligned[];
  __shared__ unsigned long long barrier;
  const Start it = start(unaligned, &barrier);
  if (threadIdx.x == 0) {
    it.full.arrive_and_expect(kRows * kBlockRowBytes);
    copy_ended_box(it.shared, map, rows, 0, row, num_rows, 1, 1, it.full);
  }
  store_box<kRows>(to, it);
}

// to = a b^T, both of rows in shared memory.
template <Element kElement, int kDepth, int kN>
__global__ void __launch_bounds__(128) shared_products(const __grid_constant__ TensorMap a,
                                                       const __grid_constant__ TensorMap b,
                                                       float* to) {
  extern __shared__ unsigned char unaligned[];
  __shared__ unsigned long long barrier;
  const Start it = start(unaligned, &barrier);
  const SharedAddress at_b = it.shared + 64 * kDepth * 2;
  load_boxes<64, kDepth>(it.shared, a, 0, it.full);
  it.full.wait(0);
  load_boxes<kN, kDepth>(at_b, b, 0, it.full);
  it.full.wait(1);
  Accumulator<1, kN / 8> c;
  products_fence();
  for (int step = 0; step < kDepth / 16; ++step) {
    const int block = step / 4, within = step % 4 * 32;
    product<kElement>(c, row_descriptor(it.shared + block * 64 * kBlockRowBytes + within),
                      row_descriptor(at_b + block * kN * kBlockRowBytes + within), step > 0);
  }
  products_commit();
  products_wait<0>();
  pin(c);
  for_each_score(c, threadIdx.x / 32 * 16, 0, threadIdx.x % 32,
                 [&](float& value, int row, int column) { to[row * kN + column] = value; });
}

// to = p v: p in registers, v's rows in shared memory.
template <Element kElement, int kDepth, int kN>
__global__ void __launch_bounds__(128) register_products(const float* p,
                                                         const __grid_constant__ TensorMap v,
                                                         float* to) {
  extern __shared__ unsigned char unaligned[];
  __shared__ unsigned long long barrier;
  const Start it = start(unaligned, &barrier);
  load_boxes<kDepth, kN>(it.shared, v, 0, it.full);
  it.full.wait(0);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  Accumulator<1, kDepth / 8> values;
  for_each_score(values, warp_row, 0, lane,
                 [&](float& value, int row, int key) { value = p[row * kDepth + key]; });
  Word a[kDepth / 16][4];
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&tile)[4] = values.at[0][2 * step + half];
      a[step][2 * half] = pack<kElement>(tile[0], tile[1]);
      a[step][2 * half + 1] = pack<kElement>(tile[2], tile[3]);
    }
  }
  Accumulator<1, kN / 8> c;
  c.clear();
  products_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    product<kElement>(c, a[step], column_descriptor<kDepth * kBlockRowBytes>(
                                      it.shared + step * 16 * kBlockRowBytes));
  }
  products_commit();
  products_wait<0>();
  pin(c);
  for_each_score(c, warp_row, 0, lane,
                 [&](float& value, int row, int column) { to[row * kN + column] = value; });
}
}  // namespace fa::cuda
)cuda";

// ---- The GPU, and memory that it shares with the host. ----

struct Gpu {
  const Device* device;
  int (*allocate)(uint64_t* address, size_t bytes, unsigned flags);
  int (*synchronize)();
  int (*free)(uint64_t address);
};

// Null where there is none.
const Gpu* gpu() {
  static const Gpu found = [] {
    const core::Result<const Device*> first = device(0);
    if (!first.ok()) return Gpu{};
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    Gpu it{first.value(), nullptr, nullptr, nullptr};
    it.allocate = reinterpret_cast<decltype(it.allocate)>(dlsym(library, "cuMemAllocManaged"));
    it.synchronize = reinterpret_cast<decltype(it.synchronize)>(dlsym(library, "cuCtxSynchronize"));
    it.free = reinterpret_cast<decltype(it.free)>(dlsym(library, "cuMemFree_v2"));
    return it;
  }();
  return found.device == nullptr ? nullptr : &found;
}

// Of both the host and the GPU; full of a value that no kernel writes.
template <class T>
class Shared {
 public:
  explicit Shared(size_t size, T value = T{77}) : size_(size) {
    const CurrentContext current(*gpu()->device);
    constexpr unsigned kGlobal = 1;
    uint64_t address = 0;
    const int result = gpu()->allocate(&address, size * sizeof(T), kGlobal);
    if (result != 0) throw std::runtime_error("cuMemAllocManaged gives " + std::to_string(result));
    data_ = reinterpret_cast<T*>(address);
    std::fill_n(data_, size, value);
  }
  ~Shared() {
    const CurrentContext current(*gpu()->device);
    gpu()->free(reinterpret_cast<uint64_t>(data_));
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// One block of a compiled kernel; `arguments` are passed as they are.
template <class... Arguments>
void run(const CompiledKernel& kernel, int threads, int shared_bytes, Arguments... arguments) {
  if (testing::Test::HasFailure()) return;  // a kernel on bad arguments would spoil the context
  const Driver& driver = *gpu()->device->driver;
  const CurrentContext current(*gpu()->device);
  Module module = nullptr;
  Function function = nullptr;
  void* pointers[] = {&arguments...};
  ASSERT_EQ(driver.load_module(&module, kernel.image.data()), 0);
  ASSERT_EQ(driver.get_function(&function, module, kernel.name.c_str()), 0);
  ASSERT_EQ(driver.set_function_attribute(function, FunctionAttribute::kMaxDynamicSharedBytes,
                                          shared_bytes),
            0);
  ASSERT_EQ(driver.launch(function, 1, 1, 1, static_cast<unsigned>(threads), 1, 1,
                          static_cast<unsigned>(shared_bytes), nullptr, pointers, nullptr),
            0);
  ASSERT_EQ(gpu()->synchronize(), 0);
}

// ---- Numbers. ----

enum class Type { kFloat16, kBFloat16 };

constexpr const char* kElements[] = {"fa::cuda::Element::kFloat16", "fa::cuda::Element::kBFloat16"};

uint16_t bits(Type type, int value) {
  return type == Type::kFloat16 ? core::round_to<core::Float16>(value).bits
                                : core::round_to<core::BFloat16>(value).bits;
}

// Integers from -4 to 4: 256 products of them and their sums are exact.
std::vector<int> integers(int count, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<int> list(static_cast<size_t>(count));
  for (int& value : list) value = static_cast<int>(engine() % 9) - 4;
  return list;
}

void fill(const Shared<uint16_t>& to, Type type, const std::vector<int>& values) {
  for (size_t i = 0; i < values.size(); ++i) to[i] = bits(type, values[i]);
}

// Element (i, j) of a [rows, depth] times b^T [columns, depth], or times b [depth, columns].
int product_at(const std::vector<int>& a, const std::vector<int>& b, int depth, int columns,
               bool transposed, int i, int j) {
  int sum = 0;
  for (int d = 0; d < depth; ++d) {
    sum += a[static_cast<size_t>(i * depth + d)] *
           b[static_cast<size_t>(transposed ? j * depth + d : d * columns + j)];
  }
  return sum;
}

int count_wrong(const Shared<float>& actual, const std::vector<int>& a, const std::vector<int>& b,
                int depth, int columns, bool transposed) {
  int wrong = 0;
  for (int at = 0; at < static_cast<int>(actual.size()); ++at) {
    const int expected = product_at(a, b, depth, columns, transposed, at / columns, at % columns);
    if (actual[static_cast<size_t>(at)] != static_cast<float>(expected)) ++wrong;
  }
  return wrong;
}

// A tensor [2, rows, 3, columns] of a 16-bit type whose entry 1, head 1 holds `values`, and 99
// elsewhere; what the copy engine is told of it.
struct Mapped {
  Mapped(Type type, int rows, int columns, const std::vector<int>& values, int box_rows,
         bool ends = false)
      : memory(static_cast<size_t>(2 * rows * 3 * columns), bits(type, 99)) {
    core::TensorView view;
    view.data = memory.data();
    view.dtype = type == Type::kFloat16 ? core::DataType::kFloat16 : core::DataType::kBFloat16;
    view.ndim = 4;
    view.shape = {2, rows, 3, columns};
    view.strides = {rows * 3 * columns, 3 * columns, columns, 1};
    for (int i = 0; i < rows * columns; ++i) {
      memory[static_cast<size_t>(((rows + i / columns) * 3 + 1) * columns + i % columns)] =
          bits(type, values[static_cast<size_t>(i)]);
    }
    const CurrentContext current(*gpu()->device);
    const core::Status status = make_tensor_map(*gpu()->device->driver, view, box_rows, ends, map);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  Shared<uint16_t> memory;
  TensorMap map;
};

// ---- The table. ----

struct Probe {
  std::string name;  // "turing_...": as that does it, on whatever GPU there is
  const char* source;
  std::string expression;
  bool is_sm90;
  std::function<void(const CompiledKernel&)> check;
};

std::string text(int value) { return std::to_string(value); }

Probe tile_addresses(int rows, int columns, int distance) {
  return {"tile_" + text(rows) + "x" + text(columns) + "_advance_" + text(distance), kKernels,
          "addresses<" + text(rows) + ", " + text(columns) + ", " + text(distance) + ">", false,
          [=](const CompiledKernel& kernel) {
            const int chunks = columns / 8;
            const size_t count = static_cast<size_t>(rows * chunks);
            const Shared<unsigned> at(2 * count);
            run(kernel, 128, 0, at.data());
            std::set<unsigned> places(at.data(), at.data() + count);
            EXPECT_EQ(places.size(), count);
            EXPECT_EQ(*places.rbegin(), (count - 1) * 16);
            for (int row = 0; row + 8 <= rows; row += 8) {
              for (int chunk = 0; chunk < chunks; ++chunk) {
                std::set<unsigned> banks;  // of the 8 rows of a matrix that ldmatrix reads
                for (int i = row; i < row + 8; ++i) {
                  banks.insert(at[static_cast<size_t>(i * chunks + chunk)] % 128);
                }
                EXPECT_EQ(banks.size(), 8u) << "rows from " << row << ", chunk " << chunk;
              }
            }
            for (size_t i = 0; i < count; ++i) {
              const size_t row = i / static_cast<size_t>(chunks);
              const size_t chunk =
                  (i + static_cast<size_t>(distance)) % static_cast<size_t>(chunks);
              EXPECT_EQ(at[count + i], at[row * static_cast<size_t>(chunks) + chunk]) << i;
            }
          }};
}

Probe tile_copies(const char* loader, int threads, int rows, int columns) {
  const std::string sizes = text(threads) + ", " + text(rows) + ", " + text(columns);
  return {
      std::string("copy_") + loader + "_" + text(threads) + "_" + text(rows) + "x" + text(columns),
      kKernels, std::string("copies<fa::cuda::Loader::") + loader + ", " + sizes + ">", false,
      [=](const CompiledKernel& kernel) {
        const int first = 3, end = first + rows - 5, used = columns - 16;
        const size_t count = static_cast<size_t>(rows * columns);
        constexpr uint16_t kUntouched = 4242;
        const Shared<uint16_t> from(2 * count), held(count, kUntouched),
            stored(2 * count, kUntouched);
        for (size_t i = 0; i < 2 * count; ++i) from[i] = static_cast<uint16_t>(i % 4001 + 1);
        run(kernel, threads, rows * columns * 2, from.data(), held.data(), stored.data(), first,
            end, used);
        int wrong = 0;
        for (int i = 0; i < rows * columns; ++i) {
          const int row = i / columns, column = i % columns;
          const size_t at = static_cast<size_t>((first + row) * columns + column);
          const bool exists = first + row < end && column < used;
          if (held[static_cast<size_t>(i)] != (exists ? from[at] : 0)) ++wrong;
          if (stored[at] != (exists ? from[at] : kUntouched)) ++wrong;
        }
        EXPECT_EQ(wrong, 0);
      }};
}

Probe fragment_scores(Type type, int depth, int n) {
  const char* element = kElements[static_cast<int>(type)];
  return {"scores_" + text(depth) + "x" + text(n) + (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels, std::string("scores<") + element + ", " + text(depth) + ", " + text(n) + ">",
          false, [=](const CompiledKernel& kernel) {
            const std::vector<int> q = integers(32 * depth, 1), k = integers(n * depth, 2);
            const Shared<uint16_t> of_q(q.size()), of_k(k.size());
            fill(of_q, type, q);
            fill(of_k, type, k);
            const Shared<float> to(static_cast<size_t>(32 * n));
            run(kernel, 64, (32 + n) * depth * 2, of_q.data(), of_k.data(), to.data());
            EXPECT_EQ(count_wrong(to, q, k, depth, n, true), 0);
          }};
}

Probe fragment_outputs(Type type, int depth, int n) {
  const char* element = kElements[static_cast<int>(type)];
  return {"outputs_" + text(depth) + "x" + text(n) + (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels, std::string("outputs<") + element + ", " + text(depth) + ", " + text(n) + ">",
          false, [=](const CompiledKernel& kernel) {
            const std::vector<int> p = integers(32 * depth, 3), v = integers(n * depth, 4);
            const Shared<float> of_p(p.size()), to(static_cast<size_t>(32 * n));
            std::copy(p.begin(), p.end(), of_p.data());
            const Shared<uint16_t> of_v(v.size());
            fill(of_v, type, v);
            run(kernel, 64, depth * n * 2, of_p.data(), of_v.data(), to.data());
            EXPECT_EQ(count_wrong(to, p, v, depth, n, false), 0);
          }};
}

Probe copy_engine_box(Type type, int rows, int first) {
  return {"box_of_" + text(rows) + "_from_" + (first < 0 ? "minus_" : "") + text(std::abs(first)) +
              (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels90, "boxes<" + text(rows) + ">", true, [=](const CompiledKernel& kernel) {
            const std::vector<int> values = integers(rows * 64, 5);
            const Mapped from(type, rows, 64, values, rows);
            const Shared<uint16_t> to(values.size());
            run(kernel, 128, rows * 128 + 1024, from.map, to.data(), first);
            int wrong = 0;
            for (int i = 0; i < rows * 64; ++i) {
              const int row = first + i / 64;
              const bool inside = row >= 0 && row < rows;
              const int expected = inside ? values[static_cast<size_t>(row * 64 + i % 64)] : 0;
              if (to[static_cast<size_t>(i)] != bits(type, expected)) ++wrong;
            }
            EXPECT_EQ(wrong, 0);
          }};
}

Probe copy_engine_ended_box(Type type, int rows, int first, int num_rows) {
  constexpr int kBoxRows = 64;
  return {"ended_box_of_" + text(rows) + "_from_" + text(first) + "_" + text(num_rows) +
              (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels90, "ended_boxes<" + text(kBoxRows) + ">", true,
          [=](const CompiledKernel& kernel) {
            const std::vector<int> values = integers(rows * 64, 5);
            const Mapped from(type, rows, 64, values, kBoxRows, true);
            const Shared<uint16_t> to(kBoxRows * 64);
            run(kernel, 128, kBoxRows * 128 + 1024, from.map, to.data(), rows, first, num_rows);
            int wrong = 0;
            for (int i = 0; i < kBoxRows * 64; ++i) {
              const int at = first * 64 + i;
              const int expected = i / 64 < num_rows ? values[static_cast<size_t>(at)] : 0;
              if (to[static_cast<size_t>(i)] != bits(type, expected)) ++wrong;
            }
            EXPECT_EQ(wrong, 0);
          }};
}

Probe descriptors_of_rows(Type type, int depth, int n) {
  const char* element = kElements[static_cast<int>(type)];
  return {"rows_" + text(depth) + "x" + text(n) + (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels90,
          std::string("shared_products<") + element + ", " + text(depth) + ", " + text(n) + ">",
          true, [=](const CompiledKernel& kernel) {
            const std::vector<int> a = integers(64 * depth, 6), b = integers(n * depth, 7);
            const Mapped of_a(type, 64, depth, a, 64), of_b(type, n, depth, b, n);
            const Shared<float> to(static_cast<size_t>(64 * n));
            run(kernel, 128, (64 + n) * depth * 2 + 1024, of_a.map, of_b.map, to.data());
            EXPECT_EQ(count_wrong(to, a, b, depth, n, true), 0);
          }};
}

Probe descriptors_of_columns(Type type, int depth, int n) {
  const char* element = kElements[static_cast<int>(type)];
  return {"columns_" + text(depth) + "x" + text(n) + (type == Type::kFloat16 ? "_fp16" : "_bf16"),
          kKernels90,
          std::string("register_products<") + element + ", " + text(depth) + ", " + text(n) + ">",
          true, [=](const CompiledKernel& kernel) {
            const std::vector<int> p = integers(64 * depth, 8), v = integers(n * depth, 9);
            const Shared<float> of_p(p.size()), to(static_cast<size_t>(64 * n));
            std::copy(p.begin(), p.end(), of_p.data());
            const Mapped of_v(type, depth, n, v, depth);
            run(kernel, 128, depth * n * 2 + 1024, of_p.data(), of_v.map, to.data());
            EXPECT_EQ(count_wrong(to, p, v, depth, n, false), 0);
          }};
}

std::vector<Probe> probes() {
  std::vector<Probe> list;
  for (const int columns : {32, 64, 96, 128, 192, 256}) {
    list.push_back(tile_addresses(64, columns, 2));
    list.push_back(tile_addresses(64, columns, columns > 64 ? 8 : 3));
    list.push_back(tile_copies("kVector", 64, 32, columns));
  }
  list.push_back(tile_copies("kVector", 128, 128, 64));
  list.push_back(tile_copies("kVector", 256, 128, 256));
  list.push_back(tile_copies("kElement", 128, 64, 96));
  for (Probe probe : {tile_copies("kVector", 64, 32, 96), fragment_scores(Type::kFloat16, 96, 64),
                      fragment_outputs(Type::kFloat16, 64, 96)}) {
    probe.name = "turing_" + probe.name;
    list.push_back(probe);
  }
  for (const Type type : {Type::kFloat16, Type::kBFloat16}) {
    list.push_back(fragment_scores(type, 32, 128));
    list.push_back(fragment_scores(type, 96, 64));
    list.push_back(fragment_scores(type, 256, 64));
    list.push_back(fragment_outputs(type, 128, 32));
    list.push_back(fragment_outputs(type, 64, 96));
    list.push_back(fragment_outputs(type, 64, 256));
    for (const int rows : {64, 80, 112, 128}) list.push_back(copy_engine_box(type, rows, 0));
    list.push_back(copy_engine_box(type, 64, 17));
    list.push_back(copy_engine_box(type, 64, -9));
    list.push_back(copy_engine_ended_box(type, 100, 17, 30));
    list.push_back(copy_engine_ended_box(type, 100, 17, 83));
    list.push_back(copy_engine_ended_box(type, 40, 8, 32));
    list.push_back(copy_engine_ended_box(type, 40, 39, 1));
    list.push_back(copy_engine_ended_box(type, 1, 0, 1));
    list.push_back(copy_engine_box(type, 64, 64));
    for (const int n : {80, 112, 128}) list.push_back(descriptors_of_rows(type, 128, n));
    for (const int n : {64, 128, 192, 256}) list.push_back(descriptors_of_columns(type, 80, n));
  }
  return list;
}

class CudaLayout : public testing::TestWithParam<Probe> {};

TEST_P(CudaLayout, holds) {
  const Probe& probe = GetParam();
  const core::Result<std::string> compiler = nvrtc_identity();
  if (!compiler.ok()) GTEST_SKIP() << compiler.status().message();
  const int capability = gpu() == nullptr ? 90 : gpu()->device->properties.compute_capability;
  if (probe.is_sm90 && capability != 90) GTEST_SKIP() << "the GPU is no Hopper";
  const bool as_turing = probe.name.starts_with("turing_");
  const core::Result<CompiledKernel> kernel = compile(
      (as_turing ? "#define FA_AS_TURING\n" : "") + std::string{probe.source},
      "fa::cuda::" + probe.expression, "sm_" + text(capability) + (probe.is_sm90 ? "a" : ""));
  ASSERT_TRUE(kernel.ok()) << kernel.status().message();
  if (gpu() == nullptr) GTEST_SKIP() << "compiled; there is no NVIDIA GPU to run it on";
  probe.check(kernel.value());
}

INSTANTIATE_TEST_SUITE_P(all, CudaLayout, testing::ValuesIn(probes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fa::cuda
