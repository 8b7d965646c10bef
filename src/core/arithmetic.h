// Whole numbers of parts. For sizes: not negative, and far from overflow.
#pragma once

#include <cstdint>

namespace fa::core {

// How many parts of `size` hold `items`.
constexpr int64_t ceil_div(int64_t items, int64_t size) { return (items + size - 1) / size; }

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace fa::core
