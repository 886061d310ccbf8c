// What a persistent backward block does for query rows, as work between column tiles: before column tiles need them
// (delta, lse, and zeroed sums of dQ where nobody stores the first) and after the last one (sums of dQ to their storage
// type, scaled unless the deterministic mode has done that).
//
// A row item is kRowTilesPerItem row tiles of one query head. Rows come through the stages of Q and dO like those of a
// column tile, so the first are there when the consumers have time for them: `out` and dO to prepare, two halves of a
// row tile's sums to finish (by the copy engine, which reads the L2 cache: no old copy in this multiprocessor's own).
// Each consumer warpgroup does half of every row tile and waits for nothing of the other.
#pragma once

#include "../cuda/element.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"
#include "trace.cuh"

namespace flashmask::sm90 {

// Who counts when a row item is prepared, and when a column tile has added its dQ.
constexpr int kPreparedCounts = 2 * kWarpgroup / 32, kFinishedCounts = 2;

template <typename T, int kHeadDim>
struct RowItem {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  static_assert(Config::kConsumers == 2 && QTile::kPanel == 64);

  // What is opaque here is not computed before the first column tile and kept in registers that column tiles need.
  const KernelParams& p;
  uint32_t base;  // of the shared memory
  int thread_in_block, consumer;
  int batch_head, first_tile, tiles;

  __device__ __forceinline__ RowItem(const KernelParams& p, uint32_t base, const Step& step)
      : p(p),
        base(opaque(base)),
        thread_in_block(opaque(threadIdx.x)),
        consumer(thread_in_block / kWarpgroup - 1),
        batch_head(step.batch_head),
        first_tile(step.mask),
        tiles(step.bounds) {}
  __device__ __forceinline__ int thread() const { return thread_in_block % kWarpgroup; }
  __device__ __forceinline__ int lane() const { return thread_in_block % 32; }
  __device__ __forceinline__ int warp() const { return thread_in_block / 32 % 4; }
  __device__ __forceinline__ int64_t first_padded_row() const {
    return static_cast<int64_t>(batch_head) * p.padded_rows;
  }

  // Calls use(row tile, place in the ring of Q, place in that of dO, free) when both places are full, and moves on in
  // the rings. `use` calls free() when it has read them.
  template <typename Use>
  __device__ __forceinline__ void for_each_tile(Ring<Config::kQStages>* q, Ring<Config::kDoStages>* dout,
                                                const Use& use) const {
    const BackwardBarriers<kHeadDim> barriers{base};
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      barriers.q_full(q->stage).wait(q->parity);
      barriers.do_full(dout->stage).wait(dout->parity);
      trace(Event::kRowTileHere);
      use(first_tile + i, base + Layout::kQ + q->stage * QTile::kBytes,
          base + Layout::kDo + dout->stage * QTile::kBytes, [&] {
            // An arrival does not wait for loads that are still on their way: the copy engine would overtake them.
            finish_reads_before_async_proxy();
            barriers.q_empty(q->stage).arrive_warp();
            barriers.do_empty(dout->stage).arrive_warp();
          });
      trace(Event::kRowTileDone);
      q->advance();
      dout->advance();
    }
  }

