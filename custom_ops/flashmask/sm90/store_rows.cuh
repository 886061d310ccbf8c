// Rows of an accumulator straight to memory, where no shared memory is free for them or would have to be waited for.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/tile_lists.cuh"
#include "global_memory.cuh"

namespace flashmask::sm90 {

// For lane t of a quad: the words [t] of its four lanes, in their order.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? words[low] : words[low + step], step);
      if (upper) {
        words[low] = got;
      } else {
        words[low + step] = got;
      }
    }
  }
}

template <int kGroups>
__device__ __forceinline__ void scale_rows(float (&gradient)[kGroups][4], float scale) {
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) gradient[n][i] *= scale;
  }
}

// A warp's 16 rows from `first_row` on, rounded: the four lanes of a row bring 64 bytes at a time. Rows from `end_row`
// and dims from `end_dim` on, which is a multiple of eight, do not exist.
template <typename T, int kGroups>
__device__ __forceinline__ void store_rows(const FlashmaskTensor& tensor, int batch, int head, int first_row,
                                           int end_row, int end_dim, const float (&values)[kGroups][4], int lane) {
  static_assert(kGroups % 4 == 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + r * 8 + lane / 4;
    T* const place = head_pointer<T>(tensor, batch, head, row) + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kGroups; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = Half2<T>::pack(values[n + i][r * 2], values[n + i][r * 2 + 1]);
      transpose_quad(words, lane);
      if (row < end_row && (n + lane % 4) * 8 < end_dim) store_global_128(place + n * 8, words);
    }
  }
}

}  // namespace flashmask::sm90
