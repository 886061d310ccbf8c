// Deterministic mode: the order in which column tiles add to dQ.
//
// Each warpgroup's part of dQ of a row tile has a counter of its own: how many column tiles have added to it. Column
// tiles take their turn in descending order. A producer warp for each consumer warpgroup does all that touches
// counters, so that consumers wait for no round trip to global memory. Up to 128 dims that warp adds, too (DqSender).
// Above:
//
//   producer warp                                        consumer warpgroup
//   how many come before (while step i - 1 is computed)  products of step i
//   wait until step i - 1 is added; count it
//   wait until those before have added; give the turn -> add step i (not waited for), tell the producer
//
// Nobody waits for ever: a turn that was added is counted whatever else happens, and those that come before have
// smaller tickets.
#pragma once

#include "backward_work.cuh"
#include "global_memory.cuh"

namespace flashmask::sm90 {

// How many column tiles add to a row tile before this one, which is active in it.
template <typename Config>
__device__ __forceinline__ int turns_before(const KernelParams& p, int64_t mask_index, int row_tile, int column_tile) {
  if (p.lists.by_row == nullptr) {  // all up to the last one are active
    return columns_of_row_tile<Config::kRows, Config::kColumns>(p, row_tile).end - column_tile - 1;
  }
  const ListWord* words = p.lists.by_row + (mask_index * p.lists.row_tiles + row_tile) * p.lists.column_words;
  int before = 0;
#pragma unroll 2  // loads at a time: few registers
  for (int index = threadIdx.x % 32 + column_tile / 32; index < p.lists.column_words; index += 32) {
    uint32_t active = words[index].active;
    if (index == column_tile / 32) active &= ~low_bits(column_tile % 32 + 1);
    before += __popc(active);
  }
  return __reduce_add_sync(kAllLanes, before);
}

// One warp, for all steps of a block. What the kernel for fewer dims uses to move dQ says here whose turn it is:
// `dq_empty` that the warpgroup may add, or store if it is the first; `dq_full` that it has (the instructions are on
// their way).
template <int kHeadDim>
__device__ __forceinline__ void manage_turns(const KernelParams& p, uint32_t shared_base, int consumer) {
  using Config = BackwardConfig<kHeadDim>;
  const BackwardBarriers<kHeadDim> barriers{shared_base};
  const bool leader = threadIdx.x % 32 == 0;
  int32_t* added = nullptr;  // counter of the step before
  uint32_t parity = 0;
  const auto count_added = [&] {
    barriers.dq_full(consumer).wait_warp(parity);
    parity ^= 1;
    // Of the warpgroup's additions, too: they came before what this warp waited for.
    if (leader) count_up(added);
    __syncwarp();
  };
  for (uint32_t number = 0; wait_for_work<kHeadDim>(shared_base, number); ++number) {
    const BackwardBlock block(p, read_work<kHeadDim>(shared_base, number));
    free_work<kHeadDim>(shared_base, number);
    for_each_tile<Config>(p, block, [&](int head, const HeadMask& mask, int tile, bool, const auto&) {
      int32_t* turn = sums_state(p, block.batch_head(p.op, head) * p.lists.row_tiles + tile, consumer);
      const int before = turns_before<Config>(p, mask.index, tile, block.column_tile);
      if (added != nullptr) count_added();
      wait_to_add(turn, before);
      // What it overwrites was read before the step that was just counted was added.
      if (leader) store_shared_32(shared_base + BackwardLayout<kHeadDim>::kIsFirst + consumer * 4, before == 0);
      barriers.dq_empty(consumer).arrive_warp();
      added = turn;
    });
    if (added != nullptr) count_added();
    added = nullptr;
  }
}

}  // namespace flashmask::sm90
