// The kernels that this library was built with. built_kernels.inc is written by cuda.cmake.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace flashmask {

#define FLASHMASK_SM80_KERNELS(dtype, type, head_dim) \
  {dtype,                                             \
   head_dim,                                          \
   80,                                                \
   9999,                                              \
   sm80::forward_tile_shape<type, head_dim>,          \
   sm80::backward_tile_shape<type, head_dim>,         \
   sm80::launch_forward<type, head_dim>,              \
   sm80::launch_backward<type, head_dim>},

const KernelSet kKernelSets[] = {
#include "built_kernels.inc"
};
const int kKernelSetCount = sizeof(kKernelSets) / sizeof(kKernelSets[0]);

}  // namespace flashmask
