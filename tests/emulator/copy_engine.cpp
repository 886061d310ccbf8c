// TMA: copies that happen later. A place that a load will fill holds NaN until then; a store reads its place late.
#include <string.h>

#include <algorithm>

#include "state.h"
#include "toolkit/cuda.h"

namespace emulator {
namespace {

uint32_t swizzled(uint32_t address, int swizzle_bytes) {
  return address ^ (address >> 7 & (swizzle_bytes == 128 ? 7 : 3)) << 4;
}

// Calls visit(shared address, global address or null if outside) for every element of a box.
template <typename Visit>
void for_each_element(const CUtensorMap& map, uint32_t place, Corner corner, const Visit& visit) {
  const int row_bytes = map.box_columns * 2;
  const bool inside =
      corner.head >= 0 && corner.head < map.sizes[2] && corner.batch >= 0 && corner.batch < map.sizes[3];
  for (int r = 0; r < map.box_rows; ++r) {
    const int row = corner.row + r;
    char* const line = map.data + row * map.strides[1] + corner.head * map.strides[2] + corner.batch * map.strides[3];
    for (int c = 0; c < map.box_columns; ++c) {
      const int dim = corner.dim + c;
      const bool exists = inside && row >= 0 && row < map.sizes[1] && dim >= 0 && dim < map.sizes[0];
      visit(swizzled(place + r * row_bytes + c * 2, map.swizzle_bytes), exists ? line + dim * 2 : nullptr);
    }
  }
}

int box_bytes(const CUtensorMap& map) { return map.box_rows * map.box_columns * 2; }

void check_place(Block* block, uint32_t place, int bytes, int alignment) {
  if (place % alignment != 0) fail("the copy engine wants multiples of %d, got %u", alignment, place);
  block->shared_at(place, bytes);
}

MBarrier& load_barrier(Block* block, uint32_t address) {
  MBarrier& barrier = block->barrier_at(address);
  if (!barrier.published) fail("mbarrier %d: not published to the copy engine", barrier.number);
  return barrier;
}

void begin_reads(uint32_t source, int bytes) {
  for (int i = 0; i < bytes; i += 16) begin_read(current, &current->stores_read, source + i);
}

void complete_bytes(Block* block, MBarrier* barrier, int bytes) {
  barrier->bytes -= bytes;
  if (barrier->pending == barrier->count && barrier->bytes < 0) {
    fail("mbarrier %d: bytes that nobody has announced in this phase", barrier->number);
  }
  block->complete_if_done(barrier);
}

}  // namespace

void load_box(uint32_t destination, const CUtensorMap& map, uint32_t barrier_address, Corner corner) {
  Block* const block = current->block;
  MBarrier* const barrier = &load_barrier(block, barrier_address);
  check_place(block, destination, box_bytes(map), 128);
  const Load load = begin_load(destination, box_bytes(map));
  block->poison(destination, box_bytes(map));
  block->events.push_back({true, [=, map = map] {
                             for_each_element(map, destination, corner, [&](uint32_t place, const char* source) {
                               const uint16_t value = 0;
                               block->write_async(
                                   place, source == nullptr ? reinterpret_cast<const char*>(&value) : source, 2);
                             });
                             pass_on_load(&barrier->arriving, load);
                             complete_bytes(block, barrier, box_bytes(map));
                           }});
}

void load_bytes(uint32_t destination, const void* source, int bytes, uint32_t barrier_address) {
  Block* const block = current->block;
  MBarrier* const barrier = &load_barrier(block, barrier_address);
  check_place(block, destination, bytes, 16);
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("load_bytes: not in multiples of 16");
  const Load load = begin_load(destination, bytes);
  block->poison(destination, bytes);
  block->events.push_back({true, [=] {
                             for (int i = 0; i < bytes; i += 16)
                               block->write_async(destination + i, static_cast<const char*>(source) + i, 16);
                             pass_on_load(&barrier->arriving, load);
                             complete_bytes(block, barrier, bytes);
                           }});
}

void store_box(const CUtensorMap& map, uint32_t source, Corner corner) {
  Block* const block = current->block;
  check_place(block, source, box_bytes(map), 128);
  begin_reads(source, box_bytes(map));
  const auto values = std::make_shared<std::vector<uint16_t>>();
  BulkOperation operation;
  operation.read = [=, map = map] {
    for_each_element(map, source, corner, [&](uint32_t place, const char*) {
      uint16_t value;
      block->read_async(&value, place, 2);
      values->push_back(value);
    });
  };
  operation.write = [=, map = map] {
    const uint16_t* value = values->data();
    for_each_element(map, source, corner, [&](uint32_t, char* destination) {
      if (destination != nullptr) memcpy(destination, value, 2);
      ++value;
    });
  };
  current->stores.push_back(std::move(operation));
}

namespace {

template <typename Combine>
void send_floats(const char* name, float* destination, uint32_t source, int bytes, const Combine& combine) {
  Block* const block = current->block;
  check_place(block, source, bytes, 16);
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(destination) % 16 != 0) fail("%s: not in multiples of 16", name);
  begin_reads(source, bytes);
  const auto values = std::make_shared<std::vector<float>>(bytes / 4);
  BulkOperation operation;
  operation.read = [=] {
    for (int i = 0; i < bytes / 4; ++i) block->read_async(&(*values)[i], source + i * 4, 4);
  };
  operation.write = [=] {
    for (size_t i = 0; i < values->size(); ++i) combine(&destination[i], (*values)[i]);
  };
  current->stores.push_back(std::move(operation));
}

}  // namespace

void add_floats(float* destination, uint32_t source, int bytes) {
  send_floats("add_floats", destination, source, bytes, [](float* place, float value) { *place += value; });
}
void store_floats(float* destination, uint32_t source, int bytes) {
  send_floats("store_floats", destination, source, bytes, [](float* place, float value) { *place = value; });
}

void BulkGroup::read() {
  if (!is_read) {
    for (const BulkOperation& operation : operations) operation.read();
  }
  is_read = true;
}
void BulkGroup::write() {
  read();
  if (!is_written) {
    for (const BulkOperation& operation : operations) operation.write();
  }
  is_written = true;
}

void commit_stores() {
  const auto group = std::make_shared<BulkGroup>();
  group->operations.swap(current->stores);
  current->store_groups.push_back(group);
  commit_reads(&current->stores_read);
  Block* const block = current->block;
  block->events.push_back({false, [=] {
                             group->read();
                             block->events.push_back({false, [=] { group->write(); }});
                           }});
}

void wait_stores(int pending, bool written) {
  if (options.fault == Fault::kStoreWait && current->index >= options.fault_index) return;
  auto& groups = current->store_groups;
  while (!groups.empty() && groups.front()->is_written) groups.pop_front();
  for (int i = 0; i + pending < static_cast<int>(groups.size()); ++i) written ? groups[i]->write() : groups[i]->read();
  end_reads(current, &current->stores_read, pending);
}

}  // namespace emulator
