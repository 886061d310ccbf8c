// Vectors of the compiler's own vector extension, so that one source serves every instruction set.
//
// A kernels_*.cc file defines FLASHMASK_ISA (a namespace name) and FLASHMASK_VECTOR_BYTES, then includes the kernel
// headers. Nothing here may be a non-inline function or a template of the standard library: the linker would merge the
// copies of different instruction sets into one and run, say, AVX-512 code on a machine without it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(FLASHMASK_ISA) || !defined(FLASHMASK_VECTOR_BYTES)
#error "define FLASHMASK_ISA and FLASHMASK_VECTOR_BYTES first"
#endif

#define FLASHMASK_INLINE static inline __attribute__((always_inline))

namespace flashmask {
namespace FLASHMASK_ISA {

typedef float VecF __attribute__((vector_size(FLASHMASK_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FLASHMASK_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(FLASHMASK_VECTOR_BYTES)));

constexpr int kLanes = FLASHMASK_VECTOR_BYTES / 4;
constexpr float kInfinity = __builtin_inff();

FLASHMASK_INLINE int min_int(int a, int b) { return a < b ? a : b; }
FLASHMASK_INLINE int max_int(int a, int b) { return a > b ? a : b; }

FLASHMASK_INLINE VecF load(const float* source) {
  VecF value;
  memcpy(&value, source, sizeof value);
  return value;
}
FLASHMASK_INLINE VecI load_int(const int32_t* source) {
  VecI value;
  memcpy(&value, source, sizeof value);
  return value;
}
FLASHMASK_INLINE void store(float* target, VecF value) { memcpy(target, &value, sizeof value); }
FLASHMASK_INLINE VecF broadcast(float value) { return VecF{} + value; }
FLASHMASK_INLINE VecI broadcast_int(int32_t value) { return VecI{} + value; }

// The comparison is written so that a NaN in `value` stays out of the maximum; it reaches the result through exp2.
FLASHMASK_INLINE VecF maximum(VecF best, VecF value) { return value > best ? value : best; }

// 2^x for x below 128; above, some number that a caller must not use. Exactly 1 at 0 and exactly 0 below -126, so that
// tiles which are fully masked change nothing; NaN stays NaN.
//
// x = n + f with n integer and |f| <= 1/2; 2^f by a polynomial of degree 6, relative error 5.2e-9, fitted at Chebyshev
// nodes with the constant term held at 1.
FLASHMASK_INLINE VecF exp2_vec(VecF x) {
  const VecF lowest = broadcast(-127.0f);
  x = x < lowest ? lowest : x;
  const VecF shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const VecF shifted = x + shifter;
  const VecF f = x - (shifted - shifter);
  VecF p = broadcast(1.54614474613e-4f);
  p = p * f + broadcast(1.33908673514e-3f);
  p = p * f + broadcast(9.61805666989e-3f);
  p = p * f + broadcast(5.55035710425e-2f);
  p = p * f + broadcast(2.40226509223e-1f);
  p = p * f + broadcast(6.93147188029e-1f);
  p = p * f + broadcast(1.0f);
  // Unsigned: the shifter's own bits leave through the top, and a masked score may be far above its row's maximum.
  const VecU exponent = (VecU)shifted << 23;
  const VecF power = (VecF)((VecU)p + exponent);
  const VecF zero = {};
  // On NaN both comparisons fail and the polynomial's NaN is kept.
  return x < broadcast(-126.0f) ? zero : (x == x ? power : p);
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
