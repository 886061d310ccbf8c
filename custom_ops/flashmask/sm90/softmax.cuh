// Online softmax in base 2 over accumulator fragments of wgmma: a thread has two rows, lane / 4 and eight below it, and
// shares each with the three other threads of its quad.
#pragma once

#include <math_constants.h>

#include "../cuda/instructions.cuh"
#include "../cuda/tile_lists.cuh"

namespace flashmask::sm90 {

// The running maximum of a row lags until it is off by more than this (in powers of two): rescaling the output costs
// more than the range that it saves, and weights up to 2^8 fit every 16-bit type.
constexpr float kRescaleThreshold = 8.0f;

struct OnlineSoftmax {
  float row_max[2];  // of raw scores
  float row_sum[2];  // of this thread's columns
  float factor[2];   // what the output so far has to be multiplied with

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = -CUDART_INF_F;
      row_sum[r] = 0.0f;
      factor[r] = 1.0f;
    }
  }

  // Takes the scores of one more tile; returns whether any row of this warp has to be rescaled.
  template <int kGroups>
  __device__ __forceinline__ bool update_max(const float (&scores)[kGroups][4], float scale_log2) {
    float new_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = fmaxf(row_max[r], scores[0][r * 2]);
      float other = scores[0][r * 2 + 1];
#pragma unroll
      for (int n = 1; n < kGroups; ++n) {
        largest = fmaxf(largest, scores[n][r * 2]);
        other = fmaxf(other, scores[n][r * 2 + 1]);
      }
      largest = fmaxf(largest, other);
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      new_max[r] = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    }
    // -inf minus -inf is NaN, which compares false: a row that has seen nothing yet stays as it is.
    const bool grown = (new_max[0] - row_max[0]) * scale_log2 > kRescaleThreshold ||
                       (new_max[1] - row_max[1]) * scale_log2 > kRescaleThreshold;
    if (!__any_sync(kAllLanes, grown)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows decide one by one, so that the result does not depend on which rows share a warp.
      const float growth = (new_max[r] - row_max[r]) * scale_log2;
      const bool moves = growth > kRescaleThreshold;
      factor[r] = moves ? exp2_fast(-growth) : 1.0f;
      if (moves) row_max[r] = new_max[r];
      row_sum[r] *= factor[r];
    }
    return true;
  }

  // Scores become weights 2^((score - max) * scale), and are added to the sums.
  template <int kGroups>
  __device__ __forceinline__ void exponentiate(float (&scores)[kGroups][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = row_max[r] == -CUDART_INF_F ? 0.0f : row_max[r] * scale_log2;
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        scores[n][r * 2] = exp2_fast(scores[n][r * 2] * scale_log2 - offset);
        scores[n][r * 2 + 1] = exp2_fast(scores[n][r * 2 + 1] * scale_log2 - offset);
        even += scores[n][r * 2];
        odd += scores[n][r * 2 + 1];
      }
      row_sum[r] += even + odd;
    }
  }

  // Over all columns of a row.
  __device__ __forceinline__ float total(int r) const {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return sum + __shfl_xor_sync(kAllLanes, sum, 2);
  }
};

template <int kGroups>
__device__ __forceinline__ void rescale(float (&output)[kGroups][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) output[n][i] *= factor[i / 2];
  }
}

}  // namespace flashmask::sm90
