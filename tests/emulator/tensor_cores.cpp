// wgmma: products that read their operands late, and whose accumulators are NaN until they have been waited for.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "numbers.h"
#include "state.h"

namespace emulator {
namespace {

// A matrix in shared memory by its descriptor: 16 along K, any number along the other axis ("mn").
struct Operand {
  uint32_t start, panel_distance, group_distance;
  int row_bytes;  // of a panel; also the kind of swizzle
  bool transposed;

  Operand(uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3FFF) << 4),
        panel_distance((descriptor >> 16 & 0x3FFF) << 4),
        group_distance((descriptor >> 32 & 0x3FFF) << 4),
        row_bytes(descriptor >> 62 == 1 ? 128 : 64),
        transposed(transposed) {
    if (descriptor >> 62 != 1 && descriptor >> 62 != 2) fail("wgmma: a descriptor without 128- or 64-byte swizzle");
  }
  // Address of eight neighbouring values: along K, or along mn if transposed.
  uint32_t chunk(int mn, int k) const {
    uint32_t address = start;
    if (transposed) {
      const int panel = row_bytes / 2;
      address += mn / panel * panel_distance + k / 8 * group_distance + k % 8 * row_bytes + mn % panel * 2;
    } else {
      address += mn / 8 * group_distance + mn % 8 * row_bytes + k * 2;
    }
    return address ^ (address >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
  }
};

// Values [16 along K][count along mn], from `first` on.
template <float (*kConvert)(uint16_t)>
void fetch(Block* block, const Operand& operand, int first, int count, float* values) {
  uint16_t eight[8];
  if (operand.transposed) {
    for (int k = 0; k < 16; ++k) {
      for (int mn = 0; mn < count; mn += 8) {
        block->read_async(eight, operand.chunk(first + mn, k), 16);
        for (int i = 0; i < 8; ++i) values[k * count + mn + i] = kConvert(eight[i]);
      }
    }
  } else {
    for (int mn = 0; mn < count; ++mn) {
      for (int k = 0; k < 16; k += 8) {
        block->read_async(eight, operand.chunk(first + mn, k), 16);
        for (int i = 0; i < 8; ++i) values[(k + i) * count + mn] = kConvert(eight[i]);
      }
    }
  }
}

// Where lane `lane` has element i of group n: row and column.
int row_of(int lane, int i) { return lane / 4 + i / 2 * 8; }
int column_of(int lane, int n, int i) { return n * 8 + lane % 4 * 2 + i % 2; }

// Calls visit(address) for all 16 bytes of an operand that a warp reads.
template <typename Visit>
void for_each_chunk(const Operand& operand, int first, int count, const Visit& visit) {
  const int step_mn = operand.transposed ? 8 : 1, step_k = operand.transposed ? 1 : 8;
  for (int k = 0; k < 16; k += step_k) {
    for (int mn = 0; mn < count; mn += step_mn) visit(operand.chunk(first + mn, k));
  }
}

void begin_reads(Warp* warp, const Product& product) {
  if (options.races == Races::kUnchecked) return;
  Thread* const first = warp->lanes[0];
  const auto read = [&](uint32_t address) { begin_read(first, &first->products_read, address); };
  // A is transposed where dS is multiplied for dQ. The first such product of a column tile reads what happens to be
  // there, and is dropped: that is no race.
  if (product.a == nullptr && !product.a_transposed) {
    for_each_chunk(Operand(product.a_descriptor, false), warp->index % 4 * 16, 16, read);
  }
  for_each_chunk(Operand(product.b_descriptor, product.b_transposed), 0, product.groups * 8, read);
}

template <float (*kConvert)(uint16_t)>
void multiply(Warp* warp, const WarpProduct& item) {
  const Product& product = item.product;
  const int columns = product.groups * 8;
  float a[16 * 16], b[16 * 256];
  if (product.a == nullptr) {
    fetch<kConvert>(warp->block, Operand(product.a_descriptor, product.a_transposed), warp->index % 4 * 16, 16, a);
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        if (item.a_home[lane][i] != item.a[lane][i]) {
          fail("wgmma: a register operand of warp %d lane %d was changed too early", warp->index, lane);
        }
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[k * 16 + row] = kConvert(item.a[lane][i] & 0xFFFF);
        a[(k + 1) * 16 + row] = kConvert(item.a[lane][i] >> 16);
      }
    }
  }
  fetch<kConvert>(warp->block, Operand(product.b_descriptor, product.b_transposed), 0, columns, b);
  float* const c = item.accumulator->values.data();
  if (!product.add) std::fill_n(c, 16 * columns, 0.0f);
  for (int row = 0; row < 16; ++row) {
    float* const line = c + row * columns;
    for (int k = 0; k < 16; ++k) {
      const float left = a[k * 16 + row];
      const float* const right = b + k * columns;
      for (int column = 0; column < columns; ++column) line[column] += left * right[column];
    }
  }
}

