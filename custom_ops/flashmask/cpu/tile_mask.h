// The mask of one partial tile: per column the masked rows, relative to the tile, and which columns matter at all.
#pragma once

#include "gemm.h"
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
  // Hulls of what is visible: the columns for each block of rows, and the rows for each block of columns. Products
  // leave out the rest.
  Span row_block_columns[kMaxTileRows / kSpanRows];
  Span column_block_rows[kMaxTileColumns / kSpanRows];

  void build(const CpuPlan& plan, int batch, int head, int row, int rows, int column, int columns) {
    const FlashmaskParams& p = plan.params;
    const int32_t* bounds = plan.bounds_of(batch, head);
    const bool keep_all = !plan.skips();
    const bool block_masked = plan.block_masked(batch, head, row, column);
    for (Span& span : row_block_columns) span = keep_all ? Span{0, columns} : Span{columns, 0};
    for (Span& span : column_block_rows) span = keep_all ? Span{0, rows} : Span{rows, 0};
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
      if (!keep_all) add_visible(j, rows);
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

  // Widens the hulls by the rows of column j that no interval at the tile's edge masks.
  void add_visible(int j, int rows) {
    int top = 0, bottom = rows;
    // Twice: the second interval may begin where the first ends.
    for (int pass = 0; pass < 2; ++pass) {
      if (start0[j] <= top && end0[j] > top) top = end0[j];
      if (start1[j] <= top && end1[j] > top) top = end1[j];
      if (end0[j] >= bottom && start0[j] < bottom) bottom = start0[j];
      if (end1[j] >= bottom && start1[j] < bottom) bottom = start1[j];
    }
    if (top >= bottom) return;
    first = min_int(first, j);
    last = j + 1;
    Span& column_block = column_block_rows[j / kSpanRows];
    column_block.begin = min_int(column_block.begin, top);
    column_block.end = max_int(column_block.end, bottom);
    for (int block = top / kSpanRows; block * kSpanRows < bottom; ++block) {
      row_block_columns[block].begin = min_int(row_block_columns[block].begin, j);
      row_block_columns[block].end = j + 1;
    }
  }
};

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
