// Stand-in for CUDA's header of the same name, which nvcc includes unasked (here: -include): keywords, vector types and
// the functions that device code may call. Those of a whole warp are collectives of the emulated machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>

#include "../machine.h"
#include "cuda_runtime_api.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One array for all threads of a block: fibers of one thread of the host. Dynamic shared memory is only ever used by
// its address, which shared_address of the overlay knows; blocks with static shared memory run one after the other.
#define __shared__ thread_local

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, gridDim;  // of the fiber that runs

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __fmul_ru(float a, float b) {
  const double exact = static_cast<double>(a) * b;
  const float near = static_cast<float>(exact);
  return near < exact ? nextafterf(near, HUGE_VALF) : near;
}
#define __log2f(x) log2f(x)  // the C library has a function of this name

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned amount) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (amount & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned amount) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (amount & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> ((selector >> 4 * i & 7) * 8) & 0xFF) << 8 * i;
  return result;
}

inline void __threadfence() {}
[[noreturn]] inline void __trap() { emulator::fail("trap"); }
template <typename T>
inline T atomicAdd(T* place, T value) {
  emulator::maybe_yield();
  const T old = *place;
  *place += value;
  return old;
}

inline void __syncwarp() { emulator::sync_warp("__syncwarp"); }
inline void __syncthreads() { emulator::named_barrier(0, emulator::threads_of_block(), true); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emulator::shuffle(mask, bits, source & 31);
  memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, emulator::lane() ^ distance);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulator::reduce("__ballot_sync", mask, vote ? 1u << emulator::lane() : 0u,
                          [](uint32_t a, uint32_t b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool vote) {
  return emulator::reduce("__any_sync", mask, vote, [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}
inline bool __all_sync(unsigned mask, bool vote) {
  return emulator::reduce("__all_sync", mask, vote, [](uint32_t a, uint32_t b) { return a & b; }) != 0;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulator::reduce("__reduce_or_sync", mask, value, [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(
      emulator::reduce("__reduce_add_sync", mask, value, [](uint32_t a, uint32_t b) { return a + b; }));
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::reduce("__reduce_min_sync", mask, value, [](uint32_t a, uint32_t b) {
    return static_cast<int>(a) < static_cast<int>(b) ? a : b;
  }));
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::reduce("__reduce_max_sync", mask, value, [](uint32_t a, uint32_t b) {
    return static_cast<int>(a) > static_cast<int>(b) ? a : b;
  }));
}
