// Compiles the backward once per instruction set.
#include "cpu/call.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cc"
#include <hwy/foreach_target.h>

#include "cpu/bias_gradient-inl.h"

namespace fa::cpu {

template <>
BackwardKernels backward_kernels<HWY_TARGET>() {
  using namespace HWY_NAMESPACE;
  return {backward_prepare, backward_differentiate, backward_finish, backward_differentiate_bias};
}

}  // namespace fa::cpu
