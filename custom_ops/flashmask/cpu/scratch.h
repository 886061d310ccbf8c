// How a kernel cuts its scratch memory into parts, each on a cache line of its own.
#pragma once

#include "simd.h"

namespace flashmask {
namespace FLASHMASK_ISA {

// With a null base it only counts, so that size and layout cannot differ.
struct ScratchCutter {
  float* base;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* part = base == nullptr ? nullptr : base + used;
    used += (floats + 15) / 16 * 16;
    return part;
  }
};

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
