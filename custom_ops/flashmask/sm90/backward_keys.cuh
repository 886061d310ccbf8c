// The warp of the backward kernel that brings what belongs to keys: K, V and the intervals of the mask.
#pragma once

#include "backward_mask.cuh"
#include "backward_scheduler.cuh"
#include "backward_work.cuh"
#include "ring.cuh"
#include "tma.cuh"

namespace flashmask::sm90 {

// K and V of a column tile are read by its block alone: so they may be the first to leave the L2 cache.

// By one thread: piece `piece` of a column tile's K, to place `place`.
template <int kHeadDim>
__device__ __forceinline__ void load_k(const BackwardMaps& maps, const BackwardBlock& block, uint32_t shared_base,
                                       int piece, int place) {
  using Layout = BackwardLayout<kHeadDim>;
  using Places = typename Layout::KeyPlaces;
  constexpr int kKeys = Layout::Config::kPlaceKeys;
  const Barrier barrier = BackwardBarriers<kHeadDim>{shared_base}.k_full(place);
  barrier.arrive_expecting(kKeys * kHeadDim * 2);
#pragma unroll
  for (int panel = 0; panel < Places::kPanels; ++panel) {
    load_box(shared_base + Layout::kK + panel * Places::kPanelBytes + place * kKeys * Places::kRowBytes, maps.k,
             barrier.address, panel * Places::kPanel, block.column_begin + piece * kKeys, block.head_k, block.batch,
             kEvictFirst);
  }
}

// By one thread: the 64 keys of a warpgroup, or the first of 64 above 128 dims.
template <int kHeadDim>
__device__ __forceinline__ void load_v(const BackwardMaps& maps, const BackwardBlock& block, uint32_t shared_base,
                                       int consumer) {
  using Layout = BackwardLayout<kHeadDim>;
  using KTile = typename Layout::KTile;
  const Barrier barrier = BackwardBarriers<kHeadDim>{shared_base}.v_full(consumer);
  barrier.arrive_expecting(KTile::kBytes / KTile::kRows * 64);
#pragma unroll
  for (int panel = 0; panel < KTile::kPanels; ++panel) {
    load_box(shared_base + Layout::kV + panel * KTile::kPanelBytes + consumer * 64 * KTile::kRowBytes, maps.v,
             barrier.address, panel * KTile::kPanel, block.column_begin + consumer * 64, block.head_k, block.batch,
             kEvictFirst);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void prefetch_keys(const BackwardMaps& maps, const BackwardBlock& block, int seqlen_k) {
  using Layout = BackwardLayout<kHeadDim>;
  using KTile = typename Layout::KTile;
#pragma unroll
  for (int panel = 0; panel < KTile::kPanels; ++panel) {
    const int dim = panel * KTile::kPanel, key = block.column_begin;
    prefetch_box(maps.k, dim, key, block.head_k, block.batch, kEvictFirst);
    prefetch_box(maps.v, dim, key, block.head_k, block.batch, kEvictFirst);
    if (KTile::kRows > 64 && key + 64 < seqlen_k) {
      if constexpr (Layout::Config::kPlaceKeys == 64) {
        prefetch_box(maps.k, dim, key + 64, block.head_k, block.batch, kEvictFirst);
      }
      prefetch_box(maps.v, dim, key + 64, block.head_k, block.batch, kEvictFirst);
    }
  }
}

// One warp: the intervals of a column tile's keys, under `count` of its masks from number `first`.
template <int kHeadDim, int kBuffers>
__device__ __forceinline__ void bring_bounds(const KernelParams& p, uint32_t shared_base, Ring<kBuffers>* ring,
                                             const BackwardBlock& block, int first, int count) {
  using Layout = BackwardLayout<kHeadDim>;
  for (int mask = block.first_mask(p.op) + first; count > 0; ++mask, --count) {
    const BackwardBarriers<kHeadDim> barriers{opaque(shared_base)};
    barriers.bounds_empty(ring->stage).wait_warp(ring->parity ^ 1);
    const uint32_t place = barriers.base + Layout::kBounds + ring->stage * Layout::kBoundsBytes;
#pragma unroll 1
    for (int key = threadIdx.x % 32; key < Layout::Config::kColumns; key += 64) {  // two loads at a time
      int4 both[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) both[i] = key_intervals(p.op, mask, block.column_begin + key + i * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_shared_128(place + (key + i * 32) * 16, make_uint4(both[i].x, both[i].y, both[i].z, both[i].w));
      }
    }
    if constexpr (Layout::Config::kPassesUnseen) {
      __syncwarp();
#pragma unroll 1
      for (int consumer = 0; consumer < Layout::Config::kConsumers; ++consumer) {
        store_spans(place + Layout::kSpans + consumer * kSpansBytes, place + consumer * 64 * 16, p.no_skip);
      }
    }
    barriers.bounds_full(ring->stage).arrive_warp();
    ring->advance();
  }
}

// One warp: K, V and intervals for all column tiles of a persistent block. It has time in between, and finds out what
// the block does next. As soon as the next column tile is known, its keys go to the L2 cache, and the intervals of its
// first mask to shared memory, as does so much of K as there is a place for.
template <int kHeadDim>
__device__ __forceinline__ void bring_keys(const KernelParams& p, const BackwardMaps& maps, uint32_t shared_base) {
  const bool leader = threadIdx.x % 32 == 0;
  Ring<kBoundsBuffers> bounds;
  const auto block = [&](uint32_t number) { return BackwardBlock(p, read_work<kHeadDim>(shared_base, number)); };
  BackwardScheduler<kHeadDim> scheduler{p, shared_base, takes_sparse_schedule(p)};
  using Layout = BackwardLayout<kHeadDim>;
  constexpr int kPlaces = BackwardConfig<kHeadDim>::kKeyPlaces, kPieces = Layout::kKeyPieces;
  // Pieces of K that have a place while the column tile before is at work: one that is free since that began.
  constexpr int kEarlyPieces = kPlaces - kPieces;
  Ring<kPlaces> places;
  const auto bring_k = [&](uint32_t number, int begin, int end) {
    for (int piece = begin; piece < end; ++piece) {
      BackwardBarriers<kHeadDim>{shared_base}.k_empty(places.stage).wait_warp(places.parity ^ 1);
      if (leader) load_k<kHeadDim>(maps, block(number), shared_base, piece, places.stage);
      __syncwarp();
      places.advance();
    }
  };

  // `number`: of the column tile at work, ~0u before the first. `early`: its successor is known before it ends.
  uint32_t number = ~0u;
  WorkItem::Kind next = scheduler.tell_next();
  while (true) {
    const bool early = next == WorkItem::kColumnTile;
    if (early) {
      if (leader && number != ~0u) prefetch_keys<kHeadDim>(maps, block(number + 1), p.op.seqlen_k);
      __syncwarp();
      bring_bounds<kHeadDim>(p, shared_base, &bounds, block(number + 1), 0, 1);
    }
    if (number != ~0u) {
      const BackwardBarriers<kHeadDim> barriers{shared_base};
      if (early) bring_k(number + 1, 0, kEarlyPieces);
      // The end of the column tile. V is free after the last dP^T, K when both warpgroups have their last dQ.
      for (int consumer = 0; consumer < 2; ++consumer) {
        barriers.v_empty(consumer).wait_warp(number % 2);
        if (leader && early) load_v<kHeadDim>(maps, block(number + 1), shared_base, consumer);
      }
      __syncwarp();
      if (early) bring_k(number + 1, kEarlyPieces, kPieces);
    }
    while (next != WorkItem::kColumnTile) {
      if (next == WorkItem::kNothing) return;
      next = scheduler.tell_next();
    }
    ++number;
    if (!early || number == 0) {
      bring_k(number, 0, kPieces);
      if (leader) {
        load_v<kHeadDim>(maps, block(number), shared_base, 0);
        load_v<kHeadDim>(maps, block(number), shared_base, 1);
      }
      __syncwarp();
    }
    if (!early) bring_bounds<kHeadDim>(p, shared_base, &bounds, block(number), 0, 1);
    bring_bounds<kHeadDim>(p, shared_base, &bounds, block(number), 1, block(number).masks(p.op) - 1);
    next = scheduler.tell_next();
  }
}

}  // namespace flashmask::sm90
