// Steps, and the barriers that the consumers of the backward kernels share.
#pragma once

#include "../cuda/instructions.cuh"
#include "backward_config.cuh"

namespace flashmask::sm90 {

constexpr int kBackwardTurnBarrier = 4;  // named barriers: "it is this warpgroup's turn", one each

__device__ __forceinline__ Step read_step(uint32_t address) {
  const uint4 words = load_shared_128(address);
  return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z), static_cast<int>(words.w)};
}

}  // namespace flashmask::sm90
