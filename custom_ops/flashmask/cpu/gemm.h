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

// Part of a dimension that matters, for each block of kSpanRows rows of C.
constexpr int kSpanRows = 8;
struct Span {
  int begin, end;
};

// What a partial tile leaves out, per block of rows of C: columns of C that are not needed at all (they keep their old
// values), and depths at which A is zero. Null where everything counts.
struct GemmSpans {
  const Span* columns = nullptr;
  const Span* depth = nullptr;
};

template <int kRows, int kVectors, Layout kLayoutA, Store kStore>
FLASHMASK_INLINE void gemm_block(int i, int j, int depth, const float* a, int lda, const float* b, int ldb, float* c,
                                 int ldc, const GemmSpans& spans) {
  const int block = i / kSpanRows;
  int begin = 0, end = depth;
  if (spans.columns != nullptr &&
      (j >= spans.columns[block].end || j + kVectors * kLanes <= spans.columns[block].begin)) {
    return;
  }
  if (spans.depth != nullptr) {
    begin = spans.depth[block].begin;
    end = max_int(begin, spans.depth[block].end);
  }
  const float* a_block =
      kLayoutA == Layout::kRowMajor ? a + (ptrdiff_t)i * lda + begin : a + (ptrdiff_t)begin * lda + i;
  gemm_micro<kRows, kVectors, kLayoutA, kStore>(end - begin, a_block, lda, b + (ptrdiff_t)begin * ldb + j, ldb,
                                                c + (ptrdiff_t)i * ldc + j, ldc);
}

template <int kVectors, Layout kLayoutA, Store kStore>
FLASHMASK_INLINE void gemm_panel(int rows, int j, int depth, const float* a, int lda, const float* b, int ldb, float* c,
                                 int ldc, const GemmSpans& spans) {
  int i = 0;
  for (; i + kMicroRows <= rows; i += kMicroRows) {
    gemm_block<kMicroRows, kVectors, kLayoutA, kStore>(i, j, depth, a, lda, b, ldb, c, ldc, spans);
  }
  if (kMicroRows > 4 && i + 4 <= rows) {
    gemm_block<4, kVectors, kLayoutA, kStore>(i, j, depth, a, lda, b, ldb, c, ldc, spans);
    i += 4;
  }
  if (i + 2 <= rows) {
    gemm_block<2, kVectors, kLayoutA, kStore>(i, j, depth, a, lda, b, ldb, c, ldc, spans);
    i += 2;
  }
  if (i < rows) gemm_block<1, kVectors, kLayoutA, kStore>(i, j, depth, a, lda, b, ldb, c, ldc, spans);
}

// C[rows, columns] (+)= A[rows, depth] * B[depth, columns]; `columns` is a multiple of kLanes.
template <Layout kLayoutA, Store kStore>
static void gemm(int rows, int columns, int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc,
                 const GemmSpans& spans) {
  // A panel of B (depth x kMicroVectors vectors) stays in the L1 cache while A streams past it.
  int j = 0;
  for (; j + kMicroVectors * kLanes <= columns; j += kMicroVectors * kLanes) {
    gemm_panel<kMicroVectors, kLayoutA, kStore>(rows, j, depth, a, lda, b, ldb, c, ldc, spans);
  }
  for (; j < columns; j += kLanes) gemm_panel<1, kLayoutA, kStore>(rows, j, depth, a, lda, b, ldb, c, ldc, spans);
}

}  // namespace FLASHMASK_ISA
}  // namespace flashmask
