// Compiles the forward once per instruction set.
#include "cpu/call.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cc"
#include <hwy/foreach_target.h>

#include "cpu/cache_update-inl.h"
#include "cpu/forward-inl.h"

namespace fa::cpu {

template <>
ForwardKernels forward_kernels<HWY_TARGET>() {
  return {HWY_NAMESPACE::forward_attend, HWY_NAMESPACE::forward_combine,
          HWY_NAMESPACE::update_cache};
}

template <>
int64_t panel_size<HWY_TARGET>() {
  return HWY_NAMESPACE::kPanel;
}

}  // namespace fa::cpu
