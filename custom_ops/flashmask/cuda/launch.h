// Launch functions of the CUDA kernels. The attention kernels are instantiated one head dim x dtype x direction per
// translation unit; kernel_table.cu lists those that were built.
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

// The kernels of one dtype and compiled head dim; head dims below it are padded on the way into shared memory.
struct KernelSet {
  int32_t dtype;  // FlashmaskDtype
  int32_t head_dim;
  int32_t min_capability, max_capability;  // 10 * major + minor of the devices that it runs on
  ShapeFunction forward_shape, backward_shape;
  LaunchFunction forward, backward;
};

// What this library was built with, best first: the first set that fits the head dim, dtype and device is taken.
extern const KernelSet kKernelSets[];
extern const int kKernelSetCount;

namespace sm80 {

template <typename T, int kHeadDim>
TileShape forward_tile_shape(int shared_limit);
template <typename T, int kHeadDim>
cudaError_t launch_forward(const KernelParams& params, int shared_limit, cudaStream_t stream);

template <typename T, int kHeadDim>
TileShape backward_tile_shape(int shared_limit);
template <typename T, int kHeadDim>
cudaError_t launch_backward(const KernelParams& params, int shared_limit, cudaStream_t stream);

}  // namespace sm80
}  // namespace flashmask
