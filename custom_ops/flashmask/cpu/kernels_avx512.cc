// AVX-512 (F, BW, DQ, VL).
#define FLASHMASK_ISA isa_avx512
#define FLASHMASK_VECTOR_BYTES 64
#include "kernel_table.h"

namespace flashmask {

const CpuKernels& avx512_kernels() {
  static constexpr CpuKernels kernels = isa_avx512::make_kernels("avx512");
  return kernels;
}

}  // namespace flashmask
