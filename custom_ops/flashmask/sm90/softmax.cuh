// Online softmax in base 2 over accumulator fragments of wgmma: a thread has two rows, lane / 4 and eight below it, and
// shares each with the three other threads of its quad.
//
// A "tile" here is what is weighed at a time: a column tile, or a part of one (forward_config.h).
//
// Weights are 2^(score - reference), and a row's reference is the largest score of the first tile in which it sees
// anything. What later tiles bring may well be larger: a weight of more than one is no worse than a smaller one. Only
// when weights become large does the reference move to the largest score, and what was summed is scaled down. So once
// every row of a warp has a reference no maximum is looked for, which took a sixth of all instructions: whether weights
// are too large shows in their sums, which are needed anyway.
//
// A score that is 128 or more above the reference (in powers of two) has a weight of infinity, and is lost by then:
// such scores are computed again from Q and K in memory.
#pragma once

#include <math_constants.h>
#include <cfloat>

#include <type_traits>

#include "../cuda/instructions.cuh"
#include "../cuda/tile_lists.cuh"

namespace flashmask::sm90 {

// A row's reference moves when a thread's weights of one tile have a larger sum than this. Every 16-bit type holds
// that; and random scores rarely get there, even if the first tile had only a small one to take the reference from.
constexpr float kLargestTileSum = 1024.0f;
// The reference of a row that has seen nothing yet. It turns a masked score into a weight of zero, as minus infinity
// would not.
constexpr float kNoReference = -FLT_MAX;

struct OnlineSoftmax {
  float reference[2];           // in powers of two: of scores times scale_log2
  float row_sum[2];             // of this thread's columns
  float factor[2];              // what the output so far has to be multiplied with, if it has to be
  float tile_sum[2];            // of the last tile, for move_references
  bool lacks_reference = true;  // any row of this warp

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference[r] = kNoReference;
      row_sum[r] = 0.0f;
      factor[r] = 1.0f;
    }
  }

  // The largest scores of a tile become references of the rows that have none.
  template <int kGroups>
  __device__ __forceinline__ void find_references(const float (&scores)[kGroups][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = scores[0][r * 2], other = scores[0][r * 2 + 1];
#pragma unroll
      for (int n = 1; n < kGroups; ++n) {
        largest = fmaxf(largest, scores[n][r * 2]);
        other = fmaxf(other, scores[n][r * 2 + 1]);
      }
      largest = quad_max(fmaxf(largest, other));
      // Rounded up: no weight of a first tile is above one, however large the scores.
      if (reference[r] == kNoReference && largest > -CUDART_INF_F) reference[r] = __fmul_ru(largest, scale_log2);
    }
    lacks_reference = __any_sync(kAllLanes, reference[0] == kNoReference || reference[1] == kNoReference);
  }

  // Scores of one more tile become weights, and are added to the sums. But not if any of the warp are too large, which
  // is returned: then references have to move. `halfway` is called when half of the weights are there.
  template <int kGroups, typename Halfway>
  __device__ __forceinline__ bool weigh(float (&scores)[kGroups][4], float scale_log2, const Halfway& halfway) {
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
    static_assert(kGroups % 2 == 0);
    const auto weigh_half = [&](auto half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i) {
          const int n = decltype(half)::value * (kGroups / 2) + i;
          scores[n][r * 2] = exp2_fast(scores[n][r * 2] * scale_log2 - reference[r]);
          scores[n][r * 2 + 1] = exp2_fast(scores[n][r * 2 + 1] * scale_log2 - reference[r]);
          even[r] += scores[n][r * 2];
          odd[r] += scores[n][r * 2 + 1];
        }
      }
    };
    weigh_half(std::integral_constant<int, 0>{});
    halfway();
    weigh_half(std::integral_constant<int, 1>{});
    tile_sum[0] = even[0] + odd[0];
    tile_sum[1] = even[1] + odd[1];
    // NaN compares false: it stays in the sums, and so reaches the output.
    const bool large = __any_sync(kAllLanes, fmaxf(tile_sum[0], tile_sum[1]) > kLargestTileSum);
    if (!large) {
      row_sum[0] += tile_sum[0];
      row_sum[1] += tile_sum[1];
    }
    return large;
  }

  // Over all columns of a row.
  __device__ __forceinline__ float total(int r) const {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return sum + __shfl_xor_sync(kAllLanes, sum, 2);
  }

  // When weigh has found weights of a tile too large: they become smaller, the tile's sums are added, and the output so
  // far has to be multiplied with `factor`. `score_again` computes the score of group n, element i. Rows decide one by
  // one, so that the result does not depend on which rows share a warp.
  template <int kGroups, typename ScoreAgain>
  __device__ __forceinline__ void move_references(float (&weights)[kGroups][4], float scale_log2,
                                                  const ScoreAgain& score_again) {
    // Rare and long, so in loops that are not unrolled, over a copy in memory: registers have no index.
    float copy[kGroups * 4];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy[n * 4 + i] = weights[n][i];
    }
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const float old_reference = r == 0 ? reference[0] : reference[1];
      float top = 0.0f;                    // exponent of the row's largest finite weight
      float largest_again = kNoReference;  // score of those that were infinite
      uint64_t lost = 0;                   // which those are; their scores stand in place of their weights
      static_assert(kGroups * 2 <= 64);
#pragma unroll 1
      for (int index = 0; index < kGroups * 2; ++index) {
        const int n = index / 2, i = r * 2 + index % 2;
        float& weight = copy[n * 4 + i];
        if (weight == CUDART_INF_F) {
          weight = score_again(n, i) * scale_log2;
          largest_again = fmaxf(largest_again, weight);
          lost |= 1ull << index;
        } else {
          top = fmaxf(top, __log2f(weight));
        }
      }
      float new_reference = quad_max(fmaxf(old_reference + top, largest_again));
      const uint32_t large = __ballot_sync(kAllLanes, (r == 0 ? tile_sum[0] : tile_sum[1]) > kLargestTileSum);
      if ((large >> (threadIdx.x & 28) & 0xF) == 0) new_reference = old_reference;  // all factors are one
      // Weights up to 2^128 are brought down in two steps, as 2^-127 is not a normal number. What was summed before is
      // nothing beside them.
      const float shift = new_reference - old_reference, down = exp2_fast(-shift);
      const float first = exp2_fast(-fminf(shift, 64.0f)), second = exp2_fast(fminf(64.0f - shift, 0.0f));
      float even = 0.0f, odd = 0.0f;
#pragma unroll 1
      for (int index = 0; index < kGroups * 2; ++index) {
        float& weight = copy[index / 2 * 4 + r * 2 + index % 2];
        weight = (lost >> index & 1) != 0 ? exp2_fast(weight - new_reference) : weight * first * second;
        (index % 2 == 0 ? even : odd) += weight;
      }
      const float sum = (r == 0 ? row_sum[0] : row_sum[1]) * down + (even + odd);
      if (r == 0) {
        reference[0] = new_reference, row_sum[0] = sum, factor[0] = down;
      } else {
        reference[1] = new_reference, row_sum[1] = sum, factor[1] = down;
      }
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] = copy[n * 4 + i];
    }
  }

 private:
  static __device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
    return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
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
