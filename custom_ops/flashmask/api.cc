// The C entry points: checks every parameter, then hands over to a backend. Nothing is read or written on bad input.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <new>
#include <string>

#include "cpu/cpu_backend.h"
#include "flashmask.h"
#include "philox.h"
#if defined(FLASHMASK_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace {

thread_local std::string last_error;

__attribute__((format(printf, 1, 2))) FlashmaskStatus invalid(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  last_error = text;
  return FLASHMASK_INVALID_ARGUMENT;
}

struct NamedNumber {
  const char* name;
  int32_t value;
};

template <size_t kCount>
FlashmaskStatus check_positive(const NamedNumber (&numbers)[kCount]) {
  for (const NamedNumber& number : numbers) {
    if (number.value < 1) return invalid("%s: expected at least 1, got %d", number.name, number.value);
  }
  return FLASHMASK_OK;
}

// Row indices are 32-bit and tiles look one tile ahead; batch * heads numbers the counters of dropout.
FlashmaskStatus check_largest(const char* name_of_heads, int64_t heads, int32_t seqlen_q, int32_t seqlen_k) {
  constexpr int32_t kLongest = INT32_MAX - 1024;
  if (seqlen_q > kLongest) return invalid("seqlen_q: expected at most %d, got %d", kLongest, seqlen_q);
  if (seqlen_k > kLongest) return invalid("seqlen_k: expected at most %d, got %d", kLongest, seqlen_k);
  if (heads > INT32_MAX) {
    return invalid("%s: expected at most %d, got %lld", name_of_heads, INT32_MAX, static_cast<long long>(heads));
  }
  return FLASHMASK_OK;
}

FlashmaskStatus check_dropout(float dropout) {
  if (dropout >= 0.0f && dropout <= 1.0f) return FLASHMASK_OK;
  return invalid("dropout: expected a probability, got %g", dropout);
}

FlashmaskStatus check_shapes(const FlashmaskParams& p) {
  if (p.abi_version != FLASHMASK_ABI_VERSION) {
    return invalid("abi_version: expected %d, got %d", FLASHMASK_ABI_VERSION, p.abi_version);
  }
  if (p.device != FLASHMASK_CPU && p.device != FLASHMASK_CUDA) return invalid("device: got %d", p.device);
  if (p.dtype < FLASHMASK_FLOAT32 || p.dtype > FLASHMASK_FLOAT16) return invalid("dtype: got %d", p.dtype);
  FlashmaskStatus status = check_positive({{"batch", p.batch},
                                           {"heads_q", p.heads_q},
                                           {"heads_k", p.heads_k},
                                           {"heads_mask", p.heads_mask},
                                           {"seqlen_q", p.seqlen_q},
                                           {"seqlen_k", p.seqlen_k}});
  if (status != FLASHMASK_OK) return status;
  if (p.heads_q % p.heads_k != 0) {
    return invalid("heads_q: expected a multiple of heads_k (%d), got %d", p.heads_k, p.heads_q);
  }
  if (p.heads_mask != 1 && p.heads_mask != p.heads_k && p.heads_mask != p.heads_q) {
    return invalid("heads_mask: expected 1, heads_k (%d) or heads_q (%d), got %d", p.heads_k, p.heads_q, p.heads_mask);
  }
  for (const int32_t dim : {p.head_dim, p.head_dim_v}) {
    if (dim < 8 || dim > FLASHMASK_MAX_HEAD_DIM || dim % 8 != 0) {
      return invalid("head_dim: expected a multiple of 8 from 8 to %d, got %d", FLASHMASK_MAX_HEAD_DIM, dim);
    }
  }
  const bool causal = p.causal != 0;
  const bool form = p.num_bounds == 0 || p.num_bounds == 2 || (causal ? p.num_bounds == 1 : p.num_bounds == 4);
  if (!form) {
    return invalid("num_bounds: expected %s, got %d", causal ? "0, 1 or 2 with causal" : "0, 2 or 4 without causal",
                   p.num_bounds);
  }
  if ((p.flags & ~FLASHMASK_FLAG_NO_SKIP) != 0) {
    return invalid("flags: expected no bits but FLASHMASK_FLAG_NO_SKIP (%d), got 0x%x", FLASHMASK_FLAG_NO_SKIP,
                   static_cast<unsigned>(p.flags));
  }
  status = check_largest("batch * heads_q", static_cast<int64_t>(p.batch) * p.heads_q, p.seqlen_q, p.seqlen_k);
  if (status != FLASHMASK_OK) return status;
  if (!std::isfinite(p.softmax_scale)) return invalid("softmax_scale: expected a finite number");
  status = check_dropout(p.dropout);
  if (status != FLASHMASK_OK) return status;
  if (p.num_threads < 0) return invalid("num_threads: expected 0 or more, got %d", p.num_threads);
  if (p.cpu_isa < FLASHMASK_ISA_AUTO || p.cpu_isa > FLASHMASK_ISA_AVX512) return invalid("cpu_isa: got %d", p.cpu_isa);
  return FLASHMASK_OK;
}

