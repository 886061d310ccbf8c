// Register fragments of 16-bit values to shared memory.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

// Four 8x8 matrices in the layout of accumulators and register operands (lane l holds row l / 4, columns 2 (l % 4) and
// the next); lanes 8i .. 8i + 7 give the row addresses of matrix i.
__device__ __forceinline__ void store_matrix(uint32_t address, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

}  // namespace flashmask::sm90
