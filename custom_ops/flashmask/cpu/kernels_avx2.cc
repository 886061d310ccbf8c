// AVX2 and FMA.
#define FLASHMASK_ISA isa_avx2
#define FLASHMASK_VECTOR_BYTES 32
#include "kernel_table.h"

namespace flashmask {

const CpuKernels& avx2_kernels() {
  static constexpr CpuKernels kernels = isa_avx2::make_kernels("avx2");
  return kernels;
}

}  // namespace flashmask
