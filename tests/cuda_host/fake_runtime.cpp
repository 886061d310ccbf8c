// A CUDA runtime without a device, and kernels that do nothing but launch, for the host side of the CUDA kernels. The
// test says which device it is and which call fails. As in the real runtime, an error stays the thread's last one until
// cudaGetLastError() takes it away, and a launch reports that one, whoever made it.
#include <stdint.h>
#include <string.h>

#include <string>

#include "cpu/cpu_backend.h"  // of custom_ops/flashmask
#include "cuda/launch.h"
#include "toolkit/cuda.h"  // of tests/emulator
#include "toolkit/cuda_bf16.h"

namespace {

int capability = 90;
int device_of_memory = 0;
std::string failing_call;
cudaError_t failure = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t call(const char* name) {
  if (failing_call != name) return cudaSuccess;
  failing_call.clear();
  last_error = failure;
  return failure;
}

cudaError_t launch(const char* name) {
  call(name);
  return cudaGetLastError();
}

CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return call("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute_of_device(attribute, 1, capability);
  return call("cudaDeviceGetAttribute");
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, device_of_memory, nullptr, nullptr};
  return call("cudaPointerGetAttributes");
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return call("cudaMemsetAsync"); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == failure ? "the planted error" : "another error";
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return call("cudaGetDriverEntryPoint");
}

namespace flashmask {

cudaError_t launch_tile_lists(const KernelParams&, cudaStream_t) { return launch("tile lists"); }

#define FAKE_KERNELS(arch, type, head_dim)                                              \
  namespace arch {                                                                      \
  template <>                                                                           \
  TileShape forward_tile_shape<type, head_dim>(int) {                                   \
    return {128, 128};                                                                  \
  }                                                                                     \
  template <>                                                                           \
  TileShape backward_tile_shape<type, head_dim>(int) {                                  \
    return {128, 128};                                                                  \
  }                                                                                     \
  template <>                                                                           \
  cudaError_t launch_forward<type, head_dim>(const KernelParams&, int, cudaStream_t) {  \
    return launch("forward");                                                           \
  }                                                                                     \
  template <>                                                                           \
  cudaError_t launch_backward<type, head_dim>(const KernelParams&, int, cudaStream_t) { \
    return launch("backward");                                                          \
  }                                                                                     \
  }
FAKE_KERNELS(sm80, __nv_bfloat16, 64)
FAKE_KERNELS(sm80, __nv_bfloat16, 128)
FAKE_KERNELS(sm90, __nv_bfloat16, 64)

// The other backend of api.cc, which these tests do not call.
FlashmaskStatus cpu_forward(const FlashmaskParams&, std::string*) { return FLASHMASK_NOT_BUILT; }
FlashmaskStatus cpu_backward(const FlashmaskParams&, std::string*) { return FLASHMASK_NOT_BUILT; }
int64_t cpu_forward_workspace_bytes(const FlashmaskParams&) { return 0; }
int64_t cpu_backward_workspace_bytes(const FlashmaskParams&) { return 0; }
const char* cpu_best_isa() { return "none"; }
FlashmaskStatus cpu_kernel_name(const FlashmaskParams&, std::string*, std::string*) { return FLASHMASK_NOT_BUILT; }

}  // namespace flashmask

extern "C" {

__attribute__((visibility("default"))) void fake_device(int compute_capability) { capability = compute_capability; }
// Which device all memory is of; the current one is 0.
__attribute__((visibility("default"))) void fake_memory(int device) { device_of_memory = device; }
// The next call of this name fails.
__attribute__((visibility("default"))) void fake_failure(const char* name, int error) {
  failing_call = name;
  failure = static_cast<cudaError_t>(error);
}
__attribute__((visibility("default"))) int fake_last_error() { return last_error; }
}
