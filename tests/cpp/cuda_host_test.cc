// The host's side of a call on an NVIDIA GPU, against stand-ins for libcuda and libnvrtc: what each
// failure says, what a repeated call costs, and that no other call is taken for a repeated one.
//
// The driver is looked for once per process, so each test's machine is a child's.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "flash_attn/flash_attn.h"
#include "stub/stub.h"
#include "tests/cpp/testing.h"

namespace fa {
namespace {

namespace filesystem = std::filesystem;

struct Tensor {
  std::vector<int64_t> shape, strides;
  fa_tensor c{};

  Tensor(void* data, std::vector<int64_t> of_shape, uint8_t code = FA_BFLOAT, uint8_t bits = 16)
      : shape(std::move(of_shape)), strides(testing::row_major_strides(shape)) {
    c = {data, FA_CUDA, 0, static_cast<int32_t>(shape.size()), code, bits, 1, nullptr, nullptr, 0};
  }
  const fa_tensor* get() {
    c.shape = shape.data();
    c.strides = strides.data();
    return &c;
  }
};

alignas(64) char memory[1 << 20];

void* at(size_t offset) { return memory + offset; }

// As memory of a device that is read back.
void* on_device(std::vector<int32_t>& values) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(values.data()) + stub::kDeviceOffset);
}

// A dense bf16 call: B 2, S 64, H 4, D 64.
struct Call {
  Tensor q{at(0), {2, 64, 4, 64}}, k{at(1 << 16), {2, 64, 4, 64}}, v{at(2 << 16), {2, 64, 4, 64}};
  Tensor out{at(3 << 16), {2, 64, 4, 64}}, lse{at(4 << 16), {2, 4, 64}, FA_FLOAT, 32};
  double scale = 0.5;
  fa_attention_args args;

  Call() { fa_attention_args_init(&args); }
  virtual ~Call() = default;
  virtual const fa_attention_args* get() {
    args.q = q.get();
    args.k = k.get();
    args.v = v.get();
    args.out = out.get();
    return &args;
  }
  fa_status run() { return fa_forward(get()); }
  bool run_known() {
    int32_t ran = -1;
    EXPECT_EQ(fa_forward_known(get(), &ran), FA_OK) << fa_last_error_message();
    return ran == 1;
  }
};

// Three sequences of 10, 20 and 34 tokens.
struct VarlenCall : Call {
  std::vector<int32_t> offsets_q{0, 10, 30, 64}, offsets_k{0, 10, 30, 64};
  Tensor cu_seqlens_q{on_device(offsets_q), {4}, FA_INT, 32};
  Tensor cu_seqlens_k{on_device(offsets_k), {4}, FA_INT, 32};
  VarlenCall() {
    for (Tensor* tensor : {&q, &k, &v, &out}) *tensor = Tensor(tensor->c.data, {64, 4, 64});
    args.max_seqlen_q = args.max_seqlen_k = 34;
  }
  const fa_attention_args* get() override {
    args.cu_seqlens_q = cu_seqlens_q.get();
    args.cu_seqlens_k = cu_seqlens_k.get();
    return Call::get();
  }
};

// One query behind 10 and 64 cached tokens.
struct CacheCall : Call {
  std::vector<int32_t> lengths{10, 64};
  Tensor cache_seqlens{on_device(lengths), {2}, FA_INT, 32};
  CacheCall() { q.shape[1] = out.shape[1] = 1; }
  const fa_attention_args* get() override {
    args.cache_seqlens = cache_seqlens.get();
    return Call::get();
  }
};

// A prompt of 2048 queries behind 10 and 64 cached tokens, in pages of `page_size` where it is not
// 0.
struct PromptCall : CacheCall {
  std::vector<int32_t> pages = std::vector<int32_t>(16);
  Tensor block_table{on_device(pages), {2, 8}, FA_INT, 32};
  explicit PromptCall(int64_t page_size = 0) {
    q.shape[1] = out.shape[1] = 2048;
    if (page_size == 0) return;
    for (Tensor* tensor : {&k, &v}) *tensor = Tensor(tensor->c.data, {8, page_size, 4, 64});
    args.block_table = block_table.get();
  }
};