  __device__ __forceinline__ void prepare(Ring<Config::kQStages>* q, Ring<Config::kDoStages>* dout) const {
    constexpr int kShare = Config::kRows / 2;  // rows of a row tile that are this warpgroup's
    constexpr int kWarpRows = kShare / 4, kGroups = kWarpRows / 8;
    constexpr int kHalves = 2 * QTile::kPanels;  // of panels
    static_assert(kWarpRows % 8 == 0);
    constexpr int kLsePerThread = kRowTilesPerItem * kShare / kWarpgroup;
    static_assert(kLsePerThread > 0 && kLsePerThread * kWarpgroup == kRowTilesPerItem * kShare);
    const auto lse_row = [&](int i) {
      const int index = i * kWarpgroup + thread();
      return (first_tile + index / kShare) * Config::kRows + consumer * kShare + index % kShare;
    };
    float lse[kLsePerThread];
#pragma unroll
    for (int i = 0; i < kLsePerThread; ++i) {
      lse[i] = -CUDART_INF_F;
      if (lse_row(i) < p.op.seqlen_q) lse[i] = p.op.lse[static_cast<int64_t>(batch_head) * p.op.seqlen_q + lse_row(i)];
    }
    const bool zeros = wants_zeros();
    if (zeros && warp() == 0 && lane() < tiles) {
      // May be seen before the zeros are there. Whoever adds has waited for all prepared rows of the head, too.
      store_state(sums_state(p, static_cast<int64_t>(batch_head) * p.lists.row_tiles + first_tile + lane(), consumer),
                  kStored);
    }
    for_each_tile(q, dout, [&](int tile, uint32_t out_place, uint32_t dout_place, const auto& free) {
      // delta is the diagonal of dO times `out` transposed, of eight rows at a time. So the tensor cores compute
      // sixteen times what is needed, in a third of the instructions. Which dims a lane brings is all the same, if they
      // are the same of both: four lanes bring half a panel's row, and neighbouring rows other halves (no bank
      // conflicts).
      const int g = lane() / 4, t = lane() % 4;
      const int first_row = consumer * kShare + warp() * kWarpRows + g;
      const uint32_t offset = first_row * QTile::kRowBytes + ((t + g % 2 * 4) ^ g) * 16;
      uint4 left[kGroups][kHalves], right[kGroups][kHalves];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const uint32_t place =
              (offset ^ half % 2 * 64) + group * 8 * QTile::kRowBytes + half / 2 * QTile::kPanelBytes;
          left[group][half] = load_shared_128(dout_place + place);
          right[group][half] = load_shared_128(out_place + place);
        }
      }
      free();
      if (zeros) {
        constexpr int kZeros = Config::kRows * kHeadDim / 2 / kWarpgroup / 4;  // of a thread, 16 bytes each
        float4* zeroed =
            reinterpret_cast<float4*>(p.dq_accumulator + (first_padded_row() + tile * Config::kRows) * kHeadDim) +
            consumer * kZeros * kWarpgroup + thread();
#pragma unroll
        for (int i = 0; i < kZeros; ++i) zeroed[i * kWarpgroup] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
      float delta[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        // An instruction takes two words a lane of dO as rows g and g + 8, and one of `out`. So each is used twice: for
        // the first word what comes of row g counts, for the second what comes of row g + 8.
        float first_words[4] = {}, second_words[4] = {};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const uint4 &a = left[group][half], &b = right[group][half];
          mma_16x8x8<T>(first_words, a.x, a.y, b.x);
          mma_16x8x8<T>(second_words, a.x, a.y, b.y);
          mma_16x8x8<T>(first_words, a.z, a.w, b.z);
          mma_16x8x8<T>(second_words, a.z, a.w, b.w);
        }
        delta[group] = g % 2 == 0 ? first_words[0] + second_words[2] : first_words[1] + second_words[3];
      }
      if (t == g / 2) {  // who has the diagonal
        static_assert(kGroups <= 2);
        float* const place = p.query_delta + first_padded_row() + tile * Config::kRows + row_place(first_row);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) place[row_place(group * 8)] = delta[group];
      }
    });
