// The block-list kernel: one launch classifies every pair of tiles of every mask head.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"
#include "launch_kernel.cuh"
#include "multiprocessors.h"
#include "tile_lists.cuh"

namespace flashmask {
namespace {

constexpr int kWarps = 32;  // one for each column tile: all bounds are asked for at once
constexpr int kTilesPerBlock = 32;
constexpr int kRowTilesPerWarp = 2;  // if there are multiprocessors for that

__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(kAllLanes, value); }

__device__ __forceinline__ void reduce(IntervalRange* range) {
  range->min_start = warp_min(range->min_start);
  range->max_end = warp_max(range->max_end);
  range->max_start = warp_max(range->max_start);
  range->min_end = warp_min(range->min_end);
}

// Block x takes 32 column tiles of one mask head, block y a share of the row tiles.
__global__ void __launch_bounds__(kWarps * 32) tile_list_kernel(const __grid_constant__ KernelParams p) {
  // Bytes, as summaries have initial values and CUDA forbids those in shared memory. Some compilers refuse the array.
  __shared__ __align__(16) unsigned char storage[kTilesPerBlock * sizeof(ColumnTileSummary)];
  ColumnTileSummary* const summaries = reinterpret_cast<ColumnTileSummary*>(storage);
  const TileLists& lists = p.lists;
  const FlashmaskParams& op = p.op;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t mask_head = blockIdx.x / lists.column_words;
  const int column_word = blockIdx.x % lists.column_words;
  const int first_tile = column_word * kTilesPerBlock;

  for (int slot = warp; slot < kTilesPerBlock; slot += kWarps) {
    const int column_begin = (first_tile + slot) * lists.tile_columns;
    const int column_end = min(column_begin + lists.tile_columns, op.seqlen_k);
    ColumnTileSummary summary;
#pragma unroll 4
    for (int column = column_begin + lane; column < column_end; column += 32) {
      const int32_t* bounds = op.bounds + (mask_head * op.seqlen_k + column) * op.num_bounds;
      summary.add(column_mask(bounds, op.num_bounds, op.causal, column, op.seqlen_q, op.seqlen_k));
    }
    reduce(&summary.lower);
    reduce(&summary.upper);
    if (lane == 0) summaries[slot] = summary;
  }
  __syncthreads();

  const int block_mask_rows = (op.seqlen_q + FLASHMASK_BLOCK_MASK_TILE - 1) / FLASHMASK_BLOCK_MASK_TILE;
  const int block_mask_columns = (op.seqlen_k + FLASHMASK_BLOCK_MASK_TILE - 1) / FLASHMASK_BLOCK_MASK_TILE;
  const auto classify = [&](int row_tile, int slot) {
    const int column_tile = first_tile + slot;
    if (column_tile >= lists.column_tiles || row_tile >= lists.row_tiles) return TileClass::kFullyMasked;
    const int row_begin = row_tile * lists.tile_rows;
    const int row_end = min(row_begin + lists.tile_rows, op.seqlen_q);
    const int column_begin = column_tile * lists.tile_columns;
    if (op.block_mask != nullptr) {
      const int64_t block = (mask_head * block_mask_rows + row_begin / FLASHMASK_BLOCK_MASK_TILE) * block_mask_columns +
                            column_begin / FLASHMASK_BLOCK_MASK_TILE;
      if (op.block_mask[block] == 0) return TileClass::kFullyMasked;
    }
    if (p.no_skip) return TileClass::kPartial;
    TileClass result = summaries[slot].classify(row_begin, row_end);
    // Columns past the end of a ragged tile have no bounds: they are masked element by element.
    if (result == TileClass::kUnmasked && column_begin + lists.tile_columns > op.seqlen_k) result = TileClass::kPartial;
    return result;
  };
  const auto vote = [](TileClass tile_class) {
    return ListWord{__ballot_sync(kAllLanes, tile_class != TileClass::kFullyMasked),
                    __ballot_sync(kAllLanes, tile_class == TileClass::kPartial)};
  };

  if (lists.by_row != nullptr) {
    for (int row_tile = blockIdx.y * kWarps + warp; row_tile < lists.row_tiles; row_tile += gridDim.y * kWarps) {
      const ListWord word = vote(classify(row_tile, lane));
      if (lane == 0) lists.by_row[(mask_head * lists.row_tiles + row_tile) * lists.column_words + column_word] = word;
    }
  }
  if (lists.by_column != nullptr) {
    int active = 0;
    for (int item = blockIdx.y * kWarps + warp; item < kTilesPerBlock * lists.row_words; item += gridDim.y * kWarps) {
      const int slot = item % kTilesPerBlock, row_word = item / kTilesPerBlock;
      if (first_tile + slot >= lists.column_tiles) continue;
      const ListWord word = vote(classify(row_word * 32 + lane, slot));
      active += __popc(word.active);
      if (lane == 0) {
        lists.by_column[(mask_head * lists.column_tiles + first_tile + slot) * lists.row_words + row_word] = word;
      }
    }
    if (p.active_tiles != nullptr && lane == 0 && active > 0) {
      atomicAdd(p.active_tiles, static_cast<unsigned long long>(active));
    }
  }
}

}  // namespace

cudaError_t launch_tile_lists(const KernelParams& p, cudaStream_t stream) {
  const int blocks = p.lists.column_words * p.op.batch * p.op.heads_mask;
  const int tiles_per_share = kWarps * kRowTilesPerWarp;
  // Every block makes the summaries of its column tiles for itself: not more blocks than run at once.
  int all = blocks * ((p.lists.row_tiles + tiles_per_share - 1) / tiles_per_share);
  const cudaError_t status = limit_to_multiprocessors(&all);
  if (status != cudaSuccess) return status;
  const dim3 grid(blocks, std::max(1, all / blocks));
  return launch_kernel(tile_list_kernel, grid, kWarps * 32, 0, stream, p);
}

}  // namespace flashmask
