// What the backward pass does per query row: before (delta, lse, zeroed dQ; and the work counter) and after (sums of
// dQ, scaled, to their storage type). Above 128 dims, or where there are no keys; else backward_row_items.cuh.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/launch_kernel.cuh"
#include "backward_config.cuh"

namespace flashmask::sm90 {

constexpr int kRowThreads = 256;

// Lanes of a row, 16 bytes of out and dout each; a power of two.
template <int kHeadDim>
constexpr int kRowLanes = kHeadDim <= 64    ? 8
                          : kHeadDim <= 128 ? 16
                                            : 32;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads) prepare_rows_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kLanes = kRowLanes<kHeadDim>;
  constexpr int kRowsPerBlock = kRowThreads / kLanes;
  const FlashmaskParams& op = p.op;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.work_counter = 0;  // of the kernel that follows
  const int blocks_per_head = p.padded_rows / kRowsPerBlock;
  const int batch_head = blockIdx.x / blocks_per_head;
  const int batch = batch_head / op.heads_q, head = batch_head - batch * op.heads_q;
  const int first_row = (blockIdx.x - batch_head * blocks_per_head) * kRowsPerBlock;
  const int row = first_row + threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;

  uint4 out = make_uint4(0, 0, 0, 0), dout = out;
  if (row < op.seqlen_q && column < op.head_dim_v) {
    out = *reinterpret_cast<const uint4*>(head_pointer<T>(op.out, batch, head, row) + column);
    dout = *reinterpret_cast<const uint4*>(head_pointer<T>(op.dout, batch, head, row) + column);
  }
  float* zeroed = p.dq_accumulator + (static_cast<int64_t>(batch_head) * p.padded_rows + first_row) * kHeadDim;
#pragma unroll
  for (int i = threadIdx.x; i < kRowsPerBlock * kHeadDim / 4; i += kRowThreads) {
    reinterpret_cast<float4*>(zeroed)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  const uint32_t left[4] = {out.x, out.y, out.z, out.w}, right[4] = {dout.x, dout.y, dout.z, dout.w};
  float delta = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = Half2<T>::unpack(left[i]), y = Half2<T>::unpack(right[i]);
    delta += x.x * y.x + x.y * y.y;
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(kAllLanes, delta, distance);
  if (column == 0) {
    // +inf turns every weight of the row into an exact zero.
    float lse = CUDART_INF_F;
    if (row < op.seqlen_q) {
      const float natural = op.lse[static_cast<int64_t>(batch_head) * op.seqlen_q + row];
      if (natural != -CUDART_INF_F) lse = natural * CUDART_L2E_F;
    }
    const int64_t index = static_cast<int64_t>(batch_head) * p.padded_rows + row_place(row);
    p.query_lse[index] = lse;
    p.query_delta[index] = delta;
  }
}

// One thread per (rows r and r + 8, 8 columns): the fragments of four lanes become two 16-byte pieces.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads) finish_rows_kernel(const __grid_constant__ KernelParams p) {
  using Layout = BackwardLayout<kHeadDim>;
  using Config = typename Layout::Config;
  constexpr int kChunks = kHeadDim / 8;
  const FlashmaskParams& op = p.op;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int chunk = item % kChunks;  // neighbours write neighbouring columns
  const int64_t pair = item / kChunks;
  const int pairs_per_head = p.padded_rows / 2;
  const int batch_head = pair / pairs_per_head;
  const int in_head = pair - static_cast<int64_t>(batch_head) * pairs_per_head;
  const int g = in_head % 8, slab = in_head / 8;  // of 16 rows, one warp's
  const int row = slab * 16 + g;
  const int batch = batch_head / op.heads_q, head = batch_head - batch * op.heads_q;
  if (batch >= op.batch || row >= op.seqlen_q || chunk * 8 >= op.head_dim) return;

  const int tile = slab / (Config::kRows / 16), warp = slab % 4;
  const int part = Config::kSplitsDims ? 0 : slab / 4 % Config::kConsumers;
  const float* fragments = p.dq_accumulator +
                           (static_cast<int64_t>(batch_head) * p.padded_rows + tile * Config::kRows) * kHeadDim +
                           part * Layout::kDqPartFloats + (chunk * kWarpgroup + warp * 32 + g * 4) * 4;
  const auto scaled = [&](float sum) { return sum * op.softmax_scale + 0.0f; };  // no zero is negative
  uint32_t upper[4], lower[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 c = reinterpret_cast<const float4*>(fragments)[t];
    upper[t] = Half2<T>::pack(scaled(c.x), scaled(c.y));
    lower[t] = Half2<T>::pack(scaled(c.z), scaled(c.w));
  }
  T* dq = head_pointer<T>(op.dq, batch, head, row) + chunk * 8;
  *reinterpret_cast<uint4*>(dq) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
  if (row + 8 < op.seqlen_q) {
    *reinterpret_cast<uint4*>(dq + 8 * op.dq.seq_stride) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_prepare_rows(const KernelParams& p, cudaStream_t stream) {
  const int64_t lanes = static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.padded_rows * kRowLanes<kHeadDim>;
  if (lanes == 0) return cudaMemsetAsync(p.work_counter, 0, sizeof(int32_t), stream);
  return launch_kernel(prepare_rows_kernel<T, kHeadDim>, static_cast<unsigned>(lanes / kRowThreads), kRowThreads, 0,
                       stream, p);
}

template <typename T, int kHeadDim>
cudaError_t launch_finish_rows(const KernelParams& p, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.padded_rows / 2 * (kHeadDim / 8);
  if (items == 0) return cudaSuccess;
  return launch_kernel(finish_rows_kernel<T, kHeadDim>, static_cast<unsigned>((items + kRowThreads - 1) / kRowThreads),
                       kRowThreads, 0, stream, p);
}

}  // namespace flashmask::sm90
