// Tile shapes of the backward kernel and what lies where in its shared memory.
#pragma once

#include "barrier.cuh"
#include "panels.cuh"

namespace flashmask::sm90 {

template <int kRows_, bool kSplitsDims_, bool kRoundedP_>
struct BackwardShape {
  static constexpr int kRows = kRows_;  // queries of a row tile
  static constexpr int kColumns = 128;  // keys of a column tile: 64 for each of two consumer warpgroups
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kStages = 2;     // of Q and dO
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  // How the warpgroups share dQ: halves of the head dim, or halves of the rows.
  static constexpr bool kSplitsDims = kSplitsDims_;
  // dS from the rounded P^T, which dV needs anyway, instead of keeping P^T in float32 beside it.
  static constexpr bool kRoundedP = kRoundedP_;
};

// dK and dV of a warpgroup's 64 keys take head_dim registers of a thread, S^T and dP^T kRows: 192 of 240.
template <int kHeadDim>
struct BackwardConfig;
template <>
struct BackwardConfig<64> : BackwardShape<128, false, true> {};
template <>
struct BackwardConfig<128> : BackwardShape<64, true, false> {};

template <int kHeadDim>
struct BackwardLayout {
  using Config = BackwardConfig<kHeadDim>;
  using KTile = Panels<Config::kColumns, kHeadDim>;        // [keys, dims]; V too
  using QTile = Panels<Config::kRows, kHeadDim>;           // [queries, dims]; dO too
  using DsTile = Panels<Config::kColumns, Config::kRows>;  // [keys, queries]: dS^T
  // dQ of a row tile in float32, one part per warpgroup, in the order of accumulator fragments:
  // [kDqGroups][128 threads][4].
  static constexpr int kDqGroups = Config::kRows * kHeadDim / Config::kConsumers / kWarpgroup / 4;
  static constexpr int kDqPartFloats = kDqGroups * kWarpgroup * 4;

  static constexpr int kK = 0;
  static constexpr int kV = kK + KTile::kBytes;
  static constexpr int kQ = kV + KTile::kBytes;
  static constexpr int kDo = kQ + Config::kStages * QTile::kBytes;
  static constexpr int kDs = kDo + Config::kStages * QTile::kBytes;  // two, taken in turn
  static constexpr int kDq = kDs + 2 * DsTile::kBytes;
  static constexpr int kLse = kDq + Config::kConsumers * kDqPartFloats * 4;
  static constexpr int kDelta = kLse + Config::kStages * Config::kRows * 4;
  static constexpr int kBounds = kDelta + Config::kStages * Config::kRows * 4;  // int4 a key: its two intervals
  static constexpr int kSteps = kBounds + Config::kColumns * 16;                // int2 a stage: see Step
  static constexpr int kBarriers = kSteps + Config::kStages * 8;
  static constexpr int kBarrierCount = 4 * Config::kStages + 4 + 2 * Config::kConsumers;
  static constexpr int kBytes = kBarriers + kBarrierCount * 8;
};

// What the producer tells the consumers of a stage.
struct Step {
  int32_t tile;  // 2 * row tile + (partial ? 1 : 0), or -1 after the last
  int32_t mask;  // index of its mask: batch * heads_mask + mask head
};

// The barriers of a block. Arrivals count warps of consumers, or one thread of a producer.
template <int kHeadDim>
struct BackwardBarriers {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  static constexpr int kStages = Config::kStages, kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  uint32_t base;  // of the shared memory

  __device__ __forceinline__ Barrier at(int index) const { return Barrier{base + Layout::kBarriers + index * 8}; }
  __device__ __forceinline__ Barrier q_full(int stage) const { return at(stage); }
  __device__ __forceinline__ Barrier q_empty(int stage) const { return at(kStages + stage); }
  __device__ __forceinline__ Barrier do_full(int stage) const { return at(2 * kStages + stage); }
  __device__ __forceinline__ Barrier do_empty(int stage) const { return at(3 * kStages + stage); }
  __device__ __forceinline__ Barrier k_full() const { return at(4 * kStages); }
  __device__ __forceinline__ Barrier v_full() const { return at(4 * kStages + 1); }
  // dS^T of all keys is there. That it may be overwritten needs no barrier: with two buffers, whoever has seen the
  // other warpgroup's dS^T of the step between knows that the other is done with the older one.
  __device__ __forceinline__ Barrier ds_full(int buffer) const { return at(4 * kStages + 2 + buffer); }
  __device__ __forceinline__ Barrier dq_full(int consumer) const { return at(4 * kStages + 4 + consumer); }
  __device__ __forceinline__ Barrier dq_empty(int consumer) const {
    return at(4 * kStages + 4 + Config::kConsumers + consumer);
  }

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      q_full(stage).init(1);
      q_empty(stage).init(kConsumerWarps);
      do_full(stage).init(1);
      do_empty(stage).init(kConsumerWarps);
    }
    k_full().init(1);
    v_full().init(1);
    for (int buffer = 0; buffer < 2; ++buffer) ds_full(buffer).init(kConsumerWarps);
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      dq_full(consumer).init(kWarpgroup / 32);
      dq_empty(consumer).init(1);
    }
    publish_barriers();
  }
};

}  // namespace flashmask::sm90