FlashmaskStatus check_keep_mask(float dropout, int32_t batch_index, int32_t head_index, int32_t heads_q,
                                int32_t seqlen_q, int32_t seqlen_k, const uint8_t* keep) {
  FlashmaskStatus status = check_dropout(dropout);
  if (status != FLASHMASK_OK) return status;
  status = check_positive({{"heads_q", heads_q}, {"seqlen_q", seqlen_q}, {"seqlen_k", seqlen_k}});
  if (status != FLASHMASK_OK) return status;
  if (batch_index < 0) return invalid("batch_index: expected 0 or more, got %d", batch_index);
  if (head_index < 0 || head_index >= heads_q) {
    return invalid("head_index: expected 0 or more and less than heads_q (%d), got %d", heads_q, head_index);
  }
  // Of the smallest batch that has this index.
  const int64_t heads = (int64_t{batch_index} + 1) * heads_q;
  status = check_largest("(batch_index + 1) * heads_q", heads, seqlen_q, seqlen_k);
  if (status != FLASHMASK_OK) return status;
  return keep == nullptr ? invalid("keep: null pointer") : FLASHMASK_OK;
}

FlashmaskStatus check_pointers(const FlashmaskParams& p, bool backward, int64_t workspace_bytes) {
  const struct {
    const char* name;
    const void* pointer;
    bool needed;
  } fields[] = {{"q", p.q.data, true},
                {"k", p.k.data, true},
                {"v", p.v.data, true},
                {"out", p.out.data, true},
                {"lse", p.lse, backward},
                {"bounds", p.bounds, p.num_bounds > 0},
                {"seed_offset", p.seed_offset, p.dropout > 0.0f},
                {"dout", p.dout.data, backward},
                {"dq", p.dq.data, backward},
                {"dk", p.dk.data, backward},
                {"dv", p.dv.data, backward},
                {"workspace", p.workspace, workspace_bytes > 0}};
  for (const auto& field : fields) {
    if (field.needed && field.pointer == nullptr) return invalid("%s: null pointer", field.name);
  }
  if (p.workspace_bytes < workspace_bytes) {
    return invalid("workspace_bytes: expected at least %lld, got %lld", static_cast<long long>(workspace_bytes),
                   static_cast<long long>(p.workspace_bytes));
  }
  return FLASHMASK_OK;
}

int64_t workspace_bytes(const FlashmaskParams& p, bool backward) {
  if (p.device == FLASHMASK_CPU) {
    return backward ? flashmask::cpu_backward_workspace_bytes(p) : flashmask::cpu_forward_workspace_bytes(p);
  }
#if defined(FLASHMASK_WITH_CUDA)
  return backward ? flashmask::cuda_backward_workspace_bytes(p) : flashmask::cuda_forward_workspace_bytes(p);
#else
  return 0;
#endif
}

