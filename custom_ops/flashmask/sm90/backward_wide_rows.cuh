// What the two producer warps of a block that send dQ up to 128 dims do above, unless they manage turns: they zero dQ,
// and finish rows of key heads whose column tiles are all done. Both in the order of heads, as they get tickets; column
// tiles wait for the zeros of their query heads. What is not finished when there are no column tiles for a block any
// more is left to the kernel that follows, which has the whole device for it.
//
// Nobody waits for ever: zeros wait for nothing, and all of them come before the first row that is finished.
#pragma once

#include "backward_rows.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"

namespace flashmask::sm90 {

// For a whole warp: row tile `number` of all heads.
template <int kHeadDim>
__device__ __forceinline__ void zero_row_tile(const KernelParams& p, int number) {
  constexpr int kRows = BackwardConfig<kHeadDim>::kRows;
  const int batch_head = number / p.lists.row_tiles, tile = number - batch_head * p.lists.row_tiles;
  float* zeroed = p.dq_accumulator + (static_cast<int64_t>(batch_head) * p.padded_rows + tile * kRows) * kHeadDim;
#pragma unroll 8
  for (int i = threadIdx.x % 32; i < kRows * kHeadDim / 4; i += 32) {
    reinterpret_cast<float4*>(zeroed)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) count_up(p.prepared + batch_head);
}

// For a whole warp: until the rows of a column tile's query heads are zeroed.
__device__ __forceinline__ void wait_for_zeros(const KernelParams& p, const BackwardBlock& block) {
  for (int head = block.first_head; head < block.end_head; head += 32) {
    wait_for_count_warp(prepared_of_lane(p, block, head), p.lists.row_tiles);
  }
  __syncwarp();
}

// One warp, until there is nothing to do or the block has heard that no column tile is left (`answered`; some steps
// before its last one ends). Of row_tiles in all, tickets below row_tiles are for zeros of one each, and then kSlabs
// tickets for each are to finish it.
template <typename T, int kHeadDim>
__device__ __forceinline__ void work_on_rows(const KernelParams& p, uint32_t shared_base) {
  constexpr int kSlabs = BackwardConfig<kHeadDim>::kRows / kSlabRows;
  const bool leader = threadIdx.x % 32 == 0;
  const int row_tiles = p.op.batch * p.op.heads_q * p.lists.row_tiles;
  int ticket = count_on(p.finish_counter);
  for (; ticket < row_tiles; ticket = count_on(p.finish_counter)) zero_row_tile<kHeadDim>(p, ticket);
  const Barrier end = BackwardBarriers<kHeadDim>{shared_base}.answered();
  int done = -1;  // a key head whose column tiles are
  while (true) {
    const int row_tile = (ticket - row_tiles) / kSlabs;
    if (row_tile >= row_tiles) return;
    const int batch_head = row_tile / p.lists.row_tiles;
    const int batch_head_k = batch_head / (p.op.heads_q / p.op.heads_k);
    // Of a key head that is known to be done, only whether the end has come: rows begun then would be waited for.
    const int column_tiles = batch_head_k == done ? 0 : p.lists.column_tiles;
    if (!wait_for_count_warp_until(p.finished + batch_head_k, column_tiles, end, 0)) return;
    done = batch_head_k;
    int next = 0;  // on its way while the rows are
    if (leader) next = atomicAdd(p.finish_counter, 1);
    const int slab = ticket - row_tiles - batch_head * p.lists.row_tiles * kSlabs;
    finish_slab<T, kHeadDim, false>(p, batch_head, slab, true);
    if (leader) atomicAdd(sums_state(p, row_tile, 0), 1);
    ticket = __shfl_sync(kAllLanes, next, 0);
  }
}

}  // namespace flashmask::sm90