using testing::contains;

std::string message() { return fa_last_error_message(); }

stub::Record& record() {
  using Get = stub::Record* (*)();
  static const auto get = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "fa_stub_record"));
  return *get();
}

class CudaHost : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (filesystem::temp_directory_path() / "cuda_host_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    setenv("FLASH_ATTENTION_CACHE_DIR", (folder_ / "kernels").c_str(), 1);
    setenv("FLASH_ATTENTION_NVRTC", FA_STUB_NVRTC, 1);
  }
  void TearDown() override { filesystem::remove_all(folder_); }

  // Runs `body` in a process of its own, whose driver is the stand-in.
  void on_a_gpu(const std::function<void()>& body) {
    in_a_child([&] {
      ASSERT_NE(dlopen(FA_STUB_DRIVER, RTLD_NOW | RTLD_GLOBAL), nullptr) << dlerror();
      body();
    });
  }
  static void in_a_child(const std::function<void()>& body) {
    EXPECT_EXIT(
        {
          body();
          std::_Exit(::testing::Test::HasFailure() ? 1 : 0);
        },
        ::testing::ExitedWithCode(0), "");
  }

  filesystem::path folder_;
};

// ---- What failures say. ----

TEST_F(CudaHost, a_missing_driver_is_named) {
  if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) GTEST_SKIP() << "this machine has a driver";
  in_a_child([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "there is no NVIDIA driver: libcuda.so.1")) << message();
  });
}

TEST_F(CudaHost, an_old_driver_is_named_with_what_it_must_be) {
  setenv("FA_STUB_DRIVER_VERSION", "11080", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "is for CUDA 11.8, must be for 12.0 or newer")) << message();
  });
  unsetenv("FA_STUB_DRIVER_VERSION");
}

TEST_F(CudaHost, a_driver_that_does_not_start_is_named) {
  setenv("FA_STUB_FAIL", "cuInit=100", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "does not start: cuInit: CUDA_ERROR_STUB (100)")) << message();
  });
  unsetenv("FA_STUB_FAIL");
}

TEST_F(CudaHost, an_old_device_is_named_with_what_serves_it) {
  setenv("FA_STUB_COMPUTE_CAPABILITY", "70", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "Stand-in GPU has compute capability 7.0, must be 7.5"))
        << message();
    EXPECT_TRUE(contains(message(), "triton serves")) << message();
  });
  unsetenv("FA_STUB_COMPUTE_CAPABILITY");
}

TEST_F(CudaHost, a_missing_nvrtc_is_named_with_what_to_install) {
  setenv("FLASH_ATTENTION_NVRTC", "/nowhere/libnvrtc.so", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "there is no file '/nowhere/libnvrtc.so'")) << message();
  });
}

TEST_F(CudaHost, another_library_is_not_taken_for_nvrtc) {
  setenv("FLASH_ATTENTION_NVRTC", FA_STUB_DRIVER, 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "libnvrtc has no function nvrtcVersion")) << message();
  });
}

TEST_F(CudaHost, a_compile_error_comes_with_its_log) {
  setenv("FA_STUB_FAIL", "nvrtcCompileProgram=6", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_INTERNAL);
    EXPECT_TRUE(contains(message(), "NVRTC cannot compile fa::cuda::forward_sm90<")) << message();
    EXPECT_TRUE(contains(message(), "for sm_90a: NVRTC_ERROR_STUB")) << message();
    EXPECT_TRUE(contains(message(), "line 1: the test asked for an error")) << message();
  });
  unsetenv("FA_STUB_FAIL");
}

