// Forward pass of one row tile: online softmax in base 2 over the column tiles that are not fully masked.
//
// Scores are held transposed, S^T[column][row], with the rows in the lanes of vectors: row statistics need no
// reduction across lanes, a column's masked interval is a contiguous stretch to overwrite, and only Q, once per row
// tile, has to be transposed.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "scratch.h"
#include "storage.h"
#include "tile_mask.h"

namespace flashmask {
namespace FLASHMASK_ISA {

struct ForwardScratch {
  int ld_rows, ld_qk, ld_v;
  float *q, *q_transposed, *k, *v, *scores, *keep, *out, *row_max, *row_sum, *rescale;

  // Lays the parts out in `base`; returns the number of floats.
  int64_t layout(const FlashmaskParams& p, float* base) {
    ld_rows = padded_row(kForwardTileRows);
    ld_qk = padded_row(p.head_dim);
    ld_v = padded_row(p.head_dim_v);
    ScratchCutter cut{base};
    q = cut.take((int64_t)kForwardTileRows * ld_qk);
    q_transposed = cut.take((int64_t)p.head_dim * ld_rows);
    k = cut.take((int64_t)kForwardTileColumns * ld_qk);
    v = cut.take((int64_t)kForwardTileColumns * ld_v);
    scores = cut.take((int64_t)kForwardTileColumns * ld_rows);
    keep = cut.take(p.dropout > 0.0f ? (int64_t)kForwardTileColumns * ld_rows : 0);
    out = cut.take((int64_t)kForwardTileRows * ld_v);
    row_max = cut.take(kForwardTileRows);
    row_sum = cut.take(kForwardTileRows);
    rescale = cut.take(kForwardTileRows);
    return cut.used;
  }
};

// Turns scores of columns [first, last) into unnormalised probabilities for kVectors vectors of rows, and updates the
// rows' running maximum and sum; `rescale` becomes the factor for what was accumulated before.
template <int kVectors>
FLASHMASK_INLINE void softmax_columns(float* scores, int ld, int first, int last, float* row_max, float* row_sum,
                                      float* rescale) {
  VecF best[kVectors], base[kVectors], sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) best[v] = load(row_max + v * kLanes);
  for (int j = first; j < last; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) best[v] = maximum(best[v], load(scores + (ptrdiff_t)j * ld + v * kLanes));
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    // A row that has seen no column yet keeps a finite base: -inf - (-inf) would be NaN.
    base[v] = best[v] == broadcast(-kInfinity) ? VecF{} : best[v];
    const VecF factor = exp2_vec(load(row_max + v * kLanes) - base[v]);
    store(rescale + v * kLanes, factor);
    store(row_max + v * kLanes, best[v]);
    sum[v] = VecF{};
  }
  for (int j = first; j < last; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* score = scores + (ptrdiff_t)j * ld + v * kLanes;
      const VecF probability = exp2_vec(load(score) - base[v]);
      sum[v] += probability;
      store(score, probability);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store(row_sum + v * kLanes, load(row_sum + v * kLanes) * load(rescale + v * kLanes) + sum[v]);
  }
}

FLASHMASK_INLINE void mask_scores(const TileMask& mask, int first, int last, float* scores, int ld) {
  for (int j = first; j < last; ++j) {
    float* column = scores + (ptrdiff_t)j * ld;
    for (int i = mask.start0[j]; i < mask.end0[j]; ++i) column[i] = -kInfinity;
    for (int i = mask.start1[j]; i < mask.end1[j]; ++i) column[i] = -kInfinity;
  }
}

