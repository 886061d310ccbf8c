// What a block of the backward kernels works on: column tiles of key heads, and their row tiles.
//
// The grid is persistent. One warp takes tickets until there are none, and tells the other producer warps of column
// tiles through slots in shared memory; consumers only see steps. Up to 128 dims rows are prepared and finished as
// pieces of the same work, too (row items).
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/tile_lists.cuh"
#include "backward_config.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

struct BackwardMaps {
  CUtensorMap q, dout, out;  // boxes of one row tile
  CUtensorMap k;             // boxes of one place
  CUtensorMap v;             // boxes of 64 keys: one warpgroup's up to 128 dims
  CUtensorMap dk, dv;        // where kGradientsByDs, of a warp's 16 keys
};

// A column tile of a key head. (Of rows to prepare or to finish `head_k` is a query head, `column_tile` a row item.)
struct ColumnWork {
  int batch;  // -1: no work is left
  int head_k;
  int column_tile;
  int first_row_tile = 0;  // with which it begins, and then around
};

// Column tile number `rank` of a group of `group_heads` key heads from `first_head_k` (over all batches).
//
// Of equally many visits the heaviest come first: under a causal mask the first columns are seen by most rows. In the
// deterministic mode column tiles take their turn on dQ in descending order, so they start in that order, and tickets
// come from a counter: whatever order the hardware starts blocks in, whoever is waited for has started. A persistent
// block works on its tickets in ascending order, so the lowest unfinished one never waits for ever.
__device__ __forceinline__ ColumnWork column_of_group(const KernelParams& p, int first_head_k, int group_heads,
                                                      int rank) {
  const int tile = rank / group_heads, batch_head_k = first_head_k + rank - tile * group_heads;
  const int batch = batch_head_k / static_cast<int>(opaque(p.op.heads_k));
  return ColumnWork{batch, batch_head_k - batch * p.op.heads_k,
                    p.turns != nullptr ? p.lists.column_tiles - 1 - tile : tile};
}

// Column tile number `ticket` of all. `sparse`: takes_sparse_schedule(), asked for before the ticket.
__device__ __forceinline__ ColumnWork column_work(const KernelParams& p, int ticket, bool sparse) {
  if (ticket >= p.column_works) return ColumnWork{-1, 0, 0};
  const HeadGroup group =
      group_of(sparse ? p.sparse_groups : p.groups, p.op.batch * p.op.heads_k, p.lists.column_tiles, ticket);
  return column_of_group(p, group.first, group.heads, ticket - group.first * p.lists.column_tiles);
}

// How far the sums of dQ of a warpgroup's part of a row tile are (row tiles counted over all heads). Who comes first
// stores its own there, if no zeros were written before (which count as stored). In the deterministic mode it is the
// number of column tiles that have added; else, up to 128 dims, one of these. Above, of part 0, how many slabs of 16
// rows are finished.
enum SumsState : int32_t { kNoSums = 0, kBeingStored = 1, kStored = 2 };
__device__ __forceinline__ int32_t* sums_state(const KernelParams& p, int64_t row_tile, int consumer) {
  return (p.turns != nullptr ? p.turns : p.sums) + row_tile * 2 + consumer;
}

// Above 128 dims two producer warps of the kernel for column tiles have nothing to do, but with turns: these zero dQ
// and finish rows meanwhile (backward_wide_rows.cuh).
template <int kHeadDim>
__device__ __forceinline__ bool has_rows_meanwhile(const KernelParams& p) {
  static_assert(BackwardConfig<kHeadDim>::kWide);
  return p.turns == nullptr;
}

// Counts on for a whole warp; returns what was there before.
__device__ __forceinline__ int count_on(int32_t* counter) {
  int before = 0;
  if (threadIdx.x % 32 == 0) before = atomicAdd(counter, 1);
  return __shfl_sync(kAllLanes, before, 0);
}

// A piece of a block's work up to 128 dims: a column tile, or rows to prepare or finish.
struct WorkItem {
  enum Kind { kNothing, kColumnTile, kPrepareRows, kFinishRows };
  static constexpr uint32_t kWaits = 4;
  Kind kind;         // kNothing: no work is left
  ColumnWork place;  // of rows: batch, query head, row item of that
  bool waits;        // what it needs, prepared rows or sums, is not known to be there
};

