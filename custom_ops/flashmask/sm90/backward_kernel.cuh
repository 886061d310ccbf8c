// Backward for Hopper: persistent blocks take one column tile of a key head after the other, over the query heads of
// its group and their active row tiles. Up to 128 dims they prepare and finish rows in between; above rows have kernels
// of their own.
//
// A producer warpgroup moves tiles by TMA, two consumer warpgroups compute. Scores are computed transposed,
// S^T = K Q^T: keys are then on the M axis of the accumulators, so P^T and dS^T become register operands of
// dV += P^T dO and dK += dS^T Q as they are. dQ = dS K needs all of dS^T, which goes through shared memory, and leaves
// by additions in float32. With query heads of a group taken one after the other, dK and dV of grouped heads need
// neither atomics nor extra memory.
#pragma once

#include <algorithm>

#include "../cuda/launch.h"
#include "../cuda/launch_kernel.cuh"
#include "../cuda/multiprocessors.h"
#include "backward_keys.cuh"
#include "backward_mainloop.cuh"
#include "backward_producer.cuh"
#include "backward_rows.cuh"
#include "backward_turns.cuh"
#include "backward_wide.cuh"
#include "backward_wide_keys.cuh"
#include "tensor_map.h"

namespace flashmask::sm90 {

template <typename T, int kHeadDim, bool kDeterministic>
__global__ void __launch_bounds__(BackwardConfig<kHeadDim>::kThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ BackwardMaps maps) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  extern __shared__ __align__(1024) char raw[];
  const uint32_t base = shared_address(raw);
  // A block starts with 168 registers a thread; what the producers give up, no more, goes to the consumers.
  constexpr int kStartRegisters = 168, kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + Config::kConsumers * kConsumerRegisters <=
                (1 + Config::kConsumers) * kStartRegisters);

  if (threadIdx.x == 0) {
    // Warps that bring rows, take dQ away or manage turns.
    constexpr int kSlotReaders = Config::kWide && !kDeterministic ? 1 : 1 + Config::kConsumers;
    BackwardBarriers<kHeadDim>{base}.init(kSlotReaders);
  } else if (threadIdx.x == 32) {
    for (const CUtensorMap* map : {&maps.k, &maps.v, &maps.q, &maps.dout}) prefetch_map(*map);
    if constexpr (!Config::kWide) prefetch_map(maps.out);
  }
  __syncthreads();

  const int warp = uniform(threadIdx.x / 32);
  if (warp < kWarpgroup / 32) {
    shrink_registers<kProducerRegisters>();
    if constexpr (Config::kWide) {
      if (warp == 0) {
        bring_wide_rows<kHeadDim>(p, maps, base);
      } else if (warp <= Config::kConsumers) {
        if constexpr (kDeterministic) {
          manage_turns<kHeadDim>(p, base, warp - 1);
        } else {
          work_on_rows<T, kHeadDim>(p, base);
        }
      } else {
        bring_wide_keys<kHeadDim>(p, maps, base);
      }
    } else if (warp == 0) {
      WorkBringer<kHeadDim>{p, maps, base}.run();
    } else if (warp <= Config::kConsumers) {
      take_dq_away<kHeadDim, kDeterministic>(p, base, warp - 1);
    } else {
      bring_keys<kHeadDim>(p, maps, base);
    }
  } else {
    grow_registers<kConsumerRegisters>();
    if constexpr (Config::kWide) {
      WideConsumer<T, kHeadDim, kDeterministic> consumer(base);
      if (warp < 2 * kWarpgroup / 32) {
        consumer.make_p(p);
      } else {
        consumer.make_ds(p);
      }
    } else {
      BackwardConsumer<T, kHeadDim, kDeterministic>(base).run(p, maps);
    }
  }
}

template <typename T, int kHeadDim>
TileShape backward_tile_shape(int) {
  return {BackwardConfig<kHeadDim>::kRows, BackwardConfig<kHeadDim>::kColumns};
}

