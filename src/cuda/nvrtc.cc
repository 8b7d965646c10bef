#include "cuda/nvrtc.h"

#include <dlfcn.h>
#include <link.h>

#include <filesystem>
#include <mutex>
#include <utility>
#include <vector>

#include "core/environment.h"
#include "cuda/device_sources.h"

namespace fa::cuda {
namespace {

namespace filesystem = std::filesystem;
using core::Result;
using core::Status;

constexpr const char* kNames[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"};
constexpr const char* kOptions[] = {"--std=c++20", "--device-as-default-execution-space",
                                    "--ptxas-options=-v"};

using NvrtcResult = int;
using Program = struct ProgramTag*;

struct Nvrtc {
  NvrtcResult (*version)(int* major, int* minor);
  const char* (*error_string)(NvrtcResult result);
  NvrtcResult (*create)(Program* program, const char* source, const char* name, int num_headers,
                        const char* const* headers, const char* const* include_names);
  NvrtcResult (*destroy)(Program* program);
  NvrtcResult (*add_name)(Program program, const char* expression);
  NvrtcResult (*lowered_name)(Program program, const char* expression, const char** name);
  NvrtcResult (*compile)(Program program, int num_options, const char* const* options);
  NvrtcResult (*log_size)(Program program, size_t* bytes);
  NvrtcResult (*log)(Program program, char* text);
  NvrtcResult (*cubin_size)(Program program, size_t* bytes);
  NvrtcResult (*cubin)(Program program, char* image);

  Status check(NvrtcResult result, const char* call) const {
    if (result == 0) return {};
    return {core::StatusCode::kInternal, core::concat(call, ": ", error_string(result))};
  }
};

// Where NVRTC is: a file, or (path empty) a name that the system's search knows.
struct Place {
  std::string path;
  std::string name;
};

// Of a library that is loaded under `name`. Told by its file, a library has the same identity
// whether or not the process has loaded it.
Place place_of(void* library, const char* name) {
  link_map* map = nullptr;
  const bool found = dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map->l_name != nullptr;
  Place place{found ? map->l_name : "", name};
  dlclose(library);
  return place;
}

class Finder {
 public:
  void add_folder(std::string folder) {
    const std::lock_guard lock(mutex_);
    folders_.push_back(std::move(folder));
  }

  Result<Place> find() {
    const std::lock_guard lock(mutex_);
    const std::string forced = core::environment::nvrtc_path();
    if (!forced.empty()) {
      std::error_code ignored;
      if (filesystem::exists(forced, ignored)) return Place{forced, ""};
      return core::unsupported("FLASH_ATTENTION_NVRTC: there is no file '", forced, "'");
    }
    // What the process has loaded already is what its framework has chosen.
    for (const char* name : kNames) {
      if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return place_of(library, name);
    }
    for (const std::string& folder : folders_) {
      for (const char* name : kNames) {
        std::error_code ignored;
        const filesystem::path path = filesystem::path(folder) / name;
        if (filesystem::exists(path, ignored)) return Place{path.string(), ""};
      }
    }
    for (const char* name : kNames) {
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return place_of(library, name);
    }
    return core::unsupported(
        "NVRTC, which compiles the kernels, is not on this machine: install nvidia-cuda-nvrtc "
        "(pip), "
        "or set FLASH_ATTENTION_NVRTC to the path of libnvrtc.so");
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> folders_;
};

Finder& finder() {
  static Finder finder;
  return finder;
}

template <class FunctionPointer>
Status find(void* library, const char* name, FunctionPointer& function) {
  function = reinterpret_cast<FunctionPointer>(dlsym(library, name));
  if (function != nullptr) return {};
  return core::unsupported("libnvrtc has no function ", name, ": it must be of CUDA 12 or newer");
}

Status find_all(void* library, Nvrtc& nvrtc) {
  FA_TRY(find(library, "nvrtcVersion", nvrtc.version));
  FA_TRY(find(library, "nvrtcGetErrorString", nvrtc.error_string));
  FA_TRY(find(library, "nvrtcCreateProgram", nvrtc.create));
  FA_TRY(find(library, "nvrtcDestroyProgram", nvrtc.destroy));
  FA_TRY(find(library, "nvrtcAddNameExpression", nvrtc.add_name));
  FA_TRY(find(library, "nvrtcGetLoweredName", nvrtc.lowered_name));
  FA_TRY(find(library, "nvrtcCompileProgram", nvrtc.compile));
  FA_TRY(find(library, "nvrtcGetProgramLogSize", nvrtc.log_size));
  FA_TRY(find(library, "nvrtcGetProgramLog", nvrtc.log));
  FA_TRY(find(library, "nvrtcGetCUBINSize", nvrtc.cubin_size));
  return find(library, "nvrtcGetCUBIN", nvrtc.cubin);
}

// NVRTC opens its second library by name alone; loaded first from beside it, that one is found.
void load_builtins_beside(const std::string& path) {
  std::error_code error;
  const filesystem::path folder = filesystem::path(path).parent_path();
  for (const auto& entry : filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("libnvrtc-builtins.so")) dlopen(entry.path().c_str(), RTLD_NOW);
  }
}

Result<Nvrtc> load() {
  const Result<Place> place = finder().find();
  if (!place.ok()) return place.status();
  const std::string& path = place.value().path;
  if (!path.empty()) load_builtins_beside(path);
  void* library =
      dlopen(path.empty() ? place.value().name.c_str() : path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    return core::unsupported("NVRTC cannot be loaded: ", why == nullptr ? path.c_str() : why);
  }
  Nvrtc nvrtc{};
  FA_TRY(find_all(library, nvrtc));
  return nvrtc;
}

Result<const Nvrtc*> nvrtc() {
  static const Result<Nvrtc> loaded = load();
  if (!loaded.ok()) return loaded.status();
  return &loaded.value();
}

// A program while it lives.
class Compilation {
 public:
  explicit Compilation(const Nvrtc& nvrtc) : nvrtc_(nvrtc) {}
  ~Compilation() {
    if (program_ != nullptr) nvrtc_.destroy(&program_);
  }
  Compilation(const Compilation&) = delete;
  Compilation& operator=(const Compilation&) = delete;

  Result<CompiledKernel> run(const std::string& source, const std::string& expression,
                             const std::string& arch) {
    std::vector<const char*> headers, names;
    for (const DeviceSource& file : device_sources()) {
      headers.push_back(file.text);
      names.push_back(file.name);
    }
    FA_TRY(
        nvrtc_.check(nvrtc_.create(&program_, source.c_str(), "flash_attention.cu",
                                   static_cast<int>(headers.size()), headers.data(), names.data()),
                     "nvrtcCreateProgram"));
    FA_TRY(nvrtc_.check(nvrtc_.add_name(program_, expression.c_str()), "nvrtcAddNameExpression"));
    std::vector<const char*> options(std::begin(kOptions), std::end(kOptions));
    const std::string arch_option = "--gpu-architecture=" + arch;
    options.push_back(arch_option.c_str());
    const NvrtcResult result =
        nvrtc_.compile(program_, static_cast<int>(options.size()), options.data());
    const std::string log = text(nvrtc_.log_size, nvrtc_.log);
    if (result != 0) {
      return Status{core::StatusCode::kInternal,
                    core::concat("NVRTC cannot compile ", expression, " for ", arch, ": ",
                                 nvrtc_.error_string(result), "\n", log)};
    }
    const char* lowered = nullptr;
    FA_TRY(nvrtc_.check(nvrtc_.lowered_name(program_, expression.c_str(), &lowered),
                        "nvrtcGetLoweredName"));
    return CompiledKernel{lowered, text(nvrtc_.cubin_size, nvrtc_.cubin), log};
  }

 private:
  std::string text(NvrtcResult (*size)(Program, size_t*),
                   NvrtcResult (*get)(Program, char*)) const {
    size_t bytes = 0;
    if (size(program_, &bytes) != 0 || bytes == 0) return {};
    std::string result(bytes, '\0');
    if (get(program_, result.data()) != 0) return {};
    return result;
  }

  const Nvrtc& nvrtc_;
  Program program_ = nullptr;
};

}  // namespace

void add_nvrtc_folder(std::string folder) { finder().add_folder(std::move(folder)); }

Result<std::string> nvrtc_identity() {
  const Result<Place> place = finder().find();
  if (!place.ok()) return place.status();
  const std::string& path = place.value().path;
  if (!path.empty()) {
    // Its size differs between versions, and asking for it takes no 100 MB library to be loaded.
    std::error_code error;
    const auto bytes = filesystem::file_size(path, error);
    if (!error) return core::concat(filesystem::path(path).filename().string(), " ", bytes);
  }
  const Result<const Nvrtc*> loaded = nvrtc();
  if (!loaded.ok()) return loaded.status();
  int major = 0, minor = 0;
  FA_TRY(loaded.value()->check(loaded.value()->version(&major, &minor), "nvrtcVersion"));
  return core::concat("NVRTC ", major, ".", minor);
}

Result<CompiledKernel> compile(std::string_view source, std::string_view expression,
                               std::string_view arch) {
  const Result<const Nvrtc*> loaded = nvrtc();
  if (!loaded.ok()) return loaded.status();
  return Compilation(*loaded.value())
      .run(std::string{source}, std::string{expression}, std::string{arch});
}

std::string compile_options() {
  std::string text;
  for (const char* option : kOptions) text += core::concat(option, " ");
  return text;
}

}  // namespace fa::cuda
