// Small helpers shared by the attention kernels.
#pragma once

#include <math_constants.h>

#include "instructions.cuh"
#include "kernel_params.h"
#include "tile_lists.cuh"

namespace flashmask {

template <typename T>
__device__ __forceinline__ T* head_pointer(const FlashmaskTensor& tensor, int batch, int head, int64_t row) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride +
         row * tensor.seq_stride;
}

template <typename T, int N>
__device__ __forceinline__ void clear(T (&values)[N]) {
  for (T& value : values) value = 0;
}
template <typename T, int N, int M>
__device__ __forceinline__ void clear(T (&values)[N][M]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < M; ++j) values[i][j] = 0;
  }
}
template <typename T, int N, int M, int L>
__device__ __forceinline__ void clear(T (&values)[N][M][L]) {
#pragma unroll
  for (int i = 0; i < N; ++i) clear(values[i]);
}

// The accumulators of two neighbouring 16x8 tiles, rounded: the A operand of a product over their 16 columns.
template <typename T>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = Half2<T>::pack(left[0], left[1]);
  a[1] = Half2<T>::pack(left[2], left[3]);
  a[2] = Half2<T>::pack(right[0], right[1]);
  a[3] = Half2<T>::pack(right[2], right[3]);
}

}  // namespace flashmask
