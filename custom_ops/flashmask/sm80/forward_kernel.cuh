// Forward: one block per row tile of one query head. Online softmax in base 2 over the active column tiles.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/launch.h"
#include "../cuda/launch_kernel.cuh"
#include "../cuda/row_bits.cuh"
#include "dropout.cuh"
#include "shared_tile.cuh"

namespace flashmask::sm80 {

// Rows x columns of a tile, warps (each owns rows / warps whole rows), and blocks wanted per multiprocessor.
template <int kRows_, int kColumns_, int kWarps_, int kBlocks_>
struct ForwardShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarps = kWarps_, kBlocks = kBlocks_;
  static constexpr int kThreads = kWarps * 32;
};

template <int kHeadDim>
struct ForwardConfig;
template <>
struct ForwardConfig<32> : ForwardShape<128, 64, 4, 3> {};
template <>
struct ForwardConfig<64> : ForwardShape<128, 128, 4, 2> {};
template <>
struct ForwardConfig<96> : ForwardShape<128, 64, 4, 2> {};
template <>
struct ForwardConfig<128> : ForwardShape<128, 64, 4, 2> {};
template <>
struct ForwardConfig<192> : ForwardShape<128, 64, 8, 1> {};
template <>
struct ForwardConfig<256> : ForwardShape<64, 64, 4, 2> {};

template <int kHeadDim>
struct ForwardLayout {
  using Config = ForwardConfig<kHeadDim>;
  using QTile = SharedTile<Config::kRows, kHeadDim>;
  using KTile = SharedTile<Config::kColumns, kHeadDim>;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + QTile::kBytes;
  static constexpr int kV = kK + KTile::kBytes;
  static constexpr int kBounds = kV + KTile::kBytes;                // raw bounds of one column tile
  static constexpr int kBits = kBounds + Config::kColumns * 4 * 4;  // per warp: masked rows of each column
  static constexpr int kBytes = kBits + Config::kWarps * Config::kColumns * 4;
};

// The running maximum of a row lags until it is off by more than this (in powers of two): rescaling the output costs
// more than the range that it saves, and weights up to 2^8 fit every 16-bit type.
constexpr float kRescaleThreshold = 8.0f;

