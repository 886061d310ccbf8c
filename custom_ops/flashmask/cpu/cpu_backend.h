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

}  // namespace flashmask
