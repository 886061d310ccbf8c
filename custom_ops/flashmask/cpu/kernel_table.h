// Everything of one instruction set, gathered for the dispatcher.
#pragma once

#include "backward.h"
#include "forward.h"

namespace flashmask {
namespace FLASHMASK_ISA {

constexpr CpuKernels make_kernels(const char* name) {
  return CpuKernels{name,     forward_scratch_floats, backward_scratch_floats, forward, backward_prepare,
                    backward, backward_finish};
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