// Row items of all heads are numbered by batch, query head and place in it.
__device__ __forceinline__ ColumnWork row_item_place(const KernelParams& p, int number) {
  const auto fresh = [](int value) { return static_cast<int>(opaque(value)); };  // few registers: nothing is kept
  const int batch_head = number / fresh(p.row_items), batch = batch_head / fresh(p.op.heads_q);
  return {batch, batch_head - batch * p.op.heads_q, number - batch_head * p.row_items};
}
__device__ __forceinline__ int row_item_number(const KernelParams& p, const ColumnWork& place) {
  return (place.batch * p.op.heads_q + place.head_k) * p.row_items + place.column_tile;
}

// Up to 128 dims a block takes tickets for column tiles and for rows to prepare, and works on them in ascending order.
// With a row item to prepare it gets one to finish (a claim, in the order of heads), unless it has one still, and so
// far behind that the column tiles of that key head are mostly done. Then it follows at once: what it takes to go from
// column tiles to rows and back is paid once for both. If they are not, it comes between two later tickets. What is not
// claimed so, is when there are no tickets any more.
//
// Nobody waits for ever, whatever order blocks start in and however few run at once. Preparing rows waits for nothing,
// and a column tile for the rows of its query heads, which have lower tickets (work_order.h). So the lowest
// unfinished ticket always goes on: whatever has to be done for one, by any warp of its block, waits for nothing of a
// later one, and a claim is waited for only by a block whose tickets are all done or only need its other warps. When
// all tickets are done, so are all column tiles, and no claim waits.
__device__ __forceinline__ WorkItem item_of_ticket(const KernelParams& p, int ticket, bool sparse) {
  const OrderedWork work = in_order(sparse ? p.sparse_order : p.order, ticket);
  if (!work.is_column) return {WorkItem::kPrepareRows, row_item_place(p, work.number), false};
  const ColumnWork place = column_work(p, work.number, sparse);
  return {place.batch < 0 ? WorkItem::kNothing : WorkItem::kColumnTile, place, false};
}

// A column tile, with what follows from it.
struct BackwardBlock {
  int batch, head_k;
  int column_tile, column_begin;
  int first_head, end_head;  // query heads of its group
  int first_row_tile;

  __device__ __forceinline__ BackwardBlock(const KernelParams& p, const ColumnWork& work)
      : batch(work.batch), head_k(work.head_k), column_tile(work.column_tile), first_row_tile(work.first_row_tile) {
    column_begin = column_tile * p.lists.tile_columns;
    const int heads_per_key = static_cast<int>(opaque(p.op.heads_q)) / p.op.heads_k;  // not kept in a register
    first_head = head_k * heads_per_key;
    end_head = first_head + heads_per_key;
  }
  __device__ __forceinline__ int mask_index(const FlashmaskParams& op, int head) const {
    return batch * op.heads_mask + mask_head(head, op.heads_q, op.heads_mask);
  }
  // Those of its query heads, one after the other.
  __device__ __forceinline__ int first_mask(const FlashmaskParams& op) const { return mask_index(op, first_head); }
  __device__ __forceinline__ int masks(const FlashmaskParams& op) const {
    return mask_index(op, end_head - 1) - first_mask(op) + 1;
  }
  __device__ __forceinline__ int key_head(const FlashmaskParams& op) const { return batch * op.heads_k + head_k; }
  __device__ __forceinline__ int64_t batch_head(const FlashmaskParams& op, int head) const {
    return static_cast<int64_t>(batch) * op.heads_q + head;
  }
};

// Where column tiles are to stay together (row_front): the row tile that the block is at that leads the key head. With
// more rows than the L2 cache keeps, those that run together so share rows in the cache. If all began with the first,
// fast multiprocessors would get further ahead of slow ones with every column tile, until each read its own rows from
// DRAM. Who takes the first column tile of the key head leads it, and goes around without a break, since it begins
// where it is. If whoever comes by told where he is, each would follow a random one, and these drift apart as well.
__device__ __forceinline__ volatile int32_t* row_front(const KernelParams& p, int key_head) {
  return p.row_front + key_head;
}
// For a whole warp: with which row tile a column tile begins that a block will come to in so many `steps`.
__device__ __forceinline__ int first_row_tile(const KernelParams& p, const ColumnWork& work, int steps) {
  if (p.row_front == nullptr || work.batch < 0) return 0;
  const int tile = __shfl_sync(kAllLanes, *row_front(p, work.batch * p.op.heads_k + work.head_k), 0);
  return (tile + steps) % p.lists.row_tiles;
}

