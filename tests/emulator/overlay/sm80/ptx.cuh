// sm80/ptx.cuh for the emulated machine.
#pragma once

#include <type_traits>

#include "../cuda/instructions.cuh"

#define FLASHMASK_DYNAMIC_SHARED(name) char* const name = emulator::shared_data()

namespace flashmask::sm80 {

inline void copy_async_16(uint32_t destination, const void* source, bool valid) {
  emulator::copy_async(destination, source, 16, valid);
}
inline void copy_async_4(uint32_t destination, const void* source) {
  emulator::copy_async(destination, source, 4, true);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulator::wait_copies(kPending);
}

inline void load_matrix(uint32_t (&fragment)[4], uint32_t address) { emulator::load_matrix(fragment, address, false); }
inline void load_matrix_transposed(uint32_t (&fragment)[4], uint32_t address) {
  emulator::load_matrix(fragment, address, true);
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(c, a, {b0, b1}, std::is_same_v<T, __nv_bfloat16>);
}
template <typename T>
void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma<T>(left, a, b[0], b[1]);
  mma<T>(right, a, b[2], b[3]);
}

inline int accumulator_offset(int lane, int element) { return lane * 4 + element; }
inline void add_accumulator(float* tile, int lane, const float (&c)[4]) {
  emulator::maybe_yield();
  for (int i = 0; i < 4; ++i) tile[accumulator_offset(lane, i)] += c[i];
}

inline void wait_for_count(const int32_t* counter, int32_t value) { emulator::wait_for_count(counter, value); }
inline void count_up(int32_t* counter) { emulator::count_up(counter); }

}  // namespace flashmask::sm80