FlashmaskStatus run(const FlashmaskParams* params, bool backward) {
  if (params == nullptr) return invalid("params: null pointer");
  FlashmaskStatus status = check_shapes(*params);
  if (status != FLASHMASK_OK) return status;
  status = check_pointers(*params, backward, workspace_bytes(*params, backward));
  if (status != FLASHMASK_OK) return status;
  try {
    if (params->device == FLASHMASK_CPU) {
      return backward ? flashmask::cpu_backward(*params, &last_error) : flashmask::cpu_forward(*params, &last_error);
    }
#if defined(FLASHMASK_WITH_CUDA)
    return backward ? flashmask::cuda_backward(*params, &last_error) : flashmask::cuda_forward(*params, &last_error);
#else
    last_error = "device: this build has no CUDA kernels";
    return FLASHMASK_NOT_BUILT;
#endif
  } catch (const std::bad_alloc&) {
    last_error = "out of memory for the scratch of the threads";
    return FLASHMASK_OUT_OF_MEMORY;
  }
}

int64_t checked_workspace_bytes(const FlashmaskParams* params, bool backward) {
  if (params == nullptr) {
    invalid("params: null pointer");
    return -1;
  }
  return check_shapes(*params) == FLASHMASK_OK ? workspace_bytes(*params, backward) : -1;
}

}  // namespace

extern "C" {

int32_t flashmask_abi_version(void) { return FLASHMASK_ABI_VERSION; }
int64_t flashmask_params_bytes(void) { return static_cast<int64_t>(sizeof(FlashmaskParams)); }
const char* flashmask_last_error(void) { return last_error.c_str(); }
const char* flashmask_cpu_isa(void) { return flashmask::cpu_best_isa(); }

int64_t flashmask_forward_workspace_bytes(const FlashmaskParams* params) {
  return checked_workspace_bytes(params, false);
}
int64_t flashmask_backward_workspace_bytes(const FlashmaskParams* params) {
  return checked_workspace_bytes(params, true);
}

const char* flashmask_kernel_name(const FlashmaskParams* params, [[maybe_unused]] int32_t backward) {
  static thread_local std::string name;
  if (params == nullptr) {
    invalid("params: null");
    return nullptr;
  }
  if (check_shapes(*params) != FLASHMASK_OK) return nullptr;
  if (params->device == FLASHMASK_CPU) {
    if (flashmask::cpu_kernel_name(*params, &name, &last_error) != FLASHMASK_OK) return nullptr;
    return name.c_str();
  }
#if defined(FLASHMASK_WITH_CUDA)
  if (flashmask::cuda_kernel_name(*params, backward != 0, &name, &last_error) != FLASHMASK_OK) return nullptr;
  return name.c_str();
#else
  last_error = "device: this library was built without CUDA kernels";
  return nullptr;
#endif
}

FlashmaskStatus flashmask_forward(const FlashmaskParams* params) { return run(params, false); }
FlashmaskStatus flashmask_backward(const FlashmaskParams* params) { return run(params, true); }

float flashmask_dropout_keep_mask(float dropout, int64_t seed, int64_t offset, int32_t batch_index, int32_t head_index,
                                  int32_t heads_q, int32_t seqlen_q, int32_t seqlen_k, uint8_t* keep) {
  if (check_keep_mask(dropout, batch_index, head_index, heads_q, seqlen_q, seqlen_k, keep) != FLASHMASK_OK) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const uint32_t threshold = flashmask::dropout_keep_threshold(dropout);
  const flashmask::DropoutKey key(seed, offset);
  for (int32_t i = 0; i < seqlen_q; ++i) {
    for (int32_t j = 0; j < seqlen_k; ++j) {
      const auto words = key.draw(batch_index * heads_q + head_index, i, j / flashmask::kDropoutColumnsPerCall);
      keep[static_cast<int64_t>(i) * seqlen_k + j] = flashmask::dropout_bits(words, j) < threshold;
    }
  }
  return flashmask::dropout_keep_scale(threshold);
}

}  // extern "C"
