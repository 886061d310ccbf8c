// The warp of the backward kernel above 128 dims that brings what belongs to keys: K, V and the intervals of the masks.
#pragma once

#include "backward_keys.cuh"

namespace flashmask::sm90 {

// About as many blocks run at once (one on each of 132 multiprocessors), so the one this far behind starts when this
// one ends: keys that it will load are in the L2 cache then. Nothing but time depends on it.
constexpr int kBlocksAhead = 132;

// `later` may be no work.
template <int kHeadDim>
__device__ __forceinline__ void bring_wide_keys(const KernelParams& p, const BackwardMaps& maps,
                                                const BackwardBlock& block, const ColumnWork& later,
                                                uint32_t shared_base) {
  using KTile = typename BackwardLayout<kHeadDim>::KTile;
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) {
    load_k<kHeadDim>(maps, block, shared_base, 0, 0);
    load_v<kHeadDim>(maps, block, shared_base, 0);
  }
  __syncwarp();
  Ring<1> ring;
  bring_bounds<kHeadDim>(p, shared_base, &ring, block, 0, 1);
  if (leader && later.batch >= 0) {
    const int first_key = later.column_tile * KTile::kRows;
    for (int dim = 0; dim < kHeadDim; dim += KTile::kPanel) {
      prefetch_box(maps.k, dim, first_key, later.head_k, later.batch);
      prefetch_box(maps.v, dim, first_key, later.head_k, later.batch);
    }
  }
  __syncwarp();
  bring_bounds<kHeadDim>(p, shared_base, &ring, block, 1, block.masks(p.op) - 1);
}

}  // namespace flashmask::sm90
