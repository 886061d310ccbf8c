// Backward consumers above 128 dims, where dK and dV of 64 keys fill the registers of a warpgroup each: the two
// warpgroups share the keys and divide the work by kind.
//
//   make_p:  mask, P^T = exp2(S^T) -> shared memory, dV += P^T dO, last dims of dQ (one step late), next S^T = K Q^T
//   make_ds: dS^T = P^T (dP^T - delta) -> shared memory, dK += dS^T Q, first 128 dims of dQ, next dP^T = V dO^T
//
// Each product so has the full width of a tile, which reads the least shared memory for it, and the exponentials of
// one warpgroup run under the products of the other. There is no room to collect dQ in shared memory: it is added to
// global memory straight from registers, piece by piece, under the product that comes after it.
#pragma once

#include "../cuda/element.cuh"
#include "backward_access.cuh"
#include "backward_mask.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"
#include "store_matrix.cuh"
#include "store_rows.cuh"
#include "wgmma.cuh"

namespace flashmask::sm90 {

template <typename T, int kHeadDim, bool kDeterministic>
struct WideConsumer {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using KTile = typename Layout::KTile;
  using QTile = typename Layout::QTile;
  using DsTile = typename Layout::DsTile;
  static constexpr int kGroups = Config::kRows / 8;  // accumulator groups of S^T and dP^T
  static constexpr int kSteps = Config::kRows / 16;  // of products over queries or keys
  // Groups of dQ: make_ds computes the first ones, make_p the rest.
  static constexpr int kFirstDqGroups = 16, kLastDqGroups = kHeadDim / 8 - kFirstDqGroups;
  // Whether the next scores are computed while dQ leaves; with a whole dQ there are no registers for that, so it is
  // computed in pieces then. At 256 dims all of dQ has to be there before a turn begins: others wait for its end.
  static constexpr bool kScoresAhead = !kDeterministic || kHeadDim <= 192;
  static constexpr int kDqPiece = kScoresAhead ? 8 : 16;
  static_assert(kFirstDqGroups % kDqPiece == 0 && kLastDqGroups % kDqPiece == 0);
  // Behind each addition of dQ in the deterministic mode; the default mode gains nothing (log, backward #86).
  static constexpr int kSlotsAfterAddition = 4;
  static_assert(Config::kColumns == 64 && Config::kRows == 64);

  uint32_t base;    // address of the shared memory
  int kept_thread;  // in the block; opaque: the compiler would read it anew in every step

  // All of this goes on from column tile to column tile.
  Ring<Config::kQStages> q;
  Ring<Config::kDoStages> dout;
  Ring<Config::kDsBuffers> ds;
  uint32_t tile_parity = 0;

  __device__ __forceinline__ explicit WideConsumer(uint32_t base) : base(base), kept_thread(opaque(threadIdx.x)) {}
  __device__ __forceinline__ BackwardBarriers<kHeadDim> barriers() const { return {base}; }
  // To read it anew takes long, but at 192 dims the order of work that comes of it is faster (log, backward #68).
  __device__ __forceinline__ auto thread_in_block() const {
    if constexpr (kHeadDim > 192) {
      return kept_thread;
    } else {
      return threadIdx.x;
    }
  }
  __device__ __forceinline__ int thread() const { return thread_in_block() % kWarpgroup; }
  __device__ __forceinline__ int lane() const { return thread_in_block() % 32; }
  __device__ __forceinline__ int warp_key() const { return thread_in_block() / 32 % 4 * 16; }
  __device__ __forceinline__ uint32_t q_place() const { return Layout::kQ + q.stage * QTile::kBytes; }
  __device__ __forceinline__ uint32_t do_place() const { return Layout::kDo + dout.stage * QTile::kBytes; }

