// Threads of the device as fibers of one thread of the host, and which of them runs next.
#include <sys/mman.h>

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>

#include "state.h"
#include "toolkit/cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim;

namespace emulator {

Thread* current = nullptr;
Options options;

namespace {

struct Failure {};

constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 4096;
constexpr int kMostThreads = 4096;
constexpr int64_t kMostTurns = 50'000'000;

std::string error;
bool failed = false;
uint64_t random_state = 1;
void* scheduler_stack_pointer;
const std::function<void()>* kernel;
std::vector<std::unique_ptr<Block>> live;
// How soon asynchronous work is done: of 256 turns of the scheduler, so many also do a piece of it. 0: only when
// nothing else can go on, or it is waited for.
unsigned eagerness;
bool strict;       // the warp of highest priority always runs, until priorities change
int laggard = -1;  // a warp that only runs when no other can

char* stack_of(int index) {
  static char* const stacks = [] {
    void* memory = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  }();
  static std::vector<bool> guarded(kMostThreads);
  if (stacks == nullptr || index >= kMostThreads) fail("no stack for fiber %d", index);
  char* stack = stacks + index * kStackBytes;
  if (!guarded[index]) {
    mprotect(stack, kGuardBytes, PROT_NONE);  // an overflow is then an error, not a riddle
    guarded[index] = true;
  }
  return stack;
}

extern "C" void emulator_switch(void** save, void* load);

void to_scheduler() { emulator_switch(&current->stack_pointer, scheduler_stack_pointer); }

void run_thread() {
  (*kernel)();
  Thread& me = *current;
  if (me.warp->arrived > 0) fail("exits while other lanes of its warp wait in %s", me.warp->collective);
  if (!me.products.empty() || !me.warp->product_groups.empty()) fail("exits with unfinished products");
  if (!me.stores.empty()) fail("exits with uncommitted stores");
  if (!me.copies.empty() || !me.copy_groups.empty()) fail("exits with copies that were not waited for");
  me.state = State::kDone;
  --me.warp->ready;
  ++me.warp->done;
  ++me.block->done;
  to_scheduler();
  __builtin_unreachable();
}

void prepare(Thread* thread, int stack_index) {
  void** top = reinterpret_cast<void**>(stack_of(stack_index) + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as a call would
  *--top = reinterpret_cast<void*>(run_thread);
  top -= 6;  // callee-saved registers
  thread->stack_pointer = top;
}

void resume(Thread* thread) {
  threadIdx.x = thread->index;
  blockIdx.x = thread->block->x;
  blockIdx.y = thread->block->y;
  current = thread;
  emulator_switch(&scheduler_stack_pointer, thread->stack_pointer);
  current = nullptr;
  if (failed) throw Failure();
}

std::string describe(const Thread& thread) {
  char text[256] = "ready";
  switch (thread.state) {
    case State::kReady:
      break;
    case State::kDone:
      return "done";
    case State::kInCollective:
      snprintf(text, sizeof text, "in %s, for the other lanes", thread.collective);
      break;
    case State::kAtBarrier: {
      const MBarrier& barrier = thread.block->barriers[thread.place];
      snprintf(text, sizeof text,
               "for mbarrier %d, parity %u (now in phase %u, %d of %d arrivals and %lld bytes to come)", barrier.number,
               thread.parity, barrier.phase, barrier.pending, barrier.count, static_cast<long long>(barrier.bytes));
      break;
    }
    case State::kAtNamedBarrier: {
      const NamedBarrier& named = thread.block->named[thread.place];
      snprintf(text, sizeof text, "for named barrier %u (%d of %d threads there)", thread.place, named.arrived,
               named.expected);
      break;
    }
    case State::kAtCounter:
      snprintf(text, sizeof text, "for a counter to come from %d to %d", *thread.counter, thread.target);
      break;
    case State::kAtRegisters:
      snprintf(text, sizeof text, "for %d registers a thread (%d free in the block)", thread.target,
               thread.block->free_registers);
      break;
  }
  return text;
}

[[noreturn]] void fail_deadlock() {
  std::string text = "deadlock; waiting:";
  for (const auto& block : live) {
    for (const Warp& warp : block->warps) {
      for (int lane = 0; lane < 32;) {
        const std::string mine = describe(*warp.lanes[lane]);
        int end = lane + 1;
        while (end < 32 && describe(*warp.lanes[end]) == mine) ++end;
        if (mine != "done") {
          text += "\n  block " + std::to_string(block->x) + " warp " + std::to_string(warp.index) + " lanes " +
                  std::to_string(lane) + "-" + std::to_string(end - 1) + " " + mine;
        }
        lane = end;
      }
    }
  }
  error = text;
  throw Failure();
}

// One piece of asynchronous work, if there is any.
bool do_event(bool copies_only) {
  Block* block = nullptr;
  int seen = 0;
  for (const auto& candidate : live) {
    if (!candidate->events.empty() && random_bits() % ++seen == 0) block = candidate.get();
  }
  Warp* warp = nullptr;
  if (!copies_only) {
    int warps = 0;
    for (const auto& candidate : live) {
      for (Warp& other : candidate->warps) {
        if (!other.product_groups.empty() && random_bits() % ++warps == 0) warp = &other;
      }
    }
  }
  if (warp != nullptr && (block == nullptr || random_bits() % 2 == 0)) {
    run_product_group(warp);
    return true;
  }
  if (block == nullptr) return false;
  const size_t index = random_bits() % block->events.size();
  const CopyEvent event = std::move(block->events[index]);
  block->events[index] = std::move(block->events.back());
  block->events.pop_back();
  event.run();
  return true;
}

void change_priority(Warp* warp) { warp->priority = warp->index == laggard ? 0 : static_cast<uint32_t>(random_bits()); }

Warp* choose_warp() {
  Warp* chosen = nullptr;
  uint32_t best = 0;
  int seen = 0;
  const bool by_priority = strict || random_bits() % 4 != 0;
  for (const auto& block : live) {
    for (Warp& warp : block->warps) {
      if (warp.ready == 0) continue;
      ++seen;
      if (by_priority ? chosen == nullptr || warp.priority > best : random_bits() % seen == 0) {
        chosen = &warp;
        best = warp.priority;
      }
    }
  }
  return chosen;
}

void start_block(unsigned number, unsigned blocks_x, int slot, int threads, int shared_bytes) {
  auto block = std::make_unique<Block>();
  block->x = number % blocks_x;
  block->y = number / blocks_x;
  block->slot = slot;
  block->shared.assign(kSharedBase + shared_bytes, 0xFF);  // NaN in every type
  block->unfenced_by.assign((kSharedBase + shared_bytes + 15) / 16, 0);
  block->threads.resize(threads);
  block->warps.resize(threads / 32);
  // What the compiler may use under __launch_bounds__(threads, 1).
  const int registers = std::min(65536 / threads / 8 * 8, 255);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block.get();
    thread.warp = &block->warps[i / 32];
    thread.index = i;
    thread.lane = i % 32;
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->block = block.get();
    thread.warp->index = i / 32;
    thread.warp->registers = registers;
    prepare(&thread, slot * threads + i);
  }
  for (Warp& warp : block->warps) change_priority(&warp);
  start_races(block.get());
  live.push_back(std::move(block));
}

void finish_block(Block* block) {
  for (Thread& thread : block->threads) {
    for (const auto& group : thread.store_groups) {
      if (!group->is_read) fail("block %u ends while a store still reads its shared memory", block->x);
      group->write();
    }
  }
  for (const CopyEvent& event : block->events) {
    if (event.is_load) fail("block %u ends before all its loads have come", block->x);
  }
  for (size_t first = 0; first + 4 <= block->warps.size(); first += 4) {
    for (size_t i = 1; i < 4; ++i) {
      if (block->warps[first + i].product_hash != block->warps[first].product_hash) {
        fail("block %u: the warps of warpgroup %zu issued different products", block->x, first / 4);
      }
    }
  }
}

void run(unsigned blocks_x, unsigned blocks_y, int threads, int shared_bytes) {
  const unsigned blocks = blocks_x * blocks_y;
  const unsigned at_once = shared_bytes > 0 ? options.multiprocessors : 1;
  unsigned next = 0;
  std::vector<bool> slot_taken(at_once);
  int64_t turns = 0;
  while (true) {
    while (live.size() < at_once && next < blocks) {
      const int slot = std::find(slot_taken.begin(), slot_taken.end(), false) - slot_taken.begin();
      slot_taken[slot] = true;
      start_block(next++, blocks_x, slot, threads, shared_bytes);
    }
    if (live.empty()) return;
    if (++turns > kMostTurns) fail("the kernel does not come to an end");
    if (random_bits() % 256 < eagerness) do_event(false);
    Warp* const warp = choose_warp();
    if (warp == nullptr) {
      if (!do_event(true)) fail_deadlock();
      continue;
    }
    if (random_bits() % 64 == 0) change_priority(warp);
    Block* const block = warp->block;
    const int first = random_bits() % 32;
    for (int i = 0; i < 32; ++i) {
      Thread* const thread = warp->lanes[(first + i) % 32];
      if (thread->state == State::kReady) resume(thread);
      if (random_bits() % 128 == 0) break;  // now and then lanes are far apart
    }
    if (block->done == threads) {
      finish_block(block);
      slot_taken[block->slot] = false;
      live.erase(std::find_if(live.begin(), live.end(), [block](const auto& other) { return other.get() == block; }));
    }
  }
}

}  // namespace

asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

void configure(const Options& chosen) {
  options = chosen;
  random_state = (chosen.seed + 1) * 0x9E3779B97F4A7C15ull;
  for (int i = 0; i < 8; ++i) random_bits();
  constexpr unsigned kEagerness[] = {0, 4, 128};
  eagerness = kEagerness[chosen.seed % 3];
  const int style = static_cast<int>(chosen.seed / 3 % 3);
  strict = style != 0;
  laggard = style == 2 ? static_cast<int>(chosen.seed / 9 % 16) : -1;
  error.clear();
}
const char* last_error() { return error.c_str(); }

bool launch(const std::function<void()>& body, unsigned blocks_x, unsigned blocks_y, int threads, int shared_bytes) {
  failed = false;
  forget_counters();
  kernel = &body;
  gridDim = dim3(blocks_x, blocks_y);
  threadIdx = blockIdx = dim3(0, 0, 0);
  try {
    if (threads % 32 != 0) fail("blocks of whole warps only");
    run(blocks_x, blocks_y, threads, shared_bytes);
  } catch (const Failure&) {
    failed = true;
  }
  current = nullptr;
  live.clear();  // fibers in the middle of something are dropped as they are
  return !failed;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failed = true;
  if (current == nullptr) {
    error = text;
    throw Failure();
  }
  error = "block " + std::to_string(current->block->x) + " thread " + std::to_string(current->index) + ": " + text;
  to_scheduler();
  __builtin_unreachable();
}

uint64_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545F4914F6CDD1Dull) >> 16;
}

