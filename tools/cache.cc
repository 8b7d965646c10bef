#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "command_line.h"
#include "commands.h"
#include "cuda/kernel_cache.h"
#include "cuda/kernel_id.h"
#include "cuda/precompile.h"

namespace fa::tools {
namespace {

struct Request {
  bool clear = false;
  int64_t precompile = 0;  // compute capability, as in 90
  std::string filter;
  int64_t shard = 0;
  int64_t num_shards = 1;
  bool list = false;
};

void show() {
  const cuda::KernelCache cache;
  const cuda::KernelCache::Usage usage = cache.usage();
  std::printf("%s\n  %lld kernels, %.1f MB\n",
              cache.folder().empty() ? "(no folder: set FLASH_ATTENTION_CACHE_DIR)"
                                     : cache.folder().c_str(),
              static_cast<long long>(usage.entries), static_cast<double>(usage.bytes) / 1e6);
}

int clear() {
  const core::Status status = cuda::KernelCache().clear();
  if (status.ok()) return kSuccess;
  std::fprintf(stderr, "flash-attn-plus cache: %s\n", status.message().c_str());
  return kFailure;
}

// Whether `text` has one of the alternatives in `filter`, which are separated by '|'.
bool matches(const std::string& text, const std::string& filter) {
  size_t begin = 0;
  for (;;) {
    const size_t end = std::min(filter.find('|', begin), filter.size());
    if (text.find(filter.substr(begin, end - begin)) != std::string::npos) return true;
    if (end == filter.size()) return false;
    begin = end + 1;
  }
}

// The kernels of this request, of all that a device can be asked for.
std::vector<cuda::KernelId> selected(const Request& request) {
  std::vector<cuda::KernelId> list;
  int64_t index = 0;
  for (const cuda::KernelId& id : cuda::kernels_for(static_cast<int>(request.precompile))) {
    if (!matches(cuda::to_string(id), request.filter)) continue;
    if (index++ % request.num_shards == request.shard) list.push_back(id);
  }
  return list;
}

int precompile(const Request& request) {
  const int compute_capability = static_cast<int>(request.precompile);
  bool failed = false;
  for (const cuda::KernelId& id : selected(request)) {
    const std::string what = cuda::to_string(id);
    const std::string arch = cuda::arch(id, compute_capability);
    if (request.list) {
      std::printf("%s: %s\n", arch.c_str(), what.c_str());
      continue;
    }
    const core::Result<cuda::CompileReport> report = cuda::precompile(id, compute_capability);
    if (!report.ok()) {
      std::fprintf(stderr, "flash-attn-plus cache: %s\n", report.status().message().c_str());
      if (report.status().code() == core::StatusCode::kUnsupported) return kFailure;
      failed = true;
      continue;
    }
    const cuda::CompileReport& it = report.value();
    std::printf("%s: %s: %d registers, %d bytes spilled%s\n", arch.c_str(), what.c_str(),
                it.registers, it.spilled_bytes, it.serialised ? ", wgmma serialised" : "");
    std::fflush(stdout);
  }
  return failed ? kFailure : kSuccess;
}

}  // namespace

int run_cache(int argc, char** argv) {
  Request request;
  CommandLine command("cache",
                      "Shows, clears or fills the cache of kernels compiled for NVIDIA GPUs. To "
                      "compile takes NVRTC,\n"
                      "but neither a GPU nor a driver.");
  command.flag("--clear", &request.clear, "remove every kernel");
  command.option("--precompile", "CC", &request.precompile,
                 "compile for devices of compute capability CC, as in 90 for 9.0");
  command.option("--filter", "TEXT", &request.filter,
                 "only kernels described so; alternatives by '|'");
  command.flag("--list", &request.list, "with --precompile: only tell which kernels");
  command.option("--shard", "I", &request.shard, "of --num-shards, from 0; for several processes");
  command.option("--num-shards", "N", &request.num_shards, "parts of the work; default 1");
  if (const auto code = command.parse(argc, argv)) return *code;
  if (request.num_shards < 1 || request.shard < 0 || request.shard >= request.num_shards) {
    return command.fail("--shard must be in [0, --num-shards)");
  }
  if (request.clear) {
    if (const int code = clear(); code != kSuccess) return code;
  }
  if (request.precompile > 0) return precompile(request);
  show();
  return kSuccess;
}

}  // namespace fa::tools
