// A kernel launch as a function call.
#pragma once

#include <cuda_runtime.h>

namespace flashmask {

// `shared_bytes` of dynamic shared memory: what a block may have on the device, not only the 48 KiB it has unasked.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace flashmask
