// In which order heads and their tiles are handed out: pure arithmetic.
//
// Heads are handed out in groups, so that those at work at the same time share the L2 cache. In a group the tiles that
// probably weigh most come first: number 0 of every head, number 1 of every head, and so on. Where tiles differ, the
// last group is larger: the heaviest tile takes as long as all tiles of a head divided by all multiprocessors, or
// longer. Were those of the last head begun when all else is done, most multiprocessors would have nothing to do until
// they end.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../mask.h"

namespace flashmask {

struct HeadGroups {
  int32_t each;         // heads of a group
  int32_t before_last;  // groups
  int32_t of_last;      // heads that the last group was meant to have at most, or as many as the others
};

struct HeadGroup {
  int32_t first, heads;
};

// Of all heads of the last group together: rows in the forward pass, eight tiles of 128 for each of an H100's
// multiprocessors, or keys in the backward pass.
constexpr int64_t kRowsOfLastGroup = 128 << 10, kKeysOfLastGroup = 64 << 10;

// The last group has at most `of_last` heads, or as many as the others.
inline HeadGroups make_head_groups(int64_t heads, int64_t each, int64_t of_last) {
  const int64_t before = std::max<int64_t>(0, heads - std::max(each, of_last));
  return {static_cast<int32_t>(each), static_cast<int32_t>((before + each - 1) / each), static_cast<int32_t>(of_last)};
}

// That of piece of work `number`, where each of `heads` has `pieces`. The group's are numbered from first * pieces on.
FLASHMASK_HD HeadGroup group_of(const HeadGroups& groups, int32_t heads, int32_t pieces, int32_t number) {
  const int32_t found = number / (groups.each * pieces);
  const int32_t group = found < groups.before_last ? found : groups.before_last;
  return {group * groups.each, group < groups.before_last ? groups.each : heads - group * groups.each};
}

// Row tile number `place` in the order of work. Under a causal mask the last ones see most; but where some tokens see
// everything, those are mostly the first.
FLASHMASK_HD int32_t row_tile_in_order(int32_t row_tiles, int32_t place) {
  return place == 1 ? 0 : row_tiles - (place > 0 ? place : 1);
}

}  // namespace flashmask
