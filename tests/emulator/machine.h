// The emulated multiprocessor, as the kernels see it through the headers of toolkit/ and overlay/. What each function
// means is said at the real one of the same name in custom_ops/flashmask; here is only what the machine adds.
#pragma once

#include <stdint.h>

#include <functional>

struct CUtensorMap;

namespace emulator {

// Shared memory starts here, as on the device: an address of 0 is a mistake.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// What a self-test breaks. `fault_index` says which one.
enum class Fault : int {
  kNone = 0,
  kBarrierWait = 1,   // waits for this mbarrier (in the order of init) return at once
  kNamedBarrier = 2,  // the same for this named barrier
  kProxyFence = 3,    // fence_async_proxy does nothing
  kStoreWait = 4,     // neither do wait_stores_read and wait_stores, for threads from this one on
  kWgmmaWait = 5,     // wgmma_wait leaves one group more unfinished
  kWgmmaBegin = 6,    // wgmma_begin does nothing
  kArrival = 7,       // arrivals at this mbarrier get lost
  kCountWait = 8,     // waits for a counter in global memory to reach this value return at once
  kCopyWait = 9,      // waits for cp.async leave one group more unfinished
};

// Whether accesses of shared memory are checked for races (races.cpp).
enum class Races : int {
  kUnchecked = 0,
  kByWarps = 1,  // who arrives at an mbarrier vouches for all that its warp did before a common __syncwarp
  kByLanes = 2,  // only for itself, as racecheck of compute-sanitizer has it; all lanes take part in arrive_warp
};

struct Options {
  uint64_t seed = 0;
  Races races = Races::kUnchecked;
  int multiprocessors = 2;  // blocks that run at the same time
  Fault fault = Fault::kNone;
  int fault_index = 0;
};

// Runs `kernel` once for every thread of every block. False if anything went wrong; last_error() then says what.
bool launch(const std::function<void()>& kernel, unsigned blocks_x, unsigned blocks_y, int threads, int shared_bytes);
void configure(const Options& options);
const char* last_error();

// ---- for the fibers ----

// Ends the launch with an error.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

int lane();
int threads_of_block();
void maybe_yield();  // now and then, lets others run here
void linger();       // often, and for long

// Collectives of a warp: all 32 lanes have to come to the same one.
void sync_warp(const char* name);
uint32_t reduce(const char* name, uint32_t mask, uint32_t value, uint32_t (*operation)(uint32_t, uint32_t));
uint32_t shuffle(uint32_t mask, uint32_t value, int source);
uint32_t uniform(uint32_t value);  // fails if lanes disagree

// Shared memory: bytes that a thread wrote and did not fence are unknown to the tensor cores and the copy engine.
void store_shared(uint32_t address, const void* value, int bytes);
void load_shared(void* value, uint32_t address, int bytes);
void store_matrix(uint32_t address, const uint32_t (&fragment)[4]);
void fence_async_proxy();

char* shared_data();  // where address kSharedBase is, for kernels that use pointers into their shared memory

// cp.async: done when it is waited for. NaN stands there until then.
void copy_async(uint32_t destination, const void* source, int bytes, bool valid);
void commit_copies();
void wait_copies(int pending);

// Matrix instructions of a warp.
void load_matrix(uint32_t (&fragment)[4], uint32_t address, bool transposed);
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);

void init_barrier(uint32_t address, int arrivals);
void publish_barriers();
void arrive(uint32_t address, int bytes);
void vouch(uint32_t address);  // kByLanes: this lane, too, for the arrival of its warp that follows
bool test_barrier(uint32_t address, uint32_t parity);
void wait_barrier(uint32_t address, uint32_t parity);
void named_barrier(int id, int threads, bool wait);
void set_registers(int registers, bool grow);

void wait_for_count(const int32_t* counter, int32_t value);
// Unless a phase of the mbarrier is over before: returns whether the count was reached.
bool wait_for_count_until(const int32_t* counter, int32_t value, uint32_t address, uint32_t parity);
void count_up(int32_t* counter);

// The copy engine: does everything later, at a time of its own choosing, at the latest when it is waited for.
struct Corner {
  int dim, row, head, batch;
};
void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier, Corner corner);
void load_bytes(uint32_t destination, const void* source, int bytes, uint32_t barrier);
void store_box(const CUtensorMap& map, uint32_t source, Corner corner);
void add_floats(float* destination, uint32_t source, int bytes);
void store_floats(float* destination, uint32_t source, int bytes);
void commit_stores();
void wait_stores(int pending, bool written);

// The tensor cores, as late.
struct Product {
  float* c;  // [groups][4] of this lane
  int groups;
  bool bfloat16;  // else float16
  bool add;
  uint64_t a_descriptor;  // A from shared memory, unless
  bool a_transposed;      // (contiguous along M)
  const uint32_t* a;      // it comes from four registers
  uint64_t b_descriptor;
  bool b_transposed;  // (contiguous along N)
};
void wgmma_begin();
void wgmma(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator
