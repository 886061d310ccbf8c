// Which row tile of which head a block works on next.
//
// The grid is persistent: a block takes tickets until there are none. Ticket order is the order of work: heads in
// groups that share the L2 cache; in a group the last rows first, because under a causal mask they see most.
#pragma once

#include "../cuda/kernel_params.h"

namespace flashmask::sm90 {

struct ForwardWork {
  int row_tile;  // -1: no work is left
  int batch;
  int head;
  int has_tiles;  // whether the row tile sees anything
};

__device__ __forceinline__ ForwardWork forward_work(const KernelParams& p, int ticket) {
  const int row_tiles = p.lists.row_tiles;
  const int total_heads = p.op.batch * p.op.heads_q;
  const int per_group = p.schedule_heads * row_tiles;
  if (ticket >= total_heads * row_tiles) return ForwardWork{-1, 0, 0, 0};
  const int group = ticket / per_group;
  const int rank = ticket - group * per_group;
  const int group_heads = min(p.schedule_heads, total_heads - group * p.schedule_heads);
  const int batch_head = group * p.schedule_heads + rank % group_heads;
  ForwardWork work;
  work.row_tile = row_tiles - 1 - rank / group_heads;
  work.batch = batch_head / p.op.heads_q;
  work.head = batch_head - work.batch * p.op.heads_q;
  work.has_tiles = 1;
  return work;
}

}  // namespace flashmask::sm90
