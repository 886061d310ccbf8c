// The CUDA side of the core, seen from plain C++: what api.cc calls when params->device is FLASHMASK_CUDA.
//
// The caller has checked shapes, the (num_bounds, causal) pair and null pointers. Checked here: what only matters to
// the kernels (dtype, alignment, the head dims and architectures that this library holds kernels for, workspace size).
// Nothing here waits for the device, so every call can be captured in a CUDA graph.
#pragma once

#include <stdint.h>

#include <string>

#include "../flashmask.h"

namespace flashmask {

// On failure `error` says which field is wrong or which CUDA call failed. Kernels run on params.stream of the current
// device; errors of the kernels themselves surface at the caller's next synchronisation.
FlashmaskStatus cuda_forward(const FlashmaskParams& params, std::string* error);
FlashmaskStatus cuda_backward(const FlashmaskParams& params, std::string* error);

// Bytes of device memory that a call needs as params.workspace. Pointers are not read and no device is asked, so the
// answer is the same on every GPU. Without kernels for these parameters it is 0; the call itself then says what is
// missing.
int64_t cuda_forward_workspace_bytes(const FlashmaskParams& params);
int64_t cuda_backward_workspace_bytes(const FlashmaskParams& params);

// Which kernel a call takes on the current device: "cuda sm90 d128".
FlashmaskStatus cuda_kernel_name(const FlashmaskParams& params, bool backward, std::string* name, std::string* error);

}  // namespace flashmask
