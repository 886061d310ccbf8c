// The producer warpgroup of the backward kernel: one warp brings tiles, one warp per consumer warpgroup takes dQ away.
#pragma once

#include "../cuda/element.cuh"
#include "backward_config.cuh"
#include "global_memory.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

struct BackwardMaps {
  CUtensorMap q, dout;  // boxes of one row tile
  CUtensorMap k, v;     // boxes of one column tile
  CUtensorMap dk, dv;   // boxes of one warpgroup's keys
};

// What a block works on: one column tile of one key head.
struct BackwardBlock {
  int batch, head_k;
  int column_tile, column_begin;
  int first_head, end_head;  // query heads of its group

  // Of equally many visits the heaviest come first: under a causal mask the first columns are seen by most rows. In the
  // deterministic mode blocks take their turn on dQ in the order of descending column tiles, so they start in that
  // order, and `block` is a ticket: whatever order the hardware starts them in, whoever is waited for has started.
  __device__ __forceinline__ BackwardBlock(const KernelParams& p, int block, int columns) {
    const FlashmaskParams& op = p.op;
    const int column_tiles = p.lists.column_tiles;
    const int group = block / (p.schedule_heads * column_tiles);
    const int rank = block - group * (p.schedule_heads * column_tiles);
    const int group_heads = min(p.schedule_heads, op.batch * op.heads_k - group * p.schedule_heads);
    const int batch_head_k = group * p.schedule_heads + rank % group_heads;
    column_tile = p.turns != nullptr ? column_tiles - 1 - rank / group_heads : rank / group_heads;
    column_begin = column_tile * columns;
    batch = batch_head_k / op.heads_k;
    head_k = batch_head_k - batch * op.heads_k;
    const int heads_per_key = op.heads_q / op.heads_k;
    first_head = head_k * heads_per_key;
    end_head = first_head + heads_per_key;
  }
  __device__ __forceinline__ int mask_index(const FlashmaskParams& op, int head) const {
    return batch * op.heads_mask + mask_head(head, op.heads_q, op.heads_mask);
  }
  __device__ __forceinline__ int64_t batch_head(const FlashmaskParams& op, int head) const {
    return static_cast<int64_t>(batch) * op.heads_q + head;
  }
};

// Calls visit(head, row tile, partial) for all that the block has to do, in order. For whole warps; every warp that
// calls it sees the same sequence.
template <typename Config, typename Visit>
__device__ __forceinline__ void for_each_tile(const KernelParams& p, const BackwardBlock& block, const Visit& visit) {
  for (int head = block.first_head; head < block.end_head; ++head) {
    const int64_t mask_index = block.mask_index(p.op, head);
    const auto words = [&](int index) {
      if (p.lists.by_column == nullptr) {
        return rows_of_column_tile<Config::kRows, Config::kColumns>(p, block.column_tile).word(index);
      }
      return p.lists.by_column[(mask_index * p.lists.column_tiles + block.column_tile) * p.lists.row_words + index];
    };
    TileWalker<decltype(words)> walker(words, p.lists.row_words);
    bool partial;
    for (int tile = walker.next(&partial); tile >= 0; tile = walker.next(&partial)) visit(head, tile, partial);
  }
}

__device__ __forceinline__ void write_step(uint32_t address, Step step) {
  store_shared_128(address, make_uint4(step.tile, step.mask, step.batch_head, step.unused));
}