int lane() { return current->lane; }
int threads_of_block() { return static_cast<int>(current->block->threads.size()); }
void maybe_yield() {
  if (random_bits() % 256 == 0) to_scheduler();
}

void linger() {
  while (random_bits() % 32 != 0) to_scheduler();
}

void block_on(State state) {
  current->state = state;
  --current->warp->ready;
  to_scheduler();
}
void make_ready(Thread* thread) {
  thread->state = State::kReady;
  ++thread->warp->ready;
}
void make_all_ready(std::vector<Thread*>* threads) {
  for (Thread* thread : *threads) make_ready(thread);
  threads->clear();
}

uint32_t collective(const char* name, uint32_t value, void (*combine)(Warp&)) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (warp.done > 0) fail("in %s, but other lanes of its warp have ended", name);
  if (warp.arrived == 0) {
    warp.collective = name;
  } else if (strcmp(warp.collective, name) != 0) {
    fail("in %s, but other lanes of its warp are in %s", name, warp.collective);
  }
  warp.in[me.lane] = value;
  me.collective = name;
  if (++warp.arrived < 32) {
    block_on(State::kInCollective);
  } else {
    warp.arrived = 0;
    combine(warp);
    see_warp(&warp);
    for (Thread* thread : warp.lanes) {
      if (thread != &me) make_ready(thread);
    }
  }
  // No later collective can end before this lane has come to it: what the last one made is still there.
  return warp.out[me.lane];
}

void sync_warp(const char* name) {
  collective(name, 0, [](Warp&) {});
}
uint32_t reduce(const char* name, uint32_t mask, uint32_t value, uint32_t (*operation)(uint32_t, uint32_t)) {
  if (mask != kAllLanes) fail("%s: only of all lanes", name);
  current->warp->operation = operation;
  return collective(name, value, [](Warp& warp) {
    uint32_t result = warp.in[0];
    for (int i = 1; i < 32; ++i) result = warp.operation(result, warp.in[i]);
    std::fill_n(warp.out, 32, result);
  });
}
uint32_t shuffle(uint32_t mask, uint32_t value, int source) {
  if (mask != kAllLanes) fail("__shfl_sync: only of all lanes");
  collective("__shfl_sync", value, [](Warp& warp) { std::copy_n(warp.in, 32, warp.out); });
  return current->warp->out[source];
}
uint32_t uniform(uint32_t value) {
  return collective("uniform", value, [](Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      if (warp.in[i] != warp.in[0]) fail("uniform() of %u in lane 0 and %u in lane %d", warp.in[0], warp.in[i], i);
      warp.out[i] = warp.in[0];
    }
  });
}

}  // namespace emulator
