// Launch functions of the CUDA kernels. The attention kernels are instantiated one architecture x head dim x dtype x
// direction per translation unit; kernel_table.cu lists those that were built.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel_params.h"

namespace flashmask {

// Rows x columns of the tiles that a kernel works on.
struct TileShape {
  int32_t rows;
  int32_t columns;
};

cudaError_t launch_tile_lists(const KernelParams& params, cudaStream_t stream);

// `shared_limit`: bytes of shared memory that one block of the device may have. Tile shapes may depend on it.
using ShapeFunction = TileShape (*)(int shared_limit);
using LaunchFunction = cudaError_t (*)(const KernelParams& params, int shared_limit, cudaStream_t stream);

enum class Direction { kForward, kBackward };

// A max_capability: the driver compiles the kernel's PTX for all newer devices.
constexpr int32_t kAllNewer = 9999;

// One architecture x direction x dtype x compiled head dim; head dims below it are padded on the way into shared
// memory.
struct Kernel {
  const char* arch;  // folder that it lives in; FLASHMASK_FORCE_ARCH names it
  Direction direction;
  int32_t dtype;  // FlashmaskDtype
  int32_t head_dim;
  int32_t min_capability, max_capability;    // 10 * major + minor of the devices that it has code for
  bool (*takes)(const FlashmaskParams& op);  // whether it does all that this call asks for
  ShapeFunction shape;
  LaunchFunction launch;
};

// What this library was built with, best first: the first that fits the call and the device is taken.
extern const Kernel kKernels[];
extern const int kKernelCount;

#define FLASHMASK_DECLARE_KERNELS(arch)                                                           \
  namespace arch {                                                                                \
  bool forward_takes(const FlashmaskParams& op);                                                  \
  bool backward_takes(const FlashmaskParams& op);                                                 \
  template <typename T, int kHeadDim>                                                             \
  TileShape forward_tile_shape(int shared_limit);                                                 \
  template <typename T, int kHeadDim>                                                             \
  TileShape backward_tile_shape(int shared_limit);                                                \
  template <typename T, int kHeadDim>                                                             \
  cudaError_t launch_forward(const KernelParams& params, int shared_limit, cudaStream_t stream);  \
  template <typename T, int kHeadDim>                                                             \
  cudaError_t launch_backward(const KernelParams& params, int shared_limit, cudaStream_t stream); \
  }
FLASHMASK_DECLARE_KERNELS(sm80)
FLASHMASK_DECLARE_KERNELS(sm90)
#undef FLASHMASK_DECLARE_KERNELS

}  // namespace flashmask
