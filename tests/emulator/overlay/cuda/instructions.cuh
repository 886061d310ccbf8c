// cuda/instructions.cuh for the emulated machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#include <type_traits>

namespace flashmask {

inline uint32_t shared_address(const void*) { return emulator::kSharedBase; }

inline void store_shared_32(uint32_t address, uint32_t value) { emulator::store_shared(address, &value, 4); }
inline void store_shared_128(uint32_t address, uint4 value) { emulator::store_shared(address, &value, 16); }
inline void store_shared_float4(uint32_t address, const float (&value)[4]) {
  emulator::store_shared(address, value, 16);
}
inline uint32_t load_shared_32(uint32_t address) {
  uint32_t value;
  emulator::load_shared(&value, address, 4);
  return value;
}
inline void load_shared_64(uint32_t (&value)[2], uint32_t address) { emulator::load_shared(value, address, 8); }
inline uint4 load_shared_128(uint32_t address) {
  uint4 value;
  emulator::load_shared(&value, address, 16);
  return value;
}
inline void load_shared_float4(float (&value)[4], uint32_t address) { emulator::load_shared(value, address, 16); }

template <typename T>
struct Half2;

template <>
struct Half2<__nv_bfloat16> {
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(emulator::to_bfloat16(high)) << 16 | emulator::to_bfloat16(low);
  }
  static float2 unpack(uint32_t pair) {
    return {emulator::from_bfloat16(pair & 0xFFFF), emulator::from_bfloat16(pair >> 16)};
  }
};

template <>
struct Half2<__half> {
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(emulator::to_float16(high)) << 16 | emulator::to_float16(low);
  }
  static float2 unpack(uint32_t pair) {
    return {emulator::from_float16(pair & 0xFFFF), emulator::from_float16(pair >> 16)};
  }
};

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // as the device does with what is not normal
}
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline uint32_t opaque(uint32_t value) { return value; }
inline uint32_t select_bits(uint32_t mask, uint32_t one, uint32_t other) { return (mask & one) | (~mask & other); }
template <typename T>
void mma_16x8x8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  emulator::mma(c, {a0, a1, 0, 0}, {b, 0}, std::is_same_v<T, __nv_bfloat16>);
}
inline uint32_t shift_left(uint32_t value, uint32_t amount) { return amount >= 32 ? 0 : value << amount; }

}  // namespace flashmask
