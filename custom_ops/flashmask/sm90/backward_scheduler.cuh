// What a persistent block of the backward kernel does next: the part of the warp that brings keys that asks memory.
//
// A ticket, a counter of others, the row tile that the leading block is at: each is known 2 us after it was asked for,
// when memory is busy. The warp that brings rows has no time for that, or the consumers wait. It says when the block
// should know what comes after the item at work (`asked`), early enough for several questions, and finds the answer
// in shared memory.
#pragma once

#include "backward_row_items.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"

namespace flashmask::sm90 {

// The counter of one of the column tile's query heads.
__device__ __forceinline__ const int32_t* prepared_of_lane(const KernelParams& p, const BackwardBlock& block,
                                                           int head) {
  const int of_lane = min(head + static_cast<int>(threadIdx.x % 32), block.end_head - 1);
  return p.prepared + block.batch_head(p.op, of_lane);
}
// For a whole warp: whether the rows of the column tile's query heads are prepared, and waiting until they are. The
// copy engine may read them then.
__device__ __forceinline__ bool rows_are_there(const KernelParams& p, const BackwardBlock& block) {
  for (int head = block.first_head; head < block.end_head; head += 32) {
    const int32_t* prepared = prepared_of_lane(p, block, head);
    if (__any_sync(kAllLanes, read_count(prepared) < kPreparedCounts * p.row_items)) return false;
  }
  __syncwarp();
  fence_async_proxy_global();
  return true;
}
__device__ __forceinline__ void wait_for_rows(const KernelParams& p, const BackwardBlock& block) {
  for (int head = block.first_head; head < block.end_head; head += 32) {
    wait_for_count_warp(prepared_of_lane(p, block, head), kPreparedCounts * p.row_items);
  }
  __syncwarp();
  fence_async_proxy_global();
}

__device__ __forceinline__ int32_t* finished_of(const KernelParams& p, int row_item) {
  return p.finished + row_item / static_cast<int>(opaque(p.key_head_row_items));
}
// For a whole warp: whether all column tiles of the key head have added their dQ.
__device__ __forceinline__ bool sums_are_there(const KernelParams& p, int row_item) {
  return !__any_sync(kAllLanes, read_count(finished_of(p, row_item)) < kFinishedCounts * p.lists.column_tiles);
}
__device__ __forceinline__ void wait_for_sums(const KernelParams& p, int row_item) {
  wait_for_count_warp(finished_of(p, row_item), kFinishedCounts * p.lists.column_tiles);
  __syncwarp();
}

// The place of item `number`: it is overwritten when the one after it is at work and the next was asked for.
template <int kHeadDim>
__device__ __forceinline__ uint32_t item_place(uint32_t shared_base, uint32_t number) {
  return shared_base + BackwardLayout<kHeadDim>::kItems + number % 2 * 16;
}
// For whole warps.
template <int kHeadDim>
__device__ __forceinline__ WorkItem read_item(uint32_t shared_base, uint32_t number) {
  const uint4 words = load_shared_128(item_place<kHeadDim>(shared_base, number));
  return {static_cast<WorkItem::Kind>(words.x % WorkItem::kWaits),
          {static_cast<int>(words.y), static_cast<int>(words.z), static_cast<int>(words.w)},
          words.x >= WorkItem::kWaits};
}

template <int kHeadDim>
struct BackwardScheduler {
  using Layout = BackwardLayout<kHeadDim>;

  const KernelParams& p;
  uint32_t shared_base;
  bool sparse;                      // which schedule
  uint32_t items = 0, columns = 0;  // that were told
  int claim = -1;                   // the row item that this block is to finish; -1: none yet
  bool has_tickets = true, gets_claim = false;

  __device__ __forceinline__ void take_claim() { claim = count_on(p.finish_counter); }
  __device__ __forceinline__ bool has_claim() const {
    return claim >= 0 && claim < p.op.batch * p.op.heads_q * static_cast<int>(opaque(p.row_items));
  }

  __device__ __forceinline__ WorkItem finish_claim(bool waits) {
    const WorkItem item{WorkItem::kFinishRows, row_item_place(p, claim), waits};
    claim = -1;
    return item;
  }
  __device__ __forceinline__ WorkItem decide() {
    // Not when rows to prepare are told: who prepares them need not wait for this answer.
    if (gets_claim) take_claim();
    gets_claim = false;
    if (has_tickets && has_claim() && sums_are_there(p, claim)) return finish_claim(false);
    if (has_tickets) {
      const WorkItem next = item_of_ticket(p, count_on(p.work_counter), sparse);
      gets_claim =
          next.kind == WorkItem::kPrepareRows && claim < 0 && row_item_number(p, next.place) >= p.first_with_claim;
      if (next.kind != WorkItem::kNothing) return next;
      has_tickets = false;
    }
    if (claim < 0) take_claim();
    if (has_claim()) return finish_claim(true);
    return {WorkItem::kNothing, {-1, 0, 0}, false};
  }

  // Finds the next item, and tells all warps. Returns its kind.
  __device__ __forceinline__ WorkItem::Kind tell_next() {
    const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};
    if (items > 0) barriers.asked().wait_warp((items - 1) % 2);
    const bool had_tickets = has_tickets;
    WorkItem next = decide();
    if (next.kind == WorkItem::kColumnTile) {
      next.place.first_row_tile = first_row_tile(p, next.place, items > 0 ? BackwardConfig<kHeadDim>::kStepsAhead : 0);
      tell_work<kHeadDim>(next.place, shared_base, columns++);
      const BackwardBlock block(p, next.place);
      next.waits = !rows_are_there(p, block);
      prefetch_list(p, block);
    } else if (has_tickets != had_tickets) {
      tell_work<kHeadDim>({-1, 0, 0}, shared_base, columns++);
    }
    store_shared_128(item_place<kHeadDim>(shared_base, items),
                     make_uint4(next.kind + (next.waits ? WorkItem::kWaits : 0), next.place.batch, next.place.head_k,
                                next.place.column_tile));
    barriers.answered().arrive_warp();
    ++items;
    return next.kind;
  }

 private:
  // The list of the column tile under its first mask will soon be read.
  static __device__ __forceinline__ void prefetch_list(const KernelParams& p, const BackwardBlock& block) {
    constexpr int kWordsOfLine = 128 / sizeof(ListWord);
    const int word = threadIdx.x % 32 * kWordsOfLine;
    if (p.lists.by_column == nullptr || word >= p.lists.row_words) return;
    const int64_t list = block.first_mask(p.op) * static_cast<int64_t>(p.lists.column_tiles) + block.column_tile;
    prefetch_near(p.lists.by_column + list * p.lists.row_words + word);
  }
};

}  // namespace flashmask::sm90
