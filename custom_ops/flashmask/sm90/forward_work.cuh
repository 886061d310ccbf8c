// Which row tile of which head a block works on next.
//
// The grid is persistent: a block takes tickets until there are none. Ticket order is the order of work
// (cuda/head_groups.h).
#pragma once

#include "../cuda/kernel_params.h"
#include "../mask.h"

namespace flashmask::sm90 {

struct ForwardWork {
  int row_tile;  // -1: no work is left
  int batch_head;
  int64_t mask_index;
};

// Row tiles of kWarpgroups x 64 rows; the lists' rows are of 64.
template <int kWarpgroups>
__host__ __device__ __forceinline__ int forward_row_tiles(const KernelParams& p) {
  return (p.lists.row_tiles + kWarpgroups - 1) / kWarpgroups;
}

template <int kWarpgroups>
__device__ __forceinline__ ForwardWork forward_work(const KernelParams& p, int ticket) {
  const FlashmaskParams& op = p.op;
  const int row_tiles = forward_row_tiles<kWarpgroups>(p);
  const int total_heads = op.batch * op.heads_q;
  if (ticket >= total_heads * row_tiles) return ForwardWork{-1, 0, 0};
  const HeadGroup group = group_of(p.groups, total_heads, row_tiles, ticket);
  const int rank = ticket - group.first * row_tiles;
  ForwardWork work;
  work.row_tile = row_tile_in_order(row_tiles, rank / group.heads);
  work.batch_head = group.first + rank % group.heads;
  const int batch = work.batch_head / op.heads_q;
  const int head = work.batch_head - batch * op.heads_q;
  work.mask_index = static_cast<int64_t>(batch) * op.heads_mask + mask_head(head, op.heads_q, op.heads_mask);
  return work;
}

}  // namespace flashmask::sm90
