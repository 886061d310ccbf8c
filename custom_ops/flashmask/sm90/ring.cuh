// A ring of buffers, which producers fill and consumers free.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

// A position in a ring of kStages buffers, with the parity of the round. A consumer waits for its `full` barrier with
// `parity`, a producer for its `empty` barrier with `parity ^ 1` (which lets the first round pass at once).
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // At most a round.
  __device__ __forceinline__ void advance_by(int stages) {
    stage += stages;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

}  // namespace flashmask::sm90
