// The producers of the forward kernel: one warp takes work and feeds the copy engine, one or two prepare element masks.
#pragma once

#include "../cuda/tile_lists.cuh"
#include "barrier.cuh"
#include "forward_mask.cuh"
#include "schedule.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

// What the consumers have to know of a tile.
constexpr uint32_t kTilePartial = 1, kTileLast = 2;

// The column tiles of one row tile, in ascending order.
template <int kRows, int kColumns>
struct ForwardWords {
  const KernelParams& p;
  const TileWord* list;  // null: only the causal flag masks
  int row_tile;

  __device__ __forceinline__ ForwardWords(const KernelParams& p, int64_t mask_index, int row_tile)
      : p(p), list(nullptr), row_tile(row_tile) {
    if (p.lists.by_row != nullptr) {
      list = p.lists.by_row + (mask_index * p.lists.row_tiles + row_tile) * p.lists.column_words;
    }
  }
  __device__ __forceinline__ TileWord operator()(int index) const {
    return list == nullptr ? columns_of_row_tile<kRows, kColumns>(p, row_tile).word(index) : list[index];
  }
};

__device__ __forceinline__ int64_t mask_index_of(const FlashmaskParams& op, const ForwardWork& work) {
  return static_cast<int64_t>(work.batch) * op.heads_mask + mask_head(work.head, op.heads_q, op.heads_mask);
}

struct ForwardMaps {
  CUtensorMap q, k, v, out;
};

template <int kHeadDim>
__device__ __forceinline__ void produce_tiles(const KernelParams& p, const ForwardMaps& maps, uint32_t shared,
                                              int lane) {
  using Layout = ForwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  using KTile = typename Layout::KTile;
  using Words = ForwardWords<Config::kRows, Config::kColumns>;
  Ring<Config::kStages> k_ring, v_ring;
  Ring<Config::kWorkStages> work_ring;
  uint32_t q_parity = 0;

  while (true) {
    int ticket = 0;
    if (lane == 0) ticket = atomicAdd(p.work_counter, 1);
    ForwardWork work = forward_work(p, __shfl_sync(kAllLanes, ticket, 0));
    const bool done = work.row_tile < 0;
    const Words words(p, mask_index_of(p.op, work), done ? 0 : work.row_tile);
    TileWalker<Words> walker(words, done ? 0 : p.lists.column_words);
    bool partial, next_partial;
    int tile = walker.next(&partial);
    work.has_tiles = tile >= 0;

    Barrier{shared + Layout::kWorkEmpty + work_ring.stage * 8}.wait(work_ring.parity ^ 1);
    if (lane == 0) {
      const uint32_t place = shared + Layout::kWork + work_ring.stage * 16;
      store_shared_32(place, work.row_tile);
      store_shared_32(place + 4, work.batch);
      store_shared_32(place + 8, work.head);
      store_shared_32(place + 12, work.has_tiles);
      Barrier{shared + Layout::kWorkFull + work_ring.stage * 8}.arrive();
    }
    work_ring.advance();
    if (done) return;
    if (tile < 0) continue;

    const int head_k = work.head / (p.op.heads_q / p.op.heads_k);
    const auto load = [&](const CUtensorMap& map, uint32_t destination, uint32_t barrier, int row) {
#pragma unroll
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
        load_box(destination + panel * KTile::kPanelBytes, map, barrier, panel * KTile::kPanel, row, head_k,
                 work.batch);
      }
    };
    const auto load_k = [&](int index, uint32_t info) {
      const Barrier full{shared + Layout::kKFull + k_ring.stage * 8};
      Barrier{shared + Layout::kKEmpty + k_ring.stage * 8}.wait(k_ring.parity ^ 1);
      if (lane == 0) {
        store_shared_32(shared + Layout::kTileInfo + k_ring.stage * 4, info);
        full.arrive_expecting(KTile::kBytes);
        load(maps.k, shared + Layout::kK + k_ring.stage * KTile::kBytes, full.address, index * Config::kColumns);
      }
      k_ring.advance();
    };
    const auto load_v = [&](int index) {
      const Barrier full{shared + Layout::kVFull + v_ring.stage * 8};
      Barrier{shared + Layout::kVEmpty + v_ring.stage * 8}.wait(v_ring.parity ^ 1);
      if (lane == 0) {
        full.arrive_expecting(KTile::kBytes);
        load(maps.v, shared + Layout::kV + v_ring.stage * KTile::kBytes, full.address, index * Config::kColumns);
      }
      v_ring.advance();
    };

    int next = walker.next(&next_partial);
    Barrier{shared + Layout::kQEmpty}.wait(q_parity ^ 1);
    q_parity ^= 1;
    if (lane == 0) {
      const Barrier full{shared + Layout::kQFull};
      full.arrive_expecting(QTile::kBytes);
#pragma unroll
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        load_box(shared + Layout::kQ + panel * QTile::kPanelBytes, maps.q, full.address, panel * QTile::kPanel,
                 work.row_tile * Config::kRows, work.head, work.batch);
      }
    }
    load_k(tile, (partial ? kTilePartial : 0) | (next < 0 ? kTileLast : 0));
    // The consumers want the next K before this V.
    while (next >= 0) {
      bool after_partial;
      const int after = walker.next(&after_partial);
      load_k(next, (next_partial ? kTilePartial : 0) | (after < 0 ? kTileLast : 0));
      load_v(tile);
      tile = next;
      next = after;
      next_partial = after_partial;
    }
    load_v(tile);
  }
}

