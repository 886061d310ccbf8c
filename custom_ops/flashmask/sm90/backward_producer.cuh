// The warps of the backward kernel that bring rows (Q, dO, lse, delta) and take dQ away.
//
// All producer warps wait together (wait_warp): a lane that the leader leaves behind in a wait could miss the phase and
// the one after it, and would then wait for ever.
#pragma once

#include "backward_mask.cuh"
#include "backward_row_items.cuh"
#include "backward_scheduler.cuh"
#include "backward_turns.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"
#include "ring.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

__device__ __forceinline__ void write_step(uint32_t address, Step step) {
  store_shared_128(address, make_uint4(step.tile, step.mask, step.batch_head, step.bounds));
}

// Where a producer warp stands in the rings of Q and dO.
template <typename Config>
struct RowRings {
  Ring<Config::kQStages> q;
  Ring<Config::kDoStages> dout;
  int led = -1;             // key head that this block leads (row_front)
  uint32_t all_bounds = 0;  // places for intervals that column tiles before have taken, one a mask
};

// A step without rows, for a whole warp.
template <int kHeadDim>
__device__ __forceinline__ void bring_end(uint32_t shared_base, RowRings<BackwardConfig<kHeadDim>>* rings, Step step) {
  const BackwardBarriers<kHeadDim> barriers{shared_base};
  barriers.q_empty(rings->q.stage).wait_warp(rings->q.parity ^ 1);
  if (threadIdx.x % 32 == 0) {
    write_step(shared_base + BackwardLayout<kHeadDim>::kSteps + rings->q.stage * 16, step);
    barriers.q_full(rings->q.stage).arrive();
  }
  __syncwarp();
  rings->q.advance();
}

// One warp: Q, dO and their rows' lse and delta for all steps of a column tile. Calls meanwhile(left) after each.
template <int kHeadDim, typename Meanwhile>
__device__ __forceinline__ void bring_rows(const KernelParams& p, const BackwardMaps& maps, const BackwardBlock& block,
                                           uint32_t shared_base, RowRings<BackwardConfig<kHeadDim>>* rings,
                                           const Meanwhile& meanwhile) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  constexpr int kRowBytes = Config::kRows * 4;  // of lse and delta
  const bool leader = threadIdx.x % 32 == 0;
  Ring<Config::kQStages>& q_ring = rings->q;
  Ring<Config::kDoStages>& do_ring = rings->dout;
  if (block.column_tile == 0) rings->led = block.key_head(p.op);
  for_each_tile<Config>(p, block, [&](int head, const HeadMask& mask, int tile, bool partial, const auto& left) {
    const uint32_t base = opaque(shared_base);
    const BackwardBarriers<kHeadDim> barriers{base};
    const int row = tile * Config::kRows;
    const int64_t query = block.batch_head(p.op, head) * p.padded_rows + row;
    const auto load = [&](uint32_t place, const CUtensorMap& map, uint32_t rows_place, const float* rows,
                          Barrier barrier) {
      barrier.arrive_expecting(QTile::kBytes + kRowBytes);
#pragma unroll
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        load_box(place + panel * QTile::kPanelBytes, map, barrier.address, panel * QTile::kPanel, row, head,
                 block.batch);
      }
      load_bytes(rows_place, rows + query, kRowBytes, barrier.address);
    };
    int flags = partial ? Step::kPartial * ((1 << Config::kConsumers) - 1) : 0;
    if constexpr (Config::kPassesUnseen) {
      // Each warpgroup's keys are looked at, but only under the first mask, whose intervals come when the column tile
      // before is done. To wait for those of further ones could be for ever: they come when the consumers have begun
      // here, for which they may need the very rows that would wait.
      if (partial && mask.number == 0) {
        const uint32_t place = rings->all_bounds % kBoundsBuffers;
        barriers.bounds_full(place).wait_warp(rings->all_bounds / kBoundsBuffers % 2);
        flags = flags_of_keys(base + Layout::kBounds + place * Layout::kBoundsBytes + Layout::kSpans, row,
                              min(row + Config::kRows, p.op.seqlen_q));
      }
    }
    barriers.q_empty(q_ring.stage).wait_warp(q_ring.parity ^ 1);
    trace(Event::kPlaceFree);
    if (leader) {
      if (p.row_front != nullptr && rings->led == block.key_head(p.op)) *row_front(p, rings->led) = tile;
      write_step(base + Layout::kSteps + q_ring.stage * 16,
                 Step{tile << Step::kRowTileShift | flags, mask.index, static_cast<int>(block.batch_head(p.op, head)),
                      mask.number});
      load(base + Layout::kQ + q_ring.stage * QTile::kBytes, maps.q, base + Layout::kLse + q_ring.stage * kRowBytes,
           p.query_lse, barriers.q_full(q_ring.stage));
    }
    barriers.do_empty(do_ring.stage).wait_warp(do_ring.parity ^ 1);
    if (leader) {
      load(base + Layout::kDo + do_ring.stage * QTile::kBytes, maps.dout,
           base + Layout::kDelta + do_ring.stage * kRowBytes, p.query_delta, barriers.do_full(do_ring.stage));
    }
    __syncwarp();
    q_ring.advance();
    do_ring.advance();
    meanwhile(left);
  });
  rings->all_bounds += block.masks(p.op);
}

