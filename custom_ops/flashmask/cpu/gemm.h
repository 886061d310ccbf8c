// The one matrix product of the CPU kernels: C (+)= A * B on small tiles in scratch memory.
//
// B and C are row-major; A is row-major, or given transposed. Every element of C is one chain of multiply-adds in
// ascending depth, whatever the tile: leaving out zeros of A changes no bit, so skipped and computed tiles agree.
#pragma once

#include "simd.h"

namespace flashmask {
namespace FLASHMASK_ISA {

// Rows of scratch matrices start an odd number of cache lines apart: a power-of-two distance would put the same column
// of every row into the same few sets of the L1 cache.
FLASHMASK_INLINE int padded_row(int columns) { return ((columns + 15) / 16 | 1) * 16; }

// Accumulators of one call: kMicroRows x kMicroVectors vectors, plus one vector of A and kMicroVectors of B. 32
// registers with AVX-512, 16 otherwise.
#if FLASHMASK_VECTOR_BYTES == 64
constexpr int kMicroRows = 8;
constexpr int kMicroVectors = 2;
#else
constexpr int kMicroRows = 4;
constexpr int kMicroVectors = 2;
#endif

enum class Layout { kRowMajor, kTransposed };
enum class Store { kOverwrite, kAccumulate };

template <int kRows, int kVectors, Layout kLayoutA, Store kStore>
FLASHMASK_INLINE void gemm_micro(int depth, const float* a, ptrdiff_t lda, const float* b, ptrdiff_t ldb, float* c,
                                 ptrdiff_t ldc) {
  VecF sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = kStore == Store::kAccumulate ? load(c + i * ldc + v * kLanes) : VecF{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    VecF row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const VecF factor = broadcast(kLayoutA == Layout::kRowMajor ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes, sum[i][v]);
  }
}

template <int kVectors, Layout kLayoutA, Store kStore>
FLASHMASK_INLINE void gemm_panel(int rows, int depth, const float* a, int lda, const float* b, int ldb, float* c,
                                 int ldc) {
  const ptrdiff_t step = kLayoutA == Layout::kRowMajor ? lda : 1;
  int i = 0;
  for (; i + kMicroRows <= rows; i += kMicroRows) {
    gemm_micro<kMicroRows, kVectors, kLayoutA, kStore>(depth, a + i * step, lda, b, ldb, c + (ptrdiff_t)i * ldc, ldc);
  }
  if (kMicroRows > 4 && i + 4 <= rows) {
    gemm_micro<4, kVectors, kLayoutA, kStore>(depth, a + i * step, lda, b, ldb, c + (ptrdiff_t)i * ldc, ldc);
    i += 4;
  }
  if (i + 2 <= rows) {
    gemm_micro<2, kVectors, kLayoutA, kStore>(depth, a + i * step, lda, b, ldb, c + (ptrdiff_t)i * ldc, ldc);
    i += 2;
  }
  if (i < rows)
    gemm_micro<1, kVectors, kLayoutA, kStore>(depth, a + i * step, lda, b, ldb, c + (ptrdiff_t)i * ldc, ldc);
}

// C[rows, columns] (+)= A[rows, depth] * B[depth, columns]; `columns` is a multiple of kLanes.
template <Layout kLayoutA, Store kStore>
static void gemm(int rows, int columns, int depth, const float* a, int lda, const float* b, int ldb, float* c,
                 int ldc) {
  // A panel of B (depth x kMicroVectors vectors) stays in the L1 cache while A streams past it.
  int j = 0;
  for (; j + kMicroVectors * kLanes <= columns; j += kMicroVectors * kLanes) {
    gemm_panel<kMicroVectors, kLayoutA, kStore>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
  }
  for (; j < columns; j += kLanes) gemm_panel<1, kLayoutA, kStore>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
