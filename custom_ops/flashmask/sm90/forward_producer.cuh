// The producers of the forward kernel: one warp feeds the copy engine, two prepare element masks.
#pragma once

#include "forward_mask.cuh"
#include "forward_orders.cuh"
#include "limits.h"
#include "tma.cuh"

namespace flashmask::sm90 {

struct ForwardMaps {
  CUtensorMap q, k, v, out;
};

// What a warpgroup has to know of a column tile, in one word.
constexpr uint32_t kSeesFirstPart = 1, kSeesLastPart = 2;  // of tiles in one part, the first
constexpr uint32_t kMasksFirstPart = 4, kMasksLastPart = 8;
// Whether any warpgroup needs element masks; then in which place of their ring these are, and the parity of its round.
constexpr uint32_t kTileHasMasks = 16;
constexpr int kMaskStageShift = 5, kMaskParityShift = 7;
constexpr int kTileNumberShift = 8;
constexpr uint32_t kTileLast = 1u << 31;  // of its row tile
static_assert(kTileNumberShift + kColumnTileBits == 31);
__device__ __forceinline__ uint32_t tile_word(const TileOrder& order, int warpgroup, int mask_stage,
                                              uint32_t mask_parity) {
  // Four bits apart in the order, side by side here.
  const uint32_t flags = order.flags >> warpgroup & 0x1111;
  return ((flags | flags >> 3 | flags >> 6 | flags >> 9) & 15) | (order.flags & kAnyPartial ? kTileHasMasks : 0) |
         mask_stage << kMaskStageShift | mask_parity << kMaskParityShift |
         static_cast<uint32_t>(order.column_tile) << kTileNumberShift | (order.flags & kLast ? kTileLast : 0);
}
__device__ __forceinline__ int tile_number(uint32_t word) { return (word & ~kTileLast) >> kTileNumberShift; }
__device__ __forceinline__ int mask_stage(uint32_t word) { return word >> kMaskStageShift & 3; }
__device__ __forceinline__ uint32_t mask_parity(uint32_t word) { return word >> kMaskParityShift & 1; }

// What the consumers have to know of a row tile.
struct RowTile {
  int row_tile;  // -1: no work is left
  int batch;
  int head;
  int has_tiles;  // whether it sees any column tile
};

template <typename Layout>
__device__ __forceinline__ void load_tiles(const KernelParams& p, const ForwardMaps& maps, uint32_t shared, int lane) {
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  using KTile = typename Layout::KTile;
  Ring<Config::kOrderStages> order_ring;
  Ring<Config::kStages> k_ring, v_ring;
  Ring<Config::kWorkStages> work_ring;
  Ring<Config::kQPlaces> q_ring;
  Ring<Config::kMaskStages> mask_ring;

  const auto publish = [&](int row_tile, int batch, int head, bool has_tiles) {
    Barrier{shared + Layout::kWorkEmpty + work_ring.stage * 8}.wait_warp(work_ring.parity ^ 1);
    if (lane == 0) {
      store_shared_128(shared + Layout::kWork + work_ring.stage * 16, make_uint4(row_tile, batch, head, has_tiles));
      Barrier{shared + Layout::kWorkFull + work_ring.stage * 8}.arrive();
    }
    work_ring.advance();
  };
  const auto load_columns = [&](const CUtensorMap& map, uint32_t destination, Barrier full, int column_tile, int head_k,
                                int batch) {
    full.arrive_expecting(KTile::kBytes);
#pragma unroll
    for (int panel = 0; panel < KTile::kPanels; ++panel) {
      load_box(destination + panel * KTile::kPanelBytes, map, full.address, panel * KTile::kPanel,
               column_tile * Config::kColumns, head_k, batch);
    }
  };

  // The consumers want the next K before this V: V is loaded one order late.
  int late_tile = -1, late_head_k = 0, late_batch = 0;
  const auto load_late_v = [&] {
    if (late_tile < 0) return;
    Barrier{shared + Layout::kVEmpty + v_ring.stage * 8}.wait_warp(v_ring.parity ^ 1);
    if (lane == 0) {
      load_columns(maps.v, shared + Layout::kV + v_ring.stage * KTile::kBytes,
                   Barrier{shared + Layout::kVFull + v_ring.stage * 8}, late_tile, late_head_k, late_batch);
    }
    v_ring.advance();
    late_tile = -1;
  };

  int batch = 0, head = 0, head_k = 0;
  // Rows of Q come and go by warpgroups, `begin` to `end` of a row tile.
  const auto load_q = [&](int row_tile, int begin, int end) {
#pragma unroll
    for (int w = begin; w < end; ++w) {
      Barrier{shared + Layout::kQEmpty + q_ring.stage * 8}.wait_warp(q_ring.parity ^ 1);
      if (lane == 0) {
        const Barrier full{shared + Layout::kQFull + q_ring.stage * 8};
        full.arrive_expecting(QTile::kBytes);
#pragma unroll
        for (int panel = 0; panel < QTile::kPanels; ++panel) {
          load_box(shared + Layout::kQ + q_ring.stage * QTile::kBytes + panel * QTile::kPanelBytes, maps.q,
                   full.address, panel * QTile::kPanel, row_tile * Config::kRows + w * kRowsPerWarpgroup, head, batch);
        }
      }
      q_ring.advance();
    }
  };
  while (true) {
    const TileOrder order = read_order<Layout>(shared, &order_ring);
    if (order.flags & kDone) {
      load_late_v();
      publish(-1, 0, 0, false);
      return;
    }
    if (order.flags & kFirst) {
      batch = order.batch_head / p.op.heads_q;
      head = order.batch_head - batch * p.op.heads_q;
      head_k = head / (p.op.heads_q / p.op.heads_k);
      if (order.flags & kNothing) load_late_v();
      publish(order.row_tile, batch, head, !(order.flags & kNothing));
      if (order.flags & kNothing) continue;
      load_q(order.row_tile, 0, Config::kEarlyQ);
    }
    Barrier{shared + Layout::kKEmpty + k_ring.stage * 8}.wait_warp(k_ring.parity ^ 1);
    if (lane == 0) {
      const auto word = [&](int warpgroup) { return tile_word(order, warpgroup, mask_ring.stage, mask_ring.parity); };
      if (Config::kMasks) {
        store_shared_128(shared + Layout::kTileWords + k_ring.stage * 16,
                         make_uint4(word(0), word(1), word(2), word(3)));
      }
      load_columns(maps.k, shared + Layout::kK + k_ring.stage * KTile::kBytes,
                   Barrier{shared + Layout::kKFull + k_ring.stage * 8}, order.column_tile, head_k, batch);
    }
    k_ring.advance();
    if (order.flags & kAnyPartial) mask_ring.advance();
    load_late_v();
    // The other places for Q are free only when warpgroups have their last scores of the row tile before; what these
    // still need comes first.
    if (order.flags & kFirst) load_q(order.row_tile, Config::kEarlyQ, Config::kConsumers);
    late_tile = order.column_tile;
    late_head_k = head_k;
    late_batch = batch;
  }
}

template <typename Layout, MaskForm kForm>
__device__ __forceinline__ void make_masks_of_form(const KernelParams& p, uint32_t shared, int warp, int lane) {
  using Config = typename Layout::Config;
  Ring<Config::kOrderStages> order_ring;
  Ring<Config::kMaskStages> mask_ring;
  int batch_head = -1;  // whose bounds these are; to find them takes three divisions, half as long as a tile's masks
  const int32_t* head_bounds = nullptr;
  while (true) {
    const TileOrder order = read_order<Layout>(shared, &order_ring);
    if (order.flags & kDone) return;
    if (!(order.flags & kAnyPartial)) continue;
    if (order.batch_head != batch_head) {
      batch_head = order.batch_head;
      const int batch = batch_head / p.op.heads_q, head = batch_head - batch * p.op.heads_q;
      const int64_t mask_index =
          static_cast<int64_t>(batch) * p.op.heads_mask + mask_head(head, p.op.heads_q, p.op.heads_mask);
      head_bounds = p.op.bounds + mask_index * p.op.seqlen_k * p.op.num_bounds;
    }
    // Asked for before the wait: with one place for masks, consumers would otherwise wait for memory at the second of
    // two partial tiles in a row.
    const int column_begin = order.column_tile * Config::kColumns;
    const bool shares_rows = Config::kMaskRowShares > 1;
    const int pair = (shares_rows ? 0 : warp) * 32 + lane, row_share = shares_rows ? warp : 0;
    const ColumnPair bounds = load_bounds<kForm>(p.op, head_bounds, column_begin + pair * 2);
    const Barrier empty{shared + Layout::kMaskEmpty + mask_ring.stage * 8};
    empty.wait_warp(mask_ring.parity ^ 1);
    const uint32_t partial = masked_warpgroups(order.flags);
    const int idle = Config::kConsumers - __popc(partial);
    if (Config::kMasksByNeed && warp == 0 && idle > 0) empty.arrive_for_warps(idle * 4);
    write_mask<Layout, kForm>(shared + Layout::kMask + mask_ring.stage * Layout::kMaskBytes, bounds,
                              order.row_tile * Config::kRows, pair, row_share, partial);
    Barrier{shared + Layout::kMaskFull + mask_ring.stage * 8}.arrive_warp();
    mask_ring.advance();
  }
}

template <typename Layout>
__device__ __forceinline__ void make_masks(const KernelParams& p, uint32_t shared, int warp, int lane) {
  switch (mask_form(p.op)) {
    case MaskForm::kTwo:
      return make_masks_of_form<Layout, MaskForm::kTwo>(p, shared, warp, lane);
    case MaskForm::kThree:
      return make_masks_of_form<Layout, MaskForm::kThree>(p, shared, warp, lane);
    case MaskForm::kFour:
      return make_masks_of_form<Layout, MaskForm::kFour>(p, shared, warp, lane);
  }
}

// For a whole warp of the consumers: the next row tile; its place is then free.
template <typename Layout>
__device__ __forceinline__ RowTile read_row_tile(uint32_t shared, Ring<Layout::Config::kWorkStages>* ring) {
  Barrier{shared + Layout::kWorkFull + ring->stage * 8}.wait_warp(ring->parity);
  const uint4 words = load_shared_128(shared + Layout::kWork + ring->stage * 16);
  Barrier{shared + Layout::kWorkEmpty + ring->stage * 8}.arrive_warp();
  ring->advance();
  return RowTile{static_cast<int>(uniform(words.x)), static_cast<int>(uniform(words.y)),
                 static_cast<int>(uniform(words.z)), static_cast<int>(uniform(words.w))};
}

}  // namespace flashmask::sm90
