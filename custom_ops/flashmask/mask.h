// The mask, once, for every backend: two half-open intervals of masked rows per key column.
//
//   num_bounds  causal  bounds of column j      column j masks the rows
//   1           yes     LTS                     [LTS, s_q) and the causal part
//   2           yes     LTS, LTE                [LTS, LTE) and the causal part
//   2           no      LTS, UTE                [LTS, s_q) and [0, UTE)
//   4           no      LTS, LTE, UTS, UTE      [LTS, LTE) and [UTS, UTE)
//   0           either  -                       the causal part, or nothing
// The causal part of column j is [0, j - (s_k - s_q)), so every form is two intervals and kernels need one code path.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FLASHMASK_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy would be shared by
// all.
#define FLASHMASK_HD inline __attribute__((always_inline))
#endif

namespace flashmask {

// An empty interval is stored so that it changes neither the smallest start nor the largest end of its neighbours.
constexpr int32_t kEmptyStart = INT32_MAX;
constexpr int32_t kEmptyEnd = INT32_MIN;

struct RowInterval {
  int32_t start = kEmptyStart;
  int32_t end = kEmptyEnd;

  FLASHMASK_HD bool empty() const { return start >= end; }
  FLASHMASK_HD bool contains(int32_t row) const { return row >= start && row < end; }
};

struct ColumnMask {
  RowInterval lower;  // LTS, LTE
  RowInterval upper;  // UTS, UTE, or the causal part

  FLASHMASK_HD bool masks(int32_t row) const { return lower.contains(row) || upper.contains(row); }
};

FLASHMASK_HD RowInterval clipped_interval(int64_t start, int64_t end, int32_t seqlen_q) {
  RowInterval interval;
  if (start < 0) start = 0;
  if (end > seqlen_q) end = seqlen_q;
  if (start < end) {
    interval.start = static_cast<int32_t>(start);
    interval.end = static_cast<int32_t>(end);
  }
  return interval;
}

// `bounds` points at the num_bounds values of column `column`.
FLASHMASK_HD ColumnMask column_mask(const int32_t* bounds, int32_t num_bounds, bool causal, int32_t column,
                                    int32_t seqlen_q, int32_t seqlen_k) {
  ColumnMask mask;
  const bool has_lower_end = causal ? num_bounds == 2 : num_bounds == 4;
  if (num_bounds > 0) {
    mask.lower = clipped_interval(bounds[0], has_lower_end ? bounds[1] : seqlen_q, seqlen_q);
  }
  if (causal) {
    mask.upper =
        clipped_interval(0, static_cast<int64_t>(column) - (static_cast<int64_t>(seqlen_k) - seqlen_q), seqlen_q);
  } else if (num_bounds == 4) {
    mask.upper = clipped_interval(bounds[2], bounds[3], seqlen_q);
  } else if (num_bounds == 2) {
    mask.upper = clipped_interval(0, bounds[1], seqlen_q);
  }
  // A column that no row sees is stored as twice the whole column: it then never keeps a tile from being skipped.
  if (!mask.lower.empty() && !mask.upper.empty()) {
    const RowInterval& first = mask.lower.start <= mask.upper.start ? mask.lower : mask.upper;
    const RowInterval& second = mask.lower.start <= mask.upper.start ? mask.upper : mask.lower;
    if (first.start == 0 && second.start <= first.end && (first.end == seqlen_q || second.end == seqlen_q)) {
      mask.lower.start = mask.upper.start = 0;
      mask.lower.end = mask.upper.end = seqlen_q;
    }
  } else if ((mask.lower.start == 0 && mask.lower.end == seqlen_q) ||
             (mask.upper.start == 0 && mask.upper.end == seqlen_q)) {
    mask.lower.start = mask.upper.start = 0;
    mask.lower.end = mask.upper.end = seqlen_q;
  }
  return mask;
}

// The smallest and largest start and end of one interval over the columns of a tile.
struct IntervalRange {
  int32_t min_start = kEmptyStart;  // rows outside [min_start, max_end) are masked in no column
  int32_t max_end = kEmptyEnd;
  int32_t max_start = kEmptyEnd;  // rows inside [max_start, min_end) are masked in every column
  int32_t min_end = kEmptyStart;

  FLASHMASK_HD void add(const RowInterval& interval) {
    if (interval.start < min_start) min_start = interval.start;
    if (interval.end > max_end) max_end = interval.end;
    if (interval.start > max_start) max_start = interval.start;
    if (interval.end < min_end) min_end = interval.end;
  }
  FLASHMASK_HD bool masks_all(int32_t row_begin, int32_t row_end) const {
    return max_start <= row_begin && row_end <= min_end;
  }
  FLASHMASK_HD bool masks_none(int32_t row_begin, int32_t row_end) const {
    return row_end <= min_start || max_end <= row_begin;
  }
};

enum class TileClass : int32_t { kFullyMasked = 0, kPartial = 1, kUnmasked = 2 };

// What the columns of a column tile have in common. Built once per column tile, asked once per tile pair.
struct ColumnTileSummary {
  IntervalRange lower;
  IntervalRange upper;

  FLASHMASK_HD void add(const ColumnMask& mask) {
    lower.add(mask.lower);
    upper.add(mask.upper);
  }
  // Conservative one way only: a tile with an unmasked element is never called fully masked.
  FLASHMASK_HD TileClass classify(int32_t row_begin, int32_t row_end) const {
    if (lower.masks_all(row_begin, row_end) || upper.masks_all(row_begin, row_end)) return TileClass::kFullyMasked;
    if (lower.masks_none(row_begin, row_end) && upper.masks_none(row_begin, row_end)) return TileClass::kUnmasked;
    return TileClass::kPartial;
  }
  // The first row at or after `row_begin` at which a tile of `tile_rows` rows, on the grid of such tiles, may hold an
  // unmasked element: a kernel that walks down a column tile jumps over whole masked row ranges.
  FLASHMASK_HD int32_t skip_masked_rows(int32_t row_begin, int32_t tile_rows, int32_t seqlen_q) const {
    while (row_begin < seqlen_q) {
      const int32_t row_end = seqlen_q - row_begin < tile_rows ? seqlen_q : row_begin + tile_rows;
      int32_t masked_end;
      if (lower.masks_all(row_begin, row_end)) {
        masked_end = lower.min_end;
      } else if (upper.masks_all(row_begin, row_end)) {
        masked_end = upper.min_end;
      } else {
        break;
      }
      row_begin = masked_end >= seqlen_q ? seqlen_q : masked_end / tile_rows * tile_rows;
    }
    return row_begin;
  }
};

// Mask head that query head `head` reads.
FLASHMASK_HD int32_t mask_head(int32_t head, int32_t heads_q, int32_t heads_mask) {
  return head / (heads_q / heads_mask);
}

}  // namespace flashmask
