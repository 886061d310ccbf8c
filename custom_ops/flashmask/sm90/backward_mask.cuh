// Element masks of the backward kernels: the intervals of a block's keys in shared memory, what those of a warpgroup
// have in common, and their use on S^T.
#pragma once

#include "../cuda/instructions.cuh"
#include "../cuda/kernel_params.h"
#include "../cuda/tile_lists.cuh"
#include "backward_access.cuh"

namespace flashmask::sm90 {

// The two intervals of masked rows of one key, empty or overlong ones as they come. Numbers of rows are changed only
// where that changes no row: so that a small one can be added and a row subtracted without overflow.
__device__ __forceinline__ int4 key_intervals(const FlashmaskParams& op, int64_t mask_index, int key) {
  constexpr int kAfterAll = INT32_MAX - 8;
  if (key >= op.seqlen_k) return make_int4(0, kAfterAll, 0, kAfterAll);  // past the end: masked everywhere
  const int32_t* bounds = op.bounds + (mask_index * op.seqlen_k + key) * op.num_bounds;
  int4 both = make_int4(0, 0, 0, 0);
  if (op.num_bounds > 0) {
    both.x = bounds[0];
    both.y = kAfterAll;
    if (op.num_bounds == (op.causal ? 2 : 4)) both.y = bounds[1];
  }
  if (op.causal) {
    both.w = key - (op.seqlen_k - op.seqlen_q);
  } else if (op.num_bounds == 4) {
    both.z = bounds[2];
    both.w = bounds[3];
  } else if (op.num_bounds == 2) {
    both.w = bounds[1];
  }
  const auto clamped = [](int row) { return min(max(row, 0), kAfterAll); };
  return make_int4(clamped(both.x), clamped(both.y), clamped(both.z), clamped(both.w));
}

// For a whole warp: what the intervals of a warpgroup's 64 keys have in common, to `place`: eight words as pairs of
// rows [begin, end): masked by everyone's first interval; by everyone's second; all that anyone's first interval masks;
// or anyone's second. The intervals are read again, one after the other, for want of registers.
__device__ __forceinline__ void store_spans(uint32_t place, uint32_t intervals, bool no_skip) {
#pragma unroll 1
  for (int word = 0; word < 8; ++word) {
    // Smallest ones as largest of the complements: of two reductions, one for each, ptxas 13.0 took the wrong one.
    const bool of_all = word < 4, is_end = word & 1;
    const int flipped = of_all == is_end ? -1 : 0;
    int found = of_all == is_end ? INT32_MIN : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t interval = intervals + (threadIdx.x % 32 + i * 32) * 16 + (word & 2) * 4;
      const int begin = load_shared_32(interval), end = load_shared_32(interval + 4);
      const bool counts = of_all || begin < end;  // an empty one touches nothing
      if (counts) found = max(found, (is_end ? end : begin) ^ flipped);
    }
    found = __reduce_max_sync(kAllLanes, found) ^ flipped;
    if (no_skip) found = word == 5 ? INT32_MAX : 0;
    store_shared_32(place + word * 4, found);
  }
}
// For a whole warp: flags of Step for rows [begin, end), which are some, by what store_spans() has written of the keys
// of both warpgroups to `place`. A lane compares one word, so that two next to each other say whether the rows lie
// within an interval that masks all, or meet one that masks any.
__device__ __forceinline__ int flags_of_keys(uint32_t place, int begin, int end) {
  const int word = threadIdx.x % 16;
  const int row = load_shared_32(place + word * 4);
  const bool of_all = (word & 4) == 0, is_end = word & 1;
  const uint32_t holds =
      __ballot_sync(kAllLanes, of_all ? (is_end ? end <= row : begin >= row) : (is_end ? begin < row : end > row));
  const uint32_t by_interval = holds & holds >> 1, by_any = by_interval | by_interval >> 2;
  const auto flag = [&](int first_word, int flag) { return by_any >> first_word & 1 ? flag : 0; };
  static_assert(kSpansBytes == 8 * 4);
  return flag(4, Step::kPartial) | flag(12, Step::kPartial << 1) | flag(0, Step::kUnseen) | flag(8, Step::kUnseen << 1);
}

// Of a thread's queries, first + 8n and the next of that: bit 2n + e is set when first + 8n + e is not before `row`.
__device__ __forceinline__ uint32_t query_bits_from(int row, int first) {
  // So many of the first of such pairs lie before `row`, and so many of the second.
  const int distance = max(row - first + 6, 6);
  return shift_left(0xFFFFFFFFu, (distance + 1) / 8 + distance / 8);
}

// A thread's keys are `first_key` and the eighth after it; its queries 8n + 2t and the next, with t = lane % 4.
template <int kGroups>
__device__ __forceinline__ void mask_scores(float (&scores)[kGroups][4], uint32_t intervals, int first_key,
                                            int row_begin, int lane, float masked_score) {
  static_assert(kGroups <= 16, "bits of one word");
  const int first = row_begin + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 both = load_shared_128(intervals + (first_key + h * 8) * 16);
    const uint32_t bits = (query_bits_from(both.x, first) & ~query_bits_from(both.y, first)) |
                          (query_bits_from(both.z, first) & ~query_bits_from(both.w, first));
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (bits & (1u << (n * 2 + e))) scores[n][h * 2 + e] = masked_score;
      }
    }
  }
}

}  // namespace flashmask::sm90