constexpr int kManyLeft = 1 << 30;

// Of a query head. Found once for all of its row tiles: it takes divisions.
struct HeadMask {
  int index;   // batch * heads_mask + mask head
  int number;  // of the column tile's masks, from 0
};

// Calls visit(head, its mask, row tile, partial, left) for all that the block has to do, in order: from its first row
// tile on and around. left() says how many visits come after this one, or kManyLeft. For whole warps; every warp that
// calls it sees the same sequence.
template <typename Config, typename Visit>
__device__ __forceinline__ void for_each_tile(const KernelParams& p, const BackwardBlock& block, const Visit& visit) {
  const int first_mask = block.first_mask(p.op);
  for (int head = block.first_head; head < block.end_head; ++head) {
    const int64_t mask_index = block.mask_index(p.op, head);
    const HeadMask mask{static_cast<int>(mask_index), static_cast<int>(mask_index) - first_mask};
    const auto words = [&](int index) {
      if (p.lists.by_column == nullptr) {
        return rows_of_column_tile<Config::kRows, Config::kColumns>(p, block.column_tile).word(index);
      }
      return p.lists.by_column[(mask_index * p.lists.column_tiles + block.column_tile) * p.lists.row_words + index];
    };
    // The word of the first tile comes twice, for its upper bits and, last, for its lower ones.
    const int first = block.first_row_tile, row_words = p.lists.row_words;
    const auto around = [&](int index) {
      const int number = first / 32 + index;
      ListWord word = words(number < row_words ? number : number - row_words);
      if (index == 0) word.active &= ~low_bits(first % 32);
      if (index == row_words) word.active &= low_bits(first % 32);
      return word;
    };
    TileWalker<decltype(around)> walker(around, row_words + (first > 0));
    bool partial;
    for (int found = walker.next(&partial); found >= 0; found = walker.next(&partial)) {
      const int tile = found + first / 32 * 32;
      visit(head, mask, tile < row_words * 32 ? tile : tile - row_words * 32, partial,
            [&] { return head + 1 < block.end_head ? kManyLeft : walker.left(kManyLeft); });
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ uint32_t work_slot(uint32_t shared_base, uint32_t number) {
  return shared_base + BackwardLayout<kHeadDim>::kWork + number % kWorkSlots * 16;
}
template <int kHeadDim>
__device__ __forceinline__ ColumnWork read_work(uint32_t shared_base, uint32_t number) {
  const uint4 words = load_shared_128(work_slot<kHeadDim>(shared_base, number));
  return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z), static_cast<int>(words.w)};
}

// For whole warps. The block's column tile `number`, or that there is none, is told through slot number % kWorkSlots.
template <int kHeadDim>
__device__ __forceinline__ void tell_work(const ColumnWork& work, uint32_t shared_base, uint32_t number) {
  const BackwardBarriers<kHeadDim> barriers{shared_base};
  barriers.work_empty(number % kWorkSlots).wait_warp(number / kWorkSlots % 2 ^ 1);
  store_shared_128(work_slot<kHeadDim>(shared_base, number),
                   make_uint4(work.batch, work.head_k, work.column_tile,
                              work.first_row_tile));  // all lanes the same: each can read it
  barriers.work_full(number % kWorkSlots).arrive_warp();
}

// For whole warps, other than the one that tells: returns whether there is work. Until freed it can be read again.
template <int kHeadDim>
__device__ __forceinline__ bool wait_for_work(uint32_t shared_base, uint32_t number) {
  BackwardBarriers<kHeadDim>{shared_base}.work_full(number % kWorkSlots).wait_warp(number / kWorkSlots % 2);
  return read_work<kHeadDim>(shared_base, number).batch >= 0;
}
template <int kHeadDim>
__device__ __forceinline__ void free_work(uint32_t shared_base, uint32_t number) {
  BackwardBarriers<kHeadDim>{shared_base}.work_empty(number % kWorkSlots).arrive_warp();
}

}  // namespace flashmask::sm90