// Every thread of a reading warp gets the work; the place is then free.
template <int kHeadDim>
__device__ __forceinline__ ForwardWork read_work(uint32_t shared, Ring<ForwardConfig<kHeadDim>::kWorkStages>* ring,
                                                 int lane) {
  using Layout = ForwardLayout<kHeadDim>;
  Barrier{shared + Layout::kWorkFull + ring->stage * 8}.wait(ring->parity);
  const uint4 words = load_shared_128(shared + Layout::kWork + ring->stage * 16);
  __syncwarp();
  if (lane == 0) Barrier{shared + Layout::kWorkEmpty + ring->stage * 8}.arrive();
  ring->advance();
  return ForwardWork{static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z),
                     static_cast<int>(words.w)};
}

template <int kHeadDim>
__device__ __forceinline__ void produce_masks(const KernelParams& p, uint32_t shared, int warp, int lane) {
  using Layout = ForwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using Words = ForwardWords<Config::kRows, Config::kColumns>;
  Ring<Config::kWorkStages> work_ring;
  Ring<Config::kMaskStages> mask_ring;
  while (true) {
    const ForwardWork work = read_work<kHeadDim>(shared, &work_ring, lane);
    if (work.row_tile < 0) return;
    if (!work.has_tiles) continue;
    const int64_t mask_index = mask_index_of(p.op, work);
    const int32_t* bounds = p.op.bounds + mask_index * p.op.seqlen_k * p.op.num_bounds;
    const Words words(p, mask_index, work.row_tile);
    TileWalker<Words> walker(words, p.lists.column_words);
    bool partial;
    for (int tile = walker.next(&partial); tile >= 0; tile = walker.next(&partial)) {
      if (!partial) continue;
      Barrier{shared + Layout::kMaskEmpty + mask_ring.stage * 8}.wait(mask_ring.parity ^ 1);
      write_mask<kHeadDim>(shared + Layout::kMask + mask_ring.stage * Layout::kMaskBytes, p.op, bounds,
                           work.row_tile * Config::kRows, tile * Config::kColumns, warp, lane);
      __syncwarp();
      if (lane == 0) Barrier{shared + Layout::kMaskFull + mask_ring.stage * 8}.arrive();
      mask_ring.advance();
    }
  }
}

}  // namespace flashmask::sm90