// One warp: K and V once, then Q, dO and their rows' lse and delta, step by step.
//
// Here and in take_dq_away the warp waits together (wait_warp): a lane that the leader leaves behind in a wait could
// miss the phase and the one after it, and would then wait for ever.
template <int kHeadDim>
__device__ __forceinline__ void bring_tiles(const KernelParams& p, const BackwardMaps& maps, const BackwardBlock& block,
                                            uint32_t shared_base) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using KTile = typename Layout::KTile;
  using QTile = typename Layout::QTile;
  constexpr int kRowBytes = Config::kRows * 4;  // of lse and delta
  const BackwardBarriers<kHeadDim> barriers{shared_base};
  const bool leader = threadIdx.x % 32 == 0;

  if (leader) {
    const uint32_t base = shared_base;
    const auto load = [&](int place, const CUtensorMap& map, Barrier barrier) {
      barrier.arrive_expecting(KTile::kBytes);
#pragma unroll
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
        load_box(base + place + panel * KTile::kPanelBytes, map, barrier.address, panel * KTile::kPanel,
                 block.column_begin, block.head_k, block.batch);
      }
    };
    load(Layout::kK, maps.k, barriers.k_full());
    load(Layout::kV, maps.v, barriers.v_full());
  }

  Ring<Config::kQStages> q_ring;
  Ring<Config::kDoStages> do_ring;
  for_each_tile<Config>(p, block, [&](int head, int tile, bool partial) {
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
      write_step(base + Layout::kSteps + q_ring.stage * 16, Step{2 * tile + partial, block.mask_index(p.op, head),
                                                                 static_cast<int>(block.batch_head(p.op, head)), 0});
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
  });
  barriers.q_empty(q_ring.stage).wait_warp(q_ring.parity ^ 1);
  if (leader) {
    write_step(shared_base + Layout::kSteps + q_ring.stage * 16, Step{-1, 0, 0, 0});
    barriers.q_full(q_ring.stage).arrive();
  }
}

// Until all later column tiles that touch this row tile have added their part of dQ, `parts` parts each.
template <typename Config>
__device__ __forceinline__ void wait_for_turn(const KernelParams& p, const int32_t* turn, int64_t mask_index,
                                              int row_tile, int column_tile, int parts) {
  int before = 0;
  for (int index = threadIdx.x % 32 + column_tile / 32; index < p.lists.column_words; index += 32) {
    uint32_t active =
        p.lists.by_row != nullptr
            ? p.lists.by_row[(mask_index * p.lists.row_tiles + row_tile) * p.lists.column_words + index].active
            : columns_of_row_tile<Config::kRows, Config::kColumns>(p, row_tile).word(index).active;
    if (index == column_tile / 32) active &= ~low_bits(column_tile % 32 + 1);
    before += __popc(active);
  }
  before = __reduce_add_sync(kAllLanes, before) * parts;
  wait_for_count(turn, before);
  __syncwarp();
}

// One warp per consumer warpgroup: adds its part of dQ to global memory, step by step.
template <int kHeadDim, bool kDeterministic>
__device__ __forceinline__ void take_dq_away(const KernelParams& p, const BackwardBlock& block, uint32_t shared_base,
                                             int consumer) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  constexpr int kPartBytes = Layout::kDqPartFloats * 4;
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t parity = 0;
  for_each_tile<Config>(p, block, [&](int head, int tile, bool) {
    const uint32_t base = opaque(shared_base);  // few registers: nothing is worth keeping from step to step
    const BackwardBarriers<kHeadDim> barriers{base};
    const int64_t batch_head = block.batch_head(p.op, head);
    int32_t* turn = p.turns + batch_head * p.lists.row_tiles + tile;
    if constexpr (kDeterministic) {
      wait_for_turn<Config>(p, turn, block.mask_index(p.op, head), tile, block.column_tile, Config::kConsumers);
    }
    barriers.dq_full(consumer).wait_warp(parity);
    parity ^= 1;
    if (leader) {
      add_floats(p.dq_accumulator + (batch_head * p.padded_rows + tile * Config::kRows) * kHeadDim +
                     consumer * Layout::kDqPartFloats,
                 base + Layout::kDq + consumer * kPartBytes, kPartBytes);
      commit_stores();
      wait_stores_read<0>();
      barriers.dq_empty(consumer).arrive();
      if constexpr (kDeterministic) {
        wait_stores<0>();
        fence_async_proxy_global();
        __threadfence();
        count_up(turn);
      }
    }
    __syncwarp();
  });
}

}  // namespace flashmask::sm90
