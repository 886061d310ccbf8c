// sm90/store_matrix.cuh for the emulated machine.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

inline void store_matrix(uint32_t address, const uint32_t (&fragment)[4]) { emulator::store_matrix(address, fragment); }

}  // namespace flashmask::sm90