__device__ __forceinline__ int row_tiles_of(const KernelParams& p, int row_item) {
  return min(kRowTilesPerItem, p.lists.row_tiles - row_item * kRowTilesPerItem);
}

// One warp: row tile `number` of a row item.
template <int kHeadDim>
__device__ __forceinline__ void bring_row_tile(const KernelParams& p, const BackwardMaps& maps, const WorkItem& item,
                                               int number, uint32_t shared_base,
                                               RowRings<BackwardConfig<kHeadDim>>* rings) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  const bool leader = threadIdx.x % 32 == 0;
  const int batch = item.place.batch, head = item.place.head_k, batch_head = batch * p.op.heads_q + head;
  const int first = item.place.column_tile * kRowTilesPerItem, tile = first + number, row = tile * Config::kRows;
  const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};
  // Half of a row tile's sums has as many bytes as a tile of `out` or dO.
  const auto load = [&](uint32_t place, const CUtensorMap& map, int part, Barrier barrier) {
    barrier.arrive_expecting(QTile::kBytes);
    if (item.kind == WorkItem::kPrepareRows) {
#pragma unroll
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        load_box(place + panel * QTile::kPanelBytes, map, barrier.address, panel * QTile::kPanel, row, head, batch,
                 part == 0 ? kEvictFirst : kKeepNormal);  // dO is read again by column tiles
      }
    } else {
      const float* sums = p.dq_accumulator + (static_cast<int64_t>(batch_head) * p.padded_rows + row) * kHeadDim;
      load_bytes(place, sums + part * Layout::kDqPartFloats, QTile::kBytes, barrier.address);
    }
  };
  barriers.q_empty(rings->q.stage).wait_warp(rings->q.parity ^ 1);
  if (leader) {
    if (number == 0) {
      write_step(barriers.base + Layout::kSteps + rings->q.stage * 16,
                 Step{item.kind == WorkItem::kPrepareRows ? Step::kPrepareRows : Step::kFinishRows, first, batch_head,
                      row_tiles_of(p, item.place.column_tile)});
    }
    load(barriers.base + Layout::kQ + rings->q.stage * QTile::kBytes, maps.out, 0, barriers.q_full(rings->q.stage));
  }
  barriers.do_empty(rings->dout.stage).wait_warp(rings->dout.parity ^ 1);
  if (leader) {
    load(barriers.base + Layout::kDo + rings->dout.stage * QTile::kBytes, maps.dout, 1,
         barriers.do_full(rings->dout.stage));
  }
  __syncwarp();
  rings->q.advance();
  rings->dout.advance();
}

// What comes next is asked for when a column tile has kStepsAhead to go, or with the first rows of a row item: so the
// keys of a column tile that follows are on their way by then.
template <int kHeadDim>
__device__ __forceinline__ void ask_for_next(uint32_t shared_base) {
  BackwardBarriers<kHeadDim>{opaque(shared_base)}.asked().arrive_warp();
}

// All steps of a column tile, for a whole warp.
template <int kHeadDim>
__device__ __forceinline__ void bring_column_tile(const KernelParams& p, const BackwardMaps& maps,
                                                  const BackwardBlock& block, uint32_t shared_base,
                                                  RowRings<BackwardConfig<kHeadDim>>* rings) {
  // With turns, not ahead: those of other blocks that come later would wait for a ticket that lies here.
  const int ahead = p.turns != nullptr ? 0 : BackwardConfig<kHeadDim>::kStepsAhead;
  bool asked = false;
  bring_rows<kHeadDim>(p, maps, block, shared_base, rings, [&](const auto& left) {
    if (!asked && left() < ahead) {
      ask_for_next<kHeadDim>(shared_base);
      asked = true;
    }
  });
  if (!asked) ask_for_next<kHeadDim>(shared_base);
  bring_end<kHeadDim>(
      shared_base, rings,
      {Step::kEndOfTile, block.column_begin, block.batch * p.op.heads_k + block.head_k, block.masks(p.op) - 1});
}