TEST_F(CudaHost, too_little_device_memory_is_told_from_other_errors) {
  for (const char* call : {"cuModuleLoadData", "cuLaunchKernel", "cuDevicePrimaryCtxRetain"}) {
    for (const int code : {2, 700}) {
      setenv("FA_STUB_FAIL", (std::string{call} + "=" + std::to_string(code)).c_str(), 1);
      on_a_gpu([&] {
        const bool while_choosing = std::string{call} == "cuDevicePrimaryCtxRetain";
        const fa_status expected = while_choosing ? FA_UNSUPPORTED
                                   : code == 2    ? FA_OUT_OF_MEMORY
                                                  : FA_DEVICE_ERROR;
        EXPECT_EQ(Call().run(), expected) << call << " " << code;
        EXPECT_TRUE(contains(message(), std::string{call} + ": CUDA_ERROR_STUB")) << message();
      });
    }
  }
  unsetenv("FA_STUB_FAIL");
}

TEST_F(CudaHost, a_fault_does_not_pass_silently_in_a_known_call) {
  on_a_gpu([] {
    Call call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    setenv("FA_STUB_FAIL", "cuLaunchKernel=700", 1);
    EXPECT_EQ(call.run(), FA_DEVICE_ERROR);
    int32_t ran = -1;
    EXPECT_EQ(fa_forward_known(call.get(), &ran), FA_DEVICE_ERROR);
    unsetenv("FA_STUB_FAIL");
    EXPECT_EQ(call.run(), FA_OK);
  });
}

// ---- Kernels on disk. ----

TEST_F(CudaHost, a_kernel_on_disk_is_used_without_nvrtc_being_loaded) {
  on_a_gpu([] { EXPECT_EQ(Call().run(), FA_OK) << message(); });
  setenv("FA_STUB_FAIL", "nvrtcCompileProgram=6", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_OK) << message();
    EXPECT_EQ(dlopen(FA_STUB_NVRTC, RTLD_NOW | RTLD_NOLOAD), nullptr);
  });
  unsetenv("FA_STUB_FAIL");
}

TEST_F(CudaHost, a_hundred_processes_fill_one_cache_at_once) {
  constexpr int kProcesses = 100;
  on_a_gpu([] {
    std::vector<pid_t> children;
    for (int i = 0; i < kProcesses; ++i) {
      const pid_t child = fork();
      if (child == 0) std::_Exit(Call().run() == FA_OK ? 0 : 1);
      children.push_back(child);
    }
    for (const pid_t child : children) {
      int status = -1;
      EXPECT_EQ(waitpid(child, &status, 0), child);
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    }
  });
  int entries = 0;
  for (const auto& entry : filesystem::directory_iterator(folder_ / "kernels")) {
    EXPECT_EQ(entry.path().extension(), ".kernel") << entry.path();
    ++entries;
  }
  EXPECT_EQ(entries, 1);
}

TEST_F(CudaHost, only_the_device_of_a_call_gets_a_context) {
  on_a_gpu([] {
    Call call;
    for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out}) tensor->c.device_id = 3;
    ASSERT_EQ(call.run(), FA_OK) << message();
    EXPECT_EQ(record().contexts, 1);
  });
}

// ---- Repeated calls. ----

TEST_F(CudaHost, a_repeated_call_launches_on_its_own_tensors_and_stream) {
  on_a_gpu([] {
    Call call;
    EXPECT_FALSE(call.run_known());
    EXPECT_EQ(record().launches, 0);
    ASSERT_EQ(call.run(), FA_OK) << message();
    EXPECT_EQ(record().launches, 1);
    const int maps = record().maps;
    for (const bool known : {false, true}) {
      const int before = record().launches;
      call.q.c.data = at(known ? 5 << 16 : 6 << 16);
      call.args.stream = &call;
      if (known) {
        EXPECT_TRUE(call.run_known());
      } else {
        EXPECT_EQ(call.run(), FA_OK) << message();
      }
      EXPECT_EQ(record().launches, before + 1);
      EXPECT_EQ(record().q, call.q.c.data);
      EXPECT_EQ(record().q_map, call.q.c.data);
      EXPECT_EQ(record().stream, &call);
    }
    EXPECT_EQ(record().modules, 1);
    EXPECT_EQ(record().maps, maps);
    EXPECT_GE(record().moved_maps, 6);
  });
}

