// Stand-in for CUDA's header of the same name.
#pragma once

#include <stdint.h>

#include "../numbers.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {{emulator::to_bfloat16(low)}, {emulator::to_bfloat16(high)}};
}
