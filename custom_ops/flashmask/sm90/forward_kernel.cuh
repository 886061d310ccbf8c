// Forward on Hopper: a persistent block of one producer warpgroup and two to four consumer warpgroups. The parts are
// in the forward_*.cuh files; docs/hopper-kernel.md shows how they work together.
#pragma once

#include "../cuda/launch.h"
#include "../cuda/launch_kernel.cuh"
#include "../cuda/multiprocessors.h"
#include "forward_consumer.cuh"
#include "tensor_map.h"

namespace flashmask::sm90 {

template <typename T, typename Layout>
__global__ void __launch_bounds__(Layout::Config::kThreads, 1)
    forward_kernel(const __grid_constant__ KernelParams p, const __grid_constant__ ForwardMaps maps) {
  using Config = typename Layout::Config;
  extern __shared__ __align__(1024) char raw[];  // what the swizzle pattern wants
  const uint32_t shared = shared_address(raw);
  if (shared % 1024 != 0) __trap();
  const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
  const int warp = uniform(thread / 32), lane = thread % 32;

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Config::kConsumers * 4;
    // Filled by one lane, emptied by whole warps.
    const auto init = [&](int full, int empty, int count, int empty_warps) {
      for (int i = 0; i < count; ++i) Barrier{shared + full + i * 8}.init(1);
      for (int i = 0; i < count; ++i) Barrier{shared + empty + i * 8}.init_warps(empty_warps);
    };
    init(Layout::kQFull, Layout::kQEmpty, Config::kQPlaces, 4);
    init(Layout::kKFull, Layout::kKEmpty, Config::kStages, kConsumerWarps);
    init(Layout::kVFull, Layout::kVEmpty, Config::kStages, kConsumerWarps);
    for (int i = 0; i < Config::kMaskStages; ++i) {
      Barrier{shared + Layout::kMaskFull + i * 8}.init_warps(Config::kMaskWarps);
    }
    for (int i = 0; i < Config::kMaskStages; ++i) {
      Barrier{shared + Layout::kMaskEmpty + i * 8}.init_warps(kConsumerWarps);
    }
    init(Layout::kWorkFull, Layout::kWorkEmpty, Config::kWorkStages, kConsumerWarps);
    init(Layout::kOrderFull, Layout::kOrderEmpty, Config::kOrderStages, 1 + Config::kMaskWarps);
    publish_barriers();
  }
  __syncthreads();

  if (warpgroup == 0) {
    shrink_registers<Config::kProducerRegisters>();
    static_assert(2 + Config::kMaskWarps <= 4);
    if (warp == 0) {
      schedule<Layout>(p, shared, lane);
    } else if (warp == 1) {
      load_tiles<Layout>(p, maps, shared, lane);
    } else if (warp - 2 < Config::kMaskWarps) {
      make_masks<Layout>(p, shared, warp - 2, lane);
    }
  } else {
    grow_registers<Config::kConsumerRegisters>();
    consume<T, Layout>(p, maps, shared, warpgroup - 1, thread);
    if (thread == 0) wait_stores<0>();
  }
}

template <typename T, int kHeadDim>
TileShape forward_tile_shape(int) {
  // The lists are made for the rows of one warpgroup and the parts of a column tile: each skips what only its
  // neighbours see.
  return TileShape{kRowsPerWarpgroup, ForwardConfig<kHeadDim>::kPartColumns};
}

template <typename T, typename Layout>
cudaError_t launch_forward_of(const KernelParams& p, cudaStream_t stream) {
  using Config = typename Layout::Config;
  const FlashmaskParams& op = p.op;
  ForwardMaps maps;
  const auto make = [&](CUtensorMap* map, const FlashmaskTensor& tensor, int seqlen, int heads, int dim, int box_rows) {
    return make_tensor_map(map, tensor, op.dtype, op.batch, seqlen, heads, dim, box_rows, Layout::QTile::kPanel);
  };
  cudaError_t status = make(&maps.q, op.q, op.seqlen_q, op.heads_q, op.head_dim, kRowsPerWarpgroup);
  if (status == cudaSuccess) status = make(&maps.k, op.k, op.seqlen_k, op.heads_k, op.head_dim, Config::kColumns);
  if (status == cudaSuccess) status = make(&maps.v, op.v, op.seqlen_k, op.heads_k, op.head_dim_v, Config::kColumns);
  if (status == cudaSuccess)
    status = make(&maps.out, op.out, op.seqlen_q, op.heads_q, op.head_dim_v, kRowsPerWarpgroup);
  if (status != cudaSuccess) return status;

  int blocks = forward_row_tiles<Config::kConsumers>(p) * op.batch * op.heads_q;
  status = limit_to_multiprocessors(&blocks);
  if (status != cudaSuccess) return status;
  status = cudaMemsetAsync(p.work_counter, 0, sizeof(int32_t), stream);
  if (status != cudaSuccess) return status;
  return launch_kernel(forward_kernel<T, Layout>, blocks, Config::kThreads, Layout::kBytes, stream, p, maps);
}

template <typename T, int kHeadDim>
cudaError_t launch_forward(const KernelParams& p, int, cudaStream_t stream) {
  if constexpr (kHasUnmasked<kHeadDim>) {
    const FlashmaskParams& op = p.op;
    if (op.num_bounds == 0 && op.block_mask == nullptr && !op.causal) {
      return launch_forward_of<T, ForwardLayout<kHeadDim, UnmaskedConfig<kHeadDim>>>(p, stream);
    }
  }
  return launch_forward_of<T, ForwardLayout<kHeadDim, ForwardConfig<kHeadDim>>>(p, stream);
}

}  // namespace flashmask::sm90
