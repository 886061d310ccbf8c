// What one CPU call works on: tile sizes, block classes, and the order in which threads take work.
#pragma once

#include "flashmask.h"
#include "mask.h"

namespace flashmask {

constexpr int kForwardTileRows = 128;
constexpr int kForwardTileColumns = 128;
constexpr int kBackwardTileRows = 64;
constexpr int kBackwardTileColumns = 128;
constexpr int kMaxTileRows = 128;
constexpr int kMaxTileColumns = 128;
static_assert(FLASHMASK_BLOCK_MASK_TILE % kMaxTileRows == 0 && FLASHMASK_BLOCK_MASK_TILE % kMaxTileColumns == 0,
              "a tile lies inside one block of block_mask");

struct CpuPlan {
  FlashmaskParams params;
  int tile_rows;
  int tile_columns;
  int num_row_tiles;
  int num_column_tiles;
  const ColumnTileSummary* summaries;  // [batch, heads_mask, num_column_tiles]

  const ColumnTileSummary* summaries_of(int batch, int head) const {
    return summaries + (static_cast<int64_t>(batch) * params.heads_mask + mask_head_of(head)) * num_column_tiles;
  }
  int mask_head_of(int head) const { return mask_head(head, params.heads_q, params.heads_mask); }
  const int32_t* bounds_of(int batch, int head) const {
    if (params.num_bounds == 0) return nullptr;
    return params.bounds +
           (static_cast<int64_t>(batch) * params.heads_mask + mask_head_of(head)) * params.seqlen_k * params.num_bounds;
  }
  bool skips() const { return (params.flags & FLASHMASK_FLAG_NO_SKIP) == 0; }

  // Block class of a tile, the 128x128 block mask included.
  bool block_masked(int batch, int head, int row, int column) const {
    if (params.block_mask == nullptr) return false;
    const int64_t rows =
        (static_cast<int64_t>(params.seqlen_q) + FLASHMASK_BLOCK_MASK_TILE - 1) / FLASHMASK_BLOCK_MASK_TILE;
    const int64_t columns =
        (static_cast<int64_t>(params.seqlen_k) + FLASHMASK_BLOCK_MASK_TILE - 1) / FLASHMASK_BLOCK_MASK_TILE;
    const int64_t head_block = static_cast<int64_t>(batch) * params.heads_mask + mask_head_of(head);
    return params.block_mask[(head_block * rows + row / FLASHMASK_BLOCK_MASK_TILE) * columns +
                             column / FLASHMASK_BLOCK_MASK_TILE] == 0;
  }
};

// Scratch of the backward pass that outlives a tile.
struct BackwardBuffers {
  float* delta;     // [batch, heads_q, seqlen_q]: rowsum(dout * out)
  float* dq_float;  // [batch, heads_q, seqlen_q, head_dim], null where dq itself is float32
};

// Hands out items 0, 1, 2, ... to threads.
class WorkQueue {
 public:
  virtual int64_t next() = 0;  // -1 when there is no more

 protected:
  ~WorkQueue() = default;
};

// Hands out items in order and lets their additions to a shared sum happen in that order too, so that the sum does not
// depend on timing. Item n belongs to group n % groups; sums are shared inside a group. An item names the position it
// is about to add at (positions rise within an item); `wait` returns once no earlier item of the group can still add
// there. Items are claimed in order, so the earliest running one never waits: there is always progress. Skipped
// positions cost nothing, and the memory is one word per thread.
class OrderedQueue {
 public:
  virtual int64_t claim(int thread) = 0;  // -1 when there is no more
  virtual void wait(int thread, int64_t item, uint32_t position) = 0;
  virtual void finish(int thread, int64_t item, uint32_t position) = 0;

 protected:
  ~OrderedQueue() = default;
};

// One set of kernels per instruction set.
struct CpuKernels {
  const char* name;
  int64_t (*forward_scratch_floats)(const FlashmaskParams&);
  int64_t (*backward_scratch_floats)(const FlashmaskParams&);
  void (*forward)(const CpuPlan&, WorkQueue&, float* scratch);
  void (*backward_prepare)(const CpuPlan&, const BackwardBuffers&, WorkQueue&);
  void (*backward)(const CpuPlan&, const BackwardBuffers&, OrderedQueue&, int thread, float* scratch);
  void (*backward_finish)(const CpuPlan&, const BackwardBuffers&, WorkQueue&);
};

const CpuKernels& portable_kernels();
#if defined(FLASHMASK_X86)
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
#endif

}  // namespace flashmask
