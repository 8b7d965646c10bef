// Compiles the backward once per instruction set.
#include "cpu/call.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cc"
#include <hwy/foreach_target.h>

#include "cpu/bias_gradient-inl.h"
#include "cpu/pair_gradient_products-inl.h"

namespace fa::cpu {

namespace HWY_NAMESPACE {

template <class Products>
BackwardKernels kernels() {
  return {backward_prepare<Products>, backward_differentiate<Products>, backward_finish<Products>,
          backward_differentiate_bias<Products>};
}

}  // namespace HWY_NAMESPACE

template <>
BackwardKernels backward_kernels<HWY_TARGET>() {
  return HWY_NAMESPACE::kernels<HWY_NAMESPACE::FloatGradientProducts>();
}

template <>
BackwardKernels pair_backward_kernels<HWY_TARGET>() {
#if FA_TARGET_HAS_PAIRS
  return HWY_NAMESPACE::kernels<HWY_NAMESPACE::PairGradientProducts>();
#else
  return {};
#endif
}

}  // namespace fa::cpu
