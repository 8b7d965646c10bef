#include "cuda/kernel_cache.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace fa::cuda {
namespace {

namespace filesystem = std::filesystem;

class KernelCacheTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (filesystem::temp_directory_path() / "kernel_cache_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    parent_ = name;
  }
  void TearDown() override { filesystem::remove_all(parent_); }

  std::string folder() const { return (parent_ / "cache").string(); }

  std::vector<filesystem::path> files() const {
    std::vector<filesystem::path> list;
    for (const auto& entry : filesystem::directory_iterator(folder())) list.push_back(entry.path());
    return list;
  }

  filesystem::path parent_;
};

const CompiledKernel kKernel{"_Z6kernel",
                             std::string("\x7f"
                                         "ELF\0machine code",
                                         17),
                             "log"};

TEST_F(KernelCacheTest, what_is_stored_is_loaded) {
  const KernelCache cache(folder());
  EXPECT_FALSE(cache.load("key"));
  ASSERT_TRUE(cache.store("key", kKernel).ok());
  const auto loaded = cache.load("key");
  ASSERT_TRUE(loaded);
  EXPECT_EQ(loaded->name, kKernel.name);
  EXPECT_EQ(loaded->image, kKernel.image);
  EXPECT_FALSE(cache.load("another key"));
  EXPECT_EQ(cache.usage().entries, 1);
}

TEST_F(KernelCacheTest, only_the_owner_may_enter) {
  const KernelCache cache(folder());
  ASSERT_TRUE(cache.store("key", kKernel).ok());
  struct stat info {};
  ASSERT_EQ(stat(folder().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777u, 0700u);
  ASSERT_EQ(stat(files()[0].c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777u, 0600u);
}

TEST_F(KernelCacheTest, a_folder_that_others_write_to_is_not_trusted) {
  const KernelCache cache(folder());
  ASSERT_TRUE(cache.store("key", kKernel).ok());
  ASSERT_EQ(chmod(folder().c_str(), 0777), 0);
  EXPECT_FALSE(cache.load("key"));
  EXPECT_FALSE(cache.store("key", kKernel).ok());
}

TEST_F(KernelCacheTest, a_damaged_entry_is_absent_and_written_again) {
  const KernelCache cache(folder());
  ASSERT_TRUE(cache.store("key", kKernel).ok());
  const filesystem::path entry = files()[0];
  const auto size = filesystem::file_size(entry);
  for (uintmax_t at = 0; at < size; at += 7) {
    std::fstream file(entry, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(at));
    const char byte = static_cast<char>(file.get());
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(byte ^ 1));
    file.close();
    EXPECT_FALSE(cache.load("key")) << "byte " << at;
    ASSERT_TRUE(cache.store("key", kKernel).ok());
    ASSERT_TRUE(cache.load("key"));
  }
  for (uintmax_t length = 0; length < size; length += 5) {
    filesystem::resize_file(entry, length);
    EXPECT_FALSE(cache.load("key")) << length << " bytes";
    ASSERT_TRUE(cache.store("key", kKernel).ok());
  }
}

TEST_F(KernelCacheTest, the_least_recently_used_make_room) {
  const CompiledKernel large{"kernel", std::string(1000, 'x'), ""};
  const KernelCache cache(folder(), 3500);
  for (const char* key : {"a", "b", "c"}) ASSERT_TRUE(cache.store(key, large).ok());
  const auto now = filesystem::file_time_type::clock::now();
  for (const auto& file : files()) filesystem::last_write_time(file, now - std::chrono::hours(1));
  ASSERT_TRUE(cache.load("a"));
  ASSERT_TRUE(cache.store("d", large).ok());
  EXPECT_TRUE(cache.load("a"));
  EXPECT_TRUE(cache.load("d"));
  EXPECT_EQ(cache.usage().entries, 3);
  EXPECT_LE(cache.usage().bytes, 3500);
}

TEST_F(KernelCacheTest, many_may_write_one_entry_at_once) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&] {
      const KernelCache cache(folder());
      for (int i = 0; i < 20; ++i) {
        EXPECT_TRUE(cache.store("key", kKernel).ok());
        const auto loaded = cache.load("key");
        EXPECT_TRUE(loaded && loaded->image == kKernel.image);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(KernelCacheTest, clear_removes_entries_and_leaves_other_files) {
  const KernelCache cache(folder());
  ASSERT_TRUE(cache.store("key", kKernel).ok());
  std::ofstream(folder() + "/mine.txt") << "not the cache's";
  ASSERT_TRUE(cache.clear().ok());
  EXPECT_EQ(cache.usage().entries, 0);
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(KernelCacheTest, without_a_folder_nothing_is_kept) {
  const KernelCache cache("");
  EXPECT_FALSE(cache.store("key", kKernel).ok());
  EXPECT_FALSE(cache.load("key"));
}

}  // namespace
}  // namespace fa::cuda
