// sm90/barrier.cuh for the emulated machine.
#pragma once

#include "../cuda/instructions.cuh"

namespace flashmask::sm90 {

constexpr int kWarpgroup = 128;

struct Barrier {
  uint32_t address;

  void init(int arrivals) const { emulator::init_barrier(address, arrivals); }
  void arrive() const { emulator::arrive(address, 0); }
  void init_warps(int warps) const { init(warps); }
  void arrive_warp() const {
    emulator::vouch(address);
    emulator::sync_warp("Barrier::arrive_warp");
    if (emulator::lane() == 0) arrive();
  }
  void arrive_for_warps(int warps) const {
    emulator::sync_warp("Barrier::arrive_for_warps");
    if (emulator::lane() > 0) return;
    for (int warp = 0; warp < warps; ++warp) arrive();
  }
  void arrive_expecting(int bytes) const { emulator::arrive(address, bytes); }
  bool test(uint32_t parity) const { return emulator::test_barrier(address, parity); }
  void wait(uint32_t parity) const { emulator::wait_barrier(address, parity); }
  void wait_warp(uint32_t parity) const {
    emulator::wait_barrier(address, parity);
    emulator::sync_warp("Barrier::wait_warp");
  }
};

inline void publish_barriers() { emulator::publish_barriers(); }
inline uint32_t uniform(uint32_t value) { return emulator::uniform(value); }
template <int kWhich>
uint32_t hidden(uint32_t value) {
  return value;
}

inline void named_barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

inline void fence_async_proxy() { emulator::fence_async_proxy(); }
inline void finish_reads_before_async_proxy() {}  // loads are done at once here

template <int kRegisters>
void shrink_registers() {
  emulator::set_registers(kRegisters, false);
}
template <int kRegisters>
void grow_registers() {
  emulator::set_registers(kRegisters, true);
}

}  // namespace flashmask::sm90
