// Tile choices and shared-memory layout of the forward kernel.
#pragma once

#include "panels.cuh"

namespace flashmask::sm90 {

constexpr int kRowsPerWarpgroup = 64;

// How the output leaves: through shared memory of its own, or straight from registers to memory.
enum class OutputBy { kOwnPlace, kRegisters };

// kConsumers warpgroups own 64 rows each; kStages buffers for K and as many for V, kQPlaces for 64 rows of Q,
// kMaskStages for element masks: none where nothing masks. A column tile's scores come in kParts parts: more
// warpgroups, but not the registers for all of them at once.
template <int kConsumers_, int kColumns_, int kStages_, int kQPlaces_, int kMaskStages_, int kParts_ = 1,
          OutputBy kOutputBy_ = OutputBy::kOwnPlace>
struct ForwardShape {
  static constexpr int kConsumers = kConsumers_, kColumns = kColumns_;
  static constexpr int kStages = kStages_, kQPlaces = kQPlaces_, kMaskStages = kMaskStages_;
  // So many warpgroups have a place for the rows of the next row tile while all are at work on those of this one.
  static constexpr int kEarlyQ = kQPlaces - kConsumers;
  static_assert(kEarlyQ >= 0 && kEarlyQ <= kConsumers);
  static constexpr int kRows = kRowsPerWarpgroup * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kParts = kParts_, kPartColumns = kColumns / kParts;
  static constexpr bool kMasks = kMaskStages > 0;
  // Whether only those warpgroups that need a tile's element masks wait for them and free their place. Then one that
  // does not may be ahead of the mask warps, but never by a round of their ring: the key tile in which it needs masks
  // again is there only when all have freed the one kStages before it, and so taken the masks of the one before that.
  static constexpr bool kMasksByNeed = kMaskStages > kStages;
  static_assert(kMaskStages <= 4);
  // Whether the warpgroups take turns at issuing products, so that one's exponentials fall into the other's products.
  // More do that by themselves, and a turn of one that is at the end of a row tile would keep the others waiting.
  static constexpr bool kTakesTurns = kConsumers == 2;
  // Else a place goes from one warpgroup to the other, and who waits for it could take the other's rows for its own, a
  // round early. Turns exclude that: the other has had its rows by then.
  static_assert(kEarlyQ == 0 || kEarlyQ == kConsumers || kTakesTurns);
  // Whether the next K is waited for while scores are computed, or only behind the exponentials: with two places for 64
  // keys it is often not there before.
  static constexpr bool kWaitsForKeysEarly = kColumns >= 128 || kStages > 2;
  // Whether the next row tile is looked up while products run (needs registers), or between row tiles.
  static constexpr bool kLooksAhead = kConsumers == 2;
  // With more, P V of the tile before is long done when half of the exponentials are: it is waited for then, so that
  // the assembler can round weights as they come.
  static constexpr bool kRoundsEarly = kConsumers > 2;
  static constexpr OutputBy kOutputBy = kOutputBy_;
  // A block starts with 168 registers a thread (with three consumers 128, with four 96); what the producers give up, no
  // more, goes to the consumers: more would wait for ever.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;
  static constexpr int kStartRegisters = kConsumers == 2 ? 168 : kConsumers == 3 ? 128 : 96;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kStartRegisters);
  // Two warps prepare element masks: each those of 64 columns, or where there are no more, of every other 32 rows.
  static constexpr int kMaskWarps = kMasks ? 2 : 0;
  static constexpr int kMaskRowShares = kColumns == 64 ? 2 : 1;
  static constexpr int kWorkStages = 2;
  static constexpr int kOrderStages = 8;
};

// Measured in docs/performance-log.md. (What the lists hold, 64 rows x kPartColumns, divides the block mask's 128.)
template <int kHeadDim>
struct ForwardConfig;
template <>
struct ForwardConfig<64> : ForwardShape<4, 128, 3, 8, 4, 2> {};
template <>
struct ForwardConfig<96> : ForwardShape<3, 128, 2, 6, 3, 2> {};
template <>
struct ForwardConfig<128> : ForwardShape<3, 64, 3, 6, 4, 1, OutputBy::kRegisters> {};
template <>
struct ForwardConfig<192> : ForwardShape<2, 64, 2, 3, 2> {};
template <>
struct ForwardConfig<256> : ForwardShape<2, 64, 2, 3, 2, 1, OutputBy::kRegisters> {};

// Where nothing masks: no code for masks and skipped tiles, and any tiles. Without a choice of its own, a head dim
// takes its ForwardConfig.
template <int kHeadDim>
struct UnmaskedConfig {
  static constexpr int kConsumers = 0;
};
template <>
struct UnmaskedConfig<64> : ForwardShape<3, 128, 3, 6, 0> {};
template <>
struct UnmaskedConfig<128> : ForwardShape<3, 64, 3, 6, 0, 1, OutputBy::kRegisters> {};
template <int kHeadDim>
constexpr bool kHasUnmasked = UnmaskedConfig<kHeadDim>::kConsumers > 0;

template <int kHeadDim_, typename Config_>
struct ForwardLayout {
  static constexpr int kHeadDim = kHeadDim_;
  using Config = Config_;
  using QTile = Panels<kRowsPerWarpgroup, kHeadDim>;  // of a warpgroup; its output, too
  using KTile = Panels<Config::kColumns, kHeadDim>;
  // Element masks of one tile, as words of two columns x 16 rows: [rows / 16][lane % 4][columns / 8]. The padding of
  // 128 columns puts the four lanes of a quad into different banks.
  static constexpr int kMaskStride = Config::kColumns / 8 + (Config::kColumns > 64 ? 4 : 0);
  static constexpr int kMaskBytes = Config::kRows / 16 * 4 * kMaskStride * 4;

  static constexpr int kQ = 0;
  static constexpr int kK = kQ + Config::kQPlaces * QTile::kBytes;
  static constexpr int kV = kK + Config::kStages * KTile::kBytes;
  static constexpr int kOut = kV + Config::kStages * KTile::kBytes;
  static constexpr int kOutBytes = Config::kOutputBy == OutputBy::kOwnPlace ? Config::kConsumers * QTile::kBytes : 0;
  static constexpr int kMask = kOut + kOutBytes;
  static constexpr int kWork = kMask + Config::kMaskStages * kMaskBytes;
  static constexpr int kOrders = kWork + Config::kWorkStages * 16;
  static constexpr int kTileWords = kOrders + Config::kOrderStages * 16;
  // Barriers: 8 bytes each.
  static constexpr int kQFull = kTileWords + Config::kStages * 16;
  static constexpr int kQEmpty = kQFull + Config::kQPlaces * 8;
  static constexpr int kKFull = kQEmpty + Config::kQPlaces * 8;
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
  static_assert(kBytes <= 227 * 1024, "what a block may have");
};

}  // namespace flashmask::sm90
