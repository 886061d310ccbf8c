// Backward: one block per column tile of one key head, over the query heads of its group and their active row tiles.
//
// Scores are computed transposed, S^T = K Q^T, with keys on the M axis. dK and dV stay in registers for the whole
// block; dQ leaves by atomic additions in float32. With query heads of a group taken one after the other, dK and dV of
// grouped heads need neither atomics nor extra memory.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/launch.h"
#include "../cuda/launch_kernel.cuh"
#include "../cuda/row_bits.cuh"
#include "backward_rows.cuh"
#include "dropout.cuh"
#include "shared_tile.cuh"

namespace flashmask::sm80 {

// Warps are a grid of kKeyWarps x kDimWarps. For S^T and dP^T a warp has kColumns / kKeyWarps keys and
// kRows / kDimWarps queries. For dK and dV it has the same keys and 1 / kDimWarps of the head dim: with kDimWarps == 1
// P^T and dS^T go straight from accumulators to operands, otherwise through shared memory.
template <int kRows_, int kColumns_, int kKeyWarps_, int kDimWarps_, int kStages_, int kBlocks_ = 1>
struct BackwardShape {
  using Shape = BackwardShape;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kKeyWarps = kKeyWarps_, kDimWarps = kDimWarps_;
  static constexpr int kStages = kStages_;  // of Q and dO
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kWarps = kKeyWarps * kDimWarps, kThreads = kWarps * 32;
};

// Large is what a block may have on data center GPUs (163 KiB and more), small is for the 99 KiB of the others; a
// device gets the large shape where it fits. Chosen by timing on an H100: docs/performance-log.md.
template <int kHeadDim, bool kLarge>
struct BackwardConfig;
template <>
struct BackwardConfig<32, true> : BackwardShape<128, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<32, false> : BackwardShape<64, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<64, true> : BackwardShape<128, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<64, false> : BackwardShape<64, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<96, true> : BackwardShape<64, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<96, false> : BackwardShape<64, 128, 8, 1, 1> {};
template <>
struct BackwardConfig<128, true> : BackwardShape<64, 128, 4, 2, 2> {};
template <>
struct BackwardConfig<128, false> : BackwardShape<64, 64, 4, 2, 1> {};
template <>
struct BackwardConfig<192, true> : BackwardShape<64, 64, 2, 4, 1> {};
template <>
struct BackwardConfig<192, false> : BackwardShape<32, 64, 4, 2, 1> {};
template <>
struct BackwardConfig<256, true> : BackwardShape<64, 64, 2, 4, 1> {};
template <>
struct BackwardConfig<256, false> : BackwardShape<32, 32, 2, 2, 1> {};

template <int kHeadDim, typename Config>
struct BackwardLayout {
  using KTile = SharedTile<Config::kColumns, kHeadDim>;
  using QTile = SharedTile<Config::kRows, kHeadDim>;
  using PTile = SharedTile<Config::kColumns, Config::kRows>;  // transposed: [keys, queries]
  static constexpr int kK = 0;
  static constexpr int kV = kK + KTile::kBytes;
  static constexpr int kQ = kV + KTile::kBytes;
  static constexpr int kDo = kQ + Config::kStages * QTile::kBytes;
  static constexpr int kDs = kDo + Config::kStages * QTile::kBytes;
  static constexpr int kP = kDs + PTile::kBytes;  // only when P goes through shared memory
  static constexpr int kRowData = kP + (Config::kDimWarps > 1 ? PTile::kBytes : 0);   // lse, delta
  static constexpr int kBounds = kRowData + Config::kStages * 2 * Config::kRows * 4;  // int4 a key
  static constexpr int kBytes = kBounds + Config::kColumns * 16;
};

template <bool kCondition>
__device__ __forceinline__ uint32_t opaque_if(uint32_t value) {
  return kCondition ? opaque(value) : value;
}

template <typename T, int kHeadDim, bool kDropout, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    backward_kernel(const __grid_constant__ KernelParams p) {
  using Layout = BackwardLayout<kHeadDim, Config>;
  using KTile = typename Layout::KTile;
  using QTile = typename Layout::QTile;
  using PTile = typename Layout::PTile;
  constexpr int kKeysPerWarp = Config::kColumns / Config::kKeyWarps;
  constexpr int kMTiles = kKeysPerWarp / 16;  // 16-key tiles of a warp
  constexpr int kQueriesPerWarp = Config::kRows / Config::kDimWarps;
  constexpr int kNTiles = kQueriesPerWarp / 8;               // 8-query tiles of a warp
  constexpr int kDTiles = kHeadDim / 8 / Config::kDimWarps;  // 8-column tiles of dK and dV of a warp
  constexpr bool kThroughShared = Config::kDimWarps > 1;
  // For dQ the warps are a grid of query tiles x parts of the head dim.
  constexpr int kDqDimWarps = kHeadDim % 64 == 0 ? 4 : 2;
  constexpr int kDqRowWarps = Config::kWarps / kDqDimWarps;
  constexpr int kDqMTiles = Config::kRows / 16 / kDqRowWarps;
  constexpr int kDqDTiles = kHeadDim / 8 / kDqDimWarps;
  // What is worked out anew in every step. The compiler would rather keep it, in registers that the main loop lacks;
  // where it pays was found by looking at what ptxas spills (docs/sm80-kernel.md).
  constexpr bool kFreshDq = kHeadDim == 256, kFreshProducts = !kFreshDq;      // addresses of their operands
  constexpr bool kFreshMask = kHeadDim <= 128 && kDropout == kThroughShared;  // a thread's place in the mask
  constexpr bool kFreshDropout = kHeadDim <= 96 || kHeadDim == 256;           // and in the dropout bits
  static_assert(kDqMTiles >= 1 && kDqDTiles % 2 == 0 && kDTiles % 2 == 0 && kNTiles % 2 == 0);

  FLASHMASK_DYNAMIC_SHARED(shared);
  const uint32_t shared_base = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int key_warp = warp % Config::kKeyWarps, dim_warp = warp / Config::kKeyWarps;
  const FlashmaskParams& op = p.op;
  const int column_tiles = p.lists.column_tiles;

  // Deterministic: blocks take their turn on dQ in the order of descending column tiles, so they must also start in
  // that order; a ticket makes sure of it whatever order the hardware starts them in.
  const bool sparse = takes_sparse_schedule(p);
  int block = blockIdx.x;
  if (p.turns != nullptr) {
    int* ticket = reinterpret_cast<int*>(shared + Layout::kBounds);  // free until the first bounds come
    if (thread == 0) *ticket = atomicAdd(p.turns + static_cast<int64_t>(op.batch) * op.heads_q * p.lists.row_tiles, 1);
    __syncthreads();
    block = *ticket;
  }
  const HeadGroup group = group_of(sparse ? p.sparse_groups : p.groups, op.batch * op.heads_k, column_tiles, block);
  const int rank = block - group.first * column_tiles;
  // Under a causal mask the first columns are seen by most rows.
  const int column_tile = p.turns != nullptr ? column_tiles - 1 - rank / group.heads : rank / group.heads;
  const int batch_head_k = group.first + rank % group.heads;
  const int batch = batch_head_k / op.heads_k;
  const int head_k = batch_head_k - batch * op.heads_k;
  const int heads_per_key = op.heads_q / op.heads_k;

  const int column_begin = column_tile * Config::kColumns;
  const int columns_valid = op.seqlen_k - column_begin;
  const int warp_key = key_warp * kKeysPerWarp;
  const int warp_query = dim_warp * kQueriesPerWarp;

  using CopyK = TileCopy<KTile, Config::kThreads>;
  using CopyQ = TileCopy<QTile, Config::kThreads>;
  CopyK::load_async(shared_base + Layout::kK, head_pointer<T>(op.k, batch, head_k, column_begin), op.k.seq_stride,
                    columns_valid, op.head_dim, thread);
  CopyK::load_async(shared_base + Layout::kV, head_pointer<T>(op.v, batch, head_k, column_begin), op.v.seq_stride,
                    columns_valid, op.head_dim_v, thread);
  copy_async_commit();

  float dk[kMTiles][kDTiles][4], dv[kMTiles][kDTiles][4];
  clear(dk);
  clear(dv);

  const uint32_t k_lanes = KTile::lanes_rows_first(shared_base + Layout::kK, lane) + warp_key * KTile::kRowBytes;
  const uint32_t q_lanes = QTile::lanes_chunks_first(shared_base + Layout::kQ, lane) + warp_query * QTile::kRowBytes;
  const uint32_t q_lanes_transposed = QTile::lanes_rows_first(shared_base + Layout::kQ, lane);
  constexpr int kVMinusK = Layout::kV - Layout::kK, kDoMinusQ = Layout::kDo - Layout::kQ;
  const float masked_score = p.negative_scale ? CUDART_INF_F : -CUDART_INF_F;
  const float scale_log2 = p.negative_scale ? -p.scale_log2 : p.scale_log2;

  for (int head = head_k * heads_per_key; head < (head_k + 1) * heads_per_key; ++head) {
    const int batch_head = batch * op.heads_q + head;
    const int mask_index = batch * op.heads_mask + mask_head(head, op.heads_q, op.heads_mask);

    __syncthreads();  // all are done with the previous head's bounds, Q and dO
    for (int key = thread; key < Config::kColumns; key += Config::kThreads) {
      int4 intervals = make_int4(0, INT32_MAX, kEmptyStart, kEmptyEnd);  // past the end: masked everywhere
      if (key < columns_valid) {
        const int32_t* bounds =
            op.bounds + (static_cast<int64_t>(mask_index) * op.seqlen_k + column_begin + key) * op.num_bounds;
        const ColumnMask mask =
            column_mask(bounds, op.num_bounds, op.causal, column_begin + key, op.seqlen_q, op.seqlen_k);
        intervals = make_int4(mask.lower.start, mask.lower.end, mask.upper.start, mask.upper.end);
      }
      *reinterpret_cast<int4*>(shared + Layout::kBounds + key * 16) = intervals;
    }

    const auto words = [&](int index) {
      if (p.lists.by_column == nullptr)
        return rows_of_column_tile<Config::kRows, Config::kColumns>(p, column_tile).word(index);
      return p.lists
          .by_column[(static_cast<int64_t>(mask_index) * column_tiles + column_tile) * p.lists.row_words + index];
    };
    TileWalker<decltype(words)> walker(words, p.lists.row_words);

    const T* q = head_pointer<T>(op.q, batch, head, 0);
    const T* dout = head_pointer<T>(op.dout, batch, head, 0);
    const auto load_rows = [&](int tile, int stage) {
      const int row = tile * Config::kRows;
      CopyQ::load_async(shared_base + Layout::kQ + stage * QTile::kBytes, q + row * op.q.seq_stride, op.q.seq_stride,
                        op.seqlen_q - row, op.head_dim, thread);
      CopyQ::load_async(shared_base + Layout::kDo + stage * QTile::kBytes, dout + row * op.dout.seq_stride,
                        op.dout.seq_stride, op.seqlen_q - row, op.head_dim_v, thread);
      constexpr int kChunks = Config::kRows / 4;
      if (thread < 2 * kChunks) {
        const float* source =
            (thread < kChunks ? p.query_lse : p.query_delta) + static_cast<int64_t>(batch_head) * p.padded_rows + row;
        copy_async_16(shared_base + Layout::kRowData + stage * 2 * Config::kRows * 4 + thread * 16,
                      source + thread % kChunks * 4, true);
      }
      copy_async_commit();
    };

    int stage = 0;
    bool partial;
    int tile = walker.next(&partial);
    if (tile >= 0) load_rows(tile, 0);

    while (tile >= 0) {
      bool next_partial;
      const int next_tile = walker.next(&next_partial);
      copy_async_wait<0>();
      __syncthreads();  // Q and dO are there for all, and all are done with dS and the other stage
      if (Config::kStages == 2 && next_tile >= 0) load_rows(next_tile, stage ^ 1);

      const uint32_t q_stage = q_lanes + stage * QTile::kBytes;
      const uint32_t q_stage_transposed = q_lanes_transposed + stage * QTile::kBytes;
      const int row_begin = tile * Config::kRows;

      float scores[kMTiles][kNTiles][4], dp[kMTiles][kNTiles][4];
      const auto product = [&](float (&result)[kMTiles][kNTiles][4], uint32_t a_lanes, uint32_t b_lanes) {
        clear(result);
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          uint32_t a[kMTiles][4];
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) load_matrix(a[m], KTile::moved(a_lanes, m * 16, step * 2));
#pragma unroll
          for (int n = 0; n < kNTiles; n += 2) {
            uint32_t b[4];
            load_matrix(b, QTile::moved(b_lanes, n * 8, step * 2));
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) mma_pair<T>(result[m][n], result[m][n + 1], a[m], b);
          }
        }
      };
      product(scores, opaque_if<kFreshProducts>(k_lanes), opaque_if<kFreshProducts>(q_stage));

