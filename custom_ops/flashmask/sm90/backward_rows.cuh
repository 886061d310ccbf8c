// What the backward pass above 128 dims does per query row, in kernels before (delta, lse) and after (sums of dQ,
// scaled, to their storage type, unless that was done meanwhile). Up to 128 dims: backward_row_items.cuh.
#pragma once

#include "../cuda/element.cuh"
#include "../cuda/launch_kernel.cuh"
#include "backward_work.cuh"
#include "store_rows.cuh"

namespace flashmask::sm90 {

constexpr int kRowThreads = 256;
constexpr int kRowsPerThread = 4;  // to prepare: their loads are in flight together
constexpr int kRowLanes = 32;      // 16 bytes of out and dout each
constexpr int kSlabRows = 16;      // of a warp's fragments

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads) prepare_rows_kernel(const __grid_constant__ KernelParams p) {
  static_assert(kHeadDim <= kRowLanes * 8);
  constexpr int kTogether = kRowThreads / kRowLanes;  // rows
  constexpr int kRowsPerBlock = kTogether * kRowsPerThread;
  const FlashmaskParams& op = p.op;
  const int blocks_per_head = p.padded_rows / kRowsPerBlock;
  const int batch_head = blockIdx.x / blocks_per_head;
  const int batch = batch_head / op.heads_q, head = batch_head - batch * op.heads_q;
  const int first_row = (blockIdx.x - batch_head * blocks_per_head) * kRowsPerBlock;
  const int thread_row = first_row + threadIdx.x / kRowLanes, column = threadIdx.x % kRowLanes * 8;

  uint4 out[kRowsPerThread], dout[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int row = thread_row + i * kTogether;
    out[i] = dout[i] = make_uint4(0, 0, 0, 0);
    if (row < op.seqlen_q && column < op.head_dim_v) {
      out[i] = *reinterpret_cast<const uint4*>(head_pointer<T>(op.out, batch, head, row) + column);
      dout[i] = *reinterpret_cast<const uint4*>(head_pointer<T>(op.dout, batch, head, row) + column);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int row = thread_row + i * kTogether;
    const uint32_t left[4] = {out[i].x, out[i].y, out[i].z, out[i].w};
    const uint32_t right[4] = {dout[i].x, dout[i].y, dout[i].z, dout[i].w};
    float delta = 0.0f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 x = Half2<T>::unpack(left[n]), y = Half2<T>::unpack(right[n]);
      delta += x.x * y.x + x.y * y.y;
    }
#pragma unroll
    for (int distance = kRowLanes / 2; distance > 0; distance /= 2)
      delta += __shfl_xor_sync(kAllLanes, delta, distance);
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
}

// For a whole warp: 16 rows, number `slab` of a head; zeros if there are no sums. The lane that added a fragment loads
// it again; four of them at a time, and with kAhead, which takes registers, the next ones are on their way while these
// leave.
template <typename T, int kHeadDim, bool kAhead>
__device__ __forceinline__ void finish_slab(const KernelParams& p, int batch_head, int slab, bool has_sums) {
  using Config = BackwardConfig<kHeadDim>;
  static_assert(Config::kWide && Config::kRows == kSlabRows * 4);
  constexpr int kGroups = kHeadDim / 8, kTogether = 4;
  static_assert(kGroups % kTogether == 0);
  const int lane = threadIdx.x % 32, warp = slab % 4, tile = slab / (Config::kRows / kSlabRows);
  const float* sums = p.dq_accumulator +
                      (static_cast<int64_t>(batch_head) * p.padded_rows + tile * Config::kRows) * kHeadDim +
                      (warp * 32 + lane) * 4;
  float4 fragments[kTogether];
  const auto load = [&](int group) {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      fragments[n] = *reinterpret_cast<const float4*>(sums + (group + n) * kWarpgroup * 4);
    }
  };
  if (kAhead) load(0);
  const int batch = batch_head / p.op.heads_q, head = batch_head - batch * p.op.heads_q;
  const int row = slab * kSlabRows + lane / 4;
  T* place = head_pointer<T>(p.op.dq, batch, head, row) + lane % 4 * 8;
#pragma unroll 1
  for (int group = 0; group < kGroups; group += kTogether) {
    if (!kAhead) load(group);
    // No zero is negative.
    const auto scaled = [&](float sum) { return has_sums ? sum * p.op.softmax_scale + 0.0f : 0.0f; };
    uint32_t words[2][kTogether];  // of two rows
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      words[0][n] = Half2<T>::pack(scaled(fragments[n].x), scaled(fragments[n].y));
      words[1][n] = Half2<T>::pack(scaled(fragments[n].z), scaled(fragments[n].w));
    }
    if (kAhead && group + kTogether < kGroups) load(group + kTogether);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      transpose_quad(words[r], lane);
      if (row + r * 8 < p.op.seqlen_q && (group + lane % 4) * 8 < p.op.head_dim) {
        store_global_128(place + r * 8 * p.op.dq.seq_stride + group * 8, words[r]);
      }
    }
  }
}

// One warp a slab.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads) finish_rows_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kSlabs = BackwardConfig<kHeadDim>::kRows / kSlabRows;  // of a row tile
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const int64_t row_tile = number / kSlabs;
  if (row_tile >= static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.lists.row_tiles) return;
  // With turns, how many have added; else how many warps' rows are finished.
  const int32_t state = *sums_state(p, row_tile, 0);
  const bool meanwhile = has_rows_meanwhile<kHeadDim>(p);
  if (meanwhile && state == kSlabs) return;
  const int batch_head = row_tile / p.lists.row_tiles;
  const int slab = number - static_cast<int64_t>(batch_head) * p.lists.row_tiles * kSlabs;
  if (slab * kSlabRows < p.op.seqlen_q) finish_slab<T, kHeadDim, true>(p, batch_head, slab, meanwhile || state > 0);
}

template <typename T, int kHeadDim>
cudaError_t launch_prepare_rows(const KernelParams& p, cudaStream_t stream) {
  const int64_t lanes = static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.padded_rows * kRowLanes;
  static_assert(128 % (kRowsPerThread * kRowThreads / kRowLanes) == 0);  // of which padded rows are a multiple
  return launch_kernel(prepare_rows_kernel<T, kHeadDim>, static_cast<unsigned>(lanes / kRowThreads / kRowsPerThread),
                       kRowThreads, 0, stream, p);
}

template <typename T, int kHeadDim>
cudaError_t launch_finish_rows(const KernelParams& p, cudaStream_t stream) {
  constexpr int kSlabs = BackwardConfig<kHeadDim>::kRows / kSlabRows, kWarps = kRowThreads / 32;
  const int64_t slabs = static_cast<int64_t>(p.op.batch) * p.op.heads_q * p.lists.row_tiles * kSlabs;
  return launch_kernel(finish_rows_kernel<T, kHeadDim>, static_cast<unsigned>((slabs + kWarps - 1) / kWarps),
                       kRowThreads, 0, stream, p);
}

}  // namespace flashmask::sm90
