// The warp of the backward kernel above 128 dims that takes tickets and brings what belongs to keys: K, V and the
// intervals of the masks.
#pragma once

#include "backward_keys.cuh"
#include "backward_wide_rows.cuh"

namespace flashmask::sm90 {

// One warp, for all column tiles of a persistent block. The next one is taken when the warp that brings rows asks for
// it: its keys go to the L2 cache then, and to shared memory as soon as the places are free.
template <int kHeadDim>
__device__ __forceinline__ void bring_wide_keys(const KernelParams& p, const BackwardMaps& maps, uint32_t shared_base) {
  const bool leader = threadIdx.x % 32 == 0;
  const bool sparse = takes_sparse_schedule(p), meanwhile = has_rows_meanwhile<kHeadDim>(p);
  Ring<1> bounds;
  int before = -1;  // key head of the column tile before, over all batches
  for (uint32_t number = 0;; ++number) {
    const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};
    if (number > 0) barriers.asked().wait_warp((number - 1) % 2);
    ColumnWork work = column_work(p, count_on(p.work_counter), sparse);
    work.first_row_tile = first_row_tile(p, work, number > 0 ? BackwardConfig<kHeadDim>::kStepsAhead : 0);
    tell_work<kHeadDim>(work, shared_base, number);
    const BackwardBlock block(p, work);
    const bool ends = work.batch < 0;
    if (ends) {
      barriers.answered().arrive_warp();
    } else {
      if (leader && number > 0) prefetch_keys<kHeadDim>(maps, block, p.op.seqlen_k);
      __syncwarp();
      if (meanwhile) wait_for_zeros(p, block);
      // V is free after the last dP^T, K when both warpgroups have their last dQ, and have added it.
      barriers.v_empty(0).wait_warp(number % 2 ^ 1);
      if (leader) load_v<kHeadDim>(maps, block, shared_base, 0);
      __syncwarp();
    }
    barriers.k_empty(0).wait_warp(number % 2 ^ 1);
    if (!ends) {
      if (leader) load_k<kHeadDim>(maps, block, shared_base, 0, 0);
      __syncwarp();
      bring_bounds<kHeadDim>(p, shared_base, &bounds, block, 0, 1);
    }
    // Of the consumers' additions, too: they came before what this warp waited for.
    if (meanwhile && leader && before >= 0) count_up(p.finished + before);
    __syncwarp();
    if (ends) return;
    before = block.batch * p.op.heads_k + block.head_k;
    bring_bounds<kHeadDim>(p, shared_base, &bounds, block, 1, block.masks(p.op) - 1);
  }
}

}  // namespace flashmask::sm90
