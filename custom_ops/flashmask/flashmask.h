// FlashMask: attention under a column-wise interval mask, on raw pointers.
//
// The C interface of the core. No framework header is included here or in anything below this folder, so that
// ctypes, any array library and the Paddle binding drive the same code.
//
// Shapes, with q rows i and key columns j:
//   q, out, dout, dq   [batch, seqlen_q, heads_q, head_dim or head_dim_v]
//   k, v, dk, dv       [batch, seqlen_k, heads_k, head_dim or head_dim_v]
//   lse                [batch, heads_q, seqlen_q] float32, natural logarithm
//   bounds             [batch, heads_mask, seqlen_k, num_bounds] int32, contiguous
//   block_mask         [batch, heads_mask, ceil(seqlen_q / 128), ceil(seqlen_k / 128)] int32, contiguous, 0 = masked
// What `bounds` means is defined in mask.h; which bits dropout draws, in philox.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FLASHMASK_API __attribute__((visibility("default")))
#else
#define FLASHMASK_API
#endif

// Raised whenever FlashmaskParams changes: a caller built against another layout is refused, not misread.
#define FLASHMASK_ABI_VERSION 1

#define FLASHMASK_MAX_HEAD_DIM 256
#define FLASHMASK_BLOCK_MASK_TILE 128

typedef enum FlashmaskStatus {
  FLASHMASK_OK = 0,
  FLASHMASK_INVALID_ARGUMENT = 1,  // flashmask_last_error() names the field
  FLASHMASK_NOT_BUILT = 2,         // this library holds no kernel for the device or the configuration
  FLASHMASK_DEVICE_ERROR = 3,      // the device runtime reported an error
  FLASHMASK_OUT_OF_MEMORY = 4,
} FlashmaskStatus;

typedef enum FlashmaskDevice { FLASHMASK_CPU = 0, FLASHMASK_CUDA = 1 } FlashmaskDevice;

// Storage type of q, k, v, out and their gradients. Arithmetic accumulates in float32 for all three.
typedef enum FlashmaskDtype { FLASHMASK_FLOAT32 = 0, FLASHMASK_BFLOAT16 = 1, FLASHMASK_FLOAT16 = 2 } FlashmaskDtype;

// Instruction set of the CPU kernels. AUTO takes the best one that the processor has.
typedef enum FlashmaskCpuIsa {
  FLASHMASK_ISA_AUTO = 0,
  FLASHMASK_ISA_PORTABLE = 1,
  FLASHMASK_ISA_AVX2 = 2,
  FLASHMASK_ISA_AVX512 = 3,
} FlashmaskCpuIsa;

// Compute every tile and mask it element by element. Slow; the result must equal the default's to the bit where q, k, v
// and dout are finite.
#define FLASHMASK_FLAG_NO_SKIP 1

// A four-dimensional operand. Strides count elements; the last axis is contiguous.
typedef struct FlashmaskTensor {
  void* data;
  int64_t batch_stride;
  int64_t seq_stride;
  int64_t head_stride;
} FlashmaskTensor;

typedef struct FlashmaskParams {
  int32_t abi_version;  // FLASHMASK_ABI_VERSION
  int32_t device;       // FlashmaskDevice
  int32_t dtype;        // FlashmaskDtype

  int32_t batch;
  int32_t heads_q;
  int32_t heads_k;     // divides heads_q: query head h reads key head h / (heads_q / heads_k)
  int32_t heads_mask;  // 1, heads_k or heads_q
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t head_dim;    // of q and k; a multiple of 8, at most FLASHMASK_MAX_HEAD_DIM
  int32_t head_dim_v;  // of v and out

  int32_t causal;         // also mask rows i < j - (seqlen_k - seqlen_q)
  int32_t num_bounds;     // 0 (bounds is null), 1 or 2 with causal, 2 or 4 without
  int32_t deterministic;  // ask for a bitwise repeatable backward pass (the CPU's always is)
  int32_t flags;          // FLASHMASK_FLAG_*; other bits are refused

  float softmax_scale;
  float dropout;  // probability of dropping, in [0, 1]

  FlashmaskTensor q, k, v, out;
  float* lse;                  // forward: may be null; backward: read
  const int32_t* bounds;       // may be null
  const int32_t* block_mask;   // may be null
  const int64_t* seed_offset;  // two values on the device; read only if dropout > 0

  // Backward only: dout and out are read; dq, dk, dv are written in full, nothing need be zeroed before.
  FlashmaskTensor dout, dq, dk, dv;

  void* workspace;  // of the size that flashmask_*_workspace_bytes returned, on the device
  int64_t workspace_bytes;

  void* stream;         // CUDA: the stream to launch on, of the current device. All memory is of that device; only of q
                        // is it checked.
  int32_t num_threads;  // CPU: 0 takes the OpenMP runtime's setting
  int32_t cpu_isa;      // CPU: FlashmaskCpuIsa
} FlashmaskParams;

FLASHMASK_API int32_t flashmask_abi_version(void);
FLASHMASK_API int64_t flashmask_params_bytes(void);

// What went wrong in the last call of this thread that did not return FLASHMASK_OK. Never null.
FLASHMASK_API const char* flashmask_last_error(void);

// Name of the instruction set that FLASHMASK_ISA_AUTO takes on this machine: "avx512", "avx2" or "portable".
FLASHMASK_API const char* flashmask_cpu_isa(void);

// Bytes of workspace that a call with these parameters needs (pointers are not read); -1 on bad parameters.
FLASHMASK_API int64_t flashmask_forward_workspace_bytes(const FlashmaskParams* params);
FLASHMASK_API int64_t flashmask_backward_workspace_bytes(const FlashmaskParams* params);

// Which kernels a call with these parameters runs on this machine (CUDA: on the current device), such as "cpu avx512",
// "cuda sm90 d128"; of the backward pass if `backward`. Null if none, as where the processor lacks the instruction set
// asked for; flashmask_last_error() says why. Valid until the next call of this thread.
FLASHMASK_API const char* flashmask_kernel_name(const FlashmaskParams* params, int32_t backward);

FLASHMASK_API FlashmaskStatus flashmask_forward(const FlashmaskParams* params);
FLASHMASK_API FlashmaskStatus flashmask_backward(const FlashmaskParams* params);

// The dropout decisions of rows [0, seqlen_q) x columns [0, seqlen_k) of one head: keep[i * seqlen_k + j] is 1 or 0.
// For tests and for reproducing a run elsewhere. Returns the factor that kept probabilities are multiplied with; NaN on
// bad arguments, of which flashmask_last_error() names one, and then nothing is written.
FLASHMASK_API float flashmask_dropout_keep_mask(float dropout, int64_t seed, int64_t offset, int32_t batch_index,
                                                int32_t head_index, int32_t heads_q, int32_t seqlen_q, int32_t seqlen_k,
                                                uint8_t* keep);

#ifdef __cplusplus
}
#endif
