// What one consumer warpgroup does for its 64 keys of a column tile, over all steps (row tiles); and so for one column
// tile after the other.
//
// Products are issued early and waited for late, so that the tensor cores have work while exponentials are computed
// (docs/hopper-kernel.md has the picture):
//
//   issued                     meanwhile
//   S^T = K Q^T                tell of dQ of two steps ago (d = 128)
//   dP^T = V dO^T              wait for S^T and for this warpgroup's turn; mask; P^T = exp2(S^T), rounded
//   dV += P^T dO               wait for dP^T; dS^T = P^T (dP^T - delta), rounded, to shared memory
//   dK += dS^T Q               tell of dS^T
//   dQ of the step before      wait for the next step's rows, and for all; dQ to shared memory
//
// (At d = 64 masks come before the turn, and dQ is told of under dP^T; at d = 128 dV is issued in two parts, and the
// next step's rows are waited for before dQ is issued. A step of which these 64 keys see nothing is passed over:
// pass_step. Deterministic: dQ of two steps ago goes to shared memory under S^T, and is told of under dP^T.)
//
// dQ = dS K needs the other warpgroup's dS^T. It is computed one step late, when that has long been there: so the
// warpgroups need not walk in step, and they take turns at the exponentials, one computing while the other
// multiplies.
#pragma once

#include "../cuda/element.cuh"
#include "backward_access.cuh"
#include "backward_mask.cuh"
#include "backward_row_items.cuh"
#include "store_matrix.cuh"
#include "store_rows.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flashmask::sm90 {

template <typename T, int kHeadDim, bool kDeterministic>
struct BackwardConsumer {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  using KTile = typename Layout::KTile;
  using KeyPlaces = typename Layout::KeyPlaces;
  using QTile = typename Layout::QTile;
  using DsTile = typename Layout::DsTile;
  static constexpr int kGroups = Config::kRows / 8;  // accumulator groups of S^T and dP^T
  static constexpr int kSteps = Config::kRows / 16;  // of products over the queries of a tile
  static constexpr bool kHandsOverEarly = Config::kHandsOverEarly && !kDeterministic;
  static_assert(kSteps % Config::kDvPiece == 0);
  static_assert(!Config::kPassesUnseen || !Layout::kGradientsByDs, "who passes a step does not wait for the copies");

  uint32_t base;        // address of the shared memory
  int thread_in_block;  // opaque: the compiler would read it anew in every step, which takes long
  int consumer;         // which of the warpgroups
  BackwardBarriers<kHeadDim> barriers;

  // All of this goes on from column tile to column tile.
  Ring<Config::kQStages> q;
  Ring<Config::kDoStages> dout;
  Ring<Config::kDsBuffers> ds, previous_ds{Config::kDsBuffers - 1, 1};  // of "step -1" nothing needs be waited for
  Ring<1> dq_slot;
  Ring<Config::kKeyPlaces> keys;  // place of the column tile's first keys; not used where they all have one place
  uint32_t tile_parity = 0;
  int bounds = -1;       // which intervals of keys are in use, of all that the block gets
  int first_bounds = 0;  // those of the column tile's first mask

  __device__ __forceinline__ explicit BackwardConsumer(uint32_t base)
      : base(base),
        thread_in_block(opaque(threadIdx.x)),
        consumer(uniform(threadIdx.x / kWarpgroup) - 1),
        barriers{base} {}
  __device__ __forceinline__ int thread() const { return thread_in_block % kWarpgroup; }
  __device__ __forceinline__ int lane() const { return thread_in_block % 32; }
  // Of the warp.
  __device__ __forceinline__ int first_key() const { return thread_in_block / 32 * 16 - kWarpgroup / 2; }