  // S^T or dP^T: all of K or V times a tile of Q or dO.
  __device__ __forceinline__ void score_product(float (&scores)[kGroups][4], uint32_t keys, uint32_t rows) const {
    const uint64_t a = KTile::along_columns(base + keys, 0, 0), b = QTile::along_columns(base + rows, 0, 0);
    fence_registers(scores);
    wgmma_begin();
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      wgmma<T, Major::kK, Major::kK>(scores, a + KTile::column_distance(column), b + QTile::column_distance(column),
                                     column > 0);
    }
    wgmma_commit();
  }
  // Looked up while the products of the step before still run: the next S^T or dP^T waits for nothing then.
  __device__ __forceinline__ Step next_step() const {
    barriers().q_full(q.stage).wait(q.parity);
    return read_step(base + Layout::kSteps + q.stage * 16);
  }
  // dV or dK += P^T or dS^T times a tile of dO or Q.
  __device__ __forceinline__ void gradient_product(float (&gradient)[kHeadDim / 8][4], uint32_t (&left)[kSteps][4],
                                                   uint32_t rows) const {
    const uint64_t b = QTile::along_rows(base + rows, 0, 0);
    fence_registers(left);
    fence_registers(gradient);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<T, Major::kMN>(gradient, left[k], b + QTile::row_distance(k * 16), true);
    wgmma_commit();
  }
  // A piece of dQ = dS K.
  __device__ __forceinline__ void dq_product(float (&dq)[kDqPiece][4], int buffer, int first_group) const {
    const uint64_t a = DsTile::along_rows(base + Layout::kDs + buffer * DsTile::kBytes, 0, 0);
    const uint64_t b = KTile::along_rows(base + Layout::kK, 0, first_group * 8);
    fence_registers(dq);
    wgmma_begin();
#pragma unroll
    for (int key = 0; key < Config::kColumns; key += 16) {
      wgmma<T, Major::kMN, Major::kMN>(dq, a + DsTile::row_distance(key), b + KTile::row_distance(key), key > 0);
    }
    wgmma_commit();
  }
  // To global memory, without the scale. `stores`: in the place of what is there, which only happens with turns.
  __device__ __forceinline__ void add_piece(const KernelParams& p, const Step& step, const float (&dq)[kDqPiece][4],
                                            int first_group, bool stores) const {
    const int tile = step.row_tile();
    float* rows = p.dq_accumulator +
                  (static_cast<int64_t>(step.batch_head) * p.padded_rows + tile * Config::kRows) * kHeadDim +
                  (first_group * kWarpgroup + thread()) * 4;
#pragma unroll
    for (int n = 0; n < kDqPiece; ++n) {
      if constexpr (kDeterministic) {
        add_or_store_fragment(rows + n * kWarpgroup * 4, dq[n], stores);
        leave_issue_slots<kSlotsAfterAddition>(rows, p.op.seqlen_q < 0);
      } else {
        add_fragment(rows + n * kWarpgroup * 4, dq[n]);
      }
    }
  }

