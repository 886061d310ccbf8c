// How long the L2 cache should keep what an access touches: the 64-bit words that createpolicy makes for all of an
// access. They are hints: what is read or written is the same.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

enum CachePolicy : uint64_t {
  kKeepNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,  // not used again: it should push nothing else out
};

}  // namespace flashmask::sm90