      if (partial) {
        constexpr int kWords = (kNTiles + 3) / 4;  // 32 queries each
        const int lane = static_cast<int>(opaque_if<kFreshMask>(thread)) % 32;
        // A thread's keys are g and g + 8 of each 16; its queries 8n + 2t and the next.
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = warp_key + m * 16 + h * 8 + lane / 4;
            const int4 intervals = *reinterpret_cast<const int4*>(shared + Layout::kBounds + key * 16);
#pragma unroll
            for (int word = 0; word < kWords; ++word) {
              const int first = row_begin + warp_query + word * 32;
              const uint32_t bits =
                  (interval_bits(intervals.x, intervals.y, first) | interval_bits(intervals.z, intervals.w, first)) >>
                  (lane % 4 * 2);
#pragma unroll
              for (int n = 0; n < kNTiles / kWords; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  if (bits & (1u << (n * 8 + e))) scores[m][word * 4 + n][h * 2 + e] = masked_score;
                }
              }
            }
          }
        }
      }

      const char* row_data = shared + Layout::kRowData + stage * 2 * Config::kRows * 4 + warp_query * 4 + lane % 4 * 8;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(row_data + n * 32);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scores[m][n][i] = exp2_fast(scores[m][n][i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
          }
        }
      }

      product(dp, opaque_if<kFreshProducts>(k_lanes) + kVMinusK, opaque_if<kFreshProducts>(q_stage) + kDoMinusQ);

      uint32_t kept[kMTiles][kNTiles];  // dropout: bit i tells of element i of the accumulator
      if constexpr (kDropout) {
        const DropoutKey key(op.seed_offset[0], op.seed_offset[1]);
        const int lane = static_cast<int>(opaque_if<kFreshDropout>(thread)) % 32;
        // Eight cells (query, 8 keys) for eight threads: two n-tiles x two queries of a thread x two halves of a 16-key
        // tile. Cell bits: 0 = query of the pair, 1 = half, 2 = n-tile.
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int n = 0; n < kNTiles; n += 2) {
            const int cell = lane / 4;
            const int row = row_begin + warp_query + (n + (cell >> 2)) * 8 + lane % 4 * 2 + (cell & 1);
            const int group8 = (column_begin + warp_key) / 8 + m * 2 + ((cell >> 1) & 1);
            uint32_t drawn[8];
            trade_in_column(key.draw(batch_head, row, group8), lane, drawn);
            kept[m][n] = kept[m][n + 1] = 0;
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const uint32_t draw = (drawn[c] >> (lane / 4 % 2 * 16)) & 0xFFFFu;
              if (draw < p.keep_threshold) kept[m][n + (c >> 2)] |= 1u << (c & 3);
            }
          }
        }
      }

      // From here `scores` is P after dropout (for dV), and dp is dS.
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(row_data + Config::kRows * 4 + n * 32);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float factor = 1.0f;
            if constexpr (kDropout) factor = kept[m][n] & (1u << i) ? p.keep_scale : 0.0f;
            const float grad = kDropout ? dp[m][n][i] * factor : dp[m][n][i];
            dp[m][n][i] = scores[m][n][i] * (grad - (i % 2 == 0 ? delta.x : delta.y));
            if constexpr (kDropout) scores[m][n][i] *= factor;
          }
        }
      }

      // dS^T, and P^T if need be, to shared memory.
      const uint32_t p_corner = opaque(shared_base + PTile::offset(warp_key + lane / 4, 0) + lane % 4 * 4);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t place = PTile::moved(p_corner, m * 16 + h * 8, warp_query / 8 + n);
            store_shared_32(place + Layout::kDs, Half2<T>::pack(dp[m][n][h * 2], dp[m][n][h * 2 + 1]));
            if constexpr (kThroughShared) {
              store_shared_32(place + Layout::kP, Half2<T>::pack(scores[m][n][h * 2], scores[m][n][h * 2 + 1]));
            }
          }
        }
      }
      if constexpr (kThroughShared) __syncthreads();

      // result += (P^T or dS^T) * (dO or Q)
      const auto accumulate = [&](float (&result)[kMTiles][kDTiles][4], const float (&left)[kMTiles][kNTiles][4],
                                  int left_place, uint32_t b_lanes) {
        const uint32_t left_lanes =
            PTile::lanes_rows_first(shared_base + left_place, lane) + warp_key * PTile::kRowBytes;
#pragma unroll
        for (int step = 0; step < Config::kRows / 16; ++step) {
          uint32_t a[kMTiles][4];
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            if constexpr (kThroughShared) {
              load_matrix(a[m], PTile::moved(left_lanes, m * 16, step * 2));
            } else {
              pack_operand<T>(a[m], left[m][step * 2 % kNTiles], left[m][(step * 2 + 1) % kNTiles]);
            }
          }
#pragma unroll
          for (int d = 0; d < kDTiles; d += 2) {
            uint32_t b[4];
            load_matrix_transposed(b, QTile::moved(b_lanes, step * 16, dim_warp * kDTiles + d));
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) mma_pair<T>(result[m][d], result[m][d + 1], a[m], b);
          }
        }
      };
      accumulate(dv, scores, Layout::kP, opaque_if<kFreshProducts>(q_stage_transposed) + kDoMinusQ);
      accumulate(dk, dp, Layout::kDs, opaque_if<kFreshProducts>(q_stage_transposed));

      if constexpr (!kThroughShared || Config::kStages == 1) __syncthreads();  // dS is there, Q and dO are free
      if (Config::kStages == 1 && next_tile >= 0) load_rows(next_tile, 0);

      float dq[kDqMTiles][kDqDTiles][4];
      clear(dq);
      const int dq_row_warp = warp % kDqRowWarps, dq_dim_warp = warp / kDqRowWarps;
      {
        const uint32_t ds_lanes = opaque_if<kFreshDq>(PTile::lanes_chunks_first(shared_base + Layout::kDs, lane));
        const uint32_t k_transposed = opaque_if<kFreshDq>(KTile::lanes_rows_first(shared_base + Layout::kK, lane));
#pragma unroll
        for (int step = 0; step < Config::kColumns / 16; ++step) {
          uint32_t a[kDqMTiles][4];
#pragma unroll
          for (int m = 0; m < kDqMTiles; ++m) {
            load_matrix_transposed(a[m], PTile::moved(ds_lanes, step * 16, (dq_row_warp * kDqMTiles + m) * 2));
          }
#pragma unroll
          for (int d = 0; d < kDqDTiles; d += 2) {
            uint32_t b[4];
            load_matrix_transposed(b, KTile::moved(k_transposed, step * 16, dq_dim_warp * kDqDTiles + d));
#pragma unroll
            for (int m = 0; m < kDqMTiles; ++m) mma_pair<T>(dq[m][d], dq[m][d + 1], a[m], b);
          }
        }
      }

      int32_t* turn = p.turns + static_cast<int64_t>(batch_head) * p.lists.row_tiles + tile;
      if (p.turns != nullptr)
        wait_for_turn<Config::kRows, Config::kColumns>(p, turn, mask_index, tile, column_tile, thread);
      float* dq_rows = p.dq_accumulator + (static_cast<int64_t>(batch_head) * p.padded_rows + row_begin) * kHeadDim;
