// Backward pass of one column tile: dK and dV stay in scratch while the row tiles that see the columns pass by.
//
// P is recomputed from lse, with delta = rowsum(dout * out):
//   dV += P^T dO,   dS = P (dO V^T - delta),   dK += dS^T Q * scale,   dQ += dS K * scale
// (Dao et al., "FlashAttention", 2022, algorithm 4). Scores are held S[row][column] here: K and V are transposed once
// per column tile. dQ is summed over column tiles in ascending order by OrderedQueue, so the result does not depend on
// the number of threads.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "scratch.h"
#include "storage.h"
#include "tile_mask.h"

namespace flashmask {
namespace FLASHMASK_ISA {

struct BackwardScratch {
  int ld_columns, ld_qk, ld_v;
  float *q, *dout, *dq, *k, *v, *k_transposed, *v_transposed, *dk, *dv, *probabilities, *dscores, *keep;

  int64_t layout(const FlashmaskParams& p, float* base) {
    ld_columns = padded_row(kBackwardTileColumns);
    ld_qk = padded_row(p.head_dim);
    ld_v = padded_row(p.head_dim_v);
    ScratchCutter cut{base};
    q = cut.take((int64_t)kBackwardTileRows * ld_qk);
    dout = cut.take((int64_t)kBackwardTileRows * ld_v);
    dq = cut.take((int64_t)kBackwardTileRows * ld_qk);
    k = cut.take((int64_t)kBackwardTileColumns * ld_qk);
    v = cut.take((int64_t)kBackwardTileColumns * ld_v);
    k_transposed = cut.take((int64_t)p.head_dim * ld_columns);
    v_transposed = cut.take((int64_t)p.head_dim_v * ld_columns);
    dk = cut.take((int64_t)kBackwardTileColumns * ld_qk);
    dv = cut.take((int64_t)kBackwardTileColumns * ld_v);
    probabilities = cut.take((int64_t)kBackwardTileRows * ld_columns);
    dscores = cut.take((int64_t)kBackwardTileRows * ld_columns);
    keep = cut.take(p.dropout > 0.0f ? (int64_t)kBackwardTileRows * ld_columns : 0);
    return cut.used;
  }
};

// The float32 rows that dQ is summed in: dq itself, or a buffer where dq is a 16-bit type.
FLASHMASK_INLINE float* dq_row(const CpuPlan& plan, const BackwardBuffers& buffers, int batch, int head, int row) {
  const FlashmaskParams& p = plan.params;
  if (buffers.dq_float == nullptr) return row_pointer<float>(p.dq, batch, row, head);
  return buffers.dq_float + (((int64_t)batch * p.heads_q + head) * p.seqlen_q + row) * p.head_dim;
}

// delta = rowsum(dout * out), and dQ's sum set to zero; one item is one row tile of one head.
template <typename T>
static void backward_prepare_typed(const CpuPlan& plan, const BackwardBuffers& buffers, WorkQueue& queue) {
  const FlashmaskParams& p = plan.params;
  const int64_t heads = (int64_t)p.batch * p.heads_q;
  for (int64_t item = queue.next(); item >= 0; item = queue.next()) {
    const int batch_head = (int)(item % heads);
    const int batch = batch_head / p.heads_q, head = batch_head % p.heads_q;
    const int row = (int)(item / heads) * kBackwardTileRows;
    const int row_end = min_int(row + kBackwardTileRows, p.seqlen_q);
    for (int i = row; i < row_end; ++i) {
      const T* out = row_pointer<const T>(p.out, batch, i, head);
      const T* dout = row_pointer<const T>(p.dout, batch, i, head);
      float sum = 0.0f;
      for (int k = 0; k < p.head_dim_v; ++k) sum += to_float(out[k]) * to_float(dout[k]);
      buffers.delta[(int64_t)batch_head * p.seqlen_q + i] = sum;
      memset(dq_row(plan, buffers, batch, head, i), 0, sizeof(float) * (size_t)p.head_dim);
    }
  }
}

// Scores to probabilities, and dO V^T to dS, for columns [first, last) of one tile (whole vectors of columns).
// The compiler fuses multiplications and additions; both flags are template arguments so that masked and unmasked tiles
// go through the same operations and give the same bits.
template <bool kMasked, bool kDropout>
static void differentiate_softmax(int rows, int first, int last, const float* lse, const float* delta,
                                  const TileMask& mask, const BackwardScratch& s) {
  for (int i = 0; i < rows; ++i) {
    // A row that sees nothing has lse = -inf; +inf here makes its probabilities zero.
    const VecF lse2 = broadcast(lse[i] == -kInfinity ? kInfinity : lse[i] * 1.44269504f);
    const VecF row_delta = broadcast(delta[i]);
    float* probabilities = s.probabilities + (ptrdiff_t)i * s.ld_columns;
    float* dscores = s.dscores + (ptrdiff_t)i * s.ld_columns;
    const VecI row = broadcast_int(i);
    for (int j = first; j < last; j += kLanes) {
      VecF probability = exp2_vec(load(probabilities + j) - lse2);
      VecF dprobability = load(dscores + j);
      VecF kept = probability;
      if (kDropout) {
        const VecF keep = load(s.keep + (ptrdiff_t)i * s.ld_columns + j);
        kept *= keep;
        dprobability *= keep;
      }
      VecF dscore = probability * (dprobability - row_delta);
      if (kMasked) {
        const VecI masked = ((row >= load_int(mask.start0 + j)) & (row < load_int(mask.end0 + j))) |
                            ((row >= load_int(mask.start1 + j)) & (row < load_int(mask.end1 + j)));
        kept = masked ? VecF{} : kept;
        dscore = masked ? VecF{} : dscore;
      }
      store(probabilities + j, kept);
      store(dscores + j, dscore);
    }
  }
}

template <typename T>
static void backward_tile_pair(const CpuPlan& plan, const BackwardBuffers& buffers, const Dropout& dropout,
                               OrderedQueue& queue, int thread, int64_t item, int batch, int head, int row_tile,
                               int column, int columns, TileClass tile_class, const BackwardScratch& s) {
  const FlashmaskParams& p = plan.params;
  const int row = row_tile * kBackwardTileRows;
  const int rows = min_int(kBackwardTileRows, p.seqlen_q - row);
  const int padded_dim = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  const int padded_dim_v = (p.head_dim_v + kLanes - 1) / kLanes * kLanes;
  TileMask mask;
  int first = 0, last = columns;  // columns that some row sees, from the start of a block of kSpanRows
  GemmSpans row_columns, row_depth, column_depth;
  if (tile_class == TileClass::kPartial) {
    mask.build(plan, batch, head, row, rows, column, columns);
    if (mask.first == mask.last) return;
    first = mask.first / kSpanRows * kSpanRows;
    last = mask.last;
    row_columns.columns = row_depth.depth = mask.row_block_columns;
    column_depth.depth = mask.column_block_rows + first / kSpanRows;
  }
  const int first_vector = first / kLanes * kLanes;
  const int last_vector = (last + kLanes - 1) / kLanes * kLanes;
  const int64_t statistics = ((int64_t)batch * p.heads_q + head) * p.seqlen_q + row;

  load_rows<T>(p.q, batch, head, row, rows, p.head_dim, padded_dim, s.q, s.ld_qk);
  load_rows<T>(p.dout, batch, head, row, rows, p.head_dim_v, padded_dim_v, s.dout, s.ld_v);
  gemm<Layout::kRowMajor, Store::kOverwrite>(rows, last_vector, p.head_dim, s.q, s.ld_qk, s.k_transposed, s.ld_columns,
                                             s.probabilities, s.ld_columns, row_columns);
  gemm<Layout::kRowMajor, Store::kOverwrite>(rows, last_vector, p.head_dim_v, s.dout, s.ld_v, s.v_transposed,
                                             s.ld_columns, s.dscores, s.ld_columns, row_columns);
  if (dropout.active) {
    dropout.fill(batch * p.heads_q + head, row, rows, column, columns, s.keep, s.ld_columns, 1);
  }
  const auto differentiate =
      tile_class == TileClass::kPartial
          ? (dropout.active ? differentiate_softmax<true, true> : differentiate_softmax<true, false>)
          : (dropout.active ? differentiate_softmax<false, true> : differentiate_softmax<false, false>);
  differentiate(rows, first_vector, last_vector, p.lse + statistics, buffers.delta + statistics, mask, s);
  gemm<Layout::kTransposed, Store::kAccumulate>(last - first, padded_dim_v, rows, s.probabilities + first, s.ld_columns,
                                                s.dout, s.ld_v, s.dv + (ptrdiff_t)first * s.ld_v, s.ld_v, column_depth);
  gemm<Layout::kTransposed, Store::kAccumulate>(last - first, padded_dim, rows, s.dscores + first, s.ld_columns, s.q,
                                                s.ld_qk, s.dk + (ptrdiff_t)first * s.ld_qk, s.ld_qk, column_depth);
  gemm<Layout::kRowMajor, Store::kOverwrite>(rows, padded_dim, last, s.dscores, s.ld_columns, s.k, s.ld_qk, s.dq,
                                             s.ld_qk, row_depth);

  const uint32_t position = (uint32_t)(head % (p.heads_q / p.heads_k)) * (uint32_t)plan.num_row_tiles + row_tile;
  queue.wait(thread, item, position);
  for (int i = 0; i < rows; ++i) {
    float* target = dq_row(plan, buffers, batch, head, row + i);
    const float* source = s.dq + (ptrdiff_t)i * s.ld_qk;
    for (int k = 0; k < p.head_dim; ++k) target[k] += source[k] * p.softmax_scale;
  }
  queue.finish(thread, item, position);
}

template <typename T>
static void backward_column_tile(const CpuPlan& plan, const BackwardBuffers& buffers, const Dropout& dropout,
                                 OrderedQueue& queue, int thread, int64_t item, int batch, int head_k, int tile,
                                 const BackwardScratch& s) {
  const FlashmaskParams& p = plan.params;
  const int column = tile * kBackwardTileColumns;
  const int columns = min_int(kBackwardTileColumns, p.seqlen_k - column);
  const int padded_columns = (columns + kLanes - 1) / kLanes * kLanes;
  const int padded_dim = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  const int padded_dim_v = (p.head_dim_v + kLanes - 1) / kLanes * kLanes;
  const int group = p.heads_q / p.heads_k;

  memset(s.dk, 0, sizeof(float) * (size_t)columns * (size_t)s.ld_qk);
  memset(s.dv, 0, sizeof(float) * (size_t)columns * (size_t)s.ld_v);
  bool have_columns = false;
  for (int head = head_k * group; head < (head_k + 1) * group; ++head) {
    const ColumnTileSummary& summary = plan.summaries_of(batch, head)[tile];
    for (int row = 0; row < p.seqlen_q; row += kBackwardTileRows) {
      TileClass tile_class = TileClass::kPartial;
      if (plan.skips()) {
        row = summary.skip_masked_rows(row, kBackwardTileRows, p.seqlen_q);
        if (row >= p.seqlen_q) break;
        if (plan.block_masked(batch, head, row, column)) continue;
        tile_class = summary.classify(row, min_int(row + kBackwardTileRows, p.seqlen_q));
      }
      if (!have_columns) {
        load_rows<T>(p.k, batch, head_k, column, columns, p.head_dim, padded_dim, s.k, s.ld_qk);
        load_rows<T>(p.v, batch, head_k, column, columns, p.head_dim_v, padded_dim_v, s.v, s.ld_v);
        transpose(s.k, s.ld_qk, columns, padded_columns, p.head_dim, p.softmax_scale * 1.44269504f, s.k_transposed,
                  s.ld_columns);
        transpose(s.v, s.ld_v, columns, padded_columns, p.head_dim_v, 1.0f, s.v_transposed, s.ld_columns);
        have_columns = true;
      }
      backward_tile_pair<T>(plan, buffers, dropout, queue, thread, item, batch, head, row / kBackwardTileRows, column,
                            columns, tile_class, s);
    }
  }
  for (int j = 0; j < columns; ++j) {
    store_row(s.dk + (ptrdiff_t)j * s.ld_qk, p.softmax_scale, p.head_dim,
              row_pointer<T>(p.dk, batch, column + j, head_k));
    store_row(s.dv + (ptrdiff_t)j * s.ld_v, 1.0f, p.head_dim_v, row_pointer<T>(p.dv, batch, column + j, head_k));
  }
}

template <typename T>
static void backward_typed(const CpuPlan& plan, const BackwardBuffers& buffers, OrderedQueue& queue, int thread,
                           float* scratch) {
  const FlashmaskParams& p = plan.params;
  const Dropout dropout(p);
  BackwardScratch parts;
  parts.layout(p, scratch);
  const int64_t groups = (int64_t)p.batch * p.heads_k;
  for (int64_t item = queue.claim(thread); item >= 0; item = queue.claim(thread)) {
    const int batch_head = (int)(item % groups);
    backward_column_tile<T>(plan, buffers, dropout, queue, thread, item, batch_head / p.heads_k, batch_head % p.heads_k,
                            (int)(item / groups), parts);
  }
}

template <typename T>
static void backward_finish_typed(const CpuPlan& plan, const BackwardBuffers& buffers, WorkQueue& queue) {
  const FlashmaskParams& p = plan.params;
  const int64_t heads = (int64_t)p.batch * p.heads_q;
  for (int64_t item = queue.next(); item >= 0; item = queue.next()) {
    const int batch_head = (int)(item % heads);
    const int batch = batch_head / p.heads_q, head = batch_head % p.heads_q;
    const int row = (int)(item / heads) * kBackwardTileRows;
    const int row_end = min_int(row + kBackwardTileRows, p.seqlen_q);
    for (int i = row; i < row_end; ++i) {
      store_row(dq_row(plan, buffers, batch, head, i), 1.0f, p.head_dim, row_pointer<T>(p.dq, batch, i, head));
    }
  }
}

static void backward_prepare(const CpuPlan& plan, const BackwardBuffers& buffers, WorkQueue& queue) {
  with_storage_type(plan.params.dtype,
                    [&](auto type) { backward_prepare_typed<decltype(type)>(plan, buffers, queue); });
}

static void backward(const CpuPlan& plan, const BackwardBuffers& buffers, OrderedQueue& queue, int thread,
                     float* scratch) {
  with_storage_type(plan.params.dtype,
                    [&](auto type) { backward_typed<decltype(type)>(plan, buffers, queue, thread, scratch); });
}

// Only 16-bit types have a separate sum to convert.
static void backward_finish(const CpuPlan& plan, const BackwardBuffers& buffers, WorkQueue& queue) {
  if (buffers.dq_float == nullptr) return;
  with_storage_type(plan.params.dtype, [&](auto type) { backward_finish_typed<decltype(type)>(plan, buffers, queue); });
}

static int64_t backward_scratch_floats(const FlashmaskParams& p) {
  BackwardScratch parts;
  return parts.layout(p, nullptr);
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
