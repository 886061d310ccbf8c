// sm90/global_memory.cuh for the emulated machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include "barrier.cuh"
#include "cache_policy.cuh"

namespace flashmask::sm90 {

inline int32_t read_count(const int32_t* counter) {
  emulator::maybe_yield();
  return *counter;
}
inline int32_t peek_count(const int32_t* counter) { return read_count(counter); }
inline void wait_to_add(const int32_t* counter, int32_t value) { emulator::wait_for_count(counter, value); }
inline void wait_for_count_warp(const int32_t* counter, int32_t value) {
  emulator::wait_for_count(counter, value);
  emulator::sync_warp("wait_for_count_warp");
}
inline bool wait_for_count_warp_until(const int32_t* counter, int32_t value, Barrier end, uint32_t parity) {
  const bool reached = emulator::wait_for_count_until(counter, value, end.address, parity);
  // Lanes may have seen different things; one that saw the end decides, as on the device.
  return !__any_sync(0xFFFFFFFFu, !reached);
}
inline void store_state(int32_t* place, int32_t value) {
  emulator::maybe_yield();
  *place = value;
}
inline int32_t claim(int32_t* place) {
  emulator::maybe_yield();
  const int32_t before = *place;
  if (before == 0) {
    *place = 1;
    emulator::linger();  // so that others meet the claim
  }
  return before;
}
inline void prefetch_near(const void*) {}
inline void count_up(int32_t* counter) { emulator::count_up(counter); }
inline void fence_async_proxy_global() {}
inline void add_fragment(float* place, const float (&c)[4]) {
  emulator::maybe_yield();
  for (int i = 0; i < 4; ++i) place[i] += c[i];
}

inline void add_or_store_fragment(float* place, const float (&c)[4], bool stores) {
  emulator::maybe_yield();
  for (int i = 0; i < 4; ++i) place[i] = (stores ? 0.0f : place[i]) + c[i];
}

template <int kSlots>
inline void leave_issue_slots(float*, bool) {}

inline void store_global_128(void* place, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(place) % 16 != 0) emulator::fail("a store of 16 bytes at %p", place);
  memcpy(place, words, 16);
}
inline void store_global_128(void* place, const uint4& words, CachePolicy) {
  const uint32_t four[4] = {words.x, words.y, words.z, words.w};
  store_global_128(place, four);
}

}  // namespace flashmask::sm90
