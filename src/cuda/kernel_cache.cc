#include "cuda/kernel_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "core/environment.h"

namespace fa::cuda {
namespace {

namespace filesystem = std::filesystem;
using core::Status;

constexpr std::string_view kMagic = "flash-attention-plus kernel 2\n";
constexpr std::string_view kSuffix = ".kernel";
constexpr std::string_view kTemporary = ".writing-";
// A temporary file this old belongs to a process that has died.
constexpr auto kAbandonedAfter = std::chrono::hours(1);

uint64_t fnv1a(std::string_view text, uint64_t hash) {
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash;
}

constexpr uint64_t kFnvOffset = 0xCBF29CE484222325;

// FNV-1a over words, eight times as fast as over bytes; what is left over counts by bytes.
uint64_t checksum(std::string_view bytes) {
  uint64_t hash = kFnvOffset;
  uint64_t word = 0;
  for (; bytes.size() >= sizeof(word); bytes.remove_prefix(sizeof(word))) {
    std::memcpy(&word, bytes.data(), sizeof(word));
    hash = (hash ^ word) * 0x100000001B3;
    hash ^= hash >> 32;  // else the upper bits of a word would reach none below them
  }
  return fnv1a(bytes, hash);
}

void append_number(std::string& to, uint64_t value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// An entry: magic, three lengths, key, kernel name, image, checksum of all before it.
std::string encode(const std::string& key, const CompiledKernel& kernel) {
  std::string bytes{kMagic};
  for (const std::string* part : {&key, &kernel.name, &kernel.image}) {
    append_number(bytes, part->size());
  }
  bytes += key + kernel.name + kernel.image;
  append_number(bytes, checksum(bytes));
  return bytes;
}

// Takes bytes off the front of an entry; fails for good once they do not suffice.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  std::string_view take(uint64_t count) {
    if (count > bytes_.size()) {
      failed_ = true;
      return {};
    }
    const std::string_view part = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return part;
  }
  uint64_t take_number() {
    uint64_t value = 0;
    const std::string_view part = take(sizeof(value));
    if (!failed_) std::memcpy(&value, part.data(), sizeof(value));
    return value;
  }
  bool finished() const { return !failed_ && bytes_.empty(); }
  bool failed() const { return failed_; }

 private:
  std::string_view bytes_;
  bool failed_ = false;
};

std::optional<CompiledKernel> decode(std::string_view bytes, const std::string& key) {
  if (bytes.size() < sizeof(uint64_t)) return std::nullopt;
  const std::string_view summed = bytes.substr(0, bytes.size() - sizeof(uint64_t));
  Reader reader(bytes);
  if (reader.take(kMagic.size()) != kMagic) return std::nullopt;
  std::array<uint64_t, 3> lengths{};
  for (uint64_t& length : lengths) length = reader.take_number();
  const std::string_view stored_key = reader.take(lengths[0]);
  const std::string_view name = reader.take(lengths[1]);
  const std::string_view image = reader.take(lengths[2]);
  const uint64_t stored_sum = reader.take_number();
  if (!reader.finished() || stored_sum != checksum(summed) || stored_key != key) {
    return std::nullopt;
  }
  return CompiledKernel{std::string{name}, std::string{image}, ""};
}

Status system_error(const char* what, const std::string& path) {
  return {core::StatusCode::kInternal, core::concat(what, " ", path, ": ", std::strerror(errno))};
}

// Whether nobody else can have put anything into the folder: kernels are code.
bool is_private(const std::string& folder) {
  struct stat info {};
  if (lstat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) return false;
  return info.st_uid == geteuid() && (info.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

Status make_folder(const std::string& folder) {
  if (folder.empty()) {
    return core::unsupported("there is no home folder; set FLASH_ATTENTION_CACHE_DIR");
  }
  std::error_code error;
  const filesystem::path path(folder);
  filesystem::create_directories(path.parent_path(), error);
  if (mkdir(folder.c_str(), S_IRWXU) != 0 && errno != EEXIST) {
    return system_error("cannot create", folder);
  }
  if (is_private(folder)) return {};
  return core::unsupported(folder, " must be a folder of this user that nobody else can write to");
}

// Writes all of `bytes` to a new file beside `path`, then gives it that name.
Status write_whole(const std::string& folder, const std::string& path, std::string_view bytes) {
  std::string temporary = folder + "/" + std::string{kTemporary} + "XXXXXX";
  const int file = mkstemp(temporary.data());  // readable by its owner alone
  if (file < 0) return system_error("cannot create", temporary);
  bool written = true;
  while (written && !bytes.empty()) {
    const ssize_t count = write(file, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    written = count > 0;
    if (written) bytes.remove_prefix(static_cast<size_t>(count));
  }
  written = written && fsync(file) == 0;
  written = close(file) == 0 && written;
  written = written && std::rename(temporary.c_str(), path.c_str()) == 0;
  if (written) return {};
  Status status = system_error("cannot write", path);
  unlink(temporary.c_str());
  return status;
}

std::optional<std::string> read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return std::nullopt;
  std::string bytes(static_cast<size_t>(file.tellg()), '\0');
  file.seekg(0);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) return std::nullopt;
  return bytes;
}

struct Entry {
  filesystem::path path;
  filesystem::file_time_type used;
  int64_t bytes;
};

// The files that are the cache's own; temporary ones where `temporary`.
std::vector<Entry> entries(const std::string& folder, bool temporary) {
  std::vector<Entry> found;
  std::error_code error;
  filesystem::directory_iterator it(folder, error);
  for (; !error && it != filesystem::directory_iterator(); it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!(temporary ? name.starts_with(kTemporary) : name.ends_with(kSuffix))) continue;
    std::error_code gone;
    const auto used = it->last_write_time(gone);
    const auto bytes = it->file_size(gone);
    if (!gone) found.push_back({it->path(), used, static_cast<int64_t>(bytes)});
  }
  return found;
}

}  // namespace

