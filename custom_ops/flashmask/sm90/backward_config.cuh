// Tile shapes of the backward kernel and what lies where in its shared memory.
#pragma once

#include "barrier.cuh"
#include "panels.cuh"
#include "ring.cuh"

namespace flashmask::sm90 {

// Up to 128 dims: the two consumer warpgroups own 64 keys each and do the same (backward_mainloop.cuh).
template <int kRows_, int kQStages_, int kKeyPlaces_, int kPlaceKeys_>
struct BackwardShape {
  static constexpr bool kWide = false;
  static constexpr int kRows = kRows_;  // queries of a row tile
  static constexpr int kColumns = 128;  // keys of a column tile: 64 for each of two consumer warpgroups
  static constexpr int kConsumers = 2;  // warpgroups
  // Places for K, of kPlaceKeys keys each. With three of 64, the first warpgroup's keys of the next column tile are
  // there before it is done with these.
  static constexpr int kKeyPlaces = kKeyPlaces_, kPlaceKeys = kPlaceKeys_;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kQStages = kQStages_, kDoStages = 2, kDsBuffers = 2;
  static constexpr int kStepsAhead = 6;  // about 12 us before a column tile ends: time for several questions to memory
};

// Above 128 dims: the consumer warpgroups share 64 keys; one makes P and dV, the other dS and dK (backward_wide.cuh).
template <int kQStages_>
struct WideBackwardShape {
  static constexpr bool kWide = true;
  static constexpr int kRows = 64, kColumns = 64, kConsumers = 2, kKeyPlaces = 1, kPlaceKeys = 64;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kQStages = kQStages_, kDoStages = 2, kDsBuffers = 2;
  static constexpr int kStepsAhead = 3;  // of 3 us
  static constexpr bool kSplitsDims = true, kPassesUnseen = false;
};

// Registers decide: dK and dV of a warpgroup's 64 keys take head_dim of a thread's 240, S^T and dP^T kRows, and the
// rounded operands kRows / 4 each. Measured in docs/performance-log.md.
template <int kHeadDim>
struct BackwardConfig;
template <>
struct BackwardConfig<64> : BackwardShape<128, 3, 3, 64> {
  // How the warpgroups share dQ: halves of the head dim, or halves of the rows.
  static constexpr bool kSplitsDims = false;
  // dS from the rounded P^T, which dV needs anyway, instead of keeping P^T in float32 beside it.
  static constexpr bool kRoundedP = true;
  // The warpgroups take turns at exponentials; whether a turn begins with the masks and lasts until dS is computed too.
  static constexpr bool kTurnIncludesDs = false;
  // dV += P^T dO is issued whenever exponentials of so many times 16 queries are ready.
  static constexpr int kDvPiece = 8;
  // Whether the word that dQ is stored is given once S^T is issued, or only once dP^T is.
  static constexpr bool kHandsOverEarly = false;
  // Whether a warpgroup passes over steps of which its own keys see nothing, and takes masks only where they need them.
  // (Of 128 rows they mostly see some.)
  static constexpr bool kPassesUnseen = false;
};
template <>
struct BackwardConfig<128> : BackwardShape<64, 3, 1, 128> {
  static constexpr bool kSplitsDims = true, kRoundedP = false, kTurnIncludesDs = true, kHandsOverEarly = true;
  static constexpr bool kPassesUnseen = true;
  static constexpr int kDvPiece = 2;
};
template <>
struct BackwardConfig<192> : WideBackwardShape<3> {};
template <>
struct BackwardConfig<256> : WideBackwardShape<2> {};

// Places for intervals of a column tile's keys (above 128 dims there is one), and for tickets to work on.
constexpr int kBoundsBuffers = 2, kWorkSlots = 2;
// What store_spans() (backward_mask.cuh) writes of the keys of a warpgroup.
constexpr int kSpansBytes = 32;
// Row tiles that are prepared or finished at a time: 512 KiB to read and as much to write, or half of that.
constexpr int kRowTilesPerItem = 16;
// A row item is not given zeros where not many more column tiles see it than it has rows for, looked up in lists of so
// many at most.
constexpr int kFewMoreColumnTiles = 4, kCountedColumnTiles = 128;
// Heads are handed out together until they have so many column tiles: a quarter of an H100's blocks.
constexpr int kColumnTilesOfGroup = 32;

template <int kHeadDim>
struct BackwardLayout {
  using Config = BackwardConfig<kHeadDim>;
  using KTile = Panels<Config::kColumns, kHeadDim>;  // [keys, dims] of V, and of K above 128 dims
  using KeyPlaces = Panels<Config::kKeyPlaces * Config::kPlaceKeys, kHeadDim>;  // K
  static constexpr int kKeyPieces = Config::kColumns / Config::kPlaceKeys;      // places that a column tile takes
  using QTile = Panels<Config::kRows, kHeadDim>;                                // [queries, dims]; dO too
  using DsTile = Panels<Config::kColumns, Config::kRows>;                       // [keys, queries]: dS^T
  // dQ of a row tile in float32, in the order of accumulator fragments, [groups of 8 dims][128 threads][4]; where the
  // warpgroups share the rows, one such part each.
  static constexpr int kDqGroups = Config::kRows * kHeadDim / Config::kConsumers / kWarpgroup / 4;
  static constexpr int kDqPartFloats = kDqGroups * kWarpgroup * 4;
  // Whether dV and dK leave by way of the buffer that the next dS^T will take, where each fits one panel of it: a warp
  // has its own 16 keys there, so it need not meet the others. Else straight from registers.
  static constexpr bool kGradientsByDs = !Config::kWide && DsTile::kPanels > 1 && DsTile::kPanel == kHeadDim;
  // P^T on its way from one warpgroup to the other: a register operand of each thread.
  static constexpr int kPBytes = Config::kColumns * Config::kRows * 2;

