// The instructions that these kernels are made of, one wrapper each, beside those that all kernels share
// (cuda/instructions.cuh). Everything here exists on sm_80; where sm_90 has a wider form it is used.
#pragma once

#include <type_traits>

#include "../cuda/instructions.cuh"

// A block's dynamic shared memory.
#define FLASHMASK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

namespace flashmask::sm80 {

// Asynchronous copy to shared memory; writes zeros and reads nothing when `valid` is false.
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(destination), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values; lanes 8i .. 8i + 7 give the row addresses of matrix i.
__device__ __forceinline__ void load_matrix(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrix_transposed(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
}

// c[16x8] += a[16x16] * b[16x8]. With g = lane / 4 and t = lane % 4, c holds (row g, columns 2t, 2t + 1) and
// (row g + 8, the same columns).
#define FLASHMASK_MMA(type) "mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(FLASHMASK_MMA("bf16") "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(FLASHMASK_MMA("f16") "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#undef FLASHMASK_MMA

// Vector additions came with sm_90 and CUDA 12.1.
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define FLASHMASK_VECTOR_ADD 1
#else
#define FLASHMASK_VECTOR_ADD 0
#endif

// Adds one accumulator fragment to global memory. The 128 floats of a 16x8 tile lie together; which lane owns which is
// chosen so that every request covers whole sectors, so it differs between architectures: accumulator_offset is the
// only code that knows.
__device__ __forceinline__ int accumulator_offset(int lane, int element) {
#if FLASHMASK_VECTOR_ADD
  return lane * 4 + element;
#else
  return element * 32 + lane;
#endif
}

__device__ __forceinline__ void add_accumulator(float* tile, int lane, const float (&c)[4]) {
#if FLASHMASK_VECTOR_ADD
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(tile + lane * 4), "f"(c[0]), "f"(c[1]),
               "f"(c[2]), "f"(c[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(tile + accumulator_offset(lane, i)), "f"(c[i]) : "memory");
  }
#endif
}

// Counters in global memory. What all threads wrote before they met at a barrier, and one of them counted up, is
// visible to those that meet at a barrier who has seen it.
__device__ __forceinline__ void wait_for_count(const int32_t* counter, int32_t value) {
  int32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}
__device__ __forceinline__ void count_up(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}

// Two products with neighbouring column tiles; b = their operands as ldmatrix gives them.
template <typename T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  mma<T>(left, a, b[0], b[1]);
  mma<T>(right, a, b[2], b[3]);
}

}  // namespace flashmask::sm80
