// The warps of the backward kernel that bring rows (Q, dO, lse, delta) and take dQ, and dK with it, away.
//
// All producer warps wait together (wait_warp): a lane that the leader leaves behind in a wait could miss the phase and
// the one after it, and would then wait for ever.
#pragma once

#include "backward_epilogue.cuh"
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
};

// A step without rows, for a whole warp.
template <int kHeadDim>
__device__ __forceinline__ void bring_end(uint32_t shared_base, RowRings<BackwardConfig<kHeadDim>>* rings, int what,
                                          int bounds) {
  const BackwardBarriers<kHeadDim> barriers{shared_base};
  barriers.q_empty(rings->q.stage).wait_warp(rings->q.parity ^ 1);
  if (threadIdx.x % 32 == 0) {
    write_step(shared_base + BackwardLayout<kHeadDim>::kSteps + rings->q.stage * 16, Step{what, 0, 0, bounds});
    barriers.q_full(rings->q.stage).arrive();
  }
  __syncwarp();
  rings->q.advance();
}

// One warp: Q, dO and their rows' lse and delta for all steps of a column tile.
//
// Above 128 dims, where a step needs the most bytes, and with more rows than the L2 cache holds (row_front): a column
// tile begins at a row tile that another is at, so that those which run together share rows in the cache. If all began
// with the first, fast multiprocessors would get further ahead of slow ones with every column tile, until each read its
// own rows from DRAM.
template <int kHeadDim>
__device__ __forceinline__ void bring_rows(const KernelParams& p, const BackwardMaps& maps, const BackwardBlock& block,
                                           uint32_t shared_base, RowRings<BackwardConfig<kHeadDim>>* rings) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  constexpr int kRowBytes = Config::kRows * 4;  // of lse and delta
  const bool leader = threadIdx.x % 32 == 0;
  Ring<Config::kQStages>& q_ring = rings->q;
  Ring<Config::kDoStages>& do_ring = rings->dout;
  const auto bring = [&](int head, int tile, bool partial) {
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
    barriers.q_empty(q_ring.stage).wait_warp(q_ring.parity ^ 1);
    if (leader) {
      const int mask = block.mask_index(p.op, head);
      write_step(base + Layout::kSteps + q_ring.stage * 16,
                 Step{2 * tile + partial, mask, static_cast<int>(block.batch_head(p.op, head)),
                      mask - block.first_mask(p.op)});
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
  };
  if constexpr (Config::kWide) {
    const bool follows = p.row_front != nullptr && p.lists.by_column == nullptr;
    const auto front = [&](int head) { return p.row_front + block.batch_head(p.op, head); };
    for_each_tile<Config>(
        p, block,
        [&](int head, int tile, bool partial) {
          if (follows && leader) *front(head) = tile;
          bring(head, tile, partial);
        },
        [&](int head) { return follows ? __shfl_sync(kAllLanes, *front(head), 0) : 0; });
  } else {
    for_each_tile<Config>(p, block, bring);
  }
}

