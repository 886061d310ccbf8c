// Shared memory, mbarriers, named barriers, register shares, counters in global memory.
#include <string.h>

#include <algorithm>

#include "state.h"

namespace emulator {

unsigned char* Block::shared_at(uint32_t address, int bytes) {
  if (address < kSharedBase || address + bytes > shared.size()) {
    fail("%d bytes at shared address %u: the block has %u to %zu", bytes, address, kSharedBase, shared.size());
  }
  return shared.data() + address;
}

void Block::poison(uint32_t address, int bytes) {
  memset(shared_at(address, bytes), 0xFF, bytes);
  for (uint32_t chunk = address / 16; chunk < (address + bytes + 15) / 16; ++chunk) unfenced_by[chunk] = 0;
}

void Block::read_async(void* destination, uint32_t address, int bytes) {
  memcpy(destination, shared_at(address, bytes), bytes);
  if (unfenced_by[address / 16] != 0) memset(destination, 0xFF, bytes);
}

void Block::write_async(uint32_t address, const void* source, int bytes) {
  memcpy(shared_at(address, bytes), source, bytes);
  unfenced_by[address / 16] = 0;
}

namespace {

void check_aligned(uint32_t address, int bytes) {
  if (address % bytes != 0) fail("shared address %u is no multiple of %d", address, bytes);
}

void write_by(Thread* thread, uint32_t address, const void* value, int bytes) {
  Block& block = *thread->block;
  block.shared_at(address, bytes);
  check_write(address, value, bytes);
  memcpy(block.shared_at(address, bytes), value, bytes);
  block.unfenced_by[address / 16] = static_cast<int16_t>(thread->index + 1);
  thread->unfenced.push_back(address / 16);
}

}  // namespace

void store_shared(uint32_t address, const void* value, int bytes) {
  maybe_yield();
  check_aligned(address, bytes);
  write_by(current, address, value, bytes);
}

void load_shared(void* value, uint32_t address, int bytes) {
  maybe_yield();
  check_aligned(address, bytes);
  current->block->shared_at(address, bytes);
  check_read(address, bytes);
  memcpy(value, current->block->shared_at(address, bytes), bytes);
}

char* shared_data() { return reinterpret_cast<char*>(current->block->shared.data()) + kSharedBase; }

void store_matrix(uint32_t address, const uint32_t (&fragment)[4]) {
  check_aligned(address, 16);
  // Lane l holds pair l % 4 of row l / 4 of each matrix; lane 8i + r names the place of row r of matrix i.
  uint32_t rows[4];
  collective("store_matrix", address, [](Warp& warp) { std::copy_n(warp.in, 32, warp.out); });
  const Warp& warp = *current->warp;
  for (int i = 0; i < 4; ++i) rows[i] = warp.out[8 * i + warp.lanes[current->lane]->lane / 4];
  for (int i = 0; i < 4; ++i) write_by(current, rows[i] + current->lane % 4 * 4, &fragment[i], 4);
  sync_warp("store_matrix's end");
}

void fence_async_proxy() {
  Thread& me = *current;
  if (options.fault == Fault::kProxyFence) return;
  for (const uint32_t chunk : me.unfenced) {
    if (me.block->unfenced_by[chunk] == me.index + 1) me.block->unfenced_by[chunk] = 0;
  }
  me.unfenced.clear();
}

// ---- mbarriers ----

namespace {
std::vector<Thread*> waiting_for_counters;
std::vector<Thread*> waiting_for_either;  // for a counter or the end of a phase: they look again after both
}  // namespace

MBarrier& Block::barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("there is no mbarrier at %u", address);
  return found->second;
}

void Block::complete_if_done(MBarrier* barrier) {
  if (barrier->pending > 0 || barrier->bytes != 0) return;
  barrier->phase ^= 1;
  barrier->pending = barrier->count;
  barrier->completed.swap(barrier->arriving);
  barrier->arriving.clear();
  make_all_ready(&barrier->waiting);
  make_all_ready(&waiting_for_either);
}

void init_barrier(uint32_t address, int arrivals) {
  Block& block = *current->block;
  check_aligned(address, 8);
  block.shared_at(address, 8);
  if (arrivals < 1) fail("an mbarrier of %d arrivals", arrivals);
  MBarrier barrier;
  barrier.number = static_cast<int>(block.barriers.size());
  barrier.count = barrier.pending = arrivals;
  if (!block.barriers.emplace(address, barrier).second) fail("there is an mbarrier at %u already", address);
  current->unpublished.push_back(address);
}

void publish_barriers() {
  for (const uint32_t address : current->unpublished) current->block->barrier_at(address).published = true;
  current->unpublished.clear();
}

void arrive(uint32_t address, int bytes) {
  maybe_yield();
  Block& block = *current->block;
  MBarrier& barrier = block.barrier_at(address);
  if (options.fault == Fault::kArrival && options.fault_index == barrier.number) return;
  if (barrier.pending <= 0) fail("mbarrier %d: more than %d arrivals", barrier.number, barrier.count);
  barrier.bytes += bytes;
  --barrier.pending;
  pass_on(&barrier.arriving);
  block.complete_if_done(&barrier);
}