// All rows of a block above 128 dims.
template <int kHeadDim>
__device__ __forceinline__ void bring_wide_rows(const KernelParams& p, const BackwardMaps& maps, uint32_t shared_base) {
  RowRings<BackwardConfig<kHeadDim>> rings;
  for (uint32_t number = 0; wait_for_work<kHeadDim>(shared_base, number); ++number) {
    const BackwardBlock block(p, read_work<kHeadDim>(shared_base, number));
    free_work<kHeadDim>(shared_base, number);
    bring_column_tile<kHeadDim>(p, maps, block, shared_base, &rings);
  }
  bring_end<kHeadDim>(shared_base, &rings, {Step::kEndOfWork, 0, 0, 0});
}

// All work of a persistent block up to 128 dims.
template <int kHeadDim>
struct WorkBringer {
  const KernelParams& p;
  const BackwardMaps& maps;
  uint32_t shared_base;
  RowRings<BackwardConfig<kHeadDim>> rings;
  uint32_t number = 0, columns = 0;  // of items and of column tiles so far

  __device__ __forceinline__ WorkItem item() const { return read_item<kHeadDim>(opaque(shared_base), number); }

  __device__ __forceinline__ void bring_column_tile() {
    const BackwardBlock block(p, read_work<kHeadDim>(shared_base, columns));
    trace(Event::kWaitsForRows);
    if (item().waits) wait_for_rows(p, block);
    trace(Event::kRowsPrepared);
    sm90::bring_column_tile<kHeadDim>(p, maps, block, shared_base, &rings);
    free_work<kHeadDim>(shared_base, columns++);
  }

  __device__ __forceinline__ void bring_row_item() {
    if (item().kind == WorkItem::kFinishRows) {
      if (item().waits) wait_for_sums(p, row_item_number(p, item().place));
      fence_async_proxy_global();
    }
    const int tiles = row_tiles_of(p, item().place.column_tile);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      bring_row_tile<kHeadDim>(p, maps, item(), i, shared_base, &rings);
      if (i == 0) ask_for_next<kHeadDim>(shared_base);
    }
  }

  __device__ __forceinline__ void run() {
    for (;; ++number) {
      trace(Event::kFindsNext);
      BackwardBarriers<kHeadDim>{opaque(shared_base)}.answered().wait_warp(number % 2);
      trace(Event::kNextFound);
      const uint32_t kind = uniform(item().kind);
      if (kind == WorkItem::kNothing) break;
      if (kind == WorkItem::kColumnTile) {
        wait_for_work<kHeadDim>(shared_base, columns);
        bring_column_tile();
      } else {
        bring_row_item();
      }
    }
    bring_end<kHeadDim>(shared_base, &rings, {Step::kEndOfWork, 0, 0, 0});
  }
};

// One warp per consumer warpgroup: adds its part of dQ to global memory, step by step.
template <int kHeadDim, bool kDeterministic>
struct DqSender {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  static constexpr int kPartBytes = Layout::kDqPartFloats * 4;

  const KernelParams& p;
  uint32_t shared_base;
  int consumer;
  uint32_t parity = 0;
  // Deterministic: the step that is to be sent, which waits until the next one is known: what has to be found out about
  // the turn of that overlaps with this one's way to memory.
  int row_tile = -1;  // over all heads; -1: none
  int before = 0;     // how many column tiles add first
  bool ready = false;

  static __device__ __forceinline__ bool leader() { return threadIdx.x % 32 == 0; }
  __device__ __forceinline__ int32_t* state(int row_tile) const { return sums_state(p, row_tile, consumer); }

