// The order in which a persistent kernel hands out two sorts of work, of which one depends on the other: pure
// arithmetic.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "head_groups.h"

namespace flashmask {

// Columns (of which a head has `columns`) need all rows (row items: `rows` a head) of their group of heads before them;
// both are numbered group by group. The first `ahead` tickets are rows, and then both are spread evenly, until there
// are only columns left: so at any time some blocks are at rows, which move memory, while most compute. Before the last
// group, which is larger, rows come so much faster that they are all handed out when it begins.
struct WorkOrder {
  int32_t ahead;
  int32_t rows_after;     // rows that are not among those
  uint32_t column_share;  // of the tickets after those, in units of 2^-32
};

struct OrderedWork {
  bool is_column;
  int32_t number;  // of its sort; after all work, columns that do not exist
};

// Before the first column of a group, all its rows have been handed out, and `spare` more.
inline WorkOrder make_work_order(int64_t columns, int64_t rows, int64_t heads, const HeadGroups& groups,
                                 int64_t spare) {
  const int64_t all_rows = heads * rows, before_last = static_cast<int64_t>(groups.before_last) * groups.each;
  const int64_t first_group = before_last > 0 ? groups.each : heads;
  WorkOrder order;
  order.ahead = static_cast<int32_t>(std::min(all_rows, first_group * rows + spare));
  order.rows_after = static_cast<int32_t>(all_rows - order.ahead);
  // Rounded down, so that rows never fall behind.
  const auto share = [](int64_t columns, int64_t rows) {
    if (rows == 0) return 0xFFFFFFFFu;
    return static_cast<uint32_t>((static_cast<uint64_t>(columns) << 32) / static_cast<uint64_t>(columns + rows));
  };
  order.column_share = std::min(share(columns, rows), share(before_last * columns, order.rows_after));
  return order;
}

// With c columns among the tickets before, there are at least c * rows / columns rows among them (and `ahead`): c is
// the share of their number, rounded down, and a ticket is a column if that grows with it.
FLASHMASK_HD OrderedWork in_order(const WorkOrder& order, int32_t ticket) {
  if (ticket < order.ahead) return {false, ticket};
  ticket -= order.ahead;
  const auto columns_of = [&](int32_t tickets) {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(tickets)) * order.column_share >> 32);
  };
  const int32_t columns = columns_of(ticket), rows = ticket - columns;
  if (rows >= order.rows_after) return {true, ticket - order.rows_after};
  if (columns_of(ticket + 1) > columns) return {true, columns};
  return {false, order.ahead + rows};
}

}  // namespace flashmask
