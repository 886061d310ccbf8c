// Counter-based random bits for dropout (Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A score's fate depends on (seed, offset, batch, head, row, column) alone, so every backend, tile size and
// thread count drops the same scores.
//
// One call of philox4x32 yields 128 bits: 16 for each of the 8 columns 8c .. 8c + 7 of one row. Column 8c + 2w + e
// reads half e (0 = low) of word w: the two neighbours of a word are the two columns that a thread holds in the
// accumulator of mma.m16n8, and the four words belong to the four threads of its quad.
#pragma once

#include <stdint.h>

#include "mask.h"

namespace flashmask {

constexpr int32_t kDropoutColumnsPerCall = 8;

struct PhiloxWords {
  uint32_t word[4];
};

FLASHMASK_HD PhiloxWords philox4x32(uint32_t counter0, uint32_t counter1, uint32_t counter2, uint32_t counter3,
                                    uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * counter0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * counter2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ counter1 ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ counter3 ^ key1;
    counter1 = static_cast<uint32_t>(product1);
    counter3 = static_cast<uint32_t>(product0);
    counter0 = next0;
    counter2 = next2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return PhiloxWords{{counter0, counter1, counter2, counter3}};
}

struct DropoutKey {
  uint32_t key0, key1, offset;

  FLASHMASK_HD DropoutKey(int64_t seed, int64_t offset64)
      : key0(static_cast<uint32_t>(static_cast<uint64_t>(seed))),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) ^
             static_cast<uint32_t>(static_cast<uint64_t>(offset64) >> 32)),
        offset(static_cast<uint32_t>(static_cast<uint64_t>(offset64))) {}

  // The bits of columns 8 * column_group .. 8 * column_group + 7; batch_head = batch * heads_q + head.
  FLASHMASK_HD PhiloxWords draw(int32_t batch_head, int32_t row, int32_t column_group) const {
    return philox4x32(static_cast<uint32_t>(column_group), static_cast<uint32_t>(row),
                      static_cast<uint32_t>(batch_head), offset, key0, key1);
  }
};

// A score is kept when its 16 bits are below this: the keep probability in units of 2^-16, rounded to nearest.
FLASHMASK_HD uint32_t dropout_keep_threshold(float dropout) {
  return static_cast<uint32_t>((1.0 - static_cast<double>(dropout)) * 65536.0 + 0.5);
}

// Kept probabilities are multiplied with the inverse of the keep probability that is really used.
FLASHMASK_HD float dropout_keep_scale(uint32_t threshold) {
  return threshold == 0 ? 0.0f : 65536.0f / static_cast<float>(threshold);
}

FLASHMASK_HD uint32_t dropout_bits(const PhiloxWords& words, int32_t column) {
  return (words.word[(column >> 1) & 3] >> ((column & 1) * 16)) & 0xFFFFu;
}

}  // namespace flashmask
