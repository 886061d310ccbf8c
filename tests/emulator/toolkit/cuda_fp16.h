// Stand-in for CUDA's header of the same name.
#pragma once

#include <stdint.h>

#include "../numbers.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float low, float high) {
  return {{emulator::to_float16(low)}, {emulator::to_float16(high)}};
}
inline float2 __half22float2(__half2 pair) {
  return {emulator::from_float16(pair.x.bits), emulator::from_float16(pair.y.bits)};
}
