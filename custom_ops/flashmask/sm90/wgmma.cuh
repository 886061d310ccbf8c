// wgmma: products of a warpgroup, m64 x N x k16, asynchronous. Accumulators are float[N / 8][4]: with g = lane / 4 and
// t = lane % 4, warp w of the warpgroup holds in [n][0..1] row 16 w + g, columns 8 n + 2 t and the next, and in
// [n][2..3] the same columns of row 16 w + g + 8. An A operand in registers has the same layout, rounded, in pairs of n
// (pack_operand of cuda/element.cuh).
//
// Order of use: fence_registers on accumulators, wgmma_begin, products, wgmma_commit, wgmma_wait, fence_registers.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

#include <type_traits>

namespace flashmask::sm90 {

// Register operands written before are visible to the products that follow.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of accumulators across this point, where the hardware still works on them.
template <int N>
__device__ __forceinline__ void fence_registers(float (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    asm volatile("" : "+f"(values[i][0]), "+f"(values[i][1]), "+f"(values[i][2]), "+f"(values[i][3])::"memory");
  }
}
__device__ __forceinline__ void fence_registers(uint32_t (&values)[4]) {
  asm volatile("" : "+r"(values[0]), "+r"(values[1]), "+r"(values[2]), "+r"(values[3])::"memory");
}
template <int N>
__device__ __forceinline__ void fence_registers(uint32_t (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) fence_registers(values[i]);
}

// A descriptor of its two words. Said so, since the compiler makes three instructions of an addition to the low one
// otherwise.
__device__ __forceinline__ uint64_t descriptor_of(uint32_t low, uint32_t high) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
  return descriptor;
}

// Which axis of an operand in shared memory is contiguous.
enum class Major : int { kK = 0, kMN = 1 };

// The asm text of one shape: the accumulators are operands %0 to %(kCount - 1), the rest follows.
#define FLASHMASK_ACC_1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FLASHMASK_ACC_4(n) FLASHMASK_ACC_1(n), FLASHMASK_ACC_1(n + 1), FLASHMASK_ACC_1(n + 2), FLASHMASK_ACC_1(n + 3)
#define FLASHMASK_ACC_8(n) FLASHMASK_ACC_4(n), FLASHMASK_ACC_4(n + 4)
#define FLASHMASK_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHMASK_REGISTERS_64 \
  FLASHMASK_REGISTERS_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHMASK_REGISTERS_96 \
  FLASHMASK_REGISTERS_64       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHMASK_REGISTERS_128 \
  FLASHMASK_REGISTERS_96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHMASK_REGISTERS_192                                                      \
  FLASHMASK_REGISTERS_128                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASHMASK_REGISTERS_256                                                                  \
  FLASHMASK_REGISTERS_192                                                                        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FLASHMASK_COUNT_32 FLASHMASK_ACC_4(0)
#define FLASHMASK_COUNT_64 FLASHMASK_ACC_8(0)
#define FLASHMASK_COUNT_96 FLASHMASK_ACC_8(0), FLASHMASK_ACC_4(8)
#define FLASHMASK_COUNT_128 FLASHMASK_ACC_8(0), FLASHMASK_ACC_8(8)
#define FLASHMASK_COUNT_192 FLASHMASK_ACC_8(0), FLASHMASK_ACC_8(8), FLASHMASK_ACC_8(16)
#define FLASHMASK_COUNT_256 FLASHMASK_ACC_8(0), FLASHMASK_ACC_8(8), FLASHMASK_ACC_8(16), FLASHMASK_ACC_8(24)

// A from shared memory (descriptor), B from shared memory (descriptor).
#define FLASHMASK_WGMMA_SHARED(n, type, a, b, go, ta, tb)                                                   \
  asm volatile("{\n.reg .pred go;\nsetp.ne.b32 go, %" go                                                    \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FLASHMASK_REGISTERS_##n \
               "}, %" a ", %" b ", go, 1, 1, %" ta ", %" tb ";\n}\n"                                        \
               : FLASHMASK_COUNT_##n                                                                        \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(add), "n"(kA), "n"(kB)                           \
               : "memory")
// A from registers, B from shared memory (descriptor).
#define FLASHMASK_WGMMA_REGISTERS(n, type, a_list, b, go, tb)                                               \
  asm volatile("{\n.reg .pred go;\nsetp.ne.b32 go, %" go                                                    \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FLASHMASK_REGISTERS_##n \
               "}, {" a_list "}, %" b ", go, 1, 1, %" tb ";\n}\n"                                           \
               : FLASHMASK_COUNT_##n                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(add), "n"(kB)           \
               : "memory")

