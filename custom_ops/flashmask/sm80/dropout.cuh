// Dropout bits in accumulator layout. philox.h gives one call per row and 8 columns; the threads that hold those
// scores share the calls: each makes one of every group, then they trade words by shuffles.
#pragma once

#include "../philox.h"
#include "ptx.cuh"

namespace flashmask::sm80 {

__device__ __forceinline__ void swap_if(bool condition, uint32_t& a, uint32_t& b) {
  const uint32_t x = condition ? b : a;
  b = condition ? a : b;
  a = x;
}

// values[i] becomes values[i ^ index]: a dynamic permutation without dynamic register indexing.
template <int kCount>
__device__ __forceinline__ void permute_xor(uint32_t (&values)[kCount], int index) {
#pragma unroll
  for (int bit = 1; bit < kCount; bit *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & bit) == 0) swap_if((index & bit) != 0, values[i], values[i ^ bit]);
    }
  }
}

// Rows on the M axis. The four threads of a quad hold the 8 columns of a call; `mine` is the call of the quad's
// cell number t = lane % 4. On return words[i] is this thread's word (two columns) of cell i.
__device__ __forceinline__ void trade_in_quad(const PhiloxWords& mine, int lane, uint32_t (&words)[4]) {
  const int t = lane & 3;
  uint32_t outgoing[4] = {mine.word[0], mine.word[1], mine.word[2], mine.word[3]};
  permute_xor(outgoing, t);  // outgoing[x] = word of thread t ^ x
  words[0] = outgoing[0];
#pragma unroll
  for (int x = 1; x < 4; ++x) words[x] = __shfl_xor_sync(0xFFFFFFFFu, outgoing[x], x);
  permute_xor(words, t);
}

// Columns on the M axis. The eight threads with the same t hold the 8 columns of a call, two to a word; `mine` is the
// call of cell number g = lane / 4. On return words[i] is this thread's word of cell i (its half is g & 1).
__device__ __forceinline__ void trade_in_column(const PhiloxWords& mine, int lane, uint32_t (&words)[8]) {
  const int g = lane >> 2;
  uint32_t outgoing[4] = {mine.word[0], mine.word[1], mine.word[2], mine.word[3]};
  permute_xor(outgoing, g >> 1);  // outgoing[x] = word of the threads g' with g' / 2 = (g / 2) ^ x
  words[0] = outgoing[0];
#pragma unroll
  for (int x = 1; x < 8; ++x) words[x] = __shfl_xor_sync(0xFFFFFFFFu, outgoing[x >> 1], x << 2);
  permute_xor(words, g);
}

}  // namespace flashmask::sm80
