// 16-bit floating-point numbers, by their bits.
#pragma once

#include <stdint.h>
#include <string.h>

namespace emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = float_bits(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3FFu;
  if (exponent == 31) return bits_float(sign | 0x7F800000u | mantissa << 13);
  if (exponent > 0) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float value = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -value : value;
}
inline uint16_t to_float16(float value) {  // to nearest, ties to even
  const uint32_t bits = float_bits(value);
  const uint16_t sign = bits >> 16 & 0x8000u;
  if (value != value) return 0x7FFF;
  const float magnitude = bits_float(bits & 0x7FFFFFFFu);
  if (magnitude >= 65520.0f) return sign | 0x7C00u;
  // Adding a number whose last bit is worth the result's last bit rounds there.
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(float_bits(magnitude + 0.5f) - float_bits(0.5f));
  const uint32_t rounded = float_bits(magnitude) + 0xFFF + (float_bits(magnitude) >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

}  // namespace emulator