// c (+)= A * B over 16 of K; `add` false overwrites c. A and B by descriptors (panels.cuh).
template <typename T, Major kAMajor, Major kBMajor, int kGroups>
__device__ __forceinline__ void wgmma(float (&c)[kGroups][4], uint64_t a_descriptor, uint64_t b_descriptor, int add) {
  constexpr int kN = kGroups * 8, kA = static_cast<int>(kAMajor), kB = static_cast<int>(kBMajor);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kN == 32) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(32, "bf16", "16", "17", "18", "19", "20");
    } else {
      FLASHMASK_WGMMA_SHARED(32, "f16", "16", "17", "18", "19", "20");
    }
  } else if constexpr (kN == 64) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(64, "bf16", "32", "33", "34", "35", "36");
    } else {
      FLASHMASK_WGMMA_SHARED(64, "f16", "32", "33", "34", "35", "36");
    }
  } else if constexpr (kN == 96) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(96, "bf16", "48", "49", "50", "51", "52");
    } else {
      FLASHMASK_WGMMA_SHARED(96, "f16", "48", "49", "50", "51", "52");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(128, "bf16", "64", "65", "66", "67", "68");
    } else {
      FLASHMASK_WGMMA_SHARED(128, "f16", "64", "65", "66", "67", "68");
    }
  } else if constexpr (kN == 192) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(192, "bf16", "96", "97", "98", "99", "100");
    } else {
      FLASHMASK_WGMMA_SHARED(192, "f16", "96", "97", "98", "99", "100");
    }
  } else if constexpr (kN == 256) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_SHARED(256, "bf16", "128", "129", "130", "131", "132");
    } else {
      FLASHMASK_WGMMA_SHARED(256, "f16", "128", "129", "130", "131", "132");
    }
  } else {
    static_assert(kN == 0, "no such width");
  }
}

// The same with A in registers.
template <typename T, Major kBMajor, int kGroups>
__device__ __forceinline__ void wgmma(float (&c)[kGroups][4], const uint32_t (&a)[4], uint64_t b_descriptor, int add) {
  constexpr int kN = kGroups * 8, kB = static_cast<int>(kBMajor);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kN == 32) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(32, "bf16", "%16, %17, %18, %19", "20", "21", "22");
    } else {
      FLASHMASK_WGMMA_REGISTERS(32, "f16", "%16, %17, %18, %19", "20", "21", "22");
    }
  } else if constexpr (kN == 64) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(64, "bf16", "%32, %33, %34, %35", "36", "37", "38");
    } else {
      FLASHMASK_WGMMA_REGISTERS(64, "f16", "%32, %33, %34, %35", "36", "37", "38");
    }
  } else if constexpr (kN == 96) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(96, "bf16", "%48, %49, %50, %51", "52", "53", "54");
    } else {
      FLASHMASK_WGMMA_REGISTERS(96, "f16", "%48, %49, %50, %51", "52", "53", "54");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(128, "bf16", "%64, %65, %66, %67", "68", "69", "70");
    } else {
      FLASHMASK_WGMMA_REGISTERS(128, "f16", "%64, %65, %66, %67", "68", "69", "70");
    }
  } else if constexpr (kN == 192) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(192, "bf16", "%96, %97, %98, %99", "100", "101", "102");
    } else {
      FLASHMASK_WGMMA_REGISTERS(192, "f16", "%96, %97, %98, %99", "100", "101", "102");
    }
  } else if constexpr (kN == 256) {
    if constexpr (kBf16) {
      FLASHMASK_WGMMA_REGISTERS(256, "bf16", "%128, %129, %130, %131", "132", "133", "134");
    } else {
      FLASHMASK_WGMMA_REGISTERS(256, "f16", "%128, %129, %130, %131", "132", "133", "134");
    }
  } else {
    static_assert(kN == 0, "no such width");
  }
}

#undef FLASHMASK_WGMMA_SHARED
#undef FLASHMASK_WGMMA_REGISTERS
#undef FLASHMASK_REGISTERS_32
#undef FLASHMASK_COUNT_32
#undef FLASHMASK_REGISTERS_64
#undef FLASHMASK_COUNT_64
#undef FLASHMASK_REGISTERS_96
#undef FLASHMASK_COUNT_96
#undef FLASHMASK_REGISTERS_128
#undef FLASHMASK_COUNT_128
#undef FLASHMASK_REGISTERS_192
#undef FLASHMASK_COUNT_192
#undef FLASHMASK_REGISTERS_256
#undef FLASHMASK_COUNT_256
#undef FLASHMASK_ACC_1
#undef FLASHMASK_ACC_4
#undef FLASHMASK_ACC_8

}  // namespace flashmask::sm90
