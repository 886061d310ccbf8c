// The two queues of plan.h on atomics. Compiled for the base instruction set only.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/plan.h"

namespace flashmask {

class AtomicQueue final : public WorkQueue {
 public:
  explicit AtomicQueue(int64_t items) : items_(items) {}
  int64_t next() override {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < items_ ? item : -1;
  }

 private:
  const int64_t items_;
  std::atomic<int64_t> next_{0};
};

// Each thread publishes one word: the item that it works on (high half) and the position that it has not yet passed
// (low half). Claiming and publishing happen under one lock, so a later item always sees every earlier one.
class SlotQueue final : public OrderedQueue {
 public:
  SlotQueue(int64_t items, int64_t groups, int threads) : items_(items), groups_(groups), slots_(threads) {}

  int64_t claim(int thread) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t item = next_ < items_ ? next_++ : -1;
    slots_[thread].word.store(item < 0 ? kIdle : pack(item, 0), std::memory_order_release);
    return item;
  }
  void wait(int thread, int64_t item, uint32_t position) override {
    slots_[thread].word.store(pack(item, position), std::memory_order_release);
    for (size_t other = 0; other < slots_.size(); ++other) {
      if (other == static_cast<size_t>(thread)) continue;
      int spins = 0;
      while (blocks(slots_[other].word.load(std::memory_order_acquire), item, position)) {
        if (++spins > kSpinsBeforeYield) std::this_thread::yield();
      }
    }
  }
  void finish(int thread, int64_t item, uint32_t position) override {
    slots_[thread].word.store(pack(item, position + 1), std::memory_order_release);
  }

 private:
  static constexpr uint64_t kIdle = UINT64_MAX;
  static constexpr int kSpinsBeforeYield = 200;
  struct alignas(64) Slot {
    std::atomic<uint64_t> word{kIdle};
  };

  static uint64_t pack(int64_t item, uint32_t position) { return static_cast<uint64_t>(item) << 32 | position; }
  bool blocks(uint64_t word, int64_t item, uint32_t position) const {
    const int64_t other = static_cast<int64_t>(word >> 32);
    return word != kIdle && other < item && (item - other) % groups_ == 0 && static_cast<uint32_t>(word) <= position;
  }

  const int64_t items_;
  const int64_t groups_;
  int64_t next_ = 0;
  std::mutex mutex_;
  std::vector<Slot> slots_;
};

}  // namespace flashmask