template <int kHeadDim>
cudaError_t make_backward_maps(const FlashmaskParams& op, BackwardMaps* maps) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  cudaError_t status = cudaSuccess;
  const auto make = [&](CUtensorMap* map, const FlashmaskTensor& tensor, int64_t seqlen, int heads, int dim, int rows,
                        int panel) {
    if (status == cudaSuccess) {
      status = make_tensor_map(map, tensor, op.dtype, op.batch, seqlen, heads, dim, rows, panel);
    }
  };
  constexpr int kPanelK = Layout::KTile::kPanel, kPanelQ = Layout::QTile::kPanel;
  make(&maps->k, op.k, op.seqlen_k, op.heads_k, op.head_dim, Config::kPlaceKeys, kPanelK);
  make(&maps->v, op.v, op.seqlen_k, op.heads_k, op.head_dim_v, 64, kPanelK);
  if constexpr (Layout::kGradientsByDs) {
    make(&maps->dk, op.dk, op.seqlen_k, op.heads_k, op.head_dim, 16, kPanelK);
    make(&maps->dv, op.dv, op.seqlen_k, op.heads_k, op.head_dim_v, 16, kPanelK);
  }
  make(&maps->q, op.q, op.seqlen_q, op.heads_q, op.head_dim, Config::kRows, kPanelQ);
  make(&maps->dout, op.dout, op.seqlen_q, op.heads_q, op.head_dim_v, Config::kRows, kPanelQ);
  make(&maps->out, op.out, op.seqlen_q, op.heads_q, op.head_dim_v, Config::kRows, kPanelQ);
  return status;
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_kernel(const KernelParams& p, int blocks, cudaStream_t stream) {
  using Layout = BackwardLayout<kHeadDim>;
  BackwardMaps maps;
  const cudaError_t status = make_backward_maps<kHeadDim>(p.op, &maps);
  if (status != cudaSuccess) return status;
  const auto kernel = p.turns != nullptr ? backward_kernel<T, kHeadDim, true> : backward_kernel<T, kHeadDim, false>;
  return launch_kernel(kernel, blocks, Layout::Config::kThreads, Layout::kBytes, stream, p, maps);
}

// Rows as work of the same kernel.
template <typename T, int kHeadDim>
cudaError_t launch_with_row_items(KernelParams p, cudaStream_t stream) {
  const int heads_k = p.op.batch * p.op.heads_k, heads_q = p.op.batch * p.op.heads_q;
  if (p.turns == nullptr) {
    // The fewer heads, the shorter rows stay prepared before they are wanted.
    const int enough = (kColumnTilesOfGroup + p.lists.column_tiles - 1) / p.lists.column_tiles;
    p.groups = make_head_groups(heads_k, std::min(p.groups.each, enough), p.groups.of_last);
  }
  p.row_items = (p.lists.row_tiles + kRowTilesPerItem - 1) / kRowTilesPerItem;
  p.key_head_row_items = p.op.heads_q / p.op.heads_k * p.row_items;
  int blocks = p.column_works + 2 * heads_q * p.row_items;
  const cudaError_t status = limit_to_multiprocessors(&blocks);
  if (status != cudaSuccess) return status;
  // Rows are prepared as long before their column tiles as every block takes for two of those, or for a row item where
  // they are short: nobody waits for them, and they are in the L2 cache still, if there is room.
  const int64_t spare =
      (static_cast<int64_t>(blocks) * 2 * p.key_head_row_items + p.lists.column_tiles - 1) / p.lists.column_tiles;
  const auto order = [&](const HeadGroups& groups) {
    return make_work_order(p.lists.column_tiles, p.key_head_row_items, heads_k, groups, spare);
  };
  p.order = order(p.groups);
  if (p.active_tiles != nullptr) p.sparse_order = order(p.sparse_groups);
  // So many row items behind what is prepared, all column tiles were handed out, and every block had two since: their
  // sums are mostly there. With few heads, before.
  const auto behind = [&](const WorkOrder& order, const HeadGroups& groups) {
    return order.ahead + static_cast<int64_t>(groups.each) * p.key_head_row_items + spare;
  };
  int64_t first = behind(p.order, p.groups);
  if (p.active_tiles != nullptr) first = std::max(first, behind(p.sparse_order, p.sparse_groups));
  p.first_with_claim = static_cast<int32_t>(std::min(first, static_cast<int64_t>(heads_k) * p.key_head_row_items / 2));
  return launch_backward_kernel<T, kHeadDim>(p, blocks, stream);
}

// Between kernels for rows.
template <typename T, int kHeadDim>
cudaError_t launch_with_row_kernels(const KernelParams& p, cudaStream_t stream) {
  cudaError_t status = launch_prepare_rows<T, kHeadDim>(p, stream);
  int blocks = p.column_works;
  if (status == cudaSuccess) status = limit_to_multiprocessors(&blocks);
  if (status == cudaSuccess) status = launch_backward_kernel<T, kHeadDim>(p, blocks, stream);
  return status == cudaSuccess ? launch_finish_rows<T, kHeadDim>(p, stream) : status;
}

template <typename T, int kHeadDim>
cudaError_t launch_backward(const KernelParams& p, int, cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(p.work_counter, 0, p.counters * sizeof(int32_t), stream);
  if (status != cudaSuccess) return status;
  if constexpr (BackwardConfig<kHeadDim>::kWide) {
    return launch_with_row_kernels<T, kHeadDim>(p, stream);
  } else {
    return launch_with_row_items<T, kHeadDim>(p, stream);
  }
}

}  // namespace flashmask::sm90
