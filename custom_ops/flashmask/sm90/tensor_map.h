// Host side of TMA: descriptors of the op's tensors.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../flashmask.h"

namespace flashmask::sm90 {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver, found at run time: the library links to no driver stub. Null if there is none.
inline EncodeTiled find_encoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess) cudaGetLastError();  // or the launch of a portable kernel would report it
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                         : nullptr;
  }();
  return encoder;
}

// TMA wants strides that are positive multiples of 16 bytes below 2^40; the stride of an axis of one element says
// nothing and is replaced.
inline bool tma_can_read(const FlashmaskTensor& tensor, int batch, int64_t seqlen, int heads) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39));
  };
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && fits(batch, tensor.batch_stride) &&
         fits(seqlen, tensor.seq_stride) && fits(heads, tensor.head_stride);
}

// Boxes of `box_rows` rows x `panel` columns of one head of a [batch, seqlen, heads, dim] tensor of 16-bit values.
// A panel is 64 columns (128 bytes, 128-byte swizzle) or 32 (64 bytes, 64-byte swizzle).
inline cudaError_t make_tensor_map(CUtensorMap* map, const FlashmaskTensor& tensor, int dtype, int batch,
                                   int64_t seqlen, int heads, int dim, int box_rows, int panel) {
  const EncodeTiled encode = find_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(seqlen),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const auto bytes = [](int64_t size, int64_t stride) { return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16); };
  const cuuint64_t strides[3] = {bytes(seqlen, tensor.seq_stride), bytes(heads, tensor.head_stride),
                                 bytes(batch, tensor.batch_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == FLASHMASK_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             panel == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flashmask::sm90
