// Compiles the forward once per instruction set.
#include "cpu/call.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cc"
#include <hwy/foreach_target.h>

#include "cpu/cache_update-inl.h"
#include "cpu/few_queries-inl.h"
#include "cpu/forward-inl.h"
#include "cpu/pair_products-inl.h"

namespace fa::cpu {

template <>
ForwardKernels forward_kernels<HWY_TARGET>() {
  using namespace HWY_NAMESPACE;
  return {forward_attend<FloatProducts>, forward_combine, update_cache};
}

template <>
ForwardKernels pair_forward_kernels<HWY_TARGET>() {
#if FA_TARGET_HAS_PAIRS
  using namespace HWY_NAMESPACE;
  static_assert(kLanes == kPairColumns);
  return {forward_attend<PairProducts>, forward_combine, update_cache, pack_tiles};
#else
  return {};
#endif
}

template <>
ForwardKernels wide_forward_kernels<HWY_TARGET>() {
#if HWY_TARGET == HWY_AVX3
  using namespace HWY_NAMESPACE;
  return {forward_attend<FloatProductsOf<WideShapes>>, forward_combine, update_cache};
#else
  return {};
#endif
}

template <>
int64_t panel_size<HWY_TARGET>() {
  return HWY_NAMESPACE::kPanel;
}

}  // namespace fa::cpu
