#include "own_path.h"

#include <system_error>
#include <vector>

#include "flash_attn/flash_attn.h"

namespace fa::tools {

namespace fs = std::filesystem;

namespace {

// The folders in `folder`; none where it cannot be read.
std::vector<fs::path> folders_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->is_directory(error)) found.push_back(it->path());
  }
  return found;
}

}  // namespace

fs::path own_folder() {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::path() : self.parent_path();
}

void add_nvrtc_of_wheels() {
  const fs::path folder = own_folder();
  if (folder.empty()) return;
  for (const fs::path& python : folders_in(folder.parent_path() / "lib")) {
    for (const fs::path& wheel : folders_in(python / "site-packages" / "nvidia")) {
      fa_add_nvrtc_folder((wheel / "lib").c_str());
    }
  }
}

}  // namespace fa::tools
