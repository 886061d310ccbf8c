// The size of a persistent grid.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

namespace flashmask {

// At most one block a multiprocessor.
inline cudaError_t limit_to_multiprocessors(int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) *blocks = std::min(*blocks, multiprocessors);
  return status;
}

}  // namespace flashmask
