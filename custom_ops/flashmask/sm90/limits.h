// Sizes that these kernels leave to the portable ones.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

// The forward kernel numbers column tiles, of 64 keys at least, with so many bits (tile_word in forward_producer.cuh).
constexpr int kColumnTileBits = 23;
constexpr int64_t kMaxKeys = int64_t{64} << kColumnTileBits;
// The bounds of a mask head are indexed with 32 bits (load_bounds in forward_mask.cuh).
static_assert(kMaxKeys * 4 <= int64_t{1} << 32);

}  // namespace flashmask::sm90
