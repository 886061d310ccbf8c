// What the backward pass does per query row: before (delta, lse, zeroed dQ), after (dQ to its storage type), and the
// turns on dQ in the deterministic mode.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/launch_kernel.cuh"
#include "ptx.cuh"

namespace flashmask::sm80 {

constexpr int kRowsPerBlock = 16;

// One block per 16 rows of one head, 16 lanes a row.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256) prepare_rows_kernel(const __grid_constant__ KernelParams p) {
  const FlashmaskParams& op = p.op;
  const int blocks_per_head = p.padded_rows / kRowsPerBlock;
  const int batch_head = blockIdx.x / blocks_per_head;
  const int batch = batch_head / op.heads_q, head = batch_head - batch * op.heads_q;
  const int first_row = (blockIdx.x - batch_head * blocks_per_head) * kRowsPerBlock;
  const int row = first_row + threadIdx.x / 16, lane = threadIdx.x % 16;

  float* zeroed = p.dq_accumulator + (static_cast<int64_t>(batch_head) * p.padded_rows + first_row) * kHeadDim;
  for (int i = threadIdx.x; i < kRowsPerBlock * kHeadDim / 4; i += 256) {
    reinterpret_cast<float4*>(zeroed)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  float delta = 0.0f;
  if (row < op.seqlen_q) {
    const T* out = head_pointer<T>(op.out, batch, head, row);
    const T* dout = head_pointer<T>(op.dout, batch, head, row);
#pragma unroll
    for (int chunk = lane; chunk < kHeadDim / 8; chunk += 16) {
      if (chunk * 8 < op.head_dim_v) {
        const uint4 a = *reinterpret_cast<const uint4*>(out + chunk * 8);
        const uint4 b = *reinterpret_cast<const uint4*>(dout + chunk * 8);
        const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = Half2<T>::unpack(left[i]), y = Half2<T>::unpack(right[i]);
          delta += x.x * y.x + x.y * y.y;
        }
      }
    }
  }
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) delta += __shfl_xor_sync(kAllLanes, delta, distance);
  if (lane == 0) {
    // +inf turns every weight of the row into an exact zero.
    float lse = CUDART_INF_F;
    if (row < op.seqlen_q) {
      const float natural = op.lse[static_cast<int64_t>(batch_head) * op.seqlen_q + row];
      if (natural != -CUDART_INF_F) lse = natural * CUDART_L2E_F;
    }
    const int64_t index = static_cast<int64_t>(batch_head) * p.padded_rows + row;
    p.query_lse[index] = lse;
    p.query_delta[index] = delta;
  }
}

// One thread per (row pair r and r + 8, 8 columns): 64 bytes of accumulator fragments become two 16-byte pieces.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256) finish_rows_kernel(const __grid_constant__ KernelParams p) {
  const FlashmaskParams& op = p.op;
  constexpr int kColumnTiles = kHeadDim / 8;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t total = static_cast<int64_t>(op.batch) * op.heads_q * p.padded_rows / 16 * kColumnTiles * 8;
  if (item >= total) return;
  const int column_tile = item % kColumnTiles;  // neighbours write neighbouring columns
  const int64_t rest = item / kColumnTiles;
  const int g = rest % 8;
  const int64_t row_tile = rest / 8;  // of 16 rows, over all heads
  const int tiles_per_head = p.padded_rows / 16;
  const int batch_head = row_tile / tiles_per_head;
  const int row = (row_tile - static_cast<int64_t>(batch_head) * tiles_per_head) * 16 + g;
  const int batch = batch_head / op.heads_q, head = batch_head - batch * op.heads_q;
  if (column_tile * 8 >= op.head_dim) return;

  const float* tile = p.dq_accumulator + (row_tile * kColumnTiles + column_tile) * 128;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + h * 8 < op.seqlen_q) {
      uint32_t packed[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        packed[t] = Half2<T>::pack(tile[accumulator_offset(g * 4 + t, h * 2)] * op.softmax_scale,
                                   tile[accumulator_offset(g * 4 + t, h * 2 + 1)] * op.softmax_scale);
      }
      *reinterpret_cast<uint4*>(head_pointer<T>(op.dq, batch, head, row + h * 8) + column_tile * 8) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_prepare_rows(const KernelParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(p.op.batch) * p.op.heads_q * (p.padded_rows / kRowsPerBlock);
  return launch_kernel(prepare_rows_kernel<T, kHeadDim>, static_cast<unsigned>(blocks), 256, 0, stream, p);
}

template <typename T, int kHeadDim>
cudaError_t launch_finish_rows(const KernelParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.padded_rows / 16 * kHeadDim;
  return launch_kernel(finish_rows_kernel<T, kHeadDim>, static_cast<unsigned>((items + 255) / 256), 256, 0, stream, p);
}

// Waits until all later column tiles that touch this row tile have added their part of dQ.
template <int kTileRows, int kTileColumns>
__device__ __forceinline__ void wait_for_turn(const KernelParams& p, const int32_t* turn, int64_t mask_index,
                                              int row_tile, int column_tile, int thread) {
  if (thread < 32) {
    const int lane = thread;
    int before = 0;
    for (int index = lane + column_tile / 32; index < p.lists.column_words; index += 32) {
      uint32_t active =
          p.lists.by_row != nullptr
              ? p.lists.by_row[(mask_index * p.lists.row_tiles + row_tile) * p.lists.column_words + index].active
              : columns_of_row_tile<kTileRows, kTileColumns>(p, row_tile).word(index).active;
      if (index == column_tile / 32) active &= ~low_bits(column_tile % 32 + 1);
      before += __popc(active);
    }
    before = __reduce_add_sync(kAllLanes, before);
    if (lane == 0) wait_for_count(turn, before);
  }
  __syncthreads();
}

__device__ __forceinline__ void pass_turn(int32_t* turn, int thread) {
  __threadfence();
  __syncthreads();
  if (thread == 0) count_up(turn);
}

}  // namespace flashmask::sm80
