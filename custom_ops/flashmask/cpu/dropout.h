// Dropout factors of one tile: 0, or the inverse keep probability. Which scores are kept is philox.h's affair.
#pragma once

#include "philox.h"
#include "plan.h"
#include "simd.h"

namespace flashmask {
namespace FLASHMASK_ISA {

struct Dropout {
  DropoutKey key;
  uint32_t threshold;
  float scale;
  bool active;

  explicit Dropout(const FlashmaskParams& p)
      : key(p.dropout > 0.0f ? p.seed_offset[0] : 0, p.dropout > 0.0f ? p.seed_offset[1] : 0),
        threshold(dropout_keep_threshold(p.dropout)),
        scale(dropout_keep_scale(threshold)),
        active(p.dropout > 0.0f) {}

  // factors[i * row_step + j * column_step] for row + i, column + j; `column` is a multiple of kDropoutColumnsPerCall.
  void fill(int batch_head, int row, int rows, int column, int columns, float* factors, ptrdiff_t row_step,
            ptrdiff_t column_step) const {
    for (int i = 0; i < rows; ++i) {
      for (int j0 = 0; j0 < columns; j0 += kDropoutColumnsPerCall) {
        const PhiloxWords words = key.draw(batch_head, row + i, (column + j0) / kDropoutColumnsPerCall);
        const int count = min_int(kDropoutColumnsPerCall, columns - j0);
        for (int j = 0; j < count; ++j) {
          factors[i * row_step + (j0 + j) * column_step] = dropout_bits(words, j) < threshold ? scale : 0.0f;
        }
      }
    }
  }
};

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