// Calls visit(register, value in the machine) for all of an accumulator.
template <typename Visit>
void for_each_register(Accumulator* accumulator, const Visit& visit) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < accumulator->groups; ++n) {
      for (int i = 0; i < 4; ++i) {
        visit(accumulator->lanes[lane][n * 4 + i],
              accumulator->values[row_of(lane, i) * accumulator->groups * 8 + column_of(lane, n, i)]);
      }
    }
  }
}

bool same(const Product& x, const Product& y) {
  return x.groups == y.groups && x.bfloat16 == y.bfloat16 && x.add == y.add && x.a_descriptor == y.a_descriptor &&
         x.a_transposed == y.a_transposed && (x.a == nullptr) == (y.a == nullptr) && x.b_descriptor == y.b_descriptor &&
         x.b_transposed == y.b_transposed;
}

void commit(Warp& warp) {
  const std::vector<Product>& first = warp.lanes[0]->products;
  std::vector<WarpProduct> group;
  for (size_t i = 0; i < first.size(); ++i) {
    WarpProduct item{first[i], nullptr, {}, {}};
    for (int lane = 0; lane < 32; ++lane) {
      const std::vector<Product>& mine = warp.lanes[lane]->products;
      if (mine.size() != first.size() || !same(mine[i], first[i])) {
        fail("wgmma: lanes 0 and %d of warp %d issue different products", lane, warp.index);
      }
      if (item.product.a != nullptr) {
        item.a_home[lane] = mine[i].a;
        std::copy_n(mine[i].a, 4, item.a[lane]);
      }
    }
    for (Accumulator& other : warp.accumulators) {
      if (other.lanes[0] == item.product.c && other.groups == item.product.groups) item.accumulator = &other;
    }
    if (item.accumulator == nullptr) {
      warp.accumulators.push_back({item.product.groups, {}, std::vector<float>(item.product.groups * 8 * 16)});
      Accumulator& mine = warp.accumulators.back();
      item.accumulator = &mine;
      for (int lane = 0; lane < 32; ++lane) mine.lanes[lane] = warp.lanes[lane]->products[i].c;
      for_each_register(&mine, [](float& home, float& value) {
        value = home;
        home = NAN;
      });
    }
    ++item.accumulator->pending;
    for (const uint64_t part : {item.product.a_descriptor, item.product.b_descriptor,
                                static_cast<uint64_t>(item.product.groups * 2 + item.product.add)}) {
      warp.product_hash = (warp.product_hash ^ part) * 0x100000001B3ull;
    }
    begin_reads(&warp, item.product);
    group.push_back(item);
  }
  commit_reads(&warp.lanes[0]->products_read);
  warp.product_groups.push_back(std::move(group));
  for (Thread* thread : warp.lanes) {
    thread->products.clear();
    thread->begun = false;
  }
}

}  // namespace

void run_product_group(Warp* warp) {
  const std::vector<WarpProduct> group = std::move(warp->product_groups.front());
  warp->product_groups.pop_front();
  for (const WarpProduct& item : group) {
    item.product.bfloat16 ? multiply<from_bfloat16>(warp, item) : multiply<from_float16>(warp, item);
    --item.accumulator->pending;
  }
  warp->accumulators.remove_if([](Accumulator& accumulator) {
    if (accumulator.pending > 0) return false;
    for_each_register(&accumulator, [](float& home, float& value) { home = value; });
    return true;
  });
}

void wgmma_begin() { current->begun = options.fault != Fault::kWgmmaBegin; }
void wgmma(const Product& product) {
  if (!current->begun) fail("wgmma without wgmma_begin before it");
  current->products.push_back(product);
}
void wgmma_commit() { collective("wgmma_commit", 0, commit); }
void wgmma_wait(int pending) {
  if (options.fault == Fault::kWgmmaWait) ++pending;
  collective("wgmma_wait", pending, [](Warp& warp) {
    while (warp.product_groups.size() > warp.in[0]) run_product_group(&warp);
    end_reads(warp.lanes[0], &warp.lanes[0]->products_read, static_cast<int>(warp.in[0]));
  });
}

}  // namespace emulator
