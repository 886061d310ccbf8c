// The end of a row tile: the output by its row sums, through shared memory and the copy engine or, where no room is
// left for that, straight to memory; lse straight to memory.
#pragma once

#include "../cuda/element.cuh"
#include "barrier.cuh"
#include "forward_config.h"
#include "forward_producer.cuh"
#include "global_memory.cuh"
#include "softmax.cuh"
#include "store_matrix.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

constexpr int kEpilogueBarrier = 5;  // named barriers: one for each consumer warpgroup

// For lane t of a quad: the words [t] of its four lanes, in their order.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? words[low] : words[low + step], step);
      if (upper) {
        words[low] = got;
      } else {
        words[low + step] = got;
      }
    }
  }
}

// 64 rows of the output straight to memory: the four lanes of a row bring 64 bytes at a time.
template <typename T, int kGroups>
__device__ __forceinline__ void store_rows(const FlashmaskParams& op, const RowTile& work, int first_row,
                                           const float (&output)[kGroups][4], int lane) {
  static_assert(kGroups % 4 == 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_row + r * 8 + lane / 4;
    T* const row = head_pointer<T>(op.out, work.batch, work.head, query) + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kGroups; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = Half2<T>::pack(output[n + i][r * 2], output[n + i][r * 2 + 1]);
      transpose_quad(words, lane);
      if (query < op.seqlen_q && (n + lane % 4) * 8 < op.head_dim_v) {
        store_global_128(row + n * 8, words);
      }
    }
  }
}

template <typename T, typename Layout>
__device__ __forceinline__ void write_output(const KernelParams& p, const CUtensorMap& map, uint32_t shared,
                                             const RowTile& work, float (&output)[Layout::kHeadDim / 8][4],
                                             const OnlineSoftmax& softmax, int warpgroup, int thread) {
  using Config = typename Layout::Config;
  using Tile = typename Layout::QTile;
  const int lane = thread % 32;
  const int row = warpgroup * 64 + thread / 32 * 16;  // of this warp, in the tile
  const int row_begin = work.row_tile * Config::kRows;
  const int64_t batch_head = static_cast<int64_t>(work.batch) * p.op.heads_q + work.head;

  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.total(r);
    // Compared with zero, not for being above it: a NaN must reach the output, or a diverged model goes unnoticed.
    inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int query = row_begin + row + r * 8 + lane / 4;
    if (p.op.lse != nullptr && lane % 4 == 0 && query < p.op.seqlen_q) {
      p.op.lse[batch_head * p.op.seqlen_q + query] =
          sum == 0.0f ? -CUDART_INF_F : (softmax.reference[r] + __log2f(sum)) * CUDART_LN2_F;
    }
  }
  rescale(output, inverse);

  if constexpr (Config::kOutputBy == OutputBy::kRegisters) {
    store_rows<T>(p.op, work, row_begin + row, output, lane);
    return;
  }
  // The last output of this warpgroup has left its place.
  if (thread == 0) wait_stores_read<0>();
  named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
#pragma unroll
  for (int n = 0; n < Layout::kHeadDim / 8; n += 2) {
    uint32_t fragment[4];
    pack_operand<T>(fragment, output[n], output[n + 1]);
    store_matrix(shared + Layout::kOut + Tile::chunk_offset(row + lane % 16, n + lane / 16), fragment);
  }
  fence_async_proxy();
  named_barrier_sync(kEpilogueBarrier + warpgroup, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      store_box(map, shared + Layout::kOut + panel * Tile::kPanelBytes + warpgroup * 64 * Tile::kRowBytes,
                panel * Tile::kPanel, row_begin + warpgroup * 64, work.head, work.batch);
    }
    commit_stores();
    if (Config::kOutputInQuery) wait_stores_read<0>();
  }
}

}  // namespace flashmask::sm90