TEST_F(CudaHost, maps_of_other_tensors_are_made_anew) {
  on_a_gpu([] {
    ASSERT_EQ(Call().run(), FA_OK) << message();
    int maps = record().maps;
    const std::vector<std::function<void(Tensor&)>> changes = {
        [](Tensor& it) { it.shape[1] = 32; },
        [](Tensor& it) { it.strides[0] += 64; },
        [](Tensor& it) { it.c.dtype_code = FA_FLOAT; },
    };
    for (const auto& change : changes) {
      Call changed;
      for (Tensor* tensor : {&changed.q, &changed.k, &changed.v, &changed.out}) change(*tensor);
      ASSERT_EQ(changed.run(), FA_OK) << message();
      EXPECT_GT(record().maps, maps);
      maps = record().maps;
    }
  });
}

TEST_F(CudaHost, a_step_of_decoding_is_known) {
  on_a_gpu([] {
    CacheCall call;
    call.args.num_splits = 1;
    ASSERT_EQ(call.run(), FA_OK) << message();
    call.q.c.data = at(5 << 16);
    EXPECT_TRUE(call.run_known());
    EXPECT_EQ(record().q, at(5 << 16));
    setenv("FLASH_ATTENTION_CHECK", "1", 1);
    call.lengths[1] = 65;
    EXPECT_FALSE(call.run_known());
    EXPECT_EQ(call.run(), FA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(message(), "cache_seqlens: entry 1 is 65")) << message();
  });
}

TEST_F(CudaHost, a_prompt_over_a_cache_takes_hoppers_kernel) {
  on_a_gpu([] {
    PromptCall call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    EXPECT_EQ(record().q_map, call.q.c.data);
    EXPECT_EQ(record().box_rows, 64u);
    CacheCall step;
    ASSERT_EQ(step.run(), FA_OK) << message();
    EXPECT_EQ(record().q_map, nullptr);
  });
}

TEST_F(CudaHost, boxes_of_the_copy_engine_lie_within_pages) {
  on_a_gpu([] {
    for (const auto& [page_size, box_rows] :
         std::vector<std::pair<int64_t, unsigned>>{{8, 8}, {16, 16}, {48, 16}, {256, 64}}) {
      PromptCall call(page_size);
      ASSERT_EQ(call.run(), FA_OK) << message();
      EXPECT_EQ(record().q_map, call.q.c.data) << page_size;
      EXPECT_EQ(record().box_rows, box_rows) << page_size;
    }
    PromptCall odd(17);
    ASSERT_EQ(odd.run(), FA_OK) << message();
    EXPECT_EQ(record().q_map, nullptr);
    odd.args.backend = "cuda:sm90";
    EXPECT_EQ(odd.run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "page_block_size is 17, must be a multiple of 8")) << message();
  });
}

// Keys then begin anywhere within a page.
TEST_F(CudaHost, padding_in_pages_takes_the_other_kernel) {
  on_a_gpu([] {
    std::vector<int32_t> padding{3, 0};
    Tensor leftpad(on_device(padding), {2}, FA_INT, 32);
    for (const int64_t page_size : {int64_t{0}, int64_t{16}}) {
      PromptCall call(page_size);
      call.args.cache_leftpad = leftpad.get();
      ASSERT_EQ(call.run(), FA_OK) << message();
      EXPECT_EQ(record().q_map, page_size == 0 ? call.q.c.data : nullptr);
    }
  });
}