  // [64 keys, queries] = this warpgroup's rows of K or V times Q or dO, over the head dim.
  template <typename Keys>
  __device__ __forceinline__ void score_product(float (&scores)[kGroups][4], int k_place, int key, int q_place,
                                                int stage) {
    const uint64_t a = Keys::along_columns(base + k_place, key, 0);
    const uint64_t b = QTile::along_columns(base + q_place + stage * QTile::kBytes, 0, 0);
    fence_registers(scores);
    wgmma_begin();
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      wgmma<T, Major::kK, Major::kK>(scores, a + Keys::column_distance(column), b + QTile::column_distance(column),
                                     column > 0);
    }
    wgmma_commit();
  }

  // dK or dV += the rounded dS^T or P^T times Q or dO, over kCount * 16 queries from the `first` 16 on. Not committed.
  template <int kCount>
  __device__ __forceinline__ void gradient_product(float (&gradient)[kHeadDim / 8][4], uint32_t (&left)[kSteps][4],
                                                   int q_place, int stage, int first = 0) {
    const uint64_t b = QTile::along_rows(base + q_place + stage * QTile::kBytes, 0, 0);
#pragma unroll
    for (int step = first; step < first + kCount; ++step) fence_registers(left[step]);
    if (first == 0) fence_registers(gradient);
    wgmma_begin();
#pragma unroll
    for (int step = first; step < first + kCount; ++step) {
      wgmma<T, Major::kMN>(gradient, left[step], b + QTile::row_distance(step * 16), true);
    }
  }

  // This warpgroup's half of dQ = dS K, over all keys.
  __device__ __forceinline__ void dq_product(float (&dq)[Layout::kDqGroups][4], int buffer, const int (&key_rows)[2]) {
    const int row = Config::kSplitsDims ? 0 : consumer * 64;
    const int dim = Config::kSplitsDims ? consumer * (kHeadDim / 2) : 0;
    const uint64_t a = DsTile::along_rows(base + Layout::kDs + buffer * DsTile::kBytes, 0, row);
    const uint64_t b[2] = {KeyPlaces::along_rows(base + Layout::kK, key_rows[0], dim),
                           KeyPlaces::along_rows(base + Layout::kK, key_rows[1], dim)};
    fence_registers(dq);
    wgmma_begin();
#pragma unroll
    for (int key = 0; key < Config::kColumns; key += 16) {
      wgmma<T, Major::kMN, Major::kMN>(dq, a + DsTile::row_distance(key),
                                       b[key / 64] + KeyPlaces::row_distance(key % 64), key > 0);
    }
    wgmma_commit();
  }

  // dQ on its way out: to shared memory, and then the word to the warp that adds it to global memory. It gets the scale
  // when rows are finished. Only in the deterministic mode, where the place in shared memory is not free before the
  // turn has come, it waits in registers until the next S^T is issued. These have to be others than the product wrote,
  // so there it is scaled on the way.
  __device__ __forceinline__ void wait_for_dq_place() {
    barriers.dq_empty(consumer).wait(dq_slot.parity ^ 1);
    dq_slot.advance();
  }
  __device__ __forceinline__ void store_dq(const float (&dq)[Layout::kDqGroups][4], uint32_t place) {
#pragma unroll
    for (int n = 0; n < Layout::kDqGroups; ++n) store_shared_float4(place + n * kWarpgroup * 16, dq[n]);
  }
  __device__ __forceinline__ void hand_over_dq() {
    fence_async_proxy();
    barriers.dq_full(consumer).arrive_warp();
  }

  // Until dV and dK of this warp's keys have been read from dS^T's buffer, if they went by way of it.
  __device__ __forceinline__ void wait_gradients_read() {
    if (!Layout::kGradientsByDs) return;
    if (lane() == 0) wait_stores_read<0>();
    __syncwarp();
  }

  // Frees the intervals that came before.
  __device__ __forceinline__ void move_to_bounds(int wanted) {
    while (bounds != wanted) {
      if (bounds >= 0) barriers.bounds_empty(bounds & (kBoundsBuffers - 1)).arrive_warp();
      ++bounds;
      barriers.bounds_full(bounds & (kBoundsBuffers - 1)).wait(bounds / kBoundsBuffers & 1);
    }
  }

  __device__ __forceinline__ void begin_turn() { named_barrier_sync(kBackwardTurnBarrier + consumer, 2 * kWarpgroup); }
  __device__ __forceinline__ void end_turn() {
    named_barrier_arrive(kBackwardTurnBarrier + (consumer ^ 1), 2 * kWarpgroup);
  }

  // A column tile, whose first step has come.
  __device__ __forceinline__ void run_tile(const KernelParams& p, const BackwardMaps& maps) {
    const float masked_score = p.negative_scale ? CUDART_INF_F : -CUDART_INF_F;
    const uint32_t ds_corner = matrix_corner<DsTile>(base + Layout::kDs, first_key(), lane());
    const uint32_t dq_place = base + Layout::kDq + consumer * Layout::kDqPartFloats * 4 + thread() * 16;
    int count = 0;  // of steps
    float dq_kept[kDeterministic ? Layout::kDqGroups : 1][4];
    const auto scale_dq = [&](const auto& product, auto& scaled) {
#pragma unroll
      for (int n = 0; n < Layout::kDqGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scaled[n][i] = product[n][i] * p.op.softmax_scale;
      }
    };

    float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
    clear(dk);
    clear(dv);
    fence_registers(dk);  // before the wait, not after
    fence_registers(dv);
    // Where the keys of a warpgroup are. If each has a place, the other's are waited for only before dQ.
    const auto place_of = [&](int warpgroup) {
      if (Layout::kKeyPieces == 1) return Ring<Config::kKeyPlaces>{0, tile_parity};
      Ring<Config::kKeyPlaces> place = keys;
      if (warpgroup > 0) place.advance();
      return place;
    };
    const auto key_row = [&](int warpgroup) {
      return place_of(warpgroup).stage * Config::kPlaceKeys + (Layout::kKeyPieces == 1 ? warpgroup * 64 : 0);
    };
    const auto wait_for_keys = [&](int warpgroup) {
      barriers.k_full(place_of(warpgroup).stage).wait(place_of(warpgroup).parity);
    };
    const auto wait_for_other_keys = [&] {
      if constexpr (Layout::kKeyPieces > 1) wait_for_keys(consumer ^ 1);
    };
    const int key_rows[2] = {key_row(0), key_row(1)};
    Step step = read_step(base + Layout::kSteps + q.stage * 16);
    wait_for_keys(consumer);
    trace(Event::kKeysHere);
    const auto next_step = [&] {
      barriers.q_full(q.stage).wait(q.parity);
      return read_step(base + Layout::kSteps + q.stage * 16);
    };
    bool unseen = false;  // whether it is by these keys
    // In one branch, or the compiler takes it that a warp's lanes may part, here and everywhere.
    const auto move_on = [&] {
      if (step.tile >= 0) {
        move_to_bounds(first_bounds + step.bounds);
        unseen = step.unseen(consumer);
      }
    };
    if constexpr (Config::kPassesUnseen) {
      if (step.tile >= 0) unseen = step.unseen(consumer);  // their intervals may still be on their way
    }
    // The end of a step: the other half of its work, dQ of the step before, in the first round a product that is
    // dropped; then the next step. Calls taken() when no product is in flight any more.
    const auto finish_step = [&](const auto& taken) {
      // In the first round this multiplies whatever the shared memory holds: a branch around a product would make the
      // compiler wait for those in flight.
      float dq[Layout::kDqGroups][4];
      if (count == 1) wait_for_other_keys();
      barriers.ds_full(previous_ds.stage).wait(previous_ds.parity);
      // Everything that the next S^T needs is at hand when these products are done.
      const int q_stage = q.stage, ds_stage = previous_ds.stage;
      q.advance();
      // Asked for before the product, while shared memory is still quick to answer.
      if constexpr (Config::kPassesUnseen) step = next_step();
      dq_product(dq, previous_ds.stage, key_rows);
      previous_ds = ds;
      dout.advance();
      ds.advance();
      if constexpr (!Config::kPassesUnseen) step = next_step();
      if (!kDeterministic && count > 1) wait_for_dq_place();
      wgmma_wait<0>();
      taken();
      fence_registers(dq);
      if constexpr (kDeterministic) {
        scale_dq(dq, dq_kept);
      } else if (count > 1) {
        store_dq(dq, dq_place);
      }
      barriers.q_empty(q_stage).arrive_warp();
      if (count > 1) barriers.ds_empty(ds_stage).arrive_warp();
      if constexpr (Config::kPassesUnseen) move_on();
    };
    // A step of which these keys see nothing: only dQ of the step before, and a dS^T of zeros, which both multiply.
    const auto pass_step = [&](bool has_dq) {
      trace(Event::kStep);
      if (!has_dq) {
        barriers.v_full(consumer).wait(tile_parity);
      } else {
        if constexpr (kDeterministic) {
          wait_for_dq_place();
          store_dq(dq_kept, dq_place);
        }
        hand_over_dq();
      }
      barriers.ds_empty(ds.stage).wait(ds.parity ^ 1);
      const uint32_t zeros =
          base + Layout::kDs + ds.stage * DsTile::kBytes + first_key() * DsTile::kRowBytes + lane() * 16;
#pragma unroll
      for (int panel = 0; panel < DsTile::kPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < 16 * DsTile::kRowBytes / 512; ++i) {
          store_shared_128(zeros + panel * DsTile::kPanelBytes + i * 512, make_uint4(0, 0, 0, 0));
        }
      }
      fence_async_proxy();
      barriers.ds_full(ds.stage).arrive_warp();
      barriers.do_full(dout.stage).wait(dout.parity);  // else it could be freed before it is there
      barriers.do_empty(dout.stage).arrive_warp();
      begin_turn();
      end_turn();
      finish_step([] {});
    };
    // Nothing is in flight from one round to the next, and nothing that a product wrote is used in the next but dK and
    // dV: the compiler would serialise the products, or wait for all of them.
    while (true) {
      while (step.tile >= 0 && !unseen) {
        trace(Event::kStep);
        const bool partial = step.partial(consumer);
        const bool has_dq = count >= 2;
        ++count;

        float scores[kGroups][4], dp[kGroups][4];
        score_product<KeyPlaces>(scores, Layout::kK, key_row(consumer), Layout::kQ, q.stage);
        if (!has_dq) {
          barriers.v_full(consumer).wait(tile_parity);
          if constexpr (Config::kPassesUnseen) move_to_bounds(first_bounds + step.bounds);
        } else if constexpr (kDeterministic) {
          wait_for_dq_place();
          store_dq(dq_kept, dq_place);
        }
        if (kHandsOverEarly && has_dq) hand_over_dq();
        barriers.do_full(dout.stage).wait(dout.parity);
        score_product<KTile>(dp, Layout::kV, consumer * 64, Layout::kDo, dout.stage);
        if (!kHandsOverEarly && has_dq) hand_over_dq();

        // Statistics of 16 rows come at a time, each some products or exponentials before it is needed: shared memory,
        // which the products read too, is slow to answer. Where P^T stays in float32, delta takes the registers of lse.
        constexpr int kLseAhead = Config::kRoundedP ? 2 : kSteps, kDeltaAhead = Config::kRoundedP ? 2 : kSteps;
        float lse[kSteps][4], delta[kSteps][4];
        const uint32_t lse_place = base + Layout::kLse + q.stage * Config::kRows * 4 + lane() % 4 * 16;
        const uint32_t delta_place = base + Layout::kDelta + dout.stage * Config::kRows * 4 + lane() % 4 * 16;
#pragma unroll
        for (int k = 0; k < kLseAhead; ++k) load_shared_float4(lse[k], lse_place + k * 64);
        if constexpr (!Config::kPassesUnseen) move_to_bounds(first_bounds + step.bounds);

        wgmma_wait<1>();
        fence_registers(scores);
        if constexpr (Config::kTurnIncludesDs) begin_turn();
        if (partial) {
          mask_scores(scores, base + Layout::kBounds + (bounds & (kBoundsBuffers - 1)) * Layout::kBoundsBytes,
                      first_key() + lane() / 4, step.row_tile() * Config::kRows, lane(), masked_score);
        }
        if constexpr (!Config::kTurnIncludesDs) begin_turn();
        uint32_t rounded_p[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (k + kLseAhead < kSteps) load_shared_float4(lse[k + kLseAhead], lse_place + (k + kLseAhead) * 64);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& score = scores[2 * k + i / 4][i % 4];
            score = exp2_fast(score * p.signed_scale_log2 - lse[k][i / 4 * 2 + i % 2]);
          }
          pack_operand<T>(rounded_p[k], scores[2 * k], scores[2 * k + 1]);
          if constexpr (!Config::kRoundedP) load_shared_float4(delta[k], delta_place + k * 64);
          // Every few exponentials, so that the tensor cores need not wait for the last.
          if (k % Config::kDvPiece == Config::kDvPiece - 1) {
            gradient_product<Config::kDvPiece>(dv, rounded_p, Layout::kDo, dout.stage, k + 1 - Config::kDvPiece);
          }
        }
        wgmma_commit();
        if constexpr (!Config::kTurnIncludesDs) end_turn();

        if constexpr (Config::kRoundedP) {
#pragma unroll
          for (int k = 0; k < kDeltaAhead; ++k) load_shared_float4(delta[k], delta_place + k * 64);
        }
        barriers.ds_empty(ds.stage).wait(ds.parity ^ 1);
        if (count == 1) wait_gradients_read();
        wgmma_wait<1>();
        fence_registers(dp);
        uint32_t rounded_ds[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (k + kDeltaAhead < kSteps)
            load_shared_float4(delta[k + kDeltaAhead], delta_place + (k + kDeltaAhead) * 64);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int n = 2 * k + i / 4;
            dp[n][i % 4] = probability(scores, rounded_p, n, i % 4) * (dp[n][i % 4] - delta[k][i / 4 * 2 + i % 2]);
          }
          pack_operand<T>(rounded_ds[k], dp[2 * k], dp[2 * k + 1]);
          store_matrix(matrix_moved<DsTile>(ds_corner + ds.stage * DsTile::kBytes, k * 16), rounded_ds[k]);
        }
        if constexpr (Config::kTurnIncludesDs) end_turn();
        gradient_product<kSteps>(dk, rounded_ds, Layout::kQ, q.stage);
        wgmma_commit();
        // The fence waits until dS^T is stored; the tensor cores have work by now, and nobody wants dS^T before the
        // next step.
        fence_async_proxy();
        barriers.ds_full(ds.stage).arrive_warp();

        wgmma_wait<1>();
        fence_registers(dv);
        fence_registers(rounded_p);
        barriers.do_empty(dout.stage).arrive_warp();

        finish_step([&] {
          fence_registers(dk);
          fence_registers(rounded_ds);
        });
      }
      if (step.tile < 0) {
        trace(Event::kStep);
        move_to_bounds(first_bounds + step.bounds);
        break;
      }
      if constexpr (Config::kPassesUnseen) {
        ++count;
        pass_step(count > 2);
      }
    }
    barriers.q_empty(q.stage).arrive_warp();
    q.advance();

    // The last dQ; after no steps at all again a product that is dropped. dV and dK leave meanwhile, straight from
    // registers or by the buffer of dS^T that is not at work (multiplied long ago by all), so that V and K are free for
    // the next column tile.
    if (count == 0) {
      barriers.v_full(consumer).wait(tile_parity);
      wait_for_other_keys();
      wait_gradients_read();
    }
    barriers.v_empty(consumer).arrive_warp();
    if (!kDeterministic && count > 1) hand_over_dq();  // now, as dS^T of the other keys has to be waited for
    float dq[Layout::kDqGroups][4];
    barriers.ds_full(previous_ds.stage).wait(previous_ds.parity);
    dq_product(dq, previous_ds.stage, key_rows);
    if constexpr (kDeterministic) {
      if (count > 1) {
        wait_for_dq_place();
        store_dq(dq_kept, dq_place);
        hand_over_dq();
      }
    }
    const int batch = step.batch_head / p.op.heads_k, head = step.batch_head % p.op.heads_k;
    // A warp's 16 keys of dV (panel 0) or dK (1) to the buffer that the next dS^T will take.
    const auto gradient_to_panel = [&](int panel, const auto& gradient) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        uint32_t rounded[4];
        pack_operand<T>(rounded, gradient[n], gradient[n + 1]);
        store_matrix(matrix_moved<DsTile>(ds_corner + ds.stage * DsTile::kBytes, panel * DsTile::kPanel + n * 8),
                     rounded);
      }
    };
    const auto store_gradient_rows = [&](const FlashmaskTensor& tensor, int dims, const auto& gradient) {
      store_rows<T>(tensor, batch, head, step.mask + first_key(), p.op.seqlen_k, dims, gradient, lane());
    };
    if constexpr (Layout::kGradientsByDs) {
      barriers.ds_empty(ds.stage).wait(ds.parity ^ 1);
      gradient_to_panel(0, dv);
    } else {
      store_gradient_rows(p.op.dv, p.op.head_dim_v, dv);
    }
    wgmma_wait<0>();
    fence_registers(dq);
    for (int piece = 0; piece < Layout::kKeyPieces; ++piece) barriers.k_empty(place_of(piece).stage).arrive_warp();
    if (count > 0) barriers.ds_empty(previous_ds.stage).arrive_warp();
    scale_rows(dk, p.op.softmax_scale);
    if constexpr (Layout::kGradientsByDs) {
      gradient_to_panel(1, dk);
      const int key = uniform(first_key());
      fence_async_proxy();
      __syncwarp();
      if (lane() == 0) {
        const uint32_t place = base + Layout::kDs + ds.stage * DsTile::kBytes + key * DsTile::kRowBytes;
        store_box(maps.dv, place, 0, step.mask + key, head, batch, kEvictFirst);
        store_box(maps.dk, place + DsTile::kPanelBytes, 0, step.mask + key, head, batch, kEvictFirst);
        commit_stores();
      }
    } else {
      store_gradient_rows(p.op.dk, p.op.head_dim, dk);
    }
    if (count > 0) {
      if constexpr (kDeterministic) scale_dq(dq, dq);
      wait_for_dq_place();
      store_dq(dq, dq_place);
      hand_over_dq();
    }
    trace(Event::kColumnTileEnd);
    tile_parity ^= 1;
    if constexpr (Layout::kKeyPieces > 1) {
      for (int piece = 0; piece < Layout::kKeyPieces; ++piece) keys.advance();
    }
    first_bounds = bounds + 1;
  }

  // All column tiles of the block, and its row items.
  __device__ __forceinline__ void run(const KernelParams& p, const BackwardMaps& maps) {
    if (consumer == 1) end_turn();  // so the other comes first
    while (true) {
      barriers.q_full(q.stage).wait(q.parity);
      const Step step = read_step(base + Layout::kSteps + q.stage * 16);
      const int what = uniform(step.tile);
      if (what == Step::kEndOfWork) break;
      if (what == Step::kPrepareRows) {
        trace(Event::kPrepareRows);
        RowItem<T, kHeadDim>(p, base, step).prepare(&q, &dout);
        trace(Event::kRowItemEnd);
      } else if (what == Step::kFinishRows) {
        trace(Event::kFinishRows);
        RowItem<T, kHeadDim>(p, base, step).finish(&q, &dout);
        trace(Event::kRowItemEnd);
      } else {
        trace(Event::kColumnTile);
        run_tile(p, maps);
      }
    }
    wait_gradients_read();            // the shared memory must outlive the copies
    if (consumer == 0) begin_turn();  // every end of a turn has met its beginning
  }

 private:
  // Element i of group n of P^T.
  static __device__ __forceinline__ float probability(const float (&exact)[kGroups][4],
                                                      const uint32_t (&rounded)[kSteps][4], int n, int i) {
    if constexpr (Config::kRoundedP) {
      const float2 pair = Half2<T>::unpack(rounded[n / 2][n % 2 * 2 + i / 2]);
      return i % 2 == 0 ? pair.x : pair.y;
    } else {
      return exact[n][i];
    }
  }
};

}  // namespace flashmask::sm90
