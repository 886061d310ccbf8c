// The C interface of the emulated library, and the CUDA runtime that its host code calls.
#include <stdio.h>
#include <string.h>

#include <string>

#include "cuda/cuda_backend.h"  // of custom_ops/flashmask
#include "machine.h"
#include "toolkit/cuda.h"
#include "toolkit/cuda_runtime.h"

// Dynamic shared memory is used by its address only; the name has to exist.
namespace flashmask::sm90 {
alignas(1024) thread_local char raw[1024];
}

namespace {

int multiprocessors = 1;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64;
  if (rank != 4 || reinterpret_cast<uintptr_t>(data) % 16 != 0 || box[0] * 2 != swizzle_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {
      static_cast<char*>(data),           {}, {2, 0, 0, 0}, static_cast<int32_t>(box[0]), static_cast<int32_t>(box[1]),
      static_cast<int32_t>(swizzle_bytes)};
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] == 0 || sizes[i] > (uint64_t{1} << 32) || box[i] == 0 || box[i] > 256 || steps[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map->sizes[i] = static_cast<int64_t>(sizes[i]);
  }
  for (int i = 0; i < 3; ++i) {
    if (strides[i] % 16 != 0 || strides[i] == 0 || strides[i] >= (uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i + 1] = static_cast<int64_t>(strides[i]);
  }
  return box[2] == 1 && box[3] == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, nullptr};  // as the real one says of any host memory
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute_of_device(attribute, multiprocessors, 90);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
  memset(destination, value, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::last_error() : "error of the emulated runtime";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }  // each call returns its own
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

extern "C" {

__attribute__((visibility("default"))) int64_t emulator_workspace_bytes(const FlashmaskParams* params, int backward) {
  return backward ? flashmask::cuda_backward_workspace_bytes(*params)
                  : flashmask::cuda_forward_workspace_bytes(*params);
}

// All pointers of `params` are to memory of the host. Returns a FlashmaskStatus; `message` takes the error.
__attribute__((visibility("default"))) int emulator_run(const FlashmaskParams* params, int backward, uint64_t seed,
                                                        int blocks_at_once, int fault, int fault_index, int races,
                                                        char* message, int message_bytes) {
  multiprocessors = blocks_at_once;
  emulator::Options options;
  options.seed = seed;
  options.multiprocessors = blocks_at_once;
  options.fault = static_cast<emulator::Fault>(fault);
  options.fault_index = fault_index;
  options.races = static_cast<emulator::Races>(races);
  emulator::configure(options);
  std::string error;
  const FlashmaskStatus status =
      backward ? flashmask::cuda_backward(*params, &error) : flashmask::cuda_forward(*params, &error);
  snprintf(message, message_bytes, "%s", error.c_str());
  return status;
}
}