KernelCache::KernelCache() : KernelCache(core::environment::cache_folder()) {}

KernelCache::KernelCache(std::string folder, int64_t max_bytes)
    : folder_(std::move(folder)), max_bytes_(max_bytes) {}

std::string KernelCache::path_of(const std::string& key) const {
  char name[64];
  std::snprintf(name, sizeof(name), "%016llx%016llx",
                static_cast<unsigned long long>(fnv1a(key, kFnvOffset)),
                static_cast<unsigned long long>(fnv1a(key, ~kFnvOffset)));
  return folder_ + "/" + name + std::string{kSuffix};
}

std::optional<CompiledKernel> KernelCache::load(const std::string& key) const {
  if (folder_.empty() || !is_private(folder_)) return std::nullopt;
  const std::string path = path_of(key);
  const std::optional<std::string> bytes = read_whole(path);
  if (!bytes) return std::nullopt;
  std::optional<CompiledKernel> kernel = decode(*bytes, key);
  if (kernel) utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // used now
  return kernel;
}

Status KernelCache::store(const std::string& key, const CompiledKernel& kernel) const {
  FA_TRY(make_folder(folder_));
  FA_TRY(write_whole(folder_, path_of(key), encode(key, kernel)));
  trim();
  return {};
}

void KernelCache::trim() const {
  const auto now = filesystem::file_time_type::clock::now();
  std::error_code ignored;
  for (const Entry& entry : entries(folder_, true)) {
    if (now - entry.used > kAbandonedAfter) filesystem::remove(entry.path, ignored);
  }
  std::vector<Entry> list = entries(folder_, false);
  int64_t bytes = 0;
  for (const Entry& entry : list) bytes += entry.bytes;
  if (bytes <= max_bytes_) return;
  std::sort(list.begin(), list.end(),
            [](const Entry& a, const Entry& b) { return a.used < b.used; });
  for (const Entry& entry : list) {
    if (bytes <= max_bytes_) return;
    filesystem::remove(entry.path, ignored);
    bytes -= entry.bytes;
  }
}

KernelCache::Usage KernelCache::usage() const {
  Usage usage;
  for (const Entry& entry : entries(folder_, false)) {
    ++usage.entries;
    usage.bytes += entry.bytes;
  }
  return usage;
}

Status KernelCache::clear() const {
  for (const bool temporary : {false, true}) {
    for (const Entry& entry : entries(folder_, temporary)) {
      std::error_code error;
      filesystem::remove(entry.path, error);
      if (error) {
        return {core::StatusCode::kInternal,
                core::concat("cannot remove ", entry.path.string(), ": ", error.message())};
      }
    }
  }
  return {};
}

}  // namespace fa::cuda
