// Hopper's matrix products: a warpgroup of 128 threads multiplies 64 rows at once, out of shared
// memory, in the background.
//
// The accumulator of warp w is rows 16 w to 16 w + 15 of the 64, in the layout of mma.h.
#pragma once

#include "cuda/device/matrix_descriptor.h"
#include "cuda/device/mma.h"

namespace fa::cuda {

// ---- Order. ----

// Before a product reads registers, or accumulates into some, that were written otherwise.
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the newest kPending groups are done. Waits of unlike kPlace stay apart, where the
// compiler would make one of both.
template <int kPending, int kPlace = 0>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0; // %1" ::"n"(kPending), "n"(kPlace) : "memory");
}

// Pins an accumulator to this place in the program. The compiler does not know that a product
// writes it later than the instruction says, and may move arithmetic behind a wait that it should
// fill.
template <int kTilesN>
__device__ inline void pin(Accumulator<1, kTilesN>& c) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c.at[0][n][e])::"memory");
  }
}

// ---- Products of 64 x N x 16. The operand list of an instruction has a register per element of
// the accumulator, which nothing but a macro spells. ----

#define FA_C8(i)                                                                              \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define FA_C16(i) FA_C8(i), FA_C8(i + 8)
#define FA_C32(i) FA_C16(i), FA_C16(i + 16)
#define FA_C64(i) FA_C32(i), FA_C32(i + 32)
#define FA_P32                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_P40 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FA_P56 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
#define FA_P64 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FA_P96                                                                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_P128                                                                          \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define FA_OPERANDS_32 FA_C32(0)
#define FA_PLACES_32 FA_P32
#define FA_OPERANDS_40 FA_C32(0), FA_C8(32)
#define FA_PLACES_40 FA_P32 ", " FA_P40
#define FA_OPERANDS_56 FA_C32(0), FA_C16(32), FA_C8(48)
#define FA_PLACES_56 FA_P32 ", " FA_P40 ", " FA_P56
#define FA_OPERANDS_64 FA_C64(0)
#define FA_PLACES_64 FA_P32 ", " FA_P40 ", " FA_P56 ", " FA_P64
#define FA_OPERANDS_96 FA_C64(0), FA_C32(64)
#define FA_PLACES_96 FA_P32 ", " FA_P40 ", " FA_P56 ", " FA_P64 ", " FA_P96
#define FA_OPERANDS_128 FA_C64(0), FA_C64(64)
#define FA_PLACES_128 FA_P32 ", " FA_P40 ", " FA_P56 ", " FA_P64 ", " FA_P96 ", " FA_P128
// `a` and `b` in shared memory. %n, %n + 1, %n + 2: a, b, whether to add to c.
#define FA_PRODUCT_SS(N, TYPE, PLACES, OPERANDS, A, B, ADD)                                    \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD                                       \
               ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" PLACES \
               "}, " A ", " B ", add, 1, 1, 0, 0; }"                                           \
               : OPERANDS                                                                      \
               : "l"(a), "l"(b), "r"(add))
// `a` in registers; `b`'s columns are contiguous.
#define FA_PRODUCT_RS(N, TYPE, PLACES, OPERANDS, A, B)                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" PLACES "}, {" A \
               "}, " B ", 1, 1, 1, 1;"                                                             \
               : OPERANDS                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// c = a b, or c += a b.
template <Element kElement, int kTilesN>
__device__ inline void product(Accumulator<1, kTilesN>& accumulator, MatrixDescriptor a,
                               MatrixDescriptor b, int add) {
  constexpr int kN = kTilesN * 8;
  static_assert(kN == 64 || kN == 80 || kN == 112 || kN == 128);
  float(&c)[kN / 2] = reinterpret_cast<float(&)[kN / 2]>(accumulator.at);
  if constexpr (kN == 64) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_SS("64", "bf16", FA_PLACES_32, FA_OPERANDS_32, "%32", "%33", "%34");
    } else {
      FA_PRODUCT_SS("64", "f16", FA_PLACES_32, FA_OPERANDS_32, "%32", "%33", "%34");
    }
  } else if constexpr (kN == 80) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_SS("80", "bf16", FA_PLACES_40, FA_OPERANDS_40, "%40", "%41", "%42");
    } else {
      FA_PRODUCT_SS("80", "f16", FA_PLACES_40, FA_OPERANDS_40, "%40", "%41", "%42");
    }
  } else if constexpr (kN == 112) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_SS("112", "bf16", FA_PLACES_56, FA_OPERANDS_56, "%56", "%57", "%58");
    } else {
      FA_PRODUCT_SS("112", "f16", FA_PLACES_56, FA_OPERANDS_56, "%56", "%57", "%58");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_SS("128", "bf16", FA_PLACES_64, FA_OPERANDS_64, "%64", "%65", "%66");
    } else {
      FA_PRODUCT_SS("128", "f16", FA_PLACES_64, FA_OPERANDS_64, "%64", "%65", "%66");
    }
  }
}

// c += a b, with a's fragment of 16 rows per warp.
template <Element kElement, int kTilesN>
__device__ inline void product(Accumulator<1, kTilesN>& accumulator, const Word (&a)[4],
                               MatrixDescriptor b) {
  constexpr int kN = kTilesN * 8;
  static_assert(kN == 64 || kN == 128 || kN == 192 || kN == 256);
  float(&c)[kN / 2] = reinterpret_cast<float(&)[kN / 2]>(accumulator.at);
  if constexpr (kN == 64) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_RS("64", "bf16", FA_PLACES_32, FA_OPERANDS_32, "%32, %33, %34, %35", "%36");
    } else {
      FA_PRODUCT_RS("64", "f16", FA_PLACES_32, FA_OPERANDS_32, "%32, %33, %34, %35", "%36");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_RS("128", "bf16", FA_PLACES_64, FA_OPERANDS_64, "%64, %65, %66, %67", "%68");
    } else {
      FA_PRODUCT_RS("128", "f16", FA_PLACES_64, FA_OPERANDS_64, "%64, %65, %66, %67", "%68");
    }
  } else if constexpr (kN == 192) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_RS("192", "bf16", FA_PLACES_96, FA_OPERANDS_96, "%96, %97, %98, %99", "%100");
    } else {
      FA_PRODUCT_RS("192", "f16", FA_PLACES_96, FA_OPERANDS_96, "%96, %97, %98, %99", "%100");
    }
  } else if constexpr (kN == 256) {
    if constexpr (kElement == Element::kBFloat16) {
      FA_PRODUCT_RS("256", "bf16", FA_PLACES_128, FA_OPERANDS_128, "%128, %129, %130, %131",
                    "%132");
    } else {
      FA_PRODUCT_RS("256", "f16", FA_PLACES_128, FA_OPERANDS_128, "%128, %129, %130, %131", "%132");
    }
  }
}

}  // namespace fa::cuda