  static constexpr int kK = 0;
  static constexpr int kV = kK + KeyPlaces::kBytes;
  static constexpr int kQ = kV + KTile::kBytes;
  static constexpr int kDo = kQ + Config::kQStages * QTile::kBytes;
  static constexpr int kDs = kDo + Config::kDoStages * QTile::kBytes;
  static constexpr int kDq = kDs + Config::kDsBuffers * DsTile::kBytes;
  static constexpr int kP = kDq;  // the wide kernel has no place for dQ
  static constexpr int kLse =
      Config::kWide ? kP + Config::kDsBuffers * kPBytes : kDq + Config::kConsumers * kDqPartFloats * 4;
  static constexpr int kDelta = kLse + Config::kQStages * Config::kRows * 4;
  static constexpr int kBounds = kDelta + Config::kDoStages * Config::kRows * 4;  // int4 a key: its two intervals
  static constexpr int kSpans = Config::kColumns * 16;  // behind all intervals: what each warpgroup's have in common
  static constexpr int kBoundsBytes = kSpans + (Config::kPassesUnseen ? Config::kConsumers * kSpansBytes : 0);
  static constexpr int kSteps = kBounds + (Config::kWide ? 1 : kBoundsBuffers) * kBoundsBytes;  // one a stage of Q
  static constexpr int kWork = kSteps + Config::kQStages * 16;                                  // column tiles
  static constexpr int kItems = (kWork + kWorkSlots * 16 + 31) / 32 * 32;  // the one at work, and the next
  // Above 128 dims, with turns: whether each warpgroup is the first to bring dQ of a row tile.
  static constexpr int kIsFirst = kItems;
  static constexpr int kBarriers = kItems + 2 * 16;
  static constexpr int kBarrierCount = 2 * (Config::kQStages + Config::kDoStages + 2 * Config::kDsBuffers) +
                                       4 * Config::kConsumers + 2 * Config::kKeyPlaces +
                                       2 * (kBoundsBuffers + kWorkSlots) + 2;
  static constexpr int kBytes = kBarriers + kBarrierCount * 8;
  static_assert(kBytes <= 227 * 1024);
};

// What the producer tells the consumers of a stage. A row item (backward_row_items.cuh) is told with its first row
// tile.
struct Step {
  static constexpr int kEndOfTile = -1, kEndOfWork = -2, kPrepareRows = -3, kFinishRows = -4;
  // Flags of a row tile, for the keys of the first consumer warpgroup; those for the second's are one bit further.
  // Above 128 dims the first are for all keys, and only the first flag is used.
  static constexpr int kPartial = 1, kUnseen = 4, kRowTileShift = 4;

  int32_t tile;  // its row tile << kRowTileShift, and flags; or one of the above
  int32_t mask;  // index of its mask: batch * heads_mask + mask head; of a row item the first row tile; at a column
                 // tile's end its first key
  int32_t batch_head;  // there of its key head
  int32_t bounds;      // which of the column tile's masks, from 0; at its end the last; or row tiles

  __device__ __forceinline__ int row_tile() const { return tile >> kRowTileShift; }
  // Whether element masks are needed.
  __device__ __forceinline__ bool partial(int consumer) const { return (tile >> consumer & kPartial) != 0; }
  // Whether all is masked.
  __device__ __forceinline__ bool unseen(int consumer) const { return (tile >> consumer & kUnseen) != 0; }
};

// The barriers of a block. Arrivals count warps of consumers, or one thread of a producer.
template <int kHeadDim>
struct BackwardBarriers {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  static constexpr int kConsumerWarps = Config::kConsumers * kWarpgroup / 32;
  static constexpr int kQ = 0, kDo = kQ + 2 * Config::kQStages, kDs = kDo + 2 * Config::kDoStages,
                       kP = kDs + 2 * Config::kDsBuffers, kDq = kP + 2 * Config::kDsBuffers,
                       kK = kDq + 2 * Config::kConsumers, kV = kK + 2 * Config::kKeyPlaces,
                       kBounds = kV + 2 * Config::kConsumers, kWork = kBounds + 2 * kBoundsBuffers,
                       kAsked = kWork + 2 * kWorkSlots;
  static_assert(kAsked + 2 == Layout::kBarrierCount);
  uint32_t base;  // of the shared memory