#pragma unroll
      for (int m = 0; m < kDqMTiles; ++m) {
#pragma unroll
        for (int d = 0; d < kDqDTiles; ++d) {
          const int place = (dq_row_warp * kDqMTiles + m) * (kHeadDim / 8) + dq_dim_warp * kDqDTiles + d;
          add_accumulator(dq_rows + place * 128, lane, dq[m][d]);
        }
      }
      if (p.turns != nullptr) pass_turn(turn, thread);

      tile = next_tile;
      partial = next_partial;
      if constexpr (Config::kStages == 2) stage ^= 1;
    }
  }

  copy_async_wait<0>();
  __syncthreads();  // all are done with K and V: their place now takes dK and dV
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int d = 0; d < kDTiles; ++d) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int place = KTile::offset(warp_key + m * 16 + h * 8 + lane / 4, dim_warp * kDTiles + d) + lane % 4 * 4;
        const float* k_pair = &dk[m][d][h * 2];
        store_shared_32(shared_base + Layout::kK + place,
                        Half2<T>::pack(k_pair[0] * op.softmax_scale, k_pair[1] * op.softmax_scale));
        store_shared_32(shared_base + Layout::kV + place, Half2<T>::pack(dv[m][d][h * 2], dv[m][d][h * 2 + 1]));
      }
    }
  }
  __syncthreads();
  store_rows<KTile, Config::kColumns, Config::kThreads>(shared_base + Layout::kK, 0,
                                                        head_pointer<T>(op.dk, batch, head_k, column_begin),
                                                        op.dk.seq_stride, columns_valid, op.head_dim, thread);
  store_rows<KTile, Config::kColumns, Config::kThreads>(shared_base + Layout::kV, 0,
                                                        head_pointer<T>(op.dv, batch, head_k, column_begin),
                                                        op.dv.seq_stride, columns_valid, op.head_dim_v, thread);
}

