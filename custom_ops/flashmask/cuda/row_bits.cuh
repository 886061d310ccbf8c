// Element masks as bits: the rows of one key column that are masked, as a word of 32 rows. Made once per column and
// warp, tested with one instruction per score.
#pragma once

#include "../mask.h"
#include "instructions.cuh"

namespace flashmask {

// Bits i with row_begin + i >= row; `row` may be any int32.
__device__ __forceinline__ uint32_t bits_from(int row, int row_begin) {
  return shift_left(0xFFFFFFFFu, max(row, row_begin) - row_begin);
}

// Bit i is set when row_begin + i lies in [start, end).
__device__ __forceinline__ uint32_t interval_bits(int start, int end, int row_begin) {
  return bits_from(start, row_begin) & ~bits_from(end, row_begin);
}

// Masked rows of `column` among row_begin .. row_begin + 31, from its raw bounds. Rows past seqlen_q may come out
// either way; columns past seqlen_k are masked everywhere.
__device__ __forceinline__ uint32_t column_bits(const int32_t* bounds, int num_bounds, bool causal, int column,
                                                int row_begin, int seqlen_q, int seqlen_k) {
  uint32_t bits = 0;
  if (causal) {
    bits = ~bits_from(column - (seqlen_k - seqlen_q), row_begin);
    if (num_bounds == 1) {
      bits |= bits_from(bounds[0], row_begin);
    } else if (num_bounds == 2) {
      bits |= interval_bits(bounds[0], bounds[1], row_begin);
    }
  } else if (num_bounds == 4) {
    bits = interval_bits(bounds[0], bounds[1], row_begin) | interval_bits(bounds[2], bounds[3], row_begin);
  } else if (num_bounds == 2) {
    bits = bits_from(bounds[0], row_begin) | ~bits_from(bounds[1], row_begin);
  }
  return column < seqlen_k ? bits : 0xFFFFFFFFu;
}

}  // namespace flashmask
