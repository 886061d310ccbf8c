// Portable vectors of 16 bytes: SSE2 on x86-64, NEON on Arm, plain code elsewhere.
#define FLASHMASK_ISA isa_portable
#define FLASHMASK_VECTOR_BYTES 16
#include "kernel_table.h"

namespace flashmask {

const CpuKernels& portable_kernels() {
  static constexpr CpuKernels kernels = isa_portable::make_kernels("portable");
  return kernels;
}

}  // namespace flashmask
