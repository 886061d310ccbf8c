// Element masks as bits: the rows of one key column that are masked, as a word of 32 rows. Made once per column and
// warp, tested with one instruction per score.
#pragma once

#include "../mask.h"
#include "ptx.cuh"

namespace flashmask::sm80 {

// Bit i is set when row_begin + i lies in [start, end). Any int32 values will do.
__device__ __forceinline__ uint32_t interval_bits(int start, int end, int row_begin) {
  const int first = min(max(start, row_begin), row_begin + 32) - row_begin;
  const int last = min(max(end, row_begin), row_begin + 32) - row_begin;
  return bit_run(first, max(last - first, 0));
}

// Masked rows of `column` among row_begin .. row_begin + 31, from its raw bounds. Rows past seqlen_q may come out
// either way; columns past seqlen_k are masked everywhere.
__device__ __forceinline__ uint32_t column_bits(const int32_t* bounds, int num_bounds, bool causal, int column,
                                                int row_begin, int seqlen_q, int seqlen_k) {
  if (column >= seqlen_k) return 0xFFFFFFFFu;
  uint32_t bits = 0;
  if (num_bounds > 0) {
    const bool has_lower_end = causal ? num_bounds == 2 : num_bounds == 4;
    bits = interval_bits(bounds[0], has_lower_end ? bounds[1] : seqlen_q, row_begin);
  }
  if (causal) {
    bits |= interval_bits(0, column - (seqlen_k - seqlen_q), row_begin);
  } else if (num_bounds == 4) {
    bits |= interval_bits(bounds[2], bounds[3], row_begin);
  } else if (num_bounds == 2) {
    bits |= interval_bits(0, bounds[1], row_begin);
  }
  return bits;
}

}  // namespace flashmask::sm80
