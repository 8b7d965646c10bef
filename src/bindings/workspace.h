// Device memory for a call, from the framework of its arguments, whose allocator knows the stream.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

namespace fa::bindings {

class Workspace {
 public:
  // `allocator` is null where the framework has none to lend.
  Workspace(DLPackManagedTensorAllocator allocator, DLDevice device)
      : allocator_(allocator), device_(device) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (memory_ != nullptr && memory_->deleter != nullptr) memory_->deleter(memory_);
  }

  bool is_lent() const { return allocator_ != nullptr; }

  // Null where the framework has no memory. Called once; `self` is the Workspace.
  static void* allocate(void* self, int64_t bytes) {
    return static_cast<Workspace*>(self)->allocate_bytes(bytes);
  }

 private:
  void* allocate_bytes(int64_t bytes) {
    DLTensor prototype{};
    prototype.device = device_;
    prototype.ndim = 1;
    prototype.dtype = {kDLUInt, 8, 1};
    prototype.shape = &bytes;
    const auto ignore = [](void*, const char*, const char*) {};
    if (allocator_(&prototype, &memory_, nullptr, ignore) != 0) memory_ = nullptr;
    if (memory_ == nullptr) return nullptr;
    const DLTensor& tensor = memory_->dl_tensor;
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
  }

  DLPackManagedTensorAllocator allocator_;
  DLDevice device_;
  DLManagedTensorVersioned* memory_ = nullptr;
};

}  // namespace fa::bindings