template <typename T, int kHeadDim, bool kDropout>
__global__ void __launch_bounds__(ForwardConfig<kHeadDim>::kThreads, ForwardConfig<kHeadDim>::kBlocks)
    forward_kernel(const __grid_constant__ KernelParams p) {
  using Layout = ForwardLayout<kHeadDim>;
  using Config = ForwardConfig<kHeadDim>;
  using QTile = typename Layout::QTile;
  using KTile = typename Layout::KTile;
  constexpr int kRowsPerWarp = Config::kRows / Config::kWarps;
  constexpr int kMTiles = kRowsPerWarp / 16;     // 16-row tiles of a warp
  constexpr int kNTiles = Config::kColumns / 8;  // 8-column tiles of the scores
  constexpr int kDTiles = kHeadDim / 8;          // 8-column tiles of the output
  constexpr int kRowsPerThread = 2 * kMTiles;
  static_assert(kRowsPerWarp == 16 || kRowsPerWarp == 32);

  FLASHMASK_DYNAMIC_SHARED(shared);
  const uint32_t shared_base = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const FlashmaskParams& op = p.op;

  const int row_tiles = p.lists.row_tiles;
  const HeadGroup group = group_of(p.groups, op.batch * op.heads_q, row_tiles, blockIdx.x);
  const int rank = blockIdx.x - group.first * row_tiles;
  const int row_tile = row_tile_in_order(row_tiles, rank / group.heads);
  const int batch_head = group.first + rank % group.heads;
  const int batch = batch_head / op.heads_q;
  const int head = batch_head - batch * op.heads_q;
  const int head_k = head / (op.heads_q / op.heads_k);
  const int64_t mask_index = static_cast<int64_t>(batch) * op.heads_mask + mask_head(head, op.heads_q, op.heads_mask);

  const int row_begin = row_tile * Config::kRows;
  const int rows_valid = op.seqlen_q - row_begin;
  const int warp_row = warp * kRowsPerWarp;

  const T* k = head_pointer<T>(op.k, batch, head_k, 0);
  const T* v = head_pointer<T>(op.v, batch, head_k, 0);
  const int32_t* bounds = op.bounds + mask_index * op.seqlen_k * op.num_bounds;

  const auto words = [&](int index) {
    if (p.lists.by_row == nullptr) return columns_of_row_tile<Config::kRows, Config::kColumns>(p, row_tile).word(index);
    return p.lists.by_row[(mask_index * row_tiles + row_tile) * p.lists.column_words + index];
  };
  TileWalker<decltype(words)> walker(words, p.lists.column_words);

  using CopyQ = TileCopy<QTile, Config::kThreads>;
  using CopyK = TileCopy<KTile, Config::kThreads>;
  // opaque: addresses are worked out anew for every tile, because kept ones would make the main loop spill.
  const auto load_keys = [&](int tile, bool partial) {
    const int column = tile * Config::kColumns;
    CopyK::load_async(shared_base + Layout::kK, k + column * op.k.seq_stride, op.k.seq_stride, op.seqlen_k - column,
                      op.head_dim, opaque(thread));
    if (partial) {
      const int values = min(Config::kColumns, op.seqlen_k - column) * op.num_bounds;
      for (int i = thread; i < values; i += Config::kThreads) {
        copy_async_4(shared_base + Layout::kBounds + i * 4, bounds + static_cast<int64_t>(column) * op.num_bounds + i);
      }
    }
    copy_async_commit();
  };

  float output[kMTiles][kDTiles][4];
  float row_max[kRowsPerThread], row_sum[kRowsPerThread];
  clear(output);
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    row_max[r] = -CUDART_INF_F;
    row_sum[r] = 0.0f;
  }

  CopyQ::load_async(shared_base + Layout::kQ, head_pointer<T>(op.q, batch, head, row_begin), op.q.seq_stride,
                    rows_valid, op.head_dim, opaque(thread));
  copy_async_commit();
  bool partial;
  int tile = walker.next(&partial);
  if (tile >= 0) load_keys(tile, partial);
  const uint32_t q_lanes = QTile::lanes_rows_first(shared_base + Layout::kQ, lane) + warp_row * QTile::kRowBytes;
  const uint32_t k_lanes = KTile::lanes_chunks_first(shared_base + Layout::kK, lane);
  const uint32_t v_lanes = KTile::lanes_rows_first(shared_base + Layout::kV, lane);

  // The maximum of a row is that of its raw scores: with a negative scale, Q changes its sign instead.
  bool flip_query = p.negative_scale;
  const bool saw_tiles = tile >= 0;
  while (tile >= 0) {
    copy_async_wait<0>();
    if (flip_query) {
      CopyQ::negate(shared_base + Layout::kQ, thread);
      flip_query = false;
    }
    __syncthreads();  // K (and Q, the first time) is there for all, and all are done with V
    const int column_begin = tile * Config::kColumns;
    CopyK::load_async(shared_base + Layout::kV, v + column_begin * op.v.seq_stride, op.v.seq_stride,
                      op.seqlen_k - column_begin, op.head_dim_v, opaque(thread));
    copy_async_commit();

    // A partial tile is looked at once more, by each warp for its own rows: often they are all masked, or none.
    const uint32_t warp_bits = shared_base + Layout::kBits + warp * Config::kColumns * 4;
    constexpr uint32_t kRowBits = kRowsPerWarp == 32 ? 0xFFFFFFFFu : (1u << kRowsPerWarp) - 1u;
    bool sees_something = true;
    if (partial) {
      const int32_t* tile_bounds = reinterpret_cast<const int32_t*>(shared + Layout::kBounds);
      uint32_t every = 0xFFFFFFFFu;
#pragma unroll
      for (int i = 0; i < Config::kColumns / 32; ++i) {
        const int column = i * 32 + lane;
        const uint32_t bits = column_bits(tile_bounds + column * op.num_bounds, op.num_bounds, op.causal,
                                          column_begin + column, row_begin + warp_row, op.seqlen_q, op.seqlen_k);
        store_shared_32(warp_bits + column * 4, bits);
        every &= bits;
      }
      __syncwarp();
      sees_something = __any_sync(kAllLanes, (every & kRowBits) != kRowBits) || p.no_skip;
    }

    float scores[kMTiles][kNTiles][4];
    if (sees_something) {
      clear(scores);
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t a[kMTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) load_matrix(a[m], QTile::moved(q_lanes, m * 16, step * 2));
#pragma unroll
        for (int n = 0; n < kNTiles; n += 2) {
          uint32_t b[4];
          load_matrix(b, KTile::moved(k_lanes, n * 8, step * 2));
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) mma_pair<T>(scores[m][n], scores[m][n + 1], a[m], b);
        }
      }

      if (partial) {
#pragma unroll
        for (int group = 0; group < kNTiles / 4; ++group) {
          // Most groups of 32 columns in a partial tile are seen by all rows of the warp, or hidden from all.
          const uint32_t mine = load_shared_32(warp_bits + (group * 32 + lane) * 4);
          if (!__any_sync(kAllLanes, (mine & kRowBits) != 0) && !p.no_skip) continue;
#pragma unroll
          for (int n = group * 4; n < group * 4 + 4; ++n) {
            uint32_t bits[2];
            load_shared_64(bits, warp_bits + (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              bits[e] >>= lane / 4;
#pragma unroll
              for (int r = 0; r < kRowsPerThread; ++r) {
                if (bits[e] & (1u << (r * 8))) scores[r / 2][n][(r % 2) * 2 + e] = -CUDART_INF_F;
              }
            }
          }
        }
      }
    }

    bool next_partial;
    const int next_tile = walker.next(&next_partial);
    copy_async_wait<0>();
    __syncthreads();  // V is there for all, and all are done with K and the bounds
    if (next_tile >= 0) load_keys(next_tile, next_partial);

    if (sees_something) {
      float new_max[kRowsPerThread];
      bool grown = false;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        float largest = row_max[r];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[r / 2][n][(r % 2) * 2], scores[r / 2][n][(r % 2) * 2 + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        new_max[r] = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        // -inf minus -inf is NaN, which compares false: a row that has seen nothing yet stays as it is.
        grown |= (new_max[r] - row_max[r]) * p.scale_log2 > kRescaleThreshold;
      }
      if (__any_sync(kAllLanes, grown)) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          const float growth = (new_max[r] - row_max[r]) * p.scale_log2;
          // Rows decide one by one, so that the result does not depend on which rows share a warp.
          const float factor = growth > kRescaleThreshold ? exp2_fast(-growth) : 1.0f;
          if (growth > kRescaleThreshold) row_max[r] = new_max[r];
          row_sum[r] *= factor;
#pragma unroll
          for (int d = 0; d < kDTiles; ++d) {
            output[r / 2][d][(r % 2) * 2] *= factor;
            output[r / 2][d][(r % 2) * 2 + 1] *= factor;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const float offset = row_max[r] == -CUDART_INF_F ? 0.0f : row_max[r] * p.scale_log2;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[r / 2][n][(r % 2) * 2 + e];
            score = exp2_fast(score * p.scale_log2 - offset);
            row_sum[r] += score;
          }
        }
      }

      if constexpr (kDropout) {
        const DropoutKey key(op.seed_offset[0], op.seed_offset[1]);
        const int first_row = row_begin + warp_row + lane / 4;
        // Four cells (row, 8 columns) a quad at a time: four rows of one n-tile, or two rows of two.
        constexpr int kTilesPerTrade = 4 / kRowsPerThread;
#pragma unroll
        for (int n = 0; n < kNTiles; n += kTilesPerTrade) {
          const int cell = lane % 4;
          const PhiloxWords mine = key.draw(batch_head, first_row + (cell % kRowsPerThread) * 8,
                                            column_begin / 8 + n + cell / kRowsPerThread);
          uint32_t drawn[4];
          trade_in_quad(mine, lane, drawn);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int r = c % kRowsPerThread, tile_n = n + c / kRowsPerThread;
            if ((drawn[c] & 0xFFFFu) >= p.keep_threshold) scores[r / 2][tile_n][(r % 2) * 2] = 0.0f;
            if ((drawn[c] >> 16) >= p.keep_threshold) scores[r / 2][tile_n][(r % 2) * 2 + 1] = 0.0f;
          }
        }
      }