// A framework's allocator takes longer than the rest of a small call.
TEST_F(CudaHost, tiles_are_counted_only_where_they_do_not_all_run_at_once) {
  on_a_gpu([] {
    static int64_t lent;
    const auto lend = [](void*, int64_t bytes) -> void* {
      lent += bytes;
      return at(7 << 16);
    };
    for (const auto& [total, expected] :
         std::vector<std::pair<int64_t, int64_t>>{{64, 0}, {1 << 16, 8}}) {
      VarlenCall call;
      for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out}) tensor->shape[0] = total;
      call.args.max_seqlen_q = call.args.max_seqlen_k = total;
      call.args.allocate_workspace = lend;
      for (const bool known : {false, true}) {
        lent = 0;
        EXPECT_EQ(known ? call.run_known() : call.run() == FA_OK, true) << message();
        EXPECT_EQ(lent, expected) << total;
        EXPECT_EQ(record().grid, total == 64 ? 12u : 132u);
      }
      // A block for each tile where there is nothing to lend.
      call.args.allocate_workspace = [](void*, int64_t) -> void* { return nullptr; };
      EXPECT_EQ(call.run(), FA_OK) << message();
      EXPECT_GE(record().grid, total == 64 ? 12u : 1024u);
    }
  });
}

TEST_F(CudaHost, dense_causal_calls_are_told_of_memory_that_they_may_go_without) {
  on_a_gpu([] {
    static int64_t lent;
    Call call;
    for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out}) {
      *tensor = Tensor(tensor->c.data, {8, 4096, 4, 64});
    }
    call.args.causal = 1;
    call.args.allocate_workspace = [](void*, int64_t bytes) -> void* {
      lent += bytes;
      return at(7 << 16);
    };
    for (const bool known : {false, true}) {
      lent = 0;
      EXPECT_EQ(known ? call.run_known() : call.run() == FA_OK, true) << message();
      EXPECT_EQ(lent, 8);
      EXPECT_EQ(record().grid, 132u);
    }
    call.args.allocate_workspace = nullptr;
    for (const bool known : {false, true}) {
      EXPECT_EQ(known ? call.run_known() : call.run() == FA_OK, true) << message();
    }
    char text[4000];
    ASSERT_EQ(fa_explain(call.get(), text, sizeof(text), nullptr), FA_OK) << message();
    EXPECT_TRUE(contains(text, " varlen, ")) << text;
    EXPECT_TRUE(contains(text, "; without memory for a counter of tiles forward_sm90")) << text;
  });
}

TEST_F(CudaHost, byte_offsets_count) {
  on_a_gpu([] {
    Call call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    call.q.c.byte_offset = 128;
    EXPECT_TRUE(call.run_known());
    EXPECT_EQ(record().q, at(128));
  });
}

TEST_F(CudaHost, threads_know_their_own_calls) {
  on_a_gpu([] {
    Call call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    std::thread([] { EXPECT_FALSE(Call().run_known()); }).join();
    EXPECT_TRUE(call.run_known());
  });
}

// Each makes another kind of call; most a wrong one.
const std::vector<std::pair<const char*, std::function<void(Call&)>>> kChanges = {
    {"k's batch", [](Call& it) { it.k.shape[0] = 1; }},
    {"k's length", [](Call& it) { it.k.shape[1] = 63; }},
    {"k's heads", [](Call& it) { it.k.shape[2] = 3; }},
    {"q's head_dim", [](Call& it) { it.q.shape[3] = 32; }},
    {"out's length", [](Call& it) { it.out.shape[1] = 65; }},
    {"v's last stride", [](Call& it) { it.v.strides[3] = 2; }},
    {"out's broadcast stride", [](Call& it) { it.out.strides[0] = 0; }},
    {"k's negative stride", [](Call& it) { it.k.strides[1] = -256; }},
    {"v's dtype", [](Call& it) { it.v.c.dtype_code = FA_FLOAT; }},
    {"q's bits", [](Call& it) { it.q.c.dtype_bits = 32; }},
    {"q's lanes", [](Call& it) { it.q.c.dtype_lanes = 2; }},
    {"k's rank", [](Call& it) { it.k.c.ndim = 3; }},
    {"k's device", [](Call& it) { it.k.c.device_id = 1; }},
    {"k's kind of device", [](Call& it) { it.k.c.device_type = FA_CPU; }},
    {"v's address within an element", [](Call& it) { it.v.c.byte_offset = 1; }},
    {"k's missing memory", [](Call& it) { it.k.c.data = nullptr; }},
    {"lse's shape",
     [](Call& it) {
       it.lse.shape = {2, 4, 63};
       it.args.lse = it.lse.get();
     }},
    {"alibi_slopes's shape",
     [](Call& it) {
       it.lse.shape = {2, 4, 63};
       it.args.alibi_slopes = it.lse.get();
     }},
    {"a negative scale",
     [](Call& it) {
       it.scale = -1.0;
       it.args.softmax_scale = &it.scale;
     }},
    {"a wrong window", [](Call& it) { it.args.window_size_left = -2; }},
    {"another wrong window", [](Call& it) { it.args.window_size_right = -2; }},
    {"a negative softcap", [](Call& it) { it.args.softcap = -1.0; }},
    {"dropout of all", [](Call& it) { it.args.dropout_p = 1.0; }},
    {"an unknown backend", [](Call& it) { it.args.backend = "another"; }},
    {"negative splits", [](Call& it) { it.args.num_splits = -1; }},
};

