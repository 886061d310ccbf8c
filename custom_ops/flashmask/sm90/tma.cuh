// The copy engine: tiles of [batch, seqlen, heads, dim] tensors to and from shared memory, and additions to global
// memory. A tile in shared memory is cut along the head dim into panels that a swizzle fits; see panels.cuh.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "cache_policy.cuh"

namespace flashmask::sm90 {

// A box of `map` (one panel wide, its rows high) whose first element is (dim, row, head, batch). Completes on
// `barrier`. Elements outside the tensor come as zeros.
__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier, int dim,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(dim), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier, int dim,
                                         int row, int head, int batch, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(dim), "r"(row), "r"(head), "r"(batch),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// To the L2 cache only.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int dim, int row, int head, int batch,
                                             CachePolicy policy) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.L2::cache_hint [%0, {%1, %2, %3, %4}], %5;\n" ::"l"(
                   reinterpret_cast<uint64_t>(&map)),
               "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(static_cast<uint64_t>(policy))
               : "memory");
}

// The way back; elements outside the tensor are not written.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int dim, int row, int head,
                                          int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(
                   reinterpret_cast<uint64_t>(&map)),
               "r"(source), "r"(dim), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int dim, int row, int head,
                                          int batch, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;\n" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(source), "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// `bytes` (a multiple of 16) of consecutive memory to shared memory; both addresses are multiples of 16.
__device__ __forceinline__ void load_bytes(uint32_t destination, const void* source, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Adds consecutive floats in shared memory to global memory, element by element, atomically.
__device__ __forceinline__ void add_floats(float* destination, uint32_t source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(destination),
               "r"(source), "r"(bytes)
               : "memory");
}

// Writes them there.
__device__ __forceinline__ void store_floats(float* destination, uint32_t source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(destination), "r"(source),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Until at most kPending groups of this thread still read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}
// Until at most kPending groups of this thread are not yet in global memory.
template <int kPending>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

}  // namespace flashmask::sm90