  __device__ __forceinline__ void wait_for_dq() {
    BackwardBarriers<kHeadDim>{opaque(shared_base)}.dq_full(consumer).wait_warp(parity);
    parity ^= 1;
  }
  // To the sums of a row tile, or in their place; for that dQ must be here. `first_row` counts padded rows over all
  // heads.
  template <typename Meanwhile>
  __device__ __forceinline__ void send_part(int64_t first_row, bool is_first, const Meanwhile& meanwhile) {
    const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};  // few registers: nothing is worth keeping
    if (leader()) {
      float* const sums = p.dq_accumulator + first_row * kHeadDim + consumer * Layout::kDqPartFloats;
      const uint32_t part = barriers.base + Layout::kDq + consumer * kPartBytes;
      if (is_first) {
        store_floats(sums, part, kPartBytes);
      } else {
        add_floats(sums, part, kPartBytes);
      }
      commit_stores();
    }
    meanwhile();
    if (leader()) {
      wait_stores_read<0>();
      barriers.dq_empty(consumer).arrive();
    }
    __syncwarp();
  }
  // When what was sent is there: says so.
  __device__ __forceinline__ void count_part(int row_tile) const {
    if (leader()) {
      wait_stores<0>();
      fence_async_proxy_global();
      count_up(state(row_tile));
    }
    __syncwarp();
  }

  // The state is looked at while dQ is computed; a claim is made only when dQ is here, so who has it keeps nobody
  // waiting for long.
  __device__ __forceinline__ void add(int row_tile, int64_t first_row) {
    const bool stored = __shfl_sync(kAllLanes, read_count(state(row_tile)), 0) == kStored;
    wait_for_dq();
    bool is_first = false;
    if (!stored) {
      int32_t before = kNoSums;
      if (leader()) before = claim(state(row_tile));
      before = __shfl_sync(kAllLanes, before, 0);
      is_first = before == kNoSums;
      if (!is_first) wait_for_count_warp(state(row_tile), kStored);
    }
    send_part(first_row, is_first, [] {});
    if (is_first) count_part(row_tile);
  }

  // Sends the step that waits. `next` takes its place (-1: none); find_before() says how many add before that.
  template <typename FindBefore>
  __device__ __forceinline__ void add_in_turn(int next, const FindBefore& find_before) {
    int next_before = 0;
    bool next_ready = false;
    if (row_tile < 0) {
      next_before = find_before();
    } else {
      if (!ready) wait_to_add(state(row_tile), before);
      __syncwarp();
      wait_for_dq();
      const int batch_head = row_tile / p.lists.row_tiles, in_head = row_tile - batch_head * p.lists.row_tiles;
      send_part(static_cast<int64_t>(batch_head) * p.padded_rows + in_head * Config::kRows, before == 0,
                [&] { next_before = find_before(); });
      // Looked at before, and waited for after: the count of this turn is what others wait for.
      const int32_t counted = next >= 0 ? peek_count(state(next)) : 0;
      count_part(row_tile);
      next_ready = next >= 0 && __shfl_sync(kAllLanes, counted, 0) >= next_before;
    }
    row_tile = next;
    before = next_before;
    ready = next_ready;
  }

  // All steps of a column tile.
  __device__ __forceinline__ void send(const BackwardBlock& block) {
    for_each_tile<Config>(p, block, [&](int head, const HeadMask& mask, int tile, bool, const auto&) {
      const int row_tile = static_cast<int>(block.batch_head(p.op, head)) * p.lists.row_tiles + tile;
      if constexpr (kDeterministic) {
        add_in_turn(row_tile, [&] { return turns_before<Config>(p, mask.index, tile, block.column_tile); });
      } else {
        add(row_tile, block.batch_head(p.op, head) * p.padded_rows + tile * Config::kRows);
      }
    });
    if constexpr (kDeterministic) add_in_turn(-1, [] { return 0; });
  }
};

// dQ of one warpgroup, of all column tiles.
template <int kHeadDim, bool kDeterministic>
__device__ __forceinline__ void take_dq_away(const KernelParams& p, uint32_t shared_base, int consumer) {
  DqSender<kHeadDim, kDeterministic> dq{p, shared_base, consumer};
  for (uint32_t number = 0; wait_for_work<kHeadDim>(shared_base, number); ++number) {
    const BackwardBlock block(p, read_work<kHeadDim>(shared_base, number));
    free_work<kHeadDim>(shared_base, number);
    dq.send(block);
    if (dq.leader()) {
      wait_stores<0>();
      fence_async_proxy_global();
      count_up(p.finished + block.batch * p.op.heads_k + block.head_k);
    }
    __syncwarp();
  }
}

}  // namespace flashmask::sm90