TEST_F(CudaHost, a_wrong_call_is_never_taken_for_a_known_one) {
  on_a_gpu([] {
    Call call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    for (const auto& [name, change] : kChanges) {
      Call changed;
      change(changed);
      EXPECT_FALSE(changed.run_known()) << name;
      EXPECT_EQ(changed.run(), FA_INVALID_ARGUMENT) << name;
    }
    EXPECT_TRUE(call.run_known());
  });
}

TEST_F(CudaHost, a_right_call_of_another_kind_is_not_a_known_one) {
  const std::vector<std::pair<const char*, std::function<void(Call&)>>> changes = {
      {"causal", [](Call& it) { it.args.causal = 1; }},
      {"window, left", [](Call& it) { it.args.window_size_left = 3; }},
      {"window, right", [](Call& it) { it.args.window_size_right = 3; }},
      {"softcap", [](Call& it) { it.args.softcap = 5.0; }},
      {"softmax_scale", [](Call& it) { it.args.softmax_scale = &it.scale; }},
      {"lse", [](Call& it) { it.args.lse = it.lse.get(); }},
      {"alignment", [](Call& it) { it.q.c.byte_offset = 2; }},
      {"strides", [](Call& it) { it.q.strides[0] += 64; }},
      {"dropout_p", [](Call& it) { it.args.dropout_p = 0.5; }},
      {"batch of one",
       [](Call& it) {
         for (Tensor* tensor : {&it.q, &it.k, &it.v, &it.out}) tensor->shape[0] = 1;
       }},
      {"the device",
       [](Call& it) {
         for (Tensor* tensor : {&it.q, &it.k, &it.v, &it.out}) tensor->c.device_id = 1;
       }},
      {"the backend", [](Call& it) { it.args.backend = "cuda:sm80"; }},
  };
  on_a_gpu([&] {
    ASSERT_EQ(Call().run(), FA_OK) << message();
    for (const auto& [name, change] : changes) {
      Call changed;
      change(changed);
      EXPECT_FALSE(changed.run_known()) << name;
      EXPECT_EQ(changed.run(), FA_OK) << name << ": " << message();
      EXPECT_TRUE(changed.run_known()) << name;
      EXPECT_TRUE(Call().run_known() || Call().run() == FA_OK) << name;
    }
  });
}

TEST_F(CudaHost, one_option_is_not_another) {
  on_a_gpu([] {
    Tensor per_head(at(4 << 16), {4}, FA_FLOAT, 32);
    Call with_slopes, with_sink;
    with_slopes.args.alibi_slopes = per_head.get();
    with_sink.args.learnable_sink = per_head.get();
    ASSERT_EQ(with_slopes.run(), FA_OK) << message();
    EXPECT_TRUE(with_slopes.run_known());
    EXPECT_FALSE(with_sink.run_known());

    Call on_sm80, on_sm90;
    on_sm80.args.backend = "cuda:sm80";
    on_sm90.args.backend = "cuda:sm90";
    ASSERT_EQ(on_sm80.run(), FA_OK) << message();
    EXPECT_FALSE(on_sm90.run_known());
  });
}

