// Between the storage types of the operands and float32 scratch: loads and stores of rows, transposition.
#pragma once

#include "flashmask.h"
#include "simd.h"

namespace flashmask {
namespace FLASHMASK_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FLASHMASK_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FLASHMASK_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLASHMASK_INLINE float to_float(float value) { return value; }
FLASHMASK_INLINE float to_float(BFloat16 value) { return float_from_bits((uint32_t)value.bits << 16); }
// Branch-free so that the compiler turns loops over it into vector code.
FLASHMASK_INLINE float to_float(Float16 value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits & 0x7C00u;
  const uint32_t magnitude = (uint32_t)(value.bits & 0x7FFFu) << 13;
  const uint32_t rebias = exponent == 0x7C00u ? 224u << 23 : 112u << 23;  // infinities and NaN reach exponent 255
  const uint32_t normal = magnitude + rebias;
  const uint32_t subnormal = bits_from_float((float)(int32_t)(value.bits & 0x3FFu) * 5.9604644775390625e-8f);  // 2^-24
  return float_from_bits(sign | (exponent == 0 ? subnormal : normal));
}

// To nearest, ties to even.
FLASHMASK_INLINE void from_float(float value, float* target) { *target = value; }
FLASHMASK_INLINE void from_float(float value, BFloat16* target) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  target->bits = (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}
FLASHMASK_INLINE void from_float(float value, Float16* target) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  // One half has a unit in the last place of 2^-24, the distance of float16's subnormals.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  target->bits = (uint16_t)((bits >> 16 & 0x8000u) | (magnitude >= 0x477FF000u ? special : finite));
}

// Calls `function` with a value of the storage type that `dtype` stands for; only its type matters.
template <typename Function>
FLASHMASK_INLINE void with_storage_type(int32_t dtype, const Function& function) {
  switch (dtype) {
    case FLASHMASK_BFLOAT16:
      return function(BFloat16{});
    case FLASHMASK_FLOAT16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

template <typename T>
FLASHMASK_INLINE T* row_pointer(const FlashmaskTensor& tensor, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + row * tensor.seq_stride +
         head * tensor.head_stride;
}

// scratch[rows][ld] = rows [row, row + rows) of one head; columns [columns, padded_columns) become zero.
template <typename T>
static void load_rows(const FlashmaskTensor& tensor, int64_t batch, int64_t head, int64_t row, int rows, int columns,
                      int padded_columns, float* scratch, int ld) {
  for (int i = 0; i < rows; ++i) {
    const T* source = row_pointer<const T>(tensor, batch, row + i, head);
    float* target = scratch + (ptrdiff_t)i * ld;
    for (int k = 0; k < columns; ++k) target[k] = to_float(source[k]);
    for (int k = columns; k < padded_columns; ++k) target[k] = 0.0f;
  }
}

template <typename T>
FLASHMASK_INLINE void store_row(const float* source, float factor, int columns, T* target) {
  for (int k = 0; k < columns; ++k) from_float(source[k] * factor, target + k);
}

// target[columns][ldt] = source[rows][lds] transposed, times `factor`; rows [rows, padded_rows) become zero columns.
// Blocks of 16 x 16 keep both sides in few cache lines.
static void transpose(const float* source, int lds, int rows, int padded_rows, int columns, float factor, float* target,
                      int ldt) {
  constexpr int kBlock = 16;
  for (int i0 = 0; i0 < padded_rows; i0 += kBlock) {
    const int i1 = min_int(i0 + kBlock, padded_rows);
    for (int k0 = 0; k0 < columns; k0 += kBlock) {
      const int k1 = min_int(k0 + kBlock, columns);
      for (int k = k0; k < k1; ++k) {
        for (int i = i0; i < i1; ++i) {
          target[(ptrdiff_t)k * ldt + i] = i < rows ? source[(ptrdiff_t)i * lds + k] * factor : 0.0f;
        }
      }
    }
  }
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