  __device__ __forceinline__ Barrier at(int index) const { return Barrier{base + Layout::kBarriers + index * 8}; }
  __device__ __forceinline__ Barrier q_full(int stage) const { return at(kQ + stage); }
  __device__ __forceinline__ Barrier q_empty(int stage) const { return at(kQ + Config::kQStages + stage); }
  __device__ __forceinline__ Barrier do_full(int stage) const { return at(kDo + stage); }
  __device__ __forceinline__ Barrier do_empty(int stage) const { return at(kDo + Config::kDoStages + stage); }
  // dS^T of all keys is there; all warpgroups have multiplied it.
  __device__ __forceinline__ Barrier ds_full(int buffer) const { return at(kDs + buffer); }
  __device__ __forceinline__ Barrier ds_empty(int buffer) const { return at(kDs + Config::kDsBuffers + buffer); }
  // P^T of the wide kernel.
  __device__ __forceinline__ Barrier p_full(int buffer) const { return at(kP + buffer); }
  __device__ __forceinline__ Barrier p_empty(int buffer) const { return at(kP + Config::kDsBuffers + buffer); }
  __device__ __forceinline__ Barrier dq_full(int consumer) const { return at(kDq + consumer); }
  __device__ __forceinline__ Barrier dq_empty(int consumer) const { return at(kDq + Config::kConsumers + consumer); }
  // Of a place.
  __device__ __forceinline__ Barrier k_full(int place) const { return at(kK + place); }
  __device__ __forceinline__ Barrier k_empty(int place) const { return at(kK + Config::kKeyPlaces + place); }
  // Of the keys of one warpgroup; above 128 dims the first is of all, and the others are not used.
  __device__ __forceinline__ Barrier v_full(int consumer) const { return at(kV + consumer); }
  __device__ __forceinline__ Barrier v_empty(int consumer) const { return at(kV + Config::kConsumers + consumer); }
  __device__ __forceinline__ Barrier bounds_full(int buffer) const { return at(kBounds + buffer); }
  __device__ __forceinline__ Barrier bounds_empty(int buffer) const { return at(kBounds + kBoundsBuffers + buffer); }
  __device__ __forceinline__ Barrier work_full(int slot) const { return at(kWork + slot); }
  __device__ __forceinline__ Barrier work_empty(int slot) const { return at(kWork + kWorkSlots + slot); }

  // The next item of work is wanted, and is told; above 128 dims only that there is none.
  __device__ __forceinline__ Barrier asked() const { return at(kAsked); }
  __device__ __forceinline__ Barrier answered() const { return at(kAsked + 1); }

  // `slot_readers`: warps that a slot of work is told to, besides the one that brings keys.
  __device__ __forceinline__ void init(int slot_readers) const {
    for (int stage = 0; stage < Config::kQStages; ++stage) {
      q_full(stage).init(1);
      q_empty(stage).init_warps(kConsumerWarps);
    }
    for (int stage = 0; stage < Config::kDoStages; ++stage) {
      do_full(stage).init(1);
      do_empty(stage).init_warps(kConsumerWarps);
    }
    for (int buffer = 0; buffer < Config::kDsBuffers; ++buffer) {
      ds_full(buffer).init_warps(Config::kWide ? kWarpgroup / 32 : kConsumerWarps);
      ds_empty(buffer).init_warps(kConsumerWarps);
      p_full(buffer).init_warps(kWarpgroup / 32);
      p_empty(buffer).init_warps(kWarpgroup / 32);
    }
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      dq_full(consumer).init_warps(kWarpgroup / 32);
      if (Config::kWide) {  // there a warp says with it whose turn it is
        dq_empty(consumer).init_warps(1);
      } else {
        dq_empty(consumer).init(1);
      }
      v_full(consumer).init(1);
      v_empty(consumer).init_warps(kWarpgroup / 32);
    }
    for (int place = 0; place < Config::kKeyPlaces; ++place) {
      k_full(place).init(1);
      k_empty(place).init_warps(kConsumerWarps);
    }
    for (int buffer = 0; buffer < kBoundsBuffers; ++buffer) {
      bounds_full(buffer).init_warps(1);
      bounds_empty(buffer).init_warps(Config::kWide ? kWarpgroup / 32 : kConsumerWarps);
    }
    for (int slot = 0; slot < kWorkSlots; ++slot) {
      work_full(slot).init_warps(1);
      work_empty(slot).init_warps(slot_readers);
    }
    asked().init_warps(1);
    answered().init_warps(1);
    publish_barriers();
  }
};

// Where in a row tile's lse or delta a row stands: the four values that a thread needs of 16 rows are neighbours.
__device__ __forceinline__ int row_place(int row) {
  return (row & ~15) | (row % 8 / 2 * 4) | (row % 16 / 8 * 2) | (row % 2);
}

}  // namespace flashmask::sm90
