#include "cuda/tensor_map.h"

#include <array>

#include "cuda/device/kernel_spec.h"

namespace fa::cuda {
namespace {

// Values of CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion.
constexpr int kMapFloat16 = 6;
constexpr int kMapBFloat16 = 9;
constexpr int kSwizzle128Bytes = 3;
constexpr int kPromote256Bytes = 3;

constexpr int kMaxMapRank = 5;

// What a map depends on beside where its tensor lies.
struct MapKey {
  core::DataType dtype = core::DataType::kOther;
  int rows = 0;  // of a box
  bool ends = false;
  int ndim = 0;
  std::array<int64_t, core::kMaxRank> shape{}, strides{};
  bool operator==(const MapKey&) const = default;
};

// The maps that a thread has made last: moving one takes 0.02 us, making it 0.12 (on an H100's
// host).
class KnownMaps {
 public:
  const TensorMap* find(const MapKey& key) const {
    for (const Entry& entry : entries_) {
      if (entry.key == key) return &entry.map;
    }
    return nullptr;
  }
  void insert(const MapKey& key, const TensorMap& map) {
    entries_[next_] = {key, map};
    next_ = (next_ + 1) % entries_.size();
  }

 private:
  struct Entry {
    MapKey key;
    TensorMap map;
  };
  std::array<Entry, 8> entries_{};
  size_t next_ = 0;
};

// A dimension of a tensor, to which a missing one (index < 0) is one entry.
struct Dimension {
  uint64_t size;
  uint64_t stride;  // bytes; of one entry any will do that is a multiple of 16
};

Dimension dimension(const core::TensorView& view, int index) {
  if (index < 0 || view.shape[index] <= 1) return {1, 16};
  return {static_cast<uint64_t>(view.shape[index]),
          static_cast<uint64_t>(view.strides[index] * core::byte_size(view.dtype))};
}

Dimension rows_of(const core::TensorView& view) { return dimension(view, view.ndim - 3); }

// Where a map's coordinates are all 0.
uintptr_t origin(const core::TensorView& view, bool ends) {
  const Dimension rows = rows_of(view);
  return reinterpret_cast<uintptr_t>(view.data) - (ends ? rows.size * rows.stride : 0);
}

core::Status encode(const Driver& driver, const core::TensorView& view, int rows, bool ends,
                    TensorMap& map) {
  const int row = view.ndim - 3;  // a tensor of rank 3 is one batch entry
  uint64_t sizes[kMaxMapRank];
  uint64_t strides[kMaxMapRank];
  uint32_t rank = 0;
  const auto add = [&](const Dimension& it) {
    sizes[rank] = it.size;
    strides[rank++] = it.stride;
  };
  add({static_cast<uint64_t>(view.shape[row + 2]), 0});
  add(rows_of(view));
  if (ends) add({rows_of(view).size + 1, rows_of(view).stride});
  add(dimension(view, row + 1));
  add(dimension(view, row - 1));
  const uint32_t box[kMaxMapRank] = {kBlockColumns, static_cast<uint32_t>(rows), 1, 1, 1};
  const uint32_t steps[kMaxMapRank] = {1, 1, 1, 1, 1};
  return driver.check(
      driver.encode_tensor_map(
          &map, view.dtype == core::DataType::kBFloat16 ? kMapBFloat16 : kMapFloat16, rank,
          reinterpret_cast<void*>(origin(view, ends)), sizes, strides + 1, box, steps,
          /*interleave=*/0, kSwizzle128Bytes, kPromote256Bytes, /*fill=*/0),
      "cuTensorMapEncodeTiled");
}

}  // namespace

bool has_tensor_map(const core::TensorView& view, bool ends) {
  if (view.num_elements() == 0) return false;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.shape[d] > 1 && view.strides[d] == 0) return false;
  }
  return origin(view, ends) <= reinterpret_cast<uintptr_t>(view.data);
}

core::Status make_tensor_map(const Driver& driver, const core::TensorView& view, int rows,
                             bool ends, TensorMap& map) {
  thread_local KnownMaps known;
  const MapKey key{view.dtype, rows, ends, view.ndim, view.shape, view.strides};
  if (const TensorMap* before = known.find(key)) {
    map = *before;
    return driver.check(driver.move_tensor_map(&map, reinterpret_cast<void*>(origin(view, ends))),
                        "cuTensorMapReplaceAddress");
  }
  FA_TRY(encode(driver, view, rows, ends, map));
  known.insert(key, map);
  return {};
}

}  // namespace fa::cuda
