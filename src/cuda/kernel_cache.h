// Compiled kernels on disk, shared by all processes of a user.
//
// A folder that only its owner may enter, an entry per kernel. Entries appear whole (written
// beside, synchronised, renamed), so that any number of processes may read and write at once; one
// that is damaged, or whose key is another's, counts as absent and is written again.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/status.h"
#include "cuda/nvrtc.h"

namespace fa::cuda {

class KernelCache {
 public:
  // FLASH_ATTENTION_CACHE_DIR, or ~/.cache/flash-attention-plus.
  KernelCache();
  explicit KernelCache(std::string folder, int64_t max_bytes = kDefaultMaxBytes);

  // Some 500 kernels.
  static constexpr int64_t kDefaultMaxBytes = int64_t{256} << 20;

  const std::string& folder() const { return folder_; }

  // The kernel stored under `key`, without its log.
  std::optional<CompiledKernel> load(const std::string& key) const;

  // Stores it, and removes the least recently used entries where they take too much. A cache that
  // cannot be written to is no error of a call: the Status is for those who ask.
  core::Status store(const std::string& key, const CompiledKernel& kernel) const;

  struct Usage {
    int64_t entries = 0;
    int64_t bytes = 0;
  };
  Usage usage() const;

  // Removes every entry.
  core::Status clear() const;

 private:
  std::string path_of(const std::string& key) const;
  void trim() const;

  std::string folder_;  // "": there is none
  int64_t max_bytes_ = kDefaultMaxBytes;
};

}  // namespace fa::cuda