void vouch(uint32_t address) {
  if (options.races == Races::kByLanes) pass_on(&current->block->barrier_at(address).arriving);
}

namespace {
MBarrier& barrier_waited_for(uint32_t address, uint32_t parity) {
  MBarrier& barrier = current->block->barrier_at(address);
  if (parity > 1) fail("mbarrier %d: waits for parity %u", barrier.number, parity);
  return barrier;
}
bool is_left_out(const MBarrier& barrier) {
  return options.fault == Fault::kBarrierWait && options.fault_index == barrier.number;
}
}  // namespace

bool test_barrier(uint32_t address, uint32_t parity) {
  maybe_yield();
  const MBarrier& barrier = barrier_waited_for(address, parity);
  if (is_left_out(barrier)) return true;
  if (barrier.phase == parity) return false;
  see(barrier.completed);
  return true;
}

void wait_barrier(uint32_t address, uint32_t parity) {
  MBarrier& barrier = barrier_waited_for(address, parity);
  if (is_left_out(barrier)) return;
  // Asked again after every phase: who sleeps through two of them waits on, as on the device.
  while (barrier.phase == parity) {
    barrier.waiting.push_back(current);
    current->place = address;
    current->parity = parity;
    block_on(State::kAtBarrier);
  }
  see(barrier.completed);
}

// ---- named barriers: whole warps come ----

void named_barrier(int id, int threads, bool wait) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("named barrier %d of %d threads", id, threads);
  collective(wait ? "a named barrier" : "arriving at a named barrier", id << 16 | threads, [](Warp& warp) {
    for (const uint32_t value : warp.in) {
      if (value != warp.in[0]) fail("lanes of a warp at different named barriers");
    }
    const int id = warp.in[0] >> 16, threads = warp.in[0] & 0xFFFF;
    NamedBarrier& named = warp.block->named[id];
    if (named.arrived > 0 && named.expected != threads) {
      fail("named barrier %d: for %d threads, but others say %d", id, threads, named.expected);
    }
    if (named.warps >> warp.index & 1) fail("named barrier %d: the warp comes twice", id);
    warp.generation = named.generation;
    named.expected = threads;
    named.warps |= uint64_t{1} << warp.index;
    named.arrived += 32;
    Thread* const last = current;
    for (Thread* thread : warp.lanes) {
      current = thread;
      pass_on(&named.arriving);
    }
    current = last;
    if (named.arrived == threads) {
      named.arrived = 0;
      named.warps = 0;
      ++named.generation;
      named.completed.swap(named.arriving);
      named.arriving.clear();
      make_all_ready(&named.waiting);
    }
  });
  if (!wait || (options.fault == Fault::kNamedBarrier && options.fault_index == id)) return;
  NamedBarrier& named = current->block->named[id];
  while (named.generation == current->warp->generation) {
    named.waiting.push_back(current);
    current->place = id;
    block_on(State::kAtNamedBarrier);
  }
  see(named.completed);
}

// ---- registers ----

void set_registers(int registers, bool grow) {
  collective(grow ? "grow_registers" : "shrink_registers", registers, [](Warp&) {});
  Thread& me = *current;
  Warp& warp = *me.warp;
  Block& block = *me.block;
  if (registers < 24 || registers > 256 || registers % 8 != 0) fail("setmaxnreg to %d", registers);
  if (me.lane == 0) {
    if (grow ? registers < warp.registers : registers > warp.registers) {
      fail("setmaxnreg from %d to %d in the wrong direction", warp.registers, registers);
    }
    while (block.free_registers < (registers - warp.registers) * 32) {
      block.waiting_for_registers.push_back(&me);
      me.target = registers;
      block_on(State::kAtRegisters);
    }
    block.free_registers -= (registers - warp.registers) * 32;
    warp.registers = registers;
    make_all_ready(&block.waiting_for_registers);
  }
  sync_warp("setmaxnreg's end");
}

// ---- counters ----

void forget_counters() {
  waiting_for_counters.clear();
  waiting_for_either.clear();
}

namespace {
void sleep_at_counter(const int32_t* counter, int32_t value, std::vector<Thread*>* waiting) {
  waiting->push_back(current);
  current->counter = counter;
  current->target = value;
  block_on(State::kAtCounter);
}
}  // namespace

void wait_for_count(const int32_t* counter, int32_t value) {
  if (options.fault == Fault::kCountWait && options.fault_index == value) return;
  while (*counter < value) sleep_at_counter(counter, value, &waiting_for_counters);
}

bool wait_for_count_until(const int32_t* counter, int32_t value, uint32_t address, uint32_t parity) {
  if (options.fault == Fault::kCountWait && options.fault_index == value) return true;
  while (true) {
    if (test_barrier(address, parity)) return false;
    if (*counter >= value) return true;
    sleep_at_counter(counter, value, &waiting_for_either);  // nothing has yielded since test_barrier looked
  }
}

void count_up(int32_t* counter) {
  maybe_yield();
  ++*counter;
  make_all_ready(&waiting_for_counters);  // they look again
  make_all_ready(&waiting_for_either);
}

}  // namespace emulator