#pragma unroll
    for (int i = 0; i < kLsePerThread; ++i) {
      if (lse_row(i) < (first_tile + tiles) * Config::kRows) {
        // +inf turns every weight of a row that sees nothing, or is none, into an exact zero.
        p.query_lse[first_padded_row() + row_place(lse_row(i))] =
            lse[i] == -CUDART_INF_F ? CUDART_INF_F : lse[i] * CUDART_L2E_F;
      }
    }
    fence_async_proxy_global();  // the copy engine reads all that, and adds to zeros
    __syncwarp();
    if (lane() == 0) count_up(p.prepared + batch_head);
  }

  // A warpgroup has half of the dims or of the rows (as it computes dQ), in the order of accumulators. The fragments of
  // four lanes become two 16-byte pieces.
  __device__ __forceinline__ void finish(Ring<Config::kQStages>* q, Ring<Config::kDoStages>* dout) const {
    constexpr int kChunks = Layout::kDqGroups / 4;  // a thread's pieces of each of two rows
    static_assert(Layout::kDqPartFloats * 4 == QTile::kBytes);
    const int heads_q = static_cast<int>(opaque(p.op.heads_q));
    const int batch = batch_head / heads_q, head = batch_head - batch * heads_q;
    const int g = lane() / 4, t = lane() % 4;
    const int row_in_tile = (Config::kSplitsDims ? 0 : consumer * 64) + warp() * 16 + g;
    const int first_dim = (Config::kSplitsDims ? consumer * (kHeadDim / 2) : 0) + t * 8;
    // Lane i: whether any column tile has added to row tile i. Nothing was written where none has.
    static_assert(kRowTilesPerItem <= 32);
    const int64_t row_tile_of_lane =
        static_cast<int64_t>(batch_head) * p.lists.row_tiles + first_tile + min(lane(), tiles - 1);
    const uint32_t summed = __ballot_sync(kAllLanes, read_count(sums_state(p, row_tile_of_lane, consumer)) != kNoSums);
    const float scale = p.turns != nullptr ? 1.0f : p.op.softmax_scale;  // wait_for_dq_place() says why
    const auto scaled = [&](float sum) { return sum * scale + 0.0f; };   // no zero is negative
    for_each_tile(q, dout, [&](int tile, uint32_t first_part, uint32_t second_part, const auto& free) {
      const uint32_t fragments = (consumer == 0 ? first_part : second_part) + (warp() * 32 + g * 4) * 16;
      uint32_t upper[kChunks][4], lower[kChunks][4];
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // each lane begins with another fragment: no bank conflicts
          float c[4];
          load_shared_float4(c, fragments + (n * 4 + t) * kWarpgroup * 16 + (t + i) % 4 * 16);
          upper[n][i] = Half2<T>::pack(scaled(c[0]), scaled(c[1]));
          lower[n][i] = Half2<T>::pack(scaled(c[2]), scaled(c[3]));
        }
      }
      free();
      if ((summed >> (tile - first_tile) & 1) == 0) {
#pragma unroll
        for (int n = 0; n < kChunks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) upper[n][i] = lower[n][i] = 0;
        }
      }
      const int row = tile * Config::kRows + row_in_tile;
      T* dq = head_pointer<T>(p.op.dq, batch, head, row) + first_dim;
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        if (first_dim + n * 32 < p.op.head_dim) {
          if (row < p.op.seqlen_q) store_global_128(dq + n * 32, rotated(upper[n], t), kEvictFirst);
          if (row + 8 < p.op.seqlen_q) {
            store_global_128(dq + 8 * p.op.dq.seq_stride + n * 32, rotated(lower[n], t), kEvictFirst);
          }
        }
      }
    });
  }

 private:
  // Whether dQ is added to zeros. Storing the first dQ instead saves moving them, but one column tile then holds up all
  // that have come to the same row tile meanwhile: that pays where few add to it, or where they take turns anyway. How
  // many do is only looked up where there are lists, and not too long ones.
  __device__ __forceinline__ bool wants_zeros() const {
    if (p.turns != nullptr) return false;
    if (p.lists.by_column == nullptr || p.lists.column_tiles > kCountedColumnTiles) return true;
    const int heads_q = static_cast<int>(opaque(p.op.heads_q));
    const int batch = batch_head / heads_q, head = batch_head - batch * heads_q;
    const int64_t mask_index =
        static_cast<int64_t>(batch) * p.op.heads_mask + mask_head(head, heads_q, p.op.heads_mask);
    const ListWord* words = p.lists.by_column + mask_index * p.lists.column_tiles * p.lists.row_words + first_tile / 32;
    static_assert(32 % kRowTilesPerItem == 0);
    int seen_by = 0;
#pragma unroll
    for (int column = lane(); column < kCountedColumnTiles; column += 32) {
      if (column < p.lists.column_tiles) {
        const uint32_t seen = words[column * p.lists.row_words].active >> first_tile % 32;
        seen_by += (seen & low_bits(kRowTilesPerItem)) != 0;
      }
    }
    // Under a narrow window it is seen by as many column tiles as its rows would fill, and by those of the window.
    constexpr int kFewColumnTiles = kRowTilesPerItem * Config::kRows / Config::kColumns + kFewMoreColumnTiles;
    return __reduce_add_sync(kAllLanes, seen_by) > kFewColumnTiles;
  }
  // Word i of the result is words[(i - by) % 4].
  static __device__ __forceinline__ uint4 rotated(const uint32_t (&words)[4], int by) {
    const bool one = by & 1, two = by & 2;
    const uint32_t a[4] = {one ? words[3] : words[0], one ? words[0] : words[1], one ? words[1] : words[2],
                           one ? words[2] : words[3]};
    return make_uint4(two ? a[2] : a[0], two ? a[3] : a[1], two ? a[0] : a[2], two ? a[1] : a[3]);
  }
};

}  // namespace flashmask::sm90