template <typename T>
static void forward_row_tile(const CpuPlan& plan, const Dropout& dropout, int batch, int head, int row_tile,
                             const ForwardScratch& s) {
  const FlashmaskParams& p = plan.params;
  const int row = row_tile * kForwardTileRows;
  const int rows = min_int(kForwardTileRows, p.seqlen_q - row);
  const int padded_rows = (rows + kLanes - 1) / kLanes * kLanes;
  const int padded_dim_v = (p.head_dim_v + kLanes - 1) / kLanes * kLanes;
  const int head_k = head / (p.heads_q / p.heads_k);
  const ColumnTileSummary* summaries = plan.summaries_of(batch, head);

  bool have_q = false;
  for (int i = 0; i < padded_rows; ++i) {
    s.row_max[i] = -kInfinity;
    s.row_sum[i] = 0.0f;
  }
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < padded_dim_v; ++k) s.out[(ptrdiff_t)i * s.ld_v + k] = 0.0f;
  }

  for (int tile = 0; tile < plan.num_column_tiles; ++tile) {
    const int column = tile * kForwardTileColumns;
    const int columns = min_int(kForwardTileColumns, p.seqlen_k - column);
    TileClass tile_class = TileClass::kPartial;
    if (plan.skips()) {
      tile_class = summaries[tile].classify(row, row + rows);
      if (tile_class == TileClass::kFullyMasked || plan.block_masked(batch, head, row, column)) continue;
    }
    int first = 0, last = columns;  // columns that some row sees, from the start of a block of kSpanRows
    GemmSpans score_spans, out_spans;
    TileMask mask;
    if (tile_class == TileClass::kPartial) {
      mask.build(plan, batch, head, row, rows, column, columns);
      if (mask.first == mask.last) continue;
      first = mask.first / kSpanRows * kSpanRows;
      last = mask.last;
      score_spans.columns = mask.column_block_rows + first / kSpanRows;
      out_spans.depth = mask.row_block_columns;
    }
    if (!have_q) {
      load_rows<T>(p.q, batch, head, row, rows, p.head_dim, p.head_dim, s.q, s.ld_qk);
      transpose(s.q, s.ld_qk, rows, padded_rows, p.head_dim, p.softmax_scale * 1.44269504f, s.q_transposed, s.ld_rows);
      have_q = true;
    }
    load_rows<T>(p.k, batch, head_k, column + first, last - first, p.head_dim, p.head_dim,
                 s.k + (ptrdiff_t)first * s.ld_qk, s.ld_qk);
    load_rows<T>(p.v, batch, head_k, column + first, last - first, p.head_dim_v, padded_dim_v,
                 s.v + (ptrdiff_t)first * s.ld_v, s.ld_v);
    gemm<Layout::kRowMajor, Store::kOverwrite>(last - first, padded_rows, p.head_dim, s.k + (ptrdiff_t)first * s.ld_qk,
                                               s.ld_qk, s.q_transposed, s.ld_rows,
                                               s.scores + (ptrdiff_t)first * s.ld_rows, s.ld_rows, score_spans);
    if (tile_class == TileClass::kPartial) mask_scores(mask, first, last, s.scores, s.ld_rows);

    constexpr int kTogether = 4;
    int i = 0;
    for (; i + kTogether * kLanes <= padded_rows; i += kTogether * kLanes) {
      softmax_columns<kTogether>(s.scores + i, s.ld_rows, first, last, s.row_max + i, s.row_sum + i, s.rescale + i);
    }
    for (; i < padded_rows; i += kLanes) {
      softmax_columns<1>(s.scores + i, s.ld_rows, first, last, s.row_max + i, s.row_sum + i, s.rescale + i);
    }
    for (int r = 0; r < rows; ++r) {
      if (s.rescale[r] == 1.0f) continue;
      float* out_row = s.out + (ptrdiff_t)r * s.ld_v;
      for (int k = 0; k < padded_dim_v; k += kLanes) store(out_row + k, load(out_row + k) * s.rescale[r]);
    }
    if (dropout.active) {
      // The sum above is taken before dropout: the softmax is normalised first, then thinned.
      dropout.fill(batch * p.heads_q + head, row, rows, column, columns, s.keep, 1, s.ld_rows);
      for (int j = first; j < last; ++j) {
        for (int r = 0; r < rows; ++r) s.scores[(ptrdiff_t)j * s.ld_rows + r] *= s.keep[(ptrdiff_t)j * s.ld_rows + r];
      }
    }
    gemm<Layout::kTransposed, Store::kAccumulate>(rows, padded_dim_v, last, s.scores, s.ld_rows, s.v, s.ld_v, s.out,
                                                  s.ld_v, out_spans);
  }

  for (int i = 0; i < rows; ++i) {
    const float sum = s.row_sum[i];
    store_row(s.out + (ptrdiff_t)i * s.ld_v, sum == 0.0f ? 0.0f : 1.0f / sum, p.head_dim_v,
              row_pointer<T>(p.out, batch, row + i, head));
    if (p.lse != nullptr) {
      p.lse[((int64_t)batch * p.heads_q + head) * p.seqlen_q + row + i] =
          sum == 0.0f ? -kInfinity : (s.row_max[i] + __builtin_log2f(sum)) * 0.693147181f;
    }
  }
}

template <typename T>
static void forward_typed(const CpuPlan& plan, WorkQueue& queue, float* scratch) {
  const FlashmaskParams& p = plan.params;
  const Dropout dropout(p);
  ForwardScratch parts;
  parts.layout(p, scratch);
  for (int64_t item = queue.next(); item >= 0; item = queue.next()) {
    const int batch_head = (int)(item / plan.num_row_tiles);
    // The last rows first: under a causal mask they are the heaviest.
    const int row_tile = plan.num_row_tiles - 1 - (int)(item % plan.num_row_tiles);
    forward_row_tile<T>(plan, dropout, batch_head / p.heads_q, batch_head % p.heads_q, row_tile, parts);
  }
}

static void forward(const CpuPlan& plan, WorkQueue& queue, float* scratch) {
  with_storage_type(plan.params.dtype, [&](auto type) { forward_typed<decltype(type)>(plan, queue, scratch); });
}

static int64_t forward_scratch_floats(const FlashmaskParams& p) {
  ForwardScratch parts;
  return parts.layout(p, nullptr);
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