constexpr int kSmallestShared = 99 * 1024;

template <int kHeadDim>
bool backward_is_large(int shared_limit) {
  static_assert(BackwardLayout<kHeadDim, BackwardConfig<kHeadDim, false>>::kBytes <= kSmallestShared);
  return BackwardLayout<kHeadDim, BackwardConfig<kHeadDim, true>>::kBytes <= shared_limit;
}

template <typename T, int kHeadDim>
TileShape backward_tile_shape(int shared_limit) {
  using Large = BackwardConfig<kHeadDim, true>;
  using Small = BackwardConfig<kHeadDim, false>;
  return backward_is_large<kHeadDim>(shared_limit) ? TileShape{Large::kRows, Large::kColumns}
                                                   : TileShape{Small::kRows, Small::kColumns};
}

template <typename T, int kHeadDim, typename Config>
cudaError_t launch_backward_kernel(const KernelParams& p, cudaStream_t stream) {
  const auto kernel =
      p.op.dropout > 0 ? backward_kernel<T, kHeadDim, true, Config> : backward_kernel<T, kHeadDim, false, Config>;
  constexpr int kShared = BackwardLayout<kHeadDim, Config>::kBytes;
  const int blocks = p.lists.column_tiles * p.op.batch * p.op.heads_k;
  return launch_kernel(kernel, blocks, Config::kThreads, kShared, stream, p);
}

template <typename T, int kHeadDim>
cudaError_t launch_backward(const KernelParams& p, int shared_limit, cudaStream_t stream) {
  cudaError_t status = launch_prepare_rows<T, kHeadDim>(p, stream);
  if (status != cudaSuccess) return status;
  if (p.turns != nullptr) {
    const size_t turns = static_cast<size_t>(p.op.batch) * p.op.heads_q * p.lists.row_tiles + 1;
    status = cudaMemsetAsync(p.turns, 0, turns * sizeof(int32_t), stream);
    if (status != cudaSuccess) return status;
  }
  status = backward_is_large<kHeadDim>(shared_limit)
               ? launch_backward_kernel<T, kHeadDim, typename BackwardConfig<kHeadDim, true>::Shape>(p, stream)
               : launch_backward_kernel<T, kHeadDim, typename BackwardConfig<kHeadDim, false>::Shape>(p, stream);
  if (status != cudaSuccess) return status;
  return launch_finish_rows<T, kHeadDim>(p, stream);
}

}  // namespace flashmask::sm80
