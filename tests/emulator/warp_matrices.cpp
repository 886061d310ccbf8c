// What mostly the portable kernels ask of the machine: cp.async, ldmatrix, mma.sync.
#include <string.h>

#include <algorithm>
#include <utility>

#include "numbers.h"
#include "state.h"

namespace emulator {

void copy_async(uint32_t destination, const void* source, int bytes, bool valid) {
  maybe_yield();
  Block* const block = current->block;
  if (destination % bytes != 0) fail("cp.async to %u, which is no multiple of %d", destination, bytes);
  if (valid && reinterpret_cast<uintptr_t>(source) % bytes != 0) fail("cp.async from an address of bad alignment");
  memset(block->shared_at(destination, bytes), 0xFF, bytes);
  current->copies.push_back([=] {
    if (valid) {
      memcpy(block->shared_at(destination, bytes), source, bytes);
    } else {
      memset(block->shared_at(destination, bytes), 0, bytes);
    }
  });
}

void commit_copies() {
  current->copy_groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void wait_copies(int pending) {
  Thread& me = *current;
  if (options.fault == Fault::kCopyWait) ++pending;
  while (static_cast<int>(me.copy_groups.size()) > pending) {
    for (const auto& copy : me.copy_groups.front()) copy();
    me.copy_groups.pop_front();
  }
  maybe_yield();
}

void load_matrix(uint32_t (&fragment)[4], uint32_t address, bool transposed) {
  if (address % 16 != 0) fail("ldmatrix: the row at %u is not aligned", address);
  maybe_yield();
  collective(transposed ? "load_matrix_transposed" : "load_matrix", address,
             [](Warp& warp) { std::copy_n(warp.in, 32, warp.out); });
  Block& block = *current->block;
  const uint32_t* rows = current->warp->out;  // lane 8i + r names the place of row r of matrix i
  const int g = current->lane / 4, t = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int row = transposed ? t * 2 + e : g, column = transposed ? g : t * 2 + e;
      memcpy(&pair[e], block.shared_at(rows[8 * i + row] + column * 2, 2), 2);
    }
    memcpy(&fragment[i], pair, 4);
  }
}

namespace {

template <bool kBfloat16>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = which == 0 ? pair & 0xFFFF : pair >> 16;
  return kBfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// With g = lane / 4 and t = lane % 4: a[0] is row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] columns 8 on.
// b[0] is rows 2t and 2t + 1 of column g; b[1] rows 8 on. c[0], c[1] are row g, columns 2t and 2t + 1; c[2], c[3] row g
// + 8.
template <bool kBfloat16>
void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = warp.lanes[lane]->mma;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) a[g + i % 2 * 8][t * 2 + i / 2 * 8 + e] = half_of<kBfloat16>(mine.a[i], e);
    }
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) b[t * 2 + i * 8 + e][g] = half_of<kBfloat16>(mine.b[i], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = warp.lanes[lane]->mma.c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) c[i] += a[row][k] * b[k][column];
    }
  }
}

}  // namespace

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  current->mma = {c, a, b};
  if (bfloat16) {
    collective("mma of bfloat16", 0, multiply<true>);
  } else {
    collective("mma of float16", 0, multiply<false>);
  }
}

}  // namespace emulator
