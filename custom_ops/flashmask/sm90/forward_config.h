// Tile choice and shared-memory layout of the forward kernel.
#pragma once

#include "panels.cuh"

namespace flashmask::sm90 {

constexpr int kRowsPerWarpgroup = 64;

// kConsumers warpgroups own 64 rows each; kStages buffers for K and as many for V, kQStages for Q, kMaskStages for
// element masks.
template <int kConsumers_, int kColumns_, int kStages_, int kQStages_, int kMaskStages_, bool kOutputInQuery_ = false>
struct ForwardShape {
  static constexpr int kConsumers = kConsumers_, kColumns = kColumns_;
  static constexpr int kStages = kStages_, kQStages = kQStages_, kMaskStages = kMaskStages_;
  static constexpr int kRows = kRowsPerWarpgroup * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Out goes through the place of Q where there is no room for its own; the next Q then waits for it.
  static constexpr bool kOutputInQuery = kOutputInQuery_;
  // A block starts with 168 (128 with three consumers) registers a thread; what the producers give up, no more, goes to
  // the consumers: more would wait for ever.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kStartRegisters = kConsumers == 2 ? 168 : 128;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kStartRegisters);
  // A warp prepares the element masks of 64 columns.
  static constexpr int kMaskWarps = kColumns / 64;
  static constexpr int kWorkStages = 2;
  static constexpr int kOrderStages = 8;
};

// 128 columns where the tiles fit: fewer turns of the softmax's fixed costs. Tile sizes divide the block mask's 128.
template <int kHeadDim>
struct ForwardConfig;
template <>
struct ForwardConfig<64> : ForwardShape<3, 128, 3, 2, 2> {};
template <>
struct ForwardConfig<96> : ForwardShape<2, 128, 2, 2, 2> {};
template <>
struct ForwardConfig<128> : ForwardShape<2, 128, 2, 2, 1> {};
template <>
struct ForwardConfig<192> : ForwardShape<2, 64, 2, 1, 2> {};
template <>
struct ForwardConfig<256> : ForwardShape<2, 64, 2, 1, 2, true> {};

template <int kHeadDim>
struct ForwardLayout {
  using Config = ForwardConfig<kHeadDim>;
  using QTile = Panels<Config::kRows, kHeadDim>;
  using KTile = Panels<Config::kColumns, kHeadDim>;
  // Element masks of one tile, as words of two columns x 16 rows: [rows / 16][lane % 4][columns / 8]. The padding puts
  // the four lanes of a quad into different banks.
  static constexpr int kMaskStride = Config::kColumns / 8 + 4;
  static constexpr int kMaskBytes = Config::kRows / 16 * 4 * kMaskStride * 4;

  static constexpr int kQ = 0;
  static constexpr int kK = kQ + Config::kQStages * QTile::kBytes;
  static constexpr int kV = kK + Config::kStages * KTile::kBytes;
  static constexpr int kOut = Config::kOutputInQuery ? kQ : kV + Config::kStages * KTile::kBytes;
  static constexpr int kMask = kV + Config::kStages * KTile::kBytes + (Config::kOutputInQuery ? 0 : QTile::kBytes);
  static constexpr int kWork = kMask + Config::kMaskStages * kMaskBytes;
  static constexpr int kOrders = kWork + Config::kWorkStages * 16;
  static constexpr int kTileFlags = kOrders + Config::kOrderStages * 16;
  // Barriers: 8 bytes each.
  static constexpr int kQFull = kTileFlags + (Config::kStages * 4 + 7) / 8 * 8;
  static constexpr int kQEmpty = kQFull + Config::kQStages * 8;
  static constexpr int kKFull = kQEmpty + Config::kQStages * 8;
  static constexpr int kKEmpty = kKFull + Config::kStages * 8;
  static constexpr int kVFull = kKEmpty + Config::kStages * 8;
  static constexpr int kVEmpty = kVFull + Config::kStages * 8;
  static constexpr int kMaskFull = kVEmpty + Config::kStages * 8;
  static constexpr int kMaskEmpty = kMaskFull + Config::kMaskStages * 8;
  static constexpr int kWorkFull = kMaskEmpty + Config::kMaskStages * 8;
  static constexpr int kWorkEmpty = kWorkFull + Config::kWorkStages * 8;
  static constexpr int kOrderFull = kWorkEmpty + Config::kWorkStages * 8;
  static constexpr int kOrderEmpty = kOrderFull + Config::kOrderStages * 8;
  static constexpr int kBytes = kOrderEmpty + Config::kOrderStages * 8;
  static_assert(!Config::kOutputInQuery || Config::kQStages == 1);
  static_assert(kBytes <= 227 * 1024, "what a block may have");
};

}  // namespace flashmask::sm90
