// Element masks of the backward kernels: the intervals of a block's keys in shared memory, and their use on S^T.
#pragma once

#include "../cuda/kernel_params.h"
#include "../cuda/row_bits.cuh"
#include "backward_access.cuh"

namespace flashmask::sm90 {

// The two intervals of masked rows of one key, as they come: bits of rows do not mind empty or overlong ones.
__device__ __forceinline__ int4 key_intervals(const FlashmaskParams& op, int64_t mask_index, int key) {
  if (key >= op.seqlen_k) return make_int4(INT32_MIN, INT32_MAX, 0, 0);  // past the end: masked everywhere
  const int32_t* bounds = op.bounds + (mask_index * op.seqlen_k + key) * op.num_bounds;
  int4 both = make_int4(0, 0, 0, 0);
  if (op.num_bounds > 0) {
    both.x = bounds[0];
    both.y = INT32_MAX;
    if (op.num_bounds == (op.causal ? 2 : 4)) both.y = bounds[1];
  }
  if (op.causal) {
    both.z = INT32_MIN;
    both.w = key - (op.seqlen_k - op.seqlen_q);
  } else if (op.num_bounds == 4) {
    both.z = bounds[2];
    both.w = bounds[3];
  } else if (op.num_bounds == 2) {
    both.z = INT32_MIN;
    both.w = bounds[1];
  }
  return both;
}

// A thread's keys are `first_key` and the eighth after it; its queries 8n + 2t and the next, with t = lane % 4.
template <int kGroups>
__device__ __forceinline__ void mask_scores(float (&scores)[kGroups][4], uint32_t intervals, int first_key,
                                            int row_begin, int lane, float masked_score) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 loaded = load_shared_128(intervals + (first_key + h * 8) * 16);
    const int4 both = make_int4(loaded.x, loaded.y, loaded.z, loaded.w);
#pragma unroll
    for (int word = 0; word < kGroups / 4; ++word) {  // 32 queries each
      const int first = row_begin + word * 32;
      const uint32_t bits =
          (interval_bits(both.x, both.y, first) | interval_bits(both.z, both.w, first)) >> (lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (bits & (1u << (n * 8 + e))) scores[word * 4 + n][h * 2 + e] = masked_score;
        }
      }
    }
  }
}

}  // namespace flashmask::sm90
