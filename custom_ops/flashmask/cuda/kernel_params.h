// What every CUDA kernel of the op receives: FlashmaskParams with derived sizes and the parts of the workspace.
#pragma once

#include <stdint.h>

#include "../flashmask.h"
#include "head_groups.h"
#include "work_order.h"

namespace flashmask {

// Two bits per pair of tiles, 32 pairs to a word: is anything visible, and does it need masking?
struct ListWord {
  uint32_t active;
  uint32_t partial;
};

// Tile classes of one mask. `by_row` holds, for every row tile, the words of its column tiles; `by_column` the other
// way round. Both are null when the classes follow from the causal flag alone.
struct TileLists {
  ListWord* by_row = nullptr;     // [batch * heads_mask, row_tiles, column_words]
  ListWord* by_column = nullptr;  // [batch * heads_mask, column_tiles, row_words]
  int32_t tile_rows = 0;
  int32_t tile_columns = 0;
  int32_t row_tiles = 0;
  int32_t column_tiles = 0;
  int32_t row_words = 0;     // ceil(row_tiles / 32)
  int32_t column_words = 0;  // ceil(column_tiles / 32)
};

struct KernelParams {
  FlashmaskParams op;
  TileLists lists;

  float scale_log2;         // |softmax_scale| * log2(e), never zero
  float signed_scale_log2;  // with the sign of softmax_scale
  int32_t negative_scale;   // softmax_scale < 0
  int32_t no_skip;

  uint32_t keep_threshold;  // dropout: 16-bit draws below it are kept
  float keep_scale;

  HeadGroups groups;  // of query heads, or of key heads in the backward pass

  int32_t* work_counter;  // persistent kernels: how many pieces of work were handed out
  int64_t counters;       // backward: how many there are from that on, all that are zero at the start

  // Backward only. Rows are padded to whole tiles.
  int32_t column_works;  // column tiles of all key heads
  // Where rows are prepared and finished as work of the persistent kernel: pieces of that work of a query head, and of
  // all query heads of a key head; and how preparing them and column tiles follow each other.
  int32_t row_items;
  int32_t key_head_row_items;
  WorkOrder order;
  int32_t first_with_claim;  // from this row item on, who prepares one gets one to finish, too
  // Deterministic, where there are lists: how many pairs of tiles these say are active, and the same for masks that
  // leave at most so many.
  unsigned long long* active_tiles;
  unsigned long long few_tiles;
  HeadGroups sparse_groups;
  WorkOrder sparse_order;
  // Behind work_counter, in this order.
  int32_t* finish_counter;  // how many pieces to finish were given to blocks; above 128 dims first those to zero
  int32_t* prepared;  // [batch * heads_q]: counts of what is prepared; above 128 dims of row tiles that are zeroed
  int32_t* finished;  // [batch * heads_k]: counts of column tiles that have added their dQ
  int32_t padded_rows;
  float* query_lse;    // [batch * heads_q, padded_rows]: lse * log2(e); +inf where a row sees nothing
  float* query_delta;  // [batch * heads_q, padded_rows]: sum(dout * out)
  // [batch * heads_k]: the row tile that the block is at that others follow, where column tiles are to stay together
  // (sm90); or null.
  int32_t* row_front;
  // Sums of dQ, without the scale but where sm90 is deterministic up to 128 dims.
  float* dq_accumulator;  // [batch * heads_q, padded_rows, compiled dim], inside a tile in the order of its kernels
  // Deterministic: column tiles that have added, [batch * heads_q, row_tiles] and then one ticket, or [batch * heads_q,
  // row_tiles, 2] for two parts of dQ.
  int32_t* turns;
  // Else (sm90) how far the sums of each part of a row tile are, [batch * heads_q, row_tiles, 2]; above 128 dims the
  // first is how many warps' rows are finished.
  int32_t* sums;
};

}  // namespace flashmask
