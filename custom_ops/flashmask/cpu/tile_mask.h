// The mask of one partial tile: per column the masked rows, relative to the tile, and which columns matter at all.
#pragma once

#include "plan.h"
#include "simd.h"

namespace flashmask {
namespace FLASHMASK_ISA {

struct TileMask {
  // Rows [start0, end0) and [start1, end1) of the tile are masked; int32 so that vectors of columns load directly.
  int32_t start0[kMaxTileColumns], end0[kMaxTileColumns];
  int32_t start1[kMaxTileColumns], end1[kMaxTileColumns];
  // Columns outside [first, last) are masked in every row of the tile.
  int first, last;

  void build(const CpuPlan& plan, int batch, int head, int row, int rows, int column, int columns) {
    const FlashmaskParams& p = plan.params;
    const int32_t* bounds = plan.bounds_of(batch, head);
    const bool keep_all = !plan.skips();
    const bool block_masked = plan.block_masked(batch, head, row, column);
    first = keep_all ? 0 : columns;
    last = keep_all ? columns : 0;
    for (int j = 0; j < columns; ++j) {
      const int32_t* column_bounds = bounds == nullptr ? nullptr : bounds + (int64_t)(column + j) * p.num_bounds;
      const ColumnMask mask =
          column_mask(column_bounds, p.num_bounds, p.causal != 0, column + j, p.seqlen_q, p.seqlen_k);
      relative(mask.lower, row, rows, &start0[j], &end0[j]);
      relative(mask.upper, row, rows, &start1[j], &end1[j]);
      if (block_masked) {
        start0[j] = 0;
        end0[j] = rows;
      }
      if (!keep_all && !covers(j, rows)) {
        if (j < first) first = j;
        last = j + 1;
      }
    }
    if (first > last) first = last;
    // A vector of columns may reach past the tile's last one.
    for (int j = columns; j < kMaxTileColumns; ++j) start0[j] = end0[j] = start1[j] = end1[j] = 0;
  }

 private:
  FLASHMASK_INLINE void relative(const RowInterval& interval, int row, int rows, int32_t* start, int32_t* end) {
    const bool none = interval.empty() || interval.start >= row + rows || interval.end <= row;
    *start = none ? 0 : max_int(interval.start - row, 0);
    *end = none ? 0 : min_int(interval.end - row, rows);
  }
  bool covers(int j, int rows) const {
    const int gap_free_end = start0[j] <= end1[j] && start1[j] <= end0[j];
    const int start = min_int(end0[j] > start0[j] ? start0[j] : rows, end1[j] > start1[j] ? start1[j] : rows);
    const int end = max_int(end0[j], end1[j]);
    const bool one_covers = (start0[j] == 0 && end0[j] == rows) || (start1[j] == 0 && end1[j] == rows);
    return one_covers || (gap_free_end && start == 0 && end == rows);
  }
};

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
