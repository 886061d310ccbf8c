// Who has seen what of shared memory: every thread has a clock, and knows how far it has seen every other's (vector
// clocks). Two accesses of a word, one of them a write, want that the later thread has seen the clock of the earlier
// one. What a thread loads by the copy engine has a clock of its own, which only the load's mbarrier passes on: not
// what the thread arrives at meanwhile.
#include <algorithm>

#include "state.h"

namespace emulator {
namespace {

void join(Clocks* into, const Clocks& from) {
  if (into->size() < from.size()) into->resize(from.size(), 0);
  uint32_t* const mine = into->data();
  const uint32_t* const other = from.data();
  for (size_t i = 0; i < from.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

constexpr uint32_t kNotOver = ~0u;  // the clock of a read that lasts

void tick(Thread* thread) { thread->passes_on[thread->index] = ++thread->seen[thread->index]; }

// What others see of a thread that arrives somewhere.
const Clocks& passed_on(const Thread& thread) {
  return options.races == Races::kByLanes ? thread.passes_on : thread.seen;
}

[[noreturn]] void fail_race(uint32_t word, const char* mine, const char* others, int other) {
  fail("race: %s of shared address %u, after a %s by thread %d that it has not seen", mine, word * 4, others,
       other % static_cast<int>(current->block->threads.size()));
}

}  // namespace

void start_races(Block* block) {
  if (options.races == Races::kUnchecked) return;
  block->words.assign(block->shared.size() / 4 + 1, Word());
  for (Thread& thread : block->threads) {
    thread.seen.assign(2 * block->threads.size(), 0);
    thread.passes_on = thread.seen;
    tick(&thread);
  }
}

void pass_on(Clocks* clocks) {
  if (options.races == Races::kUnchecked) return;
  join(clocks, passed_on(*current));
  tick(current);
}

Load begin_load(uint32_t address, int bytes) {
  check_write(address, nullptr, bytes);
  if (options.races == Races::kUnchecked) return {};
  Thread& me = *current;
  const Load load{static_cast<int>(me.block->threads.size()) + me.index, ++me.loads};
  for (uint32_t i = address / 4; i < (address + bytes) / 4; ++i) {
    me.block->words[i].writer = load.clock_of;
    me.block->words[i].clock = load.clock;
  }
  return load;
}

void pass_on_load(Clocks* clocks, const Load& load) {
  if (options.races == Races::kUnchecked) return;
  if (static_cast<int>(clocks->size()) <= load.clock_of) clocks->resize(load.clock_of + 1, 0);
  (*clocks)[load.clock_of] = std::max((*clocks)[load.clock_of], load.clock);
}

void see(const Clocks& clocks) {
  if (options.races == Races::kUnchecked) return;
  join(&current->seen, clocks);
  join(&current->passes_on, clocks);
}

void see_warp(Warp* warp) {
  if (options.races == Races::kUnchecked) return;
  Clocks all;
  for (const Thread* thread : warp->lanes) join(&all, thread->seen);
  for (Thread* thread : warp->lanes) {
    thread->seen = all;
    tick(thread);
  }
}

void check_read(uint32_t address, int bytes) {
  if (options.races == Races::kUnchecked) return;
  Thread& me = *current;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; ++i) {
    Word& word = me.block->words[i];
    if (word.clock > me.seen[word.writer]) fail_race(i, "a read", "write", word.writer);
    if (word.reads.empty()) word.reads.assign(me.seen.size(), 0);
    word.reads[me.index] = me.seen[me.index];
  }
}

void begin_read(Thread* thread, Reading* reading, uint32_t address) {
  if (options.races == Races::kUnchecked) return;
  for (uint32_t i = address / 4; i < address / 4 + 4; ++i) {
    Word& word = thread->block->words[i];
    if (word.clock > thread->seen[word.writer]) fail_race(i, "an asynchronous read", "write", word.writer);
    if (word.reads.empty()) word.reads.assign(thread->seen.size(), 0);
    word.reads[thread->index] = kNotOver;
  }
  reading->uncommitted.push_back(address);
}

void commit_reads(Reading* reading) {
  if (options.races == Races::kUnchecked) return;
  reading->groups.emplace_back();
  reading->groups.back().swap(reading->uncommitted);
}

void end_reads(Thread* thread, Reading* reading, int pending) {
  if (options.races == Races::kUnchecked) return;
  const auto set = [&](const std::vector<uint32_t>& addresses, uint32_t clock) {
    for (const uint32_t address : addresses) {
      for (uint32_t i = address / 4; i < address / 4 + 4; ++i) thread->block->words[i].reads[thread->index] = clock;
    }
  };
  bool ended = false;
  for (; static_cast<int>(reading->groups.size()) > pending; reading->groups.pop_front()) {
    set(reading->groups.front(), thread->seen[thread->index]);
    ended = true;
  }
  if (!ended) return;
  for (const auto& group : reading->groups) set(group, kNotOver);  // what both read
}

void check_write(uint32_t address, const void* value, int bytes) {
  if (options.races == Races::kUnchecked) return;
  Thread& me = *current;
  const unsigned char* there = me.block->shared.data() + address;
  // Lanes of a warp that store the same do no harm.
  const bool same = value != nullptr && std::equal(there, there + bytes, static_cast<const unsigned char*>(value));
  for (uint32_t i = address / 4; i < (address + bytes) / 4; ++i) {
    Word& word = me.block->words[i];
    const bool harmless = same && word.writer / 32 == me.index / 32;
    if (word.clock > me.seen[word.writer] && !harmless) fail_race(i, "a write", "write", word.writer);
    for (size_t other = 0; other < word.reads.size(); ++other) {
      if (word.reads[other] > me.seen[other]) fail_race(i, "a write", "read", static_cast<int>(other));
    }
    std::fill(word.reads.begin(), word.reads.end(), 0);
    word.writer = me.index;
    word.clock = me.seen[me.index];
  }
}

}  // namespace emulator
