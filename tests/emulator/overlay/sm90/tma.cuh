// sm90/tma.cuh for the emulated machine.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "cache_policy.cuh"

namespace flashmask::sm90 {

inline void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier, int dim, int row, int head,
                     int batch) {
  emulator::load_box(destination, map, barrier, {dim, row, head, batch});
}
inline void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier, int dim, int row, int head,
                     int batch, CachePolicy) {
  load_box(destination, map, barrier, dim, row, head, batch);
}
inline void store_box(const CUtensorMap& map, uint32_t source, int dim, int row, int head, int batch) {
  emulator::store_box(map, source, {dim, row, head, batch});
}
inline void store_box(const CUtensorMap& map, uint32_t source, int dim, int row, int head, int batch, CachePolicy) {
  store_box(map, source, dim, row, head, batch);
}
inline void load_bytes(uint32_t destination, const void* source, int bytes, uint32_t barrier) {
  emulator::load_bytes(destination, source, bytes, barrier);
}
inline void add_floats(float* destination, uint32_t source, int bytes) {
  emulator::add_floats(destination, source, bytes);
}
inline void store_floats(float* destination, uint32_t source, int bytes) {
  emulator::store_floats(destination, source, bytes);
}
inline void commit_stores() { emulator::commit_stores(); }
template <int kPending>
void wait_stores_read() {
  emulator::wait_stores(kPending, false);
}
template <int kPending>
void wait_stores() {
  emulator::wait_stores(kPending, true);
}
inline void prefetch_box(const CUtensorMap&, int, int, int, int, CachePolicy) {}
inline void prefetch_map(const CUtensorMap&) {}

}  // namespace flashmask::sm90
