// dK or dV of 64 keys, above 128 dims: from the accumulators of a warpgroup to shared memory, and from there by TMA.
#pragma once

#include "../cuda/element.cuh"
#include "backward_access.cuh"
#include "backward_work.cuh"
#include "store_matrix.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

template <typename T, typename KTile, int kGroups>
__device__ __forceinline__ void gradient_to_shared(float (&gradient)[kGroups][4], float scale, uint32_t place) {
  const int warp_key = threadIdx.x / 32 % 4 * 16;
  const uint32_t corner = matrix_corner<KTile>(place, warp_key, threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kGroups; n += 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) gradient[n + i / 4][i % 4] *= scale;
    uint32_t rounded[4];
    pack_operand<T>(rounded, gradient[n], gradient[n + 1]);
    store_matrix(matrix_moved<KTile>(corner, n * 8), rounded);
  }
}

// By one thread, after a fence and a barrier. Keys and dims outside the tensor are left out by the copy engine.
template <typename Tile>
__device__ __forceinline__ void store_gradient(const CUtensorMap& map, uint32_t place, const BackwardBlock& block) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    store_box(map, place + panel * Tile::kPanelBytes, panel * Tile::kPanel, block.column_begin, block.head_k,
              block.batch, kEvictFirst);
  }
}
__device__ __forceinline__ void finish_stores() {
  commit_stores();
  wait_stores_read<0>();  // the shared memory must outlive the copies
}

// All of it for a warpgroup that owns one gradient of all keys, when all are done with K and V.
template <typename T, typename KTile, int kGroups>
__device__ __forceinline__ void store_alone(float (&gradient)[kGroups][4], float scale, const CUtensorMap& map,
                                            uint32_t place, int barrier, const BackwardBlock& block) {
  gradient_to_shared<T, KTile>(gradient, scale, place);
  fence_async_proxy();
  named_barrier_sync(barrier, kWarpgroup);
  if (threadIdx.x % kWarpgroup == 0) {
    store_gradient<KTile>(map, place, block);
    finish_stores();
  }
}

}  // namespace flashmask::sm90