  // Waits for the first piece of dQ, which was issued, and adds `step`'s, unless there was no such step; meanwhile
  // issues the other pieces and, but at a column tile's end, issue_scores(), which is waited for too. Calls
  // multiplied() when dS is free; K is only when all is done.
  //
  // In the deterministic mode dQ is added when the producer warp says so (backward_turns.cuh), who then hears that it
  // is done. The parity is that of the step's number, so of its buffer of dS.
  template <bool kIsEnd, int kPieces, typename IssueScores, typename Multiplied>
  __device__ __forceinline__ void add_dq(const KernelParams& p, const Step& step, float (&dq)[kPieces][kDqPiece][4],
                                         int first_group, int buffer, int consumer, const IssueScores& issue_scores,
                                         const Multiplied& multiplied) const {
    static_assert(Config::kDsBuffers == 2);
    constexpr bool kAhead = kScoresAhead && !kIsEnd;
    const bool adds = step.tile >= 0;
    bool stores = false;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool is_last = i + 1 == kPieces;
      if (!is_last) {
        dq_product(dq[i + 1], buffer, first_group + (i + 1) * kDqPiece);
      } else if (kAhead) {
        issue_scores();
      }
      if (kDeterministic && i == 0 && adds) {
        barriers().dq_empty(consumer).wait(buffer);
        stores = load_shared_32(base + Layout::kIsFirst + consumer * 4) != 0;
      }
      if (kAhead || !is_last) {
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      fence_registers(dq[i]);
      if (is_last) multiplied();
      if (adds) add_piece(p, step, dq[i], first_group + i * kDqPiece, stores);
    }
    if (kDeterministic && adds) barriers().dq_full(consumer).arrive_warp();
    if (kIsEnd) return;
    if (!kAhead) issue_scores();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void store_gradient(const KernelParams& p, const FlashmaskTensor& tensor, int dims,
                                                 const Step& end, const float (&gradient)[kHeadDim / 8][4]) const {
    const int batch = end.batch_head / p.op.heads_k, head = end.batch_head - batch * p.op.heads_k;
    store_rows<T>(tensor, batch, head, end.mask + warp_key(), p.op.seqlen_k, dims, gradient, lane());
  }
  // The step that ends a column tile has been read.
  __device__ __forceinline__ void free_end() {
    barriers().q_empty(q.stage).arrive_warp();
    q.advance();
    tile_parity ^= 1;
  }

  // For all column tiles of the block.
  __device__ __forceinline__ void make_p(const KernelParams& p) {
    const float masked_score = p.negative_scale ? CUDART_INF_F : -CUDART_INF_F;
    const uint32_t intervals = base + Layout::kBounds;
    int bounds = -1;  // of which mask the intervals are, of all that the block gets
    Ring<Config::kDsBuffers> previous_ds{Config::kDsBuffers - 1, 1};  // of "step -1" nothing needs be waited for
    bool has_ds = false;                                              // or freed

    Step step = next_step();
    while (step.tile != Step::kEndOfWork) {
      const int first_bounds = bounds + 1;
      const auto move_to_bounds = [&](int wanted) {
        while (bounds != first_bounds + wanted) {
          if (bounds >= first_bounds) barriers().bounds_empty(0).arrive_warp();
          ++bounds;
          barriers().bounds_full(0).wait(bounds & 1);
        }
      };
      float dv[kHeadDim / 8][4], scores[kGroups][4];
      clear(dv);
      barriers().k_full(0).wait(tile_parity);
      const auto issue_scores = [&] { score_product(scores, Layout::kK, q_place()); };
      issue_scores();
      wgmma_wait<0>();
      fence_registers(scores);
      Step previous{-1, 0, 0, 0};
      while (step.tile >= 0) {
        const bool partial = step.partial(0);
        float lse[kSteps][4];
        const uint32_t lse_place = base + Layout::kLse + q.stage * Config::kRows * 4 + lane() % 4 * 16;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load_shared_float4(lse[k], lse_place + k * 64);
        if (partial) {
          move_to_bounds(step.bounds);
          mask_scores(scores, intervals, warp_key() + lane() / 4, step.row_tile() * Config::kRows, lane(),
                      masked_score);
        }
        uint32_t rounded_p[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& score = scores[2 * k + i / 4][i % 4];
            score = exp2_fast(score * p.signed_scale_log2 - lse[k][i / 4 * 2 + i % 2]);
          }
          pack_operand<T>(rounded_p[k], scores[2 * k], scores[2 * k + 1]);
        }
        barriers().q_empty(q.stage).arrive_warp();
        barriers().p_empty(ds.stage).wait(ds.parity ^ 1);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          store_shared_128(base + Layout::kP + ds.stage * Layout::kPBytes + (k * kWarpgroup + thread()) * 16,
                           make_uint4(rounded_p[k][0], rounded_p[k][1], rounded_p[k][2], rounded_p[k][3]));
        }
        barriers().p_full(ds.stage).arrive_warp();

        barriers().do_full(dout.stage).wait(dout.parity);
        gradient_product(dv, rounded_p, do_place());
        // In a column tile's first round products that are dropped: of the last dS before, or of whatever the shared
        // memory holds. A branch around them would make the compiler wait for those in flight.
        float dq[kLastDqGroups / kDqPiece][kDqPiece][4];
        barriers().ds_full(previous_ds.stage).wait(previous_ds.parity);
        dq_product(dq[0], previous_ds.stage, kFirstDqGroups);
        wgmma_wait<1>();
        fence_registers(dv);
        fence_registers(rounded_p);
        barriers().do_empty(dout.stage).arrive_warp();
        q.advance();
        const Step next = next_step();
        add_dq<false>(p, previous, dq, kFirstDqGroups, previous_ds.stage, 0, issue_scores, [&] {
          if (has_ds) barriers().ds_empty(previous_ds.stage).arrive_warp();
        });
        fence_registers(scores);
        has_ds = true;
        previous = step;
        step = next;
        previous_ds = ds;
        dout.advance();
        ds.advance();
      }
      move_to_bounds(step.bounds);  // all that will be brought is taken
      barriers().bounds_empty(0).arrive_warp();
      if (previous.tile >= 0) {
        float dq[kLastDqGroups / kDqPiece][kDqPiece][4];
        barriers().ds_full(previous_ds.stage).wait(previous_ds.parity);
        dq_product(dq[0], previous_ds.stage, kFirstDqGroups);
        // Its buffer is freed in the next column tile's first round.
        add_dq<true>(p, previous, dq, kFirstDqGroups, previous_ds.stage, 0, issue_scores, [] {});
      }
      barriers().k_empty(0).arrive_warp();
      store_gradient(p, p.op.dv, p.op.head_dim_v, step, dv);
      free_end();
      step = next_step();
    }
  }

  // For all column tiles of the block.
  __device__ __forceinline__ void make_ds(const KernelParams& p) {
    const uint32_t ds_corner = matrix_corner<DsTile>(base + Layout::kDs, warp_key(), lane());
    Step step = next_step();
    while (step.tile != Step::kEndOfWork) {
      float dk[kHeadDim / 8][4], dp[kGroups][4];
      clear(dk);
      barriers().k_full(0).wait(tile_parity);
      barriers().v_full(0).wait(tile_parity);
      // After the last step V is free, and no further dO belongs to the column tile: then a product that is dropped.
      const auto issue_scores_of = [&](const Step& coming) {
        const bool ends = coming.tile < 0;
        if (ends) {
          barriers().v_empty(0).arrive_warp();
        } else {
          barriers().do_full(dout.stage).wait(dout.parity);
        }
        score_product(dp, ends ? Layout::kK : Layout::kV, ends ? q_place() : do_place());
      };
      issue_scores_of(step);
      wgmma_wait<0>();
      fence_registers(dp);
      while (step.tile >= 0) {
        float delta[kSteps][4];
        const uint32_t delta_place = base + Layout::kDelta + dout.stage * Config::kRows * 4 + lane() % 4 * 16;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load_shared_float4(delta[k], delta_place + k * 64);
        barriers().p_full(ds.stage).wait(ds.parity);
        barriers().ds_empty(ds.stage).wait(ds.parity ^ 1);
        uint32_t rounded_ds[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const uint4 rounded_p =
              load_shared_128(base + Layout::kP + ds.stage * Layout::kPBytes + (k * kWarpgroup + thread()) * 16);
          const uint32_t pairs[4] = {rounded_p.x, rounded_p.y, rounded_p.z, rounded_p.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& grad = dp[2 * k + i / 4][i % 4];
            const float2 pair = Half2<T>::unpack(pairs[i / 2]);
            grad = (i % 2 == 0 ? pair.x : pair.y) * (grad - delta[k][i / 4 * 2 + i % 2]);
          }
          pack_operand<T>(rounded_ds[k], dp[2 * k], dp[2 * k + 1]);
          store_matrix(matrix_moved<DsTile>(ds_corner + ds.stage * DsTile::kBytes, k * 16), rounded_ds[k]);
        }
        barriers().p_empty(ds.stage).arrive_warp();
        barriers().do_empty(dout.stage).arrive_warp();
        fence_async_proxy();
        barriers().ds_full(ds.stage).arrive_warp();
        gradient_product(dk, rounded_ds, q_place());

        float dq[kFirstDqGroups / kDqPiece][kDqPiece][4];
        barriers().ds_full(ds.stage).wait(ds.parity);  // of the other warps
        dq_product(dq[0], ds.stage, 0);
        wgmma_wait<1>();
        fence_registers(dk);
        fence_registers(rounded_ds);
        barriers().q_empty(q.stage).arrive_warp();
        q.advance();
        dout.advance();
        const Step next = next_step();
        add_dq<false>(
            p, step, dq, 0, ds.stage, 1, [&] { issue_scores_of(next); },
            [&] { barriers().ds_empty(ds.stage).arrive_warp(); });
        fence_registers(dp);
        step = next;
        ds.advance();
      }
      barriers().k_empty(0).arrive_warp();
      scale_rows(dk, p.op.softmax_scale);
      store_gradient(p, p.op.dk, p.op.head_dim, step, dk);
      free_end();
      step = next_step();
    }
  }
};

}  // namespace flashmask::sm90
