// Synchronisation inside a block: mbarriers (with transaction counts for TMA), named barriers, register shares.
#pragma once

#include <stdint.h>
#ifdef FLASHMASK_TRAP_ON_HANG
#include <stdio.h>
#endif

#include "../cuda/instructions.cuh"

namespace flashmask::sm90 {

constexpr int kWarpgroup = 128;  // threads of four warps that issue a wgmma together

// One lane arrives for its warp, behind a __syncwarp. compute-sanitizer's racecheck credits an arrival to the lane that
// makes it and to no other: for that tool, in a build of its own, all lanes arrive.
#ifdef FLASHMASK_EVERY_LANE_ARRIVES
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif

// An mbarrier in shared memory, by its 32-bit address. It completes a phase when all arrivals (and all announced bytes)
// have come; waiters name the phase by its parity.
struct Barrier {
  uint32_t address;

  __device__ __forceinline__ void init(int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(address), "r"(arrivals));
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(address) : "memory");
  }
  // For barriers that only whole warps arrive at: of so many warps, by arrive_warp.
  __device__ __forceinline__ void init_warps(int warps) const { init(warps * kArrivalsOfWarp); }
  // For a whole warp: one arrival, after all its lanes came here.
  __device__ __forceinline__ void arrive_warp() const {
    __syncwarp();
    if (kArrivalsOfWarp == 32 || threadIdx.x % 32 == 0) arrive();
  }
  // For a whole warp: the arrivals of so many warps (at least one) that have no part in this phase.
  __device__ __forceinline__ void arrive_for_warps(int warps) const {
    __syncwarp();
    if (kArrivalsOfWarp == 32 || threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;\n" ::"r"(address), "r"(warps) : "memory");
    }
  }
  // One arrival that also announces bytes which TMA copies will bring.
  __device__ __forceinline__ void arrive_expecting(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ bool try_wait(uint32_t parity) const {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    return done != 0;
  }
  // Whether the phase is over, without waiting. The answer takes as long as a dozen instructions, or several if shared
  // memory is busy: so it is asked for before it is needed.
  __device__ __forceinline__ bool test(uint32_t parity) const {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    return done != 0;
  }
  // For a whole warp, which stays together: the compiler cannot know that of the other loop.
  __device__ __forceinline__ void wait_warp(uint32_t parity) const {
#ifdef FLASHMASK_TRAP_ON_HANG
    wait(parity);
#else
    while (__any_sync(0xFFFFFFFFu, !try_wait(parity))) {
    }
#endif
  }
  __device__ __forceinline__ void wait(uint32_t parity) const {
#ifdef FLASHMASK_TRAP_ON_HANG  // for debugging: a deadlock becomes an error that names the barrier
    const long long start = clock64();
    while (!try_wait(parity)) {
      if (clock64() - start > 1000000000) {
        printf("block %d thread %d waits in vain for barrier %u, parity %u\n", blockIdx.x, threadIdx.x, address,
               parity);
        __trap();
      }
    }
#else
    while (!try_wait(parity)) {
    }
#endif
  }
};

// After init, before any other thread or TMA uses the barriers; then a __syncthreads.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// The same value in all lanes of a warp, told to the compiler: it then keeps it, and what follows from it, in the
// uniform registers that wgmma's descriptors come from, and knows that branches on it do not divide the warp.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_or_sync(0xFFFFFFFFu, value); }

// The same value in a uniform register; the compiler cannot know that it is a constant, nor that two of different
// kWhich (0 or 1) are equal. Blocks have one axis, so what is added is zero.
template <int kWhich>
__device__ __forceinline__ uint32_t hidden(uint32_t value) {
  return uniform(value + (kWhich == 0 ? threadIdx.y : threadIdx.z));
}

// Barrier `id` (1 to 15; 0 is __syncthreads) over `threads` threads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before those that wgmma and TMA make later (the barrier that
// follows makes it so for all threads).
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The same fence the other way round: after it, what this thread has loaded from shared memory is in registers, and a
// TMA load may take the place. Without it an mbarrier's arrival can be seen while loads before it still queue (behind
// stores that wait for DRAM, for instance), though nothing but their use shows that: gradients of single rows were off.
__device__ __forceinline__ void finish_reads_before_async_proxy() { fence_async_proxy(); }

// Moves registers between warpgroups: producers give up what consumers need. The pool is what the block was started
// with (168 a thread for three warpgroups, 128 for four, 96 for five): asking for more than was given up waits for
// ever.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace flashmask::sm90
