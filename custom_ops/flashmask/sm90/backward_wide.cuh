// Backward consumers above 128 dims, where dK and dV of 64 keys fill the registers of a warpgroup each: the two
// warpgroups share the keys and divide the work by kind.
//
//   make_p:  S^T = K Q^T, mask, P^T = exp2(S^T) -> shared memory, dV += P^T dO, last dims of dQ (one step late)
//   make_ds: dP^T = V dO^T, dS^T = P^T (dP^T - delta) -> shared memory, dK += dS^T Q, first 128 dims of dQ
//
// Each product so has the full width of a tile, which reads the least shared memory for it, and the exponentials of
// one warpgroup run under the products of the other. There is no room to collect dQ in shared memory: it is added to
// global memory straight from registers.
#pragma once

#include "../cuda/element.cuh"
#include "backward_access.cuh"
#include "backward_mask.cuh"
#include "backward_work.cuh"
#include "global_memory.cuh"
#include "store_matrix.cuh"
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
  static constexpr int kFirstDqGroups = 16;          // of dQ, by make_ds; the rest is make_p's
  static_assert(Config::kColumns == 64 && Config::kRows == 64);

  uint32_t base;  // address of the shared memory

  __device__ __forceinline__ BackwardBarriers<kHeadDim> barriers() const { return {base}; }
  __device__ __forceinline__ static int thread() { return threadIdx.x % kWarpgroup; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp_key() { return threadIdx.x / 32 % 4 * 16; }

  // S^T or dP^T: all of K or V times a tile of Q or dO.
  __device__ __forceinline__ void score_product(float (&scores)[kGroups][4], uint32_t k_place, uint32_t q_place) const {
    const uint64_t a = KTile::along_columns(base + k_place, 0, 0), b = QTile::along_columns(base + q_place, 0, 0);
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
  __device__ __forceinline__ Step next_step(const Ring<Config::kQStages>& q) const {
    barriers().q_full(q.stage).wait(q.parity);
    return read_step(base + Layout::kSteps + q.stage * 16);
  }
  // dV or dK += P^T or dS^T times a tile of dO or Q.
  __device__ __forceinline__ void gradient_product(float (&gradient)[kHeadDim / 8][4], uint32_t (&left)[kSteps][4],
                                                   uint32_t q_place) const {
    const uint64_t b = QTile::along_rows(base + q_place, 0, 0);
    fence_registers(left);
    fence_registers(gradient);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<T, Major::kMN>(gradient, left[k], b + QTile::row_distance(k * 16), true);
    wgmma_commit();
  }
  // Dims from `dim` of dQ = dS K.
  template <int kDqGroups>
  __device__ __forceinline__ void dq_product(float (&dq)[kDqGroups][4], int buffer, int dim) const {
    const uint64_t a = DsTile::along_rows(base + Layout::kDs + buffer * DsTile::kBytes, 0, 0);
    const uint64_t b = KTile::along_rows(base + Layout::kK, 0, dim);
    fence_registers(dq);
    wgmma_begin();
#pragma unroll
    for (int key = 0; key < Config::kColumns; key += 16) {
      wgmma<T, Major::kMN, Major::kMN>(dq, a + DsTile::row_distance(key), b + KTile::row_distance(key), key > 0);
    }
    wgmma_commit();
  }
  // To global memory, without the scale. In the deterministic mode when the producer warp says so (backward_turns.cuh),
  // who then hears that it is done: `parity` is that of the step's number, so of its buffer of dS.
  template <int kDqGroups>
  __device__ __forceinline__ void add_dq(const KernelParams& p, const Step& step, const float (&dq)[kDqGroups][4],
                                         int first_group, int consumer, int parity) const {
    static_assert(Config::kDsBuffers == 2);
    const int tile = step.tile >> 1;
    float* rows = p.dq_accumulator +
                  (static_cast<int64_t>(step.batch_head) * p.padded_rows + tile * Config::kRows) * kHeadDim +
                  (first_group * kWarpgroup + thread()) * 4;
    if constexpr (kDeterministic) barriers().dq_empty(consumer).wait(parity);
#pragma unroll
    for (int n = 0; n < kDqGroups; ++n) add_fragment(rows + n * kWarpgroup * 4, dq[n]);
    if constexpr (kDeterministic) barriers().dq_full(consumer).arrive_warp();
  }

  __device__ __forceinline__ void make_p(const KernelParams& p, float (&dv)[kHeadDim / 8][4]) const {
    constexpr int kDqGroups = kHeadDim / 8 - kFirstDqGroups;
    const float masked_score = p.negative_scale ? CUDART_INF_F : -CUDART_INF_F;
    const uint32_t intervals = base + Layout::kBounds;
    int bounds = -1;  // which of the column tile's masks the intervals are of
    const auto move_to_bounds = [&](int wanted) {
      while (bounds != wanted) {
        if (bounds >= 0) barriers().bounds_empty(0).arrive_warp();
        ++bounds;
        barriers().bounds_full(0).wait(bounds & 1);
      }
    };
    Ring<Config::kQStages> q;
    Ring<Config::kDoStages> dout;
    Ring<Config::kDsBuffers> ds, previous_ds{Config::kDsBuffers - 1, 1};  // of "step -1" nothing needs be waited for
    Step previous{-1, 0, 0, 0};

    clear(dv);
    barriers().k_full(0).wait(0);
    Step step = next_step(q);
    while (true) {
      if (step.tile < 0) {
        move_to_bounds(step.bounds);  // all that will be brought is taken
        break;
      }
      const bool partial = step.tile & 1;

      float scores[kGroups][4];
      score_product(scores, Layout::kK, Layout::kQ + q.stage * QTile::kBytes);
      float lse[kSteps][4];
      const uint32_t lse_place = base + Layout::kLse + q.stage * Config::kRows * 4 + lane() % 4 * 16;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_shared_float4(lse[k], lse_place + k * 64);
      if (partial) move_to_bounds(step.bounds);
      wgmma_wait<0>();
      fence_registers(scores);
      if (partial) {
        mask_scores(scores, intervals, warp_key() + lane() / 4, (step.tile >> 1) * Config::kRows, lane(), masked_score);
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
      gradient_product(dv, rounded_p, Layout::kDo + dout.stage * QTile::kBytes);
      // In the first round a product of whatever the shared memory holds, which is dropped.
      float dq[kDqGroups][4];
      barriers().ds_full(previous_ds.stage).wait(previous_ds.parity);
      dq_product(dq, previous_ds.stage, kFirstDqGroups * 8);
      wgmma_wait<1>();
      fence_registers(dv);
      fence_registers(rounded_p);
      barriers().do_empty(dout.stage).arrive_warp();
      q.advance();
      const Step next = next_step(q);
      wgmma_wait<0>();
      fence_registers(dq);
      if (previous.tile >= 0) {
        barriers().ds_empty(previous_ds.stage).arrive_warp();
        add_dq(p, previous, dq, kFirstDqGroups, 0, previous_ds.stage);
      }
      previous = step;
      step = next;
      previous_ds = ds;
      dout.advance();
      ds.advance();
    }
    if (previous.tile < 0) return;
    float dq[kDqGroups][4];
    barriers().ds_full(previous_ds.stage).wait(previous_ds.parity);
    dq_product(dq, previous_ds.stage, kFirstDqGroups * 8);
    wgmma_wait<0>();
    fence_registers(dq);
    add_dq(p, previous, dq, kFirstDqGroups, 0, previous_ds.stage);
  }

  __device__ __forceinline__ void make_ds(const KernelParams& p, float (&dk)[kHeadDim / 8][4]) const {
    const uint32_t ds_corner = matrix_corner<DsTile>(base + Layout::kDs, warp_key(), lane());
    Ring<Config::kQStages> q;
    Ring<Config::kDoStages> dout;
    Ring<Config::kDsBuffers> ds;

    clear(dk);
    barriers().k_full(0).wait(0);
    barriers().v_full(0).wait(0);
    Step step = next_step(q);
    while (step.tile >= 0) {
      float dp[kGroups][4];
      barriers().do_full(dout.stage).wait(dout.parity);
      score_product(dp, Layout::kV, Layout::kDo + dout.stage * QTile::kBytes);
      float delta[kSteps][4];
      const uint32_t delta_place = base + Layout::kDelta + dout.stage * Config::kRows * 4 + lane() % 4 * 16;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_shared_float4(delta[k], delta_place + k * 64);
      barriers().p_full(ds.stage).wait(ds.parity);
      barriers().ds_empty(ds.stage).wait(ds.parity ^ 1);
      wgmma_wait<0>();
      fence_registers(dp);
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
      gradient_product(dk, rounded_ds, Layout::kQ + q.stage * QTile::kBytes);

      float dq[kFirstDqGroups][4];
      barriers().ds_full(ds.stage).wait(ds.parity);  // of the other warps
      dq_product(dq, ds.stage, 0);
      wgmma_wait<1>();
      fence_registers(dk);
      fence_registers(rounded_ds);
      barriers().q_empty(q.stage).arrive_warp();
      q.advance();
      const Step next = next_step(q);
      wgmma_wait<0>();
      fence_registers(dq);
      barriers().ds_empty(ds.stage).arrive_warp();
      add_dq(p, step, dq, 0, 1, ds.stage);
      step = next;
      dout.advance();
      ds.advance();
    }
  }
};

}  // namespace flashmask::sm90
