// Stand-in for CUDA's header of the same name: TMA descriptors.
#pragma once

#include <stdint.h>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 2, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// The hardware's 128 bytes are opaque; these are what the emulated copy engine needs. Elements have 16 bits.
struct alignas(64) CUtensorMap {
  char* data;
  int64_t sizes[4];
  int64_t strides[4];  // bytes
  int32_t box_columns, box_rows;
  int32_t swizzle_bytes;  // 64 or 128
};
static_assert(sizeof(CUtensorMap) == 128);
