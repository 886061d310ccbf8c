// What to do next, told tile by tile. One warp, the scheduler, takes row tiles from the global queue, walks their tile
// lists and writes orders into a ring in shared memory, far enough ahead that after a block's first
// row tile neither the queue nor the lists are waited for. The loader and the mask warps read them.
#pragma once

#include <type_traits>

#include "../cuda/tile_lists.cuh"
#include "barrier.cuh"
#include "forward_config.h"
#include "forward_work.cuh"
#include "ring.cuh"

namespace flashmask::sm90 {

// One column tile of a row tile. Bit w of `flags` says that warpgroup w's 64 rows see something of its first part, bit
// 8 + w that they need element masks there; four bits further left stands the same of its last part, where a tile has
// two.
struct TileOrder {
  int column_tile;
  uint32_t flags;
  int row_tile;
  int batch_head;
};
constexpr int kLastPartShift = 4, kPartialShift = 8;
constexpr uint32_t kAnyPartial = 0xFF00;
constexpr uint32_t kFirst = 1u << 28;    // of its row tile
constexpr uint32_t kLast = 1u << 29;     // of its row tile
constexpr uint32_t kNothing = 1u << 30;  // the row tile sees no column tile at all
constexpr uint32_t kDone = 1u << 31;     // no work is left
// Warpgroups that need element masks in any part, one bit each.
__device__ __forceinline__ uint32_t masked_warpgroups(uint32_t flags) {
  return (flags >> kPartialShift | flags >> (kPartialShift + kLastPartShift)) & 15;
}

// Yields the column tiles that a row tile sees, in ascending order. As TileWalker (cuda/tile_lists.cuh), over the lists
// of all its warpgroups at once; these have a bit for every part of a tile.
template <int kConsumers, int kColumns, int kParts>
struct OrderWalker {
  const KernelParams& p;
  const ListWord* list;  // of the first warpgroup's rows; null: only the causal flag masks
  int list_row, chunk = -32;
  ListWord mine[kConsumers];

  __device__ __forceinline__ OrderWalker(const KernelParams& p, int64_t mask_index, int row_tile)
      : p(p), list(nullptr), list_row(row_tile * kConsumers) {
    if (p.lists.by_row != nullptr) {
      list = p.lists.by_row + (mask_index * p.lists.row_tiles + list_row) * p.lists.column_words;
    }
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) mine[w] = ListWord{0, 0};
  }

  __device__ __forceinline__ ListWord word(int w, int index) const {
    if (index >= p.lists.column_words || list_row + w >= p.lists.row_tiles) return ListWord{0, 0};
    if (list != nullptr) return list[w * p.lists.column_words + index];
    return columns_of_row_tile<kRowsPerWarpgroup, kColumns / kParts>(p, list_row + w).word(index);
  }
  __device__ __forceinline__ uint32_t active() const {
    uint32_t any = 0;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) any |= mine[w].active;
    return kParts == 2 ? (any | any >> 1) & 0x55555555u : any;
  }

  // The next tile or -1.
  __device__ __forceinline__ int next(uint32_t* flags) {
    const int lane = threadIdx.x & 31;
    uint32_t holders = __ballot_sync(kAllLanes, active() != 0);
    while (holders == 0) {
      chunk += 32;
      if (chunk >= p.lists.column_words) {
        chunk = p.lists.column_words;  // a further call must not wrap around
        return -1;
      }
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) mine[w] = word(w, chunk + lane);
      holders = __ballot_sync(kAllLanes, active() != 0);
    }
    const int holder = __ffs(holders) - 1;
    const int bit = __ffs(active()) - 1;  // of this lane; what the holder says counts
    uint32_t told = 0;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      const uint32_t active = mine[w].active >> (bit & 31), partial = mine[w].partial >> (bit & 31);
      told |= (active & 1) << w | (partial & 1) << (kPartialShift + w);
      if (kParts == 2) {
        told |= (active >> 1 & 1) << (kLastPartShift + w) | (partial >> 1 & 1) << (kPartialShift + kLastPartShift + w);
      }
    }
    told = __shfl_sync(kAllLanes, told | static_cast<uint32_t>(bit) << 16, holder);
    const int found = told >> 16 & 31;
    if (lane == holder) {
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) mine[w].active &= ~((kParts == 2 ? 3u : 1u) << found);
    }
    *flags = told & 0xFFFF;
    return ((chunk + holder) * 32 + found) / kParts;
  }
};

// The same where nothing masks: all of them, one after the other.
template <int kColumns>
struct EveryTile {
  int count, reached = 0;

  __device__ __forceinline__ EveryTile(const KernelParams& p, int64_t, int)
      : count((p.op.seqlen_k + kColumns - 1) / kColumns) {}
  __device__ __forceinline__ int next(uint32_t* flags) {
    *flags = 0;
    return reached < count ? reached++ : -1;
  }
};

template <typename Layout>
__device__ __forceinline__ void schedule(const KernelParams& p, uint32_t shared, int lane) {
  using Config = typename Layout::Config;
  using Walker = std::conditional_t<Config::kMasks, OrderWalker<Config::kConsumers, Config::kColumns, Config::kParts>,
                                    EveryTile<Config::kColumns>>;
  Ring<Config::kOrderStages> ring;
  const auto push = [&](int column_tile, uint32_t flags, int row_tile, int batch_head) {
    Barrier{shared + Layout::kOrderEmpty + ring.stage * 8}.wait_warp(ring.parity ^ 1);
    if (lane == 0) {
      store_shared_128(shared + Layout::kOrders + ring.stage * 16,
                       make_uint4(column_tile, flags, row_tile, batch_head));
      Barrier{shared + Layout::kOrderFull + ring.stage * 8}.arrive();
    }
    ring.advance();
  };
  while (true) {
    int ticket = 0;
    if (lane == 0) ticket = atomicAdd(p.work_counter, 1);
    const ForwardWork work = forward_work<Config::kConsumers>(p, __shfl_sync(kAllLanes, ticket, 0));
    if (work.row_tile < 0) {
      push(0, kDone, 0, 0);
      return;
    }
    Walker walker(p, work.mask_index, work.row_tile);
    uint32_t flags, next_flags = 0;
    int tile = walker.next(&flags);
    if (tile < 0) push(0, kFirst | kLast | kNothing, work.row_tile, work.batch_head);
    flags |= kFirst;
    while (tile >= 0) {
      const int next = walker.next(&next_flags);
      push(tile, flags | (next < 0 ? kLast : 0), work.row_tile, work.batch_head);
      tile = next;
      flags = next_flags;
    }
  }
}

// For a whole warp: the next order; its place is then free.
template <typename Layout>
__device__ __forceinline__ TileOrder read_order(uint32_t shared, Ring<Layout::Config::kOrderStages>* ring) {
  Barrier{shared + Layout::kOrderFull + ring->stage * 8}.wait_warp(ring->parity);
  const uint4 words = load_shared_128(shared + Layout::kOrders + ring->stage * 16);
  Barrier{shared + Layout::kOrderEmpty + ring->stage * 8}.arrive_warp();
  ring->advance();
  return TileOrder{static_cast<int>(uniform(words.x)), uniform(words.y), static_cast<int>(uniform(words.z)),
                   static_cast<int>(uniform(words.w))};
}

}  // namespace flashmask::sm90
