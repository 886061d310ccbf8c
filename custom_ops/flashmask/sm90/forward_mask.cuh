// Element masks of partial tiles. Two warps of the producers work out which rows of a tile every column masks, one bit
// each, while the consumers still multiply; these then need one test per score.
#pragma once

#include <math_constants.h>

#include "../cuda/row_bits.cuh"
#include "../cuda/tile_lists.cuh"
#include "forward_config.h"

namespace flashmask::sm90 {

// How many ends of intervals of a column, the causal one included, say which rows are masked. Each form has code of its
// own: what mask warps do for a tile takes turns at the instruction units with what the consumers do.
enum class MaskForm {
  kTwo,    // from lower_start on, and before upper_end
  kThree,  // from lower_start to lower_end, and before upper_end
  kFour    // from lower_start to lower_end, and from upper_start to upper_end
};
__device__ __forceinline__ MaskForm mask_form(const FlashmaskParams& op) {
  return op.num_bounds == 4 ? MaskForm::kFour : op.causal && op.num_bounds == 2 ? MaskForm::kThree : MaskForm::kTwo;
}

// The mask of a lane's two neighbouring columns, as far as its form has bounds: with 128 columns, lane `lane` of mask
// warp `warp` has pair warp * 32 + lane of a tile; with 64, both warps have all pairs.
struct ColumnPair {
  int lower_start[2], lower_end[2], upper_start[2], upper_end[2];
};

template <MaskForm kForm>
__device__ __forceinline__ ColumnPair load_bounds(const FlashmaskParams& op, const int32_t* head_bounds,
                                                  int first_column) {
  ColumnPair pair;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = first_column + c, diagonal = column - (op.seqlen_k - op.seqlen_q);
    const uint32_t existing = min(column, op.seqlen_k - 1);  // no jump over the loads
    const int32_t* bounds = head_bounds + existing * static_cast<uint32_t>(op.num_bounds);
    if constexpr (kForm == MaskForm::kTwo) {
      pair.lower_start[c] = op.num_bounds > 0 ? bounds[0] : INT32_MAX;
      pair.upper_end[c] = op.causal ? diagonal : op.num_bounds > 0 ? bounds[1] : 0;
    } else {
      pair.lower_start[c] = bounds[0];
      pair.lower_end[c] = bounds[1];
      if constexpr (kForm == MaskForm::kFour) pair.upper_start[c] = bounds[2];
      pair.upper_end[c] = kForm == MaskForm::kFour ? bounds[3] : diagonal;
    }
    if (column >= op.seqlen_k) {  // masked everywhere
      pair.lower_start[c] = 0;
      pair.lower_end[c] = INT32_MAX;
    }
  }
  return pair;
}

// Writes the words of a pair of columns of the tile whose corner is given: for 16 rows each, low half the even column.
// Turned left by one to four places, by the number of the eight columns in their group of 32: so the bits that a
// consumer's thread wants of four words land side by side (apply_mask). Only for the rows of warpgroups that need it,
// from the first to the last bit of `partial`: with three or four of them, a tile is often partial for one. Of these
// rows, `row_share` takes 32 of every kMaskRowShares times 32.
template <typename Layout, MaskForm kForm>
__device__ __forceinline__ void write_mask(uint32_t place, const ColumnPair& columns, int row_begin, int pair,
                                           int row_share, uint32_t partial) {
  const uint32_t mine = place + (pair % 4 * Layout::kMaskStride + pair / 4) * 4;
  const int first_row = (__ffs(partial) - 1) * kRowsPerWarpgroup, end_row = (32 - __clz(partial)) * kRowsPerWarpgroup;
#pragma unroll 1
  for (int first = first_row + row_share * 32; first < end_row; first += 32 * Layout::Config::kMaskRowShares) {
    const int row = row_begin + first;
    uint32_t bits[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t lower = kForm == MaskForm::kTwo ? bits_from(columns.lower_start[c], row)
                                                     : interval_bits(columns.lower_start[c], columns.lower_end[c], row);
      const uint32_t upper = kForm == MaskForm::kFour ? interval_bits(columns.upper_start[c], columns.upper_end[c], row)
                                                      : ~bits_from(columns.upper_end[c], row);
      bits[c] = lower | upper;
    }
    const uint32_t group = mine + static_cast<uint32_t>(first) / 16 * 4 * Layout::kMaskStride * 4;
    const auto turned = [&](uint32_t word) { return __funnelshift_l(word, word, pair / 4 % 4 + 1); };
    store_shared_32(group, turned(__byte_perm(bits[0], bits[1], 0x5410)));
    store_shared_32(group + 4 * Layout::kMaskStride * 4, turned(__byte_perm(bits[0], bits[1], 0x7632)));
  }
}

// Puts -inf where the mask says so. `warp` counts the consumers' warps: 16 rows each.
template <typename Layout, int kGroups>
__device__ __forceinline__ void apply_mask(float (&scores)[kGroups][4], uint32_t place, int warp, int lane) {
  const uint32_t mine = place + (warp * 4 + lane % 4) * Layout::kMaskStride * 4;
#pragma unroll
  for (int quarter = 0; quarter < kGroups / 4; ++quarter) {
    const uint4 words = load_shared_128(mine + quarter * 16);
    // Most groups of 32 columns in a partial tile are seen by all rows of the warp.
    if (!__any_sync(kAllLanes, (words.x | words.y | words.z | words.w) != 0)) continue;
    // Of each word the thread wants one bit of every byte. Bits 1 to 4 of a byte, which come from words 0 to 3, become
    // four predicates in one instruction (R2P), where every score would have taken a test of its own. Bit 0 is not
    // used: the compiler has another way for that, which is longer.
    const auto turned = [&](uint32_t word) { return __funnelshift_r(word, word, lane / 4); };
    const uint32_t low = select_bits(0x02020202u, turned(words.x), turned(words.y));
    const uint32_t high = select_bits(0x08080808u, turned(words.z), turned(words.w));
    const uint32_t bits = select_bits(0x06060606u, low, high);
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      constexpr int kScore[4] = {0, 2, 1, 3};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (bits & (2u << (byte * 8 + i))) scores[quarter * 4 + i][kScore[byte]] = -CUDART_INF_F;
      }
    }
  }
}

// Where nothing else masks: only the first `keys` columns of the tile exist.
template <int kGroups>
__device__ __forceinline__ void mask_behind(float (&scores)[kGroups][4], int keys, int lane) {
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const int column = n * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i % 2 >= keys) scores[n][i] = -CUDART_INF_F;
    }
  }
}

}  // namespace flashmask::sm90
