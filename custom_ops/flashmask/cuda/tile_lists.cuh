// Which tiles to visit: a small kernel that classifies all tile pairs once per call, and the walker with which the
// attention kernels read its lists.
#pragma once

#include "../mask.h"
#include "kernel_params.h"

namespace flashmask {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ uint32_t low_bits(int count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1u;
}

// Whether p.sparse_groups and p.sparse_order hold instead of p.groups and p.order: the lists leave few pairs of tiles,
// which the host does not know. The same all through a kernel.
__device__ __forceinline__ bool takes_sparse_schedule(const KernelParams& p) {
  return p.active_tiles != nullptr && *p.active_tiles <= p.few_tiles;
}

// Column tiles [first, end) that a row tile sees, or row tiles that a column tile is seen from, when only the causal
// flag masks. Those in [unmasked_first, unmasked_end) need no masking.
struct TileSpan {
  int first, end, unmasked_first, unmasked_end;

  __device__ __forceinline__ ListWord word(int index) const {
    ListWord word;
    word.active = low_bits(end - index * 32) & ~low_bits(first - index * 32);
    word.partial = word.active & ~(low_bits(unmasked_end - index * 32) & ~low_bits(unmasked_first - index * 32));
    return word;
  }
};

template <int kTileRows, int kTileColumns>
__device__ __forceinline__ TileSpan columns_of_row_tile(const KernelParams& p, int row_tile) {
  const int seqlen_q = p.op.seqlen_q, seqlen_k = p.op.seqlen_k;
  const int whole_tiles = seqlen_k / kTileColumns;  // a ragged last tile is always masked
  TileSpan span{0, p.lists.column_tiles, 0, whole_tiles};
  if (p.no_skip) {
    span.unmasked_end = 0;
  } else if (p.op.causal) {
    const int row_begin = row_tile * kTileRows;
    const int row_end = min(row_begin + kTileRows, seqlen_q);
    const int visible_to_last = row_end + (seqlen_k - seqlen_q);  // columns below this are visible to the last row
    const int visible_to_first = row_begin + 1 + (seqlen_k - seqlen_q);
    span.end = visible_to_last <= 0 ? 0 : min(span.end, (visible_to_last - 1) / kTileColumns + 1);
    span.unmasked_end = visible_to_first <= 0 ? 0 : min(whole_tiles, visible_to_first / kTileColumns);
  }
  return span;
}

template <int kTileRows, int kTileColumns>
__device__ __forceinline__ TileSpan rows_of_column_tile(const KernelParams& p, int column_tile) {
  const int seqlen_q = p.op.seqlen_q, seqlen_k = p.op.seqlen_k;
  const int column_begin = column_tile * kTileColumns;
  const bool ragged = column_begin + kTileColumns > seqlen_k;
  TileSpan span{0, p.lists.row_tiles, 0, ragged ? 0 : p.lists.row_tiles};
  if (p.no_skip) {
    span.unmasked_end = 0;
  } else if (p.op.causal) {
    const int column_end = min(column_begin + kTileColumns, seqlen_k);
    const int first_seeing_any = column_begin - (seqlen_k - seqlen_q);
    const int first_seeing_all = column_end - 1 - (seqlen_k - seqlen_q);
    span.first = first_seeing_any <= 0 ? 0 : first_seeing_any / kTileRows;
    span.unmasked_first = first_seeing_all <= 0 ? 0 : (first_seeing_all + kTileRows - 1) / kTileRows;
  }
  return span;
}

// Yields the active tiles of one list in ascending order. All lanes of a warp hold 32 words together, so one ballot
// jumps over up to 1,024 skipped tiles. Every warp walks for itself and sees the same sequence.
//
// `Words` is a callable: word number -> ListWord. It is called again whenever 32 words are used up, so that it costs
// no registers in between.
template <typename Words>
struct TileWalker {
  Words words;
  int count;        // of words
  int chunk = -32;  // first word of the 32 that the lanes hold
  ListWord mine{0, 0};

  __device__ __forceinline__ TileWalker(const Words& words, int count) : words(words), count(count) {}

  // Returns the next tile or -1; `partial` says whether it needs masking.
  __device__ __forceinline__ int next(bool* partial) {
    const int lane = threadIdx.x & 31;
    uint32_t holders = __ballot_sync(kAllLanes, mine.active != 0);
    while (holders == 0) {
      chunk += 32;
      if (chunk >= count) {
        chunk = count;  // a further call must not wrap around
        return -1;
      }
      mine = chunk + lane < count ? words(chunk + lane) : ListWord{0, 0};
      holders = __ballot_sync(kAllLanes, mine.active != 0);
    }
    const int holder = __ffs(holders) - 1;
    const uint32_t active = __shfl_sync(kAllLanes, mine.active, holder);
    const uint32_t masked = __shfl_sync(kAllLanes, mine.partial, holder);
    const int bit = __ffs(active) - 1;
    if (lane == holder) mine.active &= mine.active - 1;
    *partial = (masked >> bit) & 1;
    return (chunk + holder) * 32 + bit;
  }

  // How many tiles come after the one that next() returned; `many` if there are words not looked at.
  __device__ __forceinline__ int left(int many) const {
    return chunk + 32 < count ? many : static_cast<int>(__reduce_add_sync(kAllLanes, __popc(mine.active)));
  }
};

}  // namespace flashmask
