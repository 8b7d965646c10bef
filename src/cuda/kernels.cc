#include "cuda/kernels.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "core/environment.h"
#include "cuda/device_sources.h"
#include "cuda/kernel_cache.h"

namespace fa::cuda {
namespace {

using core::Result;
using core::Status;

constexpr const char* kElementNames[] = {"float16", "bfloat16", "float32"};
constexpr const char* kScoreNames[] = {"", " softcap", " general"};
constexpr const char* kLoaderNames[] = {"", " paged", " unaligned"};

uint64_t sources_hash() {
  static const uint64_t hash = [] {
    uint64_t value = 0xCBF29CE484222325;
    const auto add = [&](const char* text) {
      do {
        value = (value ^ static_cast<unsigned char>(*text)) * 0x100000001B3;
      } while (*text++ != '\0');
    };
    for (const DeviceSource& file : device_sources()) {
      add(file.name);
      add(file.text);
    }
    return value;
  }();
  return hash;
}

// From the disk, or from NVRTC and then to the disk.
Result<CompiledKernel> obtain(const KernelId& id, int compute_capability) {
  const KernelCache cache;
  const Result<std::string> key = cache_key(id, compute_capability);
  if (!key.ok()) return key.status();
  if (std::optional<CompiledKernel> stored = cache.load(key.value())) return std::move(*stored);
  Result<CompiledKernel> compiled = compile_kernel(id, compute_capability);
  if (!compiled.ok()) return compiled;
  const Status stored = cache.store(key.value(), compiled.value());
  if (!stored.ok() && core::environment::verbose_dispatch()) {
    std::fprintf(stderr, "flash_attn kernel cache: %s\n", stored.message().c_str());
  }
  return compiled;
}

Result<LoadedKernel> load(int index, const KernelId& id) {
  const Result<const Device*> found = device(index);
  if (!found.ok()) return found.status();
  const Device& on = *found.value();
  const Result<CompiledKernel> compiled = obtain(id, on.properties.compute_capability);
  if (!compiled.ok()) return compiled.status();
  const Driver& driver = *on.driver;
  const CurrentContext current(on);
  FA_TRY(current.status());
  LoadedKernel kernel{id, &on};
  Module module = nullptr;
  FA_TRY(
      driver.check(driver.load_module(&module, compiled.value().image.data()), "cuModuleLoadData"));
  FA_TRY(driver.check(driver.get_function(&kernel.function, module, compiled.value().name.c_str()),
                      "cuModuleGetFunction"));
  FA_TRY(driver.check(
      driver.function_attribute(&kernel.registers, FunctionAttribute::kRegisters, kernel.function),
      "cuFuncGetAttribute"));
  FA_TRY(driver.check(driver.function_attribute(&kernel.local_bytes, FunctionAttribute::kLocalBytes,
                                                kernel.function),
                      "cuFuncGetAttribute"));
  FA_TRY(driver.check(
      driver.set_function_attribute(kernel.function, FunctionAttribute::kMaxDynamicSharedBytes,
                                    dynamic_shared_bytes(id)),
      "cuFuncSetAttribute"));
  return kernel;
}

// A place for a kernel, of which one thread at a time tries to fill it.
struct Slot {
  std::mutex mutex;
  std::optional<LoadedKernel> kernel;
};

class Store {
 public:
  Slot& slot(int index, const KernelId& id) {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Slot>& slot = slots_[core::concat(index, " ", expression(id))];
    if (slot == nullptr) slot = std::make_unique<Slot>();
    return *slot;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::unique_ptr<Slot>> slots_;
};

}  // namespace

const char* name(Family family) {
  constexpr const char* kNames[] = {"forward_sm80", "forward_fp32", "s_dmask",
                                    "forward_sm90", "update_cache", "combine_splits"};
  return kNames[static_cast<int>(family)];
}

std::string to_string(const KernelId& id) {
  const KernelSpec& spec = id.spec;
  std::string dims = std::to_string(spec.head_dim);
  if (spec.head_dim_v != spec.head_dim) dims += "/" + std::to_string(spec.head_dim_v);
  return core::concat(name(id.family), " ", kElementNames[static_cast<int>(spec.element)],
                      " head_dim ", dims, kScoreNames[static_cast<int>(spec.score)],
                      spec.dropout ? " dropout" : "", kLoaderNames[static_cast<int>(spec.loader)],
                      spec.packs ? " packed" : "", spec.varlen ? " varlen" : "", ", tile ",
                      spec.tile_m, "x", spec.tile_n, ", ", spec.num_warps, " warps",
                      spec.stages > 1 ? core::concat(", ", spec.stages, " stages") : "",
                      spec.teams > 1 ? core::concat(", ", spec.teams, " teams") : "");
}

std::string expression(const KernelId& id) {
  const KernelSpec& spec = id.spec;
  return core::concat(
      "fa::cuda::", name(id.family), "<fa::cuda::KernelSpec{.element = fa::cuda::Element(",
      static_cast<int>(spec.element), "), .head_dim = ", spec.head_dim,
      ", .head_dim_v = ", spec.head_dim_v, ", .tile_m = ", spec.tile_m, ", .tile_n = ", spec.tile_n,
      ", .num_warps = ", spec.num_warps, ", .score = fa::cuda::Score(",
      static_cast<int>(spec.score), "), .dropout = ", spec.dropout ? "true" : "false",
      ", .loader = fa::cuda::Loader(", static_cast<int>(spec.loader),
      "), .packs = ", spec.packs ? "true" : "false", ", .stages = ", spec.stages,
      ", .varlen = ", spec.varlen ? "true" : "false", ", .teams = ", spec.teams, "}>");
}

int threads(const KernelId& id) { return id.spec.num_warps * 32; }

int dynamic_shared_bytes(const KernelId& id) {
  switch (id.family) {
    case Family::kForward80:
      return forward_sm80_shared_bytes(id.spec);
    case Family::kForward32:
      return forward_fp32_shared_bytes(id.spec);
    case Family::kForward90:
      return forward_sm90_shared_bytes(id.spec);
    case Family::kSDmask:
    case Family::kUpdateCache:
    case Family::kCombineSplits:
      break;
  }
  return 0;
}

std::string arch(const KernelId& id, int compute_capability) {
  return core::concat("sm_", compute_capability, id.family == Family::kForward90 ? "a" : "");
}

Result<CompiledKernel> compile_kernel(const KernelId& id, int compute_capability) {
  const std::string source = core::concat("#include \"cuda/device/", name(id.family), ".h\"\n");
  return compile(source, expression(id), arch(id, compute_capability));
}

Result<std::string> cache_key(const KernelId& id, int compute_capability) {
  const Result<std::string> compiler = nvrtc_identity();
  if (!compiler.ok()) return compiler.status();
  return core::concat(expression(id), "\n", arch(id, compute_capability), "\n", compile_options(),
                      "\n", compiler.value(), "\n", sources_hash());
}

Result<const LoadedKernel*> load_kernel(int index, const KernelId& id) {
  static Store store;
  Slot& slot = store.slot(index, id);
  const std::lock_guard lock(slot.mutex);
  if (!slot.kernel) {
    Result<LoadedKernel> kernel = load(index, id);
    if (!kernel.ok()) return kernel.status();
    slot.kernel = kernel.value();
  }
  return &*slot.kernel;
}

std::string describe_kernel(const LoadedKernel& it) {
  std::string text = core::concat(to_string(it.id), ", ", it.registers, " registers, ",
                                  dynamic_shared_bytes(it.id), " bytes of shared memory");
  if (it.local_bytes > 0) text += core::concat(", ", it.local_bytes, " bytes of local memory");
  return text;
}

Status LoadedKernel::launch(int64_t num_blocks, void** arguments, void* stream) const {
  if (num_blocks == 0) return {};
  if (num_blocks > kMaxBlocks) {
    return core::unsupported("the problem takes ", num_blocks, " blocks of ", to_string(id),
                             ", a launch has at most ", kMaxBlocks);
  }
  const CurrentContext current(*device);
  FA_TRY(current.status());
  return device->driver->check(
      device->driver->launch(function, static_cast<unsigned>(num_blocks), 1, 1,
                             static_cast<unsigned>(threads(id)), 1, 1,
                             static_cast<unsigned>(dynamic_shared_bytes(id)),
                             static_cast<StreamHandle>(stream), arguments, nullptr),
      "cuLaunchKernel");
}

}  // namespace fa::cuda
