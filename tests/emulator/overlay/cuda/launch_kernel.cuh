// cuda/launch_kernel.cuh for the emulated machine.
#pragma once

#include <cuda_runtime.h>

namespace flashmask {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t,
                          const Arguments&... arguments) {
  const bool done = emulator::launch([&] { kernel(arguments...); }, blocks.x, blocks.y, threads, shared_bytes);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace flashmask
