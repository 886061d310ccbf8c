// Global memory that blocks share: counters and sums.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

// Until `counter` has come to `value`; what was written before it was counted up is then visible.
__device__ __forceinline__ void wait_for_count(const int32_t* counter, int32_t value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}
__device__ __forceinline__ void count_up(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}

// Orders what the copy engine wrote to global memory before what follows.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// One lane's fragment of an accumulator, added to global memory.
__device__ __forceinline__ void add_fragment(float* place, const float (&c)[4], float scale) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(place), "f"(c[0] * scale), "f"(c[1] * scale),
               "f"(c[2] * scale), "f"(c[3] * scale)
               : "memory");
}

}  // namespace flashmask::sm90
