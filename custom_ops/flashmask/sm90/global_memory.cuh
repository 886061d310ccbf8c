// Global memory: what blocks share (counters and sums), and wide stores.
#pragma once

#include <stdint.h>

#include "barrier.cuh"
#include "cache_policy.cuh"

namespace flashmask::sm90 {

// What was written before a counter was counted up is visible to who has seen that.
__device__ __forceinline__ int32_t read_count(const int32_t* counter) {
  int32_t seen;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}
// Says nothing of what was written before.
__device__ __forceinline__ int32_t peek_count(const int32_t* counter) {
  int32_t seen;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}
// For what is only added to afterwards, and not read. What was counted, additions and the first column tile's stores,
// has arrived in the L2 cache: it was waited for before the count was released. Additions that are sent when the count
// is known arrive behind it. So nothing is acquired, which would take one more journey. The memory model of PTX does
// not promise that: it is how the hardware works, and tests on it compare the bits of deterministic runs.
__device__ __forceinline__ void wait_to_add(const int32_t* counter, int32_t value) {
  while (peek_count(counter) < value) {
  }
}
// For a whole warp, which stays together: the compiler cannot know that of the other loop, and keeps what all lanes
// share in more registers than a producer has then. Each lane may have a counter of its own.
__device__ __forceinline__ void wait_for_count_warp(const int32_t* counter, int32_t value) {
  while (__any_sync(0xFFFFFFFFu, read_count(counter) < value)) {
    // An acquiring load empties the L1 cache: this one looks without, until it is time.
    while (__any_sync(0xFFFFFFFFu, peek_count(counter) < value)) {
    }
  }
}
// The same, unless a phase of `end` is over before: returns whether the count was reached.
__device__ __forceinline__ bool wait_for_count_warp_until(const int32_t* counter, int32_t value, Barrier end,
                                                          uint32_t parity) {
  while (!__any_sync(0xFFFFFFFFu, end.test(parity))) {
    if (value == 0) return true;  // without a question to memory
    if (!__any_sync(0xFFFFFFFFu, peek_count(counter) < value) &&
        !__any_sync(0xFFFFFFFFu, read_count(counter) < value)) {
      return true;
    }
    __nanosleep(2000);  // as long as an answer takes; and what others issue meanwhile is not held up
  }
  return false;
}
// To the multiprocessor's own cache; a hint.
__device__ __forceinline__ void prefetch_near(const void* place) {
  asm volatile("prefetch.global.L1 [%0];\n" ::"l"(place));
}
__device__ __forceinline__ void count_up(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}

// Without any order to what is written before or after.
__device__ __forceinline__ void store_state(int32_t* place, int32_t value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;\n" ::"l"(place), "r"(value) : "memory");
}
// Makes 0 a 1; returns what it was.
__device__ __forceinline__ int32_t claim(int32_t* place) {
  int32_t before;
  asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;\n" : "=r"(before) : "l"(place) : "memory");
  return before;
}

// Orders what the copy engine wrote to global memory before what follows.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// One lane's fragment of an accumulator, added to global memory.
__device__ __forceinline__ void add_fragment(float* place, const float (&c)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(place), "f"(c[0]), "f"(c[1]), "f"(c[2]),
               "f"(c[3])
               : "memory");
}

// The same, or stored there. ptxas makes a branch around the addition of its predicate; the gap that this leaves
// between additions does no harm, on the contrary (log, backward #84, #86).
__device__ __forceinline__ void add_or_store_fragment(float* place, const float (&c)[4], bool stores) {
  asm volatile(
      "{\n"
      ".reg .pred stores;\n"
      "setp.ne.b32 stores, %5, 0;\n"
      "@stores st.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "@!stores red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "}\n" ::"l"(place),
      "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "r"(static_cast<int>(stores))
      : "memory");
}

// Issue slots for memory instructions that this warp leaves empty, so that the queue of these instructions does not
// fill with what it sends one right after the other: other warps' loads from shared memory wait in it, too (log,
// backward #86). They are stores whose predicate never holds, which only who reads `never` knows: ptxas drops anything
// else that has no effect.
template <int kSlots>
__device__ __forceinline__ void leave_issue_slots(float* place, bool never) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.ne.b32 never, %1, 0;\n"
        "@never st.global.f32 [%0], 0f00000000;\n"
        "}\n" ::"l"(place),
        "r"(static_cast<int>(never))
        : "memory");
  }
}

// 16 bytes, at once: the compiler would take some of them apart.
__device__ __forceinline__ void store_global_128(void* place, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(place), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_global_128(void* place, const uint4& words, CachePolicy policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;\n" ::"l"(place), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w), "l"(static_cast<uint64_t>(policy))
               : "memory");
}

}  // namespace flashmask::sm90
