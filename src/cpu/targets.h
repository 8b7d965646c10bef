// Which of Highway's targets every source with vector code is compiled for. Include it before
// <hwy/foreach_target.h>.
//
// SVE and RVV vectors have no size at compile time and cannot be array elements, which the register
// tiles are; SVE machines run the NEON code. SSSE3 and AVX3_DL add nothing to SSE4 and AVX3 here.
#pragma once

#define FA_SIZELESS_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#if defined(FA_EVERY_TARGET)  // a test compiles those that add nothing too
#define HWY_DISABLED_TARGETS FA_SIZELESS_TARGETS
#else
#define HWY_DISABLED_TARGETS (FA_SIZELESS_TARGETS | HWY_SSSE3 | HWY_AVX3_DL)
#endif
#define HWY_COMPILE_ALL_ATTAINABLE

// Whether the target in work has the kernels in pairs of bfloat16, whose vectors are as wide as
// their blocks of columns.
#define FA_TARGET_HAS_PAIRS (FA_CPU_HAS_PAIRS && (HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON))
