// The end of a row tile: the output by its row sums, through shared memory and the copy engine or, where that has
// better uses, straight to memory; lse straight to memory.
#pragma once

#include "../cuda/element.cuh"
#include "barrier.cuh"
#include "forward_config.h"
#include "forward_producer.cuh"
#include "softmax.cuh"
#include "store_matrix.cuh"
#include "store_rows.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

constexpr int kEpilogueBarrier = 5;  // named barriers: one for each consumer warpgroup, behind those of turns

template <typename T, typename Layout>
__device__ __forceinline__ void write_output(const KernelParams& p, const CUtensorMap& map, uint32_t shared,
                                             const RowTile& work, float (&output)[Layout::kHeadDim / 8][4],
                                             const OnlineSoftmax& softmax, int warpgroup, int thread) {
  using Config = typename Layout::Config;
  using Tile = typename Layout::QTile;
  const int lane = thread % 32;
  const int row = thread / 32 * 16;  // of this warp
  const int row_begin = work.row_tile * Config::kRows + warpgroup * kRowsPerWarpgroup;
  const uint32_t place = shared + Layout::kOut + warpgroup * Tile::kBytes;
  const int64_t first_lse = (static_cast<int64_t>(work.batch) * p.op.heads_q + work.head) * p.op.seqlen_q;

  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.total(r);
    // Compared with zero, not for being above it: a NaN must reach the output, or a diverged model goes unnoticed.
    inverse[r] = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
    const int query = row_begin + row + r * 8 + lane / 4;
    if (p.op.lse != nullptr && lane % 4 == 0 && query < p.op.seqlen_q) {
      p.op.lse[first_lse + query] =
          sum == 0.0f ? -CUDART_INF_F : (softmax.reference[r] + log2_fast(sum)) * CUDART_LN2_F;
    }
  }
#pragma unroll
  for (int n = 0; n < Layout::kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) output[n][i] = output[n][i] * inverse[i / 2] + 0.0f;  // no zero is negative
  }

  if constexpr (Config::kOutputBy == OutputBy::kRegisters) {
    store_rows<T>(p.op.out, work.batch, work.head, row_begin + row, p.op.seqlen_q, p.op.head_dim_v, output, lane);
    return;
  }
  // The last output of this warpgroup has left its place.
  if (thread == 0) wait_stores_read<0>();
  named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
#pragma unroll
  for (int n = 0; n < Layout::kHeadDim / 8; n += 2) {
    uint32_t fragment[4];
    pack_operand<T>(fragment, output[n], output[n + 1]);
    store_matrix(place + Tile::chunk_offset(row + lane % 16, n + lane / 16), fragment);
  }
  fence_async_proxy();
  named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      store_box(map, place + panel * Tile::kPanelBytes, panel * Tile::kPanel, row_begin, work.head, work.batch);
    }
    commit_stores();
  }
}

}  // namespace flashmask::sm90