// All column tiles of a persistent block, and their tickets: each is taken when the rows of the column tile before have
// all been asked for, two or three steps ahead of the consumers.
template <int kHeadDim>
__device__ __forceinline__ void bring_all_rows(const KernelParams& p, const BackwardMaps& maps, uint32_t shared_base) {
  RowRings<BackwardConfig<kHeadDim>> rings;
  bool goes_on = tell_work<kHeadDim>(p, shared_base, 0);
  for (uint32_t number = 0; goes_on; ++number) {
    const auto block = [&] { return BackwardBlock(p, read_work<kHeadDim>(shared_base, number)); };
    bring_rows<kHeadDim>(p, maps, block(), shared_base, &rings);
    goes_on = tell_work<kHeadDim>(p, shared_base, number + 1);
    bring_end<kHeadDim>(shared_base, &rings, Step::kEndOfTile, block().masks(p.op) - 1);
  }
  bring_end<kHeadDim>(shared_base, &rings, Step::kEndOfWork, 0);
}

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
  // Counts column tiles that have added this warpgroup's part.
  __device__ __forceinline__ int32_t* turn(int row_tile) const {
    return p.turns + static_cast<int64_t>(row_tile) * Config::kConsumers + consumer;
  }

  // `first_row` counts padded rows over all heads.
  template <typename Meanwhile>
  __device__ __forceinline__ void add(int64_t first_row, const Meanwhile& meanwhile) {
    const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};  // few registers: nothing is worth keeping
    barriers.dq_full(consumer).wait_warp(parity);
    parity ^= 1;
    if (leader()) {
      add_floats(p.dq_accumulator + first_row * kHeadDim + consumer * Layout::kDqPartFloats,
                 barriers.base + Layout::kDq + consumer * kPartBytes, kPartBytes);
      commit_stores();
    }
    meanwhile();
    if (leader()) {
      wait_stores_read<0>();
      barriers.dq_empty(consumer).arrive();
    }
    __syncwarp();
  }

  // Sends the step that waits. `next` takes its place (-1: none); find_before() says how many add before that.
  template <typename FindBefore>
  __device__ __forceinline__ void add_in_turn(int next, const FindBefore& find_before) {
    int next_before = 0;
    bool next_ready = false;
    if (row_tile < 0) {
      next_before = find_before();
    } else {
      if (!ready) wait_for_count(turn(row_tile), before);
      __syncwarp();
      const int batch_head = row_tile / p.lists.row_tiles;
      const int in_head = row_tile - batch_head * p.lists.row_tiles;
      add(static_cast<int64_t>(batch_head) * p.padded_rows + in_head * Config::kRows,
          [&] { next_before = find_before(); });
      if (next >= 0) next_ready = __shfl_sync(kAllLanes, read_count(turn(next)), 0) >= next_before;
      if (leader()) {
        wait_stores<0>();
        fence_async_proxy_global();
        count_up(turn(row_tile));
      }
      __syncwarp();
    }
    row_tile = next;
    before = next_before;
    ready = next_ready;
  }

  // All steps of a column tile.
  __device__ __forceinline__ void send(const BackwardBlock& block) {
    for_each_tile<Config>(p, block, [&](int head, int tile, bool) {
      if constexpr (kDeterministic) {
        add_in_turn(static_cast<int>(block.batch_head(p.op, head)) * p.lists.row_tiles + tile,
                    [&] { return turns_before<Config>(p, block.mask_index(p.op, head), tile, block.column_tile); });
      } else {
        add(block.batch_head(p.op, head) * p.padded_rows + tile * Config::kRows, [] {});
      }
    });
    if constexpr (kDeterministic) add_in_turn(-1, [] { return 0; });
  }
};

// All that leaves through one warpgroup's place for dQ: dQ of all steps of a column tile, then dK.
template <int kHeadDim, bool kDeterministic>
__device__ __forceinline__ void take_all_away(const KernelParams& p, const BackwardMaps& maps, uint32_t shared_base,
                                              int consumer) {
  using Layout = BackwardLayout<kHeadDim>;
  using GradientTile = typename Layout::GradientTile;
  DqSender<kHeadDim, kDeterministic> dq{p, shared_base, consumer};
  for (uint32_t number = 0; wait_for_work<kHeadDim>(shared_base, number); ++number) {
    const BackwardBlock block(p, read_work<kHeadDim>(shared_base, number));
    free_work<kHeadDim>(shared_base, number);
    dq.send(block);
    const BackwardBarriers<kHeadDim> barriers{shared_base};
    barriers.dq_full(consumer).wait_warp(dq.parity);
    dq.parity ^= 1;
    if (dq.leader()) {
      store_gradient<GradientTile>(maps.dk, shared_base + Layout::kDq + consumer * Layout::kDqPartFloats * 4,
                                   consumer * 64, block);
      finish_stores();
      barriers.dq_empty(consumer).arrive();
    }
    __syncwarp();
  }
}

}  // namespace flashmask::sm90