#pragma unroll
      for (int step = 0; step < Config::kColumns / 16; ++step) {
        uint32_t a[kMTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) pack_operand<T>(a[m], scores[m][step * 2], scores[m][step * 2 + 1]);
#pragma unroll
        for (int d = 0; d < kDTiles; d += 2) {
          uint32_t b[4];
          load_matrix_transposed(b, KTile::moved(v_lanes, step * 16, d));
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) mma_pair<T>(output[m][d], output[m][d + 1], a[m], b);
        }
      }
    }
    tile = next_tile;
    partial = next_partial;
  }

  // A warp's rows of Q are its own: it may put its output there without waiting for the others. But Q must have come.
  if (!saw_tiles) {
    copy_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    // Compared with zero, not for being above it: a NaN must reach the output, or a diverged model goes unnoticed.
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = warp_row + (r / 2) * 16 + (r % 2) * 8 + lane / 4;
    if (op.lse != nullptr && lane % 4 == 0 && row < rows_valid) {
      const float lse = sum == 0.0f ? -CUDART_INF_F : (row_max[r] * p.scale_log2 + __log2f(sum)) * CUDART_LN2_F;
      op.lse[static_cast<int64_t>(batch_head) * op.seqlen_q + row_begin + row] = lse;
    }
    if constexpr (kDropout) inverse *= p.keep_scale;
#pragma unroll
    for (int d = 0; d < kDTiles; ++d) {
      const uint32_t pair =
          Half2<T>::pack(output[r / 2][d][(r % 2) * 2] * inverse, output[r / 2][d][(r % 2) * 2 + 1] * inverse);
      store_shared_32(shared_base + Layout::kQ + QTile::offset(row, d) + (lane % 4) * 4, pair);
    }
  }
  __syncwarp();
  store_rows<QTile, kRowsPerWarp, 32>(shared_base + Layout::kQ, warp_row,
                                      head_pointer<T>(op.out, batch, head, row_begin), op.out.seq_stride, rows_valid,
                                      op.head_dim_v, lane);
}

template <typename T, int kHeadDim>
TileShape forward_tile_shape(int) {
  return TileShape{ForwardConfig<kHeadDim>::kRows, ForwardConfig<kHeadDim>::kColumns};
}

template <typename T, int kHeadDim>
cudaError_t launch_forward(const KernelParams& p, int, cudaStream_t stream) {
  using Config = ForwardConfig<kHeadDim>;
  const auto kernel = p.op.dropout > 0 ? forward_kernel<T, kHeadDim, true> : forward_kernel<T, kHeadDim, false>;
  constexpr int kShared = ForwardLayout<kHeadDim>::kBytes;
  static_assert(kShared <= 99 * 1024, "what every device of capability 8.0 and newer grants a block");
  const int blocks = p.lists.row_tiles * p.op.batch * p.op.heads_q;
  return launch_kernel(kernel, blocks, Config::kThreads, kShared, stream, p);
}

}  // namespace flashmask::sm80
