// What api.cc calls for params.device == FLASHMASK_CPU. Parameters have been checked.
#pragma once

#include <string>

#include "flashmask.h"

namespace flashmask {

FlashmaskStatus cpu_forward(const FlashmaskParams& params, std::string* error);
FlashmaskStatus cpu_backward(const FlashmaskParams& params, std::string* error);
int64_t cpu_forward_workspace_bytes(const FlashmaskParams& params);
int64_t cpu_backward_workspace_bytes(const FlashmaskParams& params);
const char* cpu_best_isa();
// Which kernels a call with these parameters runs, such as "cpu avx512". They are the same forward and backward.
FlashmaskStatus cpu_kernel_name(const FlashmaskParams& params, std::string* name, std::string* error);

}  // namespace flashmask
