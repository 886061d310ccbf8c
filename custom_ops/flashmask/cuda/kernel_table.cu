// The kernels that this library was built with. built_kernels.inc is written by cuda.cmake.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#ifdef FLASHMASK_WITH_SM90  // older toolkits know no tensor maps
#include "../sm90/limits.h"
#include "../sm90/tensor_map.h"
#endif

namespace flashmask {

namespace sm80 {
bool forward_takes(const FlashmaskParams&) { return true; }
bool backward_takes(const FlashmaskParams&) { return true; }
}  // namespace sm80

#ifdef FLASHMASK_WITH_SM90
namespace sm90 {
// Dropout is left to the portable kernels: its Philox draws cost more than the products that it would go with.
bool forward_takes(const FlashmaskParams& op) {
  return op.dropout == 0 && op.seqlen_k <= kMaxKeys && find_encoder() != nullptr &&
         tma_can_read(op.q, op.batch, op.seqlen_q, op.heads_q) &&
         tma_can_read(op.k, op.batch, op.seqlen_k, op.heads_k) &&
         tma_can_read(op.v, op.batch, op.seqlen_k, op.heads_k) &&
         tma_can_read(op.out, op.batch, op.seqlen_q, op.heads_q);
}
bool backward_takes(const FlashmaskParams& op) {
  return forward_takes(op) && tma_can_read(op.dout, op.batch, op.seqlen_q, op.heads_q) &&
         tma_can_read(op.dk, op.batch, op.seqlen_k, op.heads_k) &&
         tma_can_read(op.dv, op.batch, op.seqlen_k, op.heads_k);
}
}  // namespace sm90
#endif

#define FLASHMASK_FORWARD(arch, min_capability, max_capability, dtype, type, head_dim) \
  {#arch,                                                                              \
   Direction::kForward,                                                                \
   dtype,                                                                              \
   head_dim,                                                                           \
   min_capability,                                                                     \
   max_capability,                                                                     \
   arch::forward_takes,                                                                \
   arch::forward_tile_shape<type, head_dim>,                                           \
   arch::launch_forward<type, head_dim>},
#define FLASHMASK_BACKWARD(arch, min_capability, max_capability, dtype, type, head_dim) \
  {#arch,                                                                               \
   Direction::kBackward,                                                                \
   dtype,                                                                               \
   head_dim,                                                                            \
   min_capability,                                                                      \
   max_capability,                                                                      \
   arch::backward_takes,                                                                \
   arch::backward_tile_shape<type, head_dim>,                                           \
   arch::launch_backward<type, head_dim>},

const Kernel kKernels[] = {
#include "built_kernels.inc"
};
const int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace flashmask
