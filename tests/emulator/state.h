// What the emulated machine knows of blocks, warps and threads.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emulator {

struct Block;
struct Warp;

enum class State { kReady, kInCollective, kAtBarrier, kAtNamedBarrier, kAtCounter, kAtRegisters, kDone };

// Stores and reductions of the copy engine: first the shared memory is read, some time later the result is written.
struct BulkOperation {
  std::function<void()> read, write;
};
struct BulkGroup {
  std::vector<BulkOperation> operations;
  bool is_read = false, is_written = false;

  void read();
  void write();
};

using Clocks = std::vector<uint32_t>;  // of the threads of a block, and of their loads; empty: nothing seen

// A load of the copy engine: the clock that it is on, and when.
struct Load {
  int clock_of = 0;
  uint32_t clock = 0;
};

// Asynchronous reads of shared memory that were not waited for: addresses of 16 bytes, by groups.
struct Reading {
  std::vector<uint32_t> uncommitted;
  std::deque<std::vector<uint32_t>> groups;
};

struct Thread {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;

  State state = State::kReady;
  const char* collective = "";       // kInCollective
  uint32_t place = 0, parity = 0;    // kAtBarrier: address and parity; kAtNamedBarrier: id
  const int32_t* counter = nullptr;  // kAtCounter
  int32_t target = 0;                // kAtCounter, kAtRegisters

  bool begun = false;  // wgmma_begin since the last commit
  std::vector<Product> products;
  std::vector<BulkOperation> stores;
  std::deque<std::shared_ptr<BulkGroup>> store_groups;
  std::vector<std::function<void()>> copies;  // cp.async that was not committed
  std::deque<std::vector<std::function<void()>>> copy_groups;
  struct {
    float* c;
    const uint32_t *a, *b;
  } mma;

  std::vector<uint32_t> unfenced;     // 16-byte chunks of shared memory
  std::vector<uint32_t> unpublished;  // barriers

  // races.cpp: what this thread has seen, itself included; and without what it only knows by its warp. What its groups
  // of stores, and of its warp's products (lane 0), still read.
  Clocks seen, passes_on;
  uint32_t loads = 0;  // by the copy engine
  Reading stores_read, products_read;
};

// The accumulator of a warp while the tensor cores have it.
struct Accumulator {
  int groups;
  float* lanes[32];
  std::vector<float> values;  // [16 rows][8 * groups]
  int pending = 0;            // products
};
struct WarpProduct {
  Product product;
  Accumulator* accumulator;
  uint32_t a[32][4];           // register operands when issued
  const uint32_t* a_home[32];  // and where they were
};

struct Warp {
  Block* block = nullptr;
  Thread* lanes[32];
  int index = 0;
  int ready = 32, done = 0;
  uint32_t priority = 0;
  int registers = 0;

  // The collective that lanes have come to.
  int arrived = 0;
  const char* collective = "";
  uint32_t in[32], out[32];
  uint32_t (*operation)(uint32_t, uint32_t) = nullptr;
  uint64_t generation = 0;  // of the named barrier

  std::list<Accumulator> accumulators;
  std::deque<std::vector<WarpProduct>> product_groups;
  uint64_t product_hash = 0;
};

struct MBarrier {
  int number = 0;  // in the order of init
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool published = false;
  std::vector<Thread*> waiting;
  Clocks arriving, completed;  // of this phase and of the last
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint64_t warps = 0, generation = 0;
  std::vector<Thread*> waiting;
  Clocks arriving, completed;
};

// What happened last to four bytes of shared memory.
struct Word {
  int writer = 0;
  uint32_t clock = 0;  // of the writer; 0: never written
  Clocks reads;        // since then; by thread, 0: none
};

// What the copy engine has yet to do.
struct CopyEvent {
  bool is_load;
  std::function<void()> run;
};

struct Block {
  unsigned x = 0, y = 0;
  int slot = 0;
  int done = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // from address 0 on
  std::vector<int16_t> unfenced_by;   // thread + 1 of each 16-byte chunk
  std::vector<Word> words;            // if races are checked
  std::unordered_map<uint32_t, MBarrier> barriers;
  NamedBarrier named[16];
  std::vector<CopyEvent> events;
  int free_registers = 0;
  std::vector<Thread*> waiting_for_registers;

  unsigned char* shared_at(uint32_t address, int bytes);
  MBarrier& barrier_at(uint32_t address);
  void complete_if_done(MBarrier* barrier);
  void poison(uint32_t address, int bytes);
  // For tensor cores and copy engine: NaN where a write was not fenced.
  void read_async(void* destination, uint32_t address, int bytes);
  void write_async(uint32_t address, const void* source, int bytes);
};

extern Thread* current;  // null while the scheduler or the copy engine works
extern Options options;

uint64_t random_bits();
uint32_t collective(const char* name, uint32_t value, void (*combine)(Warp&));
void block_on(State state);
void make_ready(Thread* thread);
void make_all_ready(std::vector<Thread*>* threads);

void forget_counters();  // what fibers of the last launch waited for
void run_product_group(Warp* warp);

// races.cpp; nothing unless races are checked. For the current thread, if none is named.
void start_races(Block* block);
void pass_on(Clocks* clocks);    // arrives
void see(const Clocks& clocks);  // what others had passed on
void see_warp(Warp* warp);       // all lanes have met
void check_read(uint32_t address, int bytes);
void check_write(uint32_t address, const void* value, int bytes);  // before it
Load begin_load(uint32_t address, int bytes);                      // by the copy engine
void pass_on_load(Clocks* clocks, const Load& load);               // it is here
// Asynchronous reads of 16 bytes by a thread: they last until their group is waited for.
void begin_read(Thread* thread, Reading* reading, uint32_t address);
void commit_reads(Reading* reading);
void end_reads(Thread* thread, Reading* reading, int pending);

}  // namespace emulator
