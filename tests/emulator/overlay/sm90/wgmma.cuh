// sm90/wgmma.cuh for the emulated machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace flashmask::sm90 {

inline void wgmma_begin() { emulator::wgmma_begin(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}

// The machine writes accumulators behind the compiler's back, but always through pointers that it was given.
template <int N>
void fence_registers(float (&)[N][4]) {}
inline void fence_registers(uint32_t (&)[4]) {}
template <int N>
void fence_registers(uint32_t (&)[N][4]) {}

inline uint64_t descriptor_of(uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; }

enum class Major : int { kK = 0, kMN = 1 };

template <typename T, Major kAMajor, Major kBMajor, int kGroups>
void wgmma(float (&c)[kGroups][4], uint64_t a_descriptor, uint64_t b_descriptor, int add) {
  emulator::wgmma({&c[0][0], kGroups, std::is_same_v<T, __nv_bfloat16>, add != 0, a_descriptor, kAMajor == Major::kMN,
                   nullptr, b_descriptor, kBMajor == Major::kMN});
}

template <typename T, Major kBMajor, int kGroups>
void wgmma(float (&c)[kGroups][4], const uint32_t (&a)[4], uint64_t b_descriptor, int add) {
  emulator::wgmma({&c[0][0], kGroups, std::is_same_v<T, __nv_bfloat16>, add != 0, 0, false, a, b_descriptor,
                   kBMajor == Major::kMN});
}

}  // namespace flashmask::sm90
