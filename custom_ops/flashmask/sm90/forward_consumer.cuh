// A consumer warpgroup of the forward kernel: 64 rows of Q against all active column tiles.
//
// S = Q K^T of the next tile and O += P V of this one are issued together; the softmax of the next tile then runs while
// P V still does. The warpgroups take turns in issuing, so that one's softmax hides under the other's products.
#pragma once

#include "../cuda/element.cuh"
#include "forward_epilogue.cuh"
#include "forward_producer.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace flashmask::sm90 {

// Named barriers: 0 is __syncthreads.
constexpr int kTurnBarrier = 1;  // one for each consumer warpgroup

// Whose turn it is to issue products.
template <int kConsumers>
struct Turn {
  int warpgroup;
  __device__ __forceinline__ void start() const {
    if (warpgroup == kConsumers - 1) pass();
  }
  __device__ __forceinline__ void wait() const { named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const {
    const int next = warpgroup + 1 == kConsumers ? 0 : warpgroup + 1;
    named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroup);
  }
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume(const KernelParams& p, const ForwardMaps& maps, uint32_t shared, int warpgroup,
                                        int thread) {
  using Layout = ForwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  using KTile = typename Layout::KTile;
  constexpr int kScoreGroups = Config::kColumns / 8, kSteps = Config::kColumns / 16;
  const int lane = thread % 32, warp = warpgroup * 4 + thread / 32;
  const Turn<Config::kConsumers> turn{warpgroup};
  turn.start();

  Ring<Config::kStages> k_ring, v_ring;
  Ring<Config::kMaskStages> mask_ring;
  Ring<Config::kWorkStages> work_ring;
  uint32_t q_parity = 0;
  const auto release = [&](int barrier) {
    __syncwarp();
    if (lane == 0) Barrier{shared + barrier}.arrive();
  };

  while (true) {
    const ForwardWork work = read_work<kHeadDim>(shared, &work_ring, lane);
    if (work.row_tile < 0) break;
    float output[kHeadDim / 8][4];
    clear(output);
    OnlineSoftmax softmax;

    if (work.has_tiles) {
      float scores[kScoreGroups][4];
      uint32_t weights[kSteps][4];
      uint32_t info;  // of the tile that K holds next
      bool last;      // of the tile that scores hold

      const auto wait_k = [&] {
        Barrier{shared + Layout::kKFull + k_ring.stage * 8}.wait(k_ring.parity);
        info = load_shared_32(shared + Layout::kTileInfo + k_ring.stage * 4);
      };
      const auto issue_scores = [&] {
        const uint32_t k = shared + Layout::kK + k_ring.stage * KTile::kBytes;
#pragma unroll
        for (int d = 0; d < kHeadDim; d += 16) {
          wgmma<T, Major::kK, Major::kK>(scores, QTile::along_columns(shared + Layout::kQ, warpgroup * 64, d),
                                         KTile::along_columns(k, 0, d), d > 0);
        }
        wgmma_commit();
      };
      const auto issue_output = [&] {
        const uint32_t v = shared + Layout::kV + v_ring.stage * KTile::kBytes;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          wgmma<T, Major::kMN>(output, weights[step], KTile::along_rows(v, step * 16, 0), 1);
        }
        wgmma_commit();
      };
      // After the scores have come: frees K, and Q after the last; masks. Returns whether to rescale the output.
      const auto scores_to_weights = [&] {
        fence_registers(scores);
        last = info & kTileLast;
        release(Layout::kKEmpty + k_ring.stage * 8);
        k_ring.advance();
        if (!Config::kOutputInQuery && last) release(Layout::kQEmpty);
        if (p.negative_scale) {
          // The maximum is that of the raw scores, so it is their sign that changes.
#pragma unroll
          for (int n = 0; n < kScoreGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[n][i] = -scores[n][i];
          }
        }
        if (info & kTilePartial) {
          Barrier{shared + Layout::kMaskFull + mask_ring.stage * 8}.wait(mask_ring.parity);
          apply_mask<kHeadDim>(scores, shared + Layout::kMask + mask_ring.stage * Layout::kMaskBytes, warp, lane);
          release(Layout::kMaskEmpty + mask_ring.stage * 8);
          mask_ring.advance();
        }
        const bool grown = softmax.update_max(scores, p.scale_log2);
        softmax.exponentiate(scores, p.scale_log2);
        // The exponentials belong here, while P V runs. Without a loop between them, the assembler puts them behind the
        // wait for P V.
        fence_registers(scores);
        if (!last) wait_k();
        return grown;
      };
      const auto pack_weights = [&] {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          pack_operand<T>(weights[step], scores[step * 2], scores[step * 2 + 1]);
        }
      };

      Barrier{shared + Layout::kQFull}.wait(q_parity);
      q_parity ^= 1;
      wait_k();
      turn.wait();
      fence_registers(scores);
      wgmma_begin();
      issue_scores();
      turn.pass();
      wgmma_wait<0>();
      scores_to_weights();  // nothing to rescale yet
      pack_weights();

      while (!last) {
        turn.wait();
        fence_registers(scores);
        fence_registers(weights);
        fence_registers(output);
        wgmma_begin();
        issue_scores();
        Barrier{shared + Layout::kVFull + v_ring.stage * 8}.wait(v_ring.parity);
        wgmma_begin();
        issue_output();
        turn.pass();
        wgmma_wait<1>();
        const bool grown = scores_to_weights();
        wgmma_wait<0>();
        fence_registers(output);
        release(Layout::kVEmpty + v_ring.stage * 8);
        v_ring.advance();
        if (grown) rescale(output, softmax.factor);
        pack_weights();
      }
      Barrier{shared + Layout::kVFull + v_ring.stage * 8}.wait(v_ring.parity);
      fence_registers(weights);
      fence_registers(output);
      wgmma_begin();
      issue_output();
      wgmma_wait<0>();
      fence_registers(output);
      release(Layout::kVEmpty + v_ring.stage * 8);
      v_ring.advance();
    }

    write_output<T, kHeadDim>(p, maps.out, shared, work, output, softmax, warpgroup, thread);
    if (Config::kOutputInQuery && work.has_tiles) release(Layout::kQEmpty);
  }
}

}  // namespace flashmask::sm90