TEST_F(CudaHost, the_environment_is_heeded_at_each_call) {
  on_a_gpu([] {
    Call call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    setenv("FLASH_ATTENTION_BACKEND", "another", 1);
    EXPECT_FALSE(call.run_known());
    EXPECT_EQ(call.run(), FA_INVALID_ARGUMENT);
    unsetenv("FLASH_ATTENTION_BACKEND");
    setenv("FLASH_ATTENTION_USE_FLAGGEMS", "true", 1);
    EXPECT_FALSE(call.run_known());
    unsetenv("FLASH_ATTENTION_USE_FLAGGEMS");
    EXPECT_TRUE(call.run_known());
  });
}

TEST_F(CudaHost, rows_of_one_element_have_no_known_calls) {
  on_a_gpu([] {
    Call call;
    for (Tensor* tensor : {&call.q, &call.k, &call.v, &call.out}) tensor->shape[3] = 1;
    ASSERT_EQ(call.run(), FA_OK) << message();
    EXPECT_FALSE(call.run_known());
  });
}

// ---- FLASH_ATTENTION_CHECK. ----

TEST_F(CudaHost, lengths_on_the_device_are_checked_on_request) {
  on_a_gpu([] {
    VarlenCall call;
    ASSERT_EQ(call.run(), FA_OK) << message();
    EXPECT_TRUE(call.run_known());
    call.offsets_k[1] = 40;
    EXPECT_EQ(call.run(), FA_OK);
    EXPECT_EQ(record().reads, 0);
    setenv("FLASH_ATTENTION_CHECK", "1", 1);
    const int launches = record().launches;
    EXPECT_FALSE(call.run_known());
    EXPECT_EQ(call.run(), FA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(message(), "cu_seqlens_k: entry 2 is 30, must be at least entry 1"))
        << message();
    EXPECT_EQ(record().launches, launches);
    EXPECT_EQ(record().reads, 2);
    call.offsets_k[1] = 10;
    EXPECT_EQ(call.run(), FA_OK) << message();
    EXPECT_EQ(fa_validate(call.get(), nullptr, 1), FA_OK);
    call.args.max_seqlen_q = 33;
    EXPECT_EQ(call.run(), FA_INVALID_ARGUMENT);
    EXPECT_EQ(fa_validate(call.get(), nullptr, 1), FA_INVALID_ARGUMENT);
    EXPECT_EQ(fa_validate(call.get(), nullptr, 0), FA_OK);
  });
}

TEST_F(CudaHost, pages_on_the_device_are_checked_on_request) {
  setenv("FLASH_ATTENTION_CHECK", "1", 1);
  on_a_gpu([] {
    VarlenCall call;
    for (Tensor* tensor : {&call.k, &call.v}) *tensor = Tensor(tensor->c.data, {8, 16, 4, 64});
    std::vector<int32_t> pages{0, 1, 2, -9, 3, 4, 5, -9, 5, 6, 7, -9};
    Tensor block_table(on_device(pages), {3, 3}, FA_INT, 32);
    block_table.strides[0] = 4;
    call.args.block_table = block_table.get();
    EXPECT_EQ(call.run(), FA_OK) << message();
    pages[10] = 8;
    EXPECT_EQ(call.run(), FA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(message(), "block_table: entry [2, 2] is 8")) << message();
  });
  unsetenv("FLASH_ATTENTION_CHECK");
}

TEST_F(CudaHost, values_are_not_read_into_a_graph) {
  setenv("FLASH_ATTENTION_CHECK", "1", 1);
  setenv("FA_STUB_CAPTURING", "1", 1);
  on_a_gpu([] {
    EXPECT_EQ(Call().run(), FA_OK) << message();  // nothing to read
    EXPECT_EQ(VarlenCall().run(), FA_UNSUPPORTED);
    EXPECT_TRUE(contains(message(), "FLASH_ATTENTION_CHECK")) << message();
    EXPECT_EQ(record().reads, 0);
  });
  unsetenv("FA_STUB_CAPTURING");
  unsetenv("FLASH_ATTENTION_CHECK");
}

}  // namespace
}  // namespace fa
