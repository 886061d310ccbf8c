// A consumer warpgroup of the forward kernel: 64 rows of Q against all active column tiles.
//
// S = Q K^T of the next tile and O += P V of this one are issued together; the softmax of the next tile then runs while
// P V still does. Two warpgroups take turns in issuing, so that one's softmax hides under the other's products. More
// have fewer registers for scores: tiles are narrower, or their parts come one after the other, each with a softmax of
// its own.
#pragma once

#include <type_traits>

#include "../cuda/element.cuh"
#include "forward_epilogue.cuh"
#include "forward_producer.cuh"
#include "softmax.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

namespace flashmask::sm90 {

// Named barriers: 0 is __syncthreads.
constexpr int kForwardTurnBarrier = 1;  // one for each consumer warpgroup

// Whose turn it is to issue products.
template <int kConsumers, bool kTakesTurns>
struct Turn {
  int warpgroup;
  __device__ __forceinline__ void start() const {
    if (warpgroup == kConsumers - 1) pass();
  }
  __device__ __forceinline__ void wait() const {
    if (!kTakesTurns) return;
    named_barrier_sync(kForwardTurnBarrier + warpgroup, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass() const {
    if (!kTakesTurns) return;
    const int next = warpgroup + 1 == kConsumers ? 0 : warpgroup + 1;
    named_barrier_arrive(kForwardTurnBarrier + next, 2 * kWarpgroup);
  }
};

// Which part of a column tile a pass is about; whether it is the first that is seen of the tile (kEnters), and whether
// the pass frees K (kLeaves). Whether the other part is seen is not known at compile time in a pass that enters a tile
// in parts: if not, finish_tile frees K behind it. `index` is a constant where the pass is written for one part.
template <bool kEnters_, bool kLeaves_>
struct TilePart {
  static constexpr bool kEnters = kEnters_, kLeaves = kLeaves_;
  int index;
};

template <typename T, typename Layout>
__device__ __forceinline__ void consume(const KernelParams& p, const ForwardMaps& maps, uint32_t shared, int warpgroup,
                                        int thread) {
  using Config = typename Layout::Config;
  using QTile = typename Layout::QTile;
  using KTile = typename Layout::KTile;
  constexpr int kHeadDim = Layout::kHeadDim;
  constexpr int kParts = Config::kParts, kLastPart = kParts - 1;
  constexpr int kScoreGroups = Config::kPartColumns / 8, kSteps = Config::kPartColumns / 16;
  static_assert(kParts == 1 || (Config::kMasksByNeed && !Config::kTakesTurns));
  using WholeTile = TilePart<true, true>;
  const int lane = thread % 32, warp = warpgroup * 4 + thread / 32;
  static_assert(kForwardTurnBarrier + Config::kConsumers <= kEpilogueBarrier);
  const Turn<Config::kConsumers, Config::kTakesTurns> turn{warpgroup};
  turn.start();

  Ring<Config::kStages> k_ring, v_ring;
  Ring<Config::kWorkStages> row_tile_ring;
  Ring<Config::kQPlaces> q_ring{warpgroup};  // the loader fills it by warpgroups
  const auto release = [&](int barrier) { Barrier{shared + barrier}.arrive_warp(); };

  float output[kHeadDim / 8][4];
  int has_output = 0;  // whether it holds anything of the row tile at work: the first product overwrites it
  float scores[kScoreGroups][4];
  uint32_t weights[kSteps][4];
  // Where nothing masks, a row tile has this many column tiles, and the last so many keys.
  const int tiles = (p.op.seqlen_k + Config::kColumns - 1) / Config::kColumns;
  const int last_keys = p.op.seqlen_k - (tiles - 1) * Config::kColumns;
  int tile = 0;          // of these
  uint32_t weighed = 0;  // tile_word of the tile whose scores are at work
  uint32_t flags = 0;    // that of the tile that K holds next
  uint32_t ended = 0;    // not 0 behind the last tile of the row tile at work; once `begun`, of the one `next` names
  // The row tile at work, and the next where that is known: which then follows without a gap if it sees anything.
  RowTile work{}, next;
  bool has_next = false, follows = false;
  OnlineSoftmax softmax;

  int used_k = 0;  // place of the K that the scores at work come from
  // Bits of tile words: a tile that has one of these needs more than most do. All of them while every tile does.
  constexpr uint32_t kEveryTile = ~0u;
  constexpr uint32_t kSpecialTile =
      kTileLast | (Config::kMasksByNeed ? kMasksFirstPart | kMasksLastPart : kTileHasMasks);
  uint32_t special_bits = kEveryTile;
  uint32_t special = 0;  // which of these the tile at work has
  const auto wait_k = [&] {
    Barrier{shared + Layout::kKFull + k_ring.stage * 8}.wait_warp(k_ring.parity);
    if (!Config::kMasks) return;
    flags = uniform(load_shared_32(shared + Layout::kTileWords + (k_ring.stage * 4 + warpgroup) * 4));
  };
  // Whether these 64 rows see anything of it.
  const auto is_seen = [&] { return !Config::kMasks || (flags & (kSeesFirstPart | kSeesLastPart)) != 0; };
  const auto release_q = [&] {
    release(Layout::kQEmpty + q_ring.stage * 8);
    q_ring.advance_by(Config::kConsumers);
  };
  const auto enter_tile = [&] {
    if (Config::kMasks) {
      weighed = flags;
    } else {
      if (++tile == tiles) tile = 0;
      weighed = tile == 0 ? kTileLast | kSeesFirstPart : kSeesFirstPart;
    }
  };
  const auto leave_k = [&] {
    used_k = k_ring.stage;
    k_ring.advance();
    ended = weighed & kTileLast;
  };
  const auto release_k = [&] { release(Layout::kKEmpty + used_k * 8); };
  const auto wait_q = [&] { Barrier{shared + Layout::kQFull + q_ring.stage * 8}.wait_warp(q_ring.parity); };
  // The V that the weights at hand are for. While these wait for the next scores, so many tiles that are not seen can
  // be skipped, no more: V of a further one would need the place of the V that is held, and be waited for for ever.
  constexpr int kSkips = kParts == 1 ? 0 : Config::kStages - 1;
  Ring<Config::kStages> held;
  auto& held_v = kSkips > 0 ? held : v_ring;
  int skips = 0;  // that are left
  int owed = 0;   // skipped since, whose V is still to be waited for and freed
  const auto hold_v = [&] {
    if (kSkips == 0) return;
    held = v_ring;
    v_ring.advance();
    skips = kSkips;
  };
  const auto v_full = [&](const auto& ring) { return Barrier{shared + Layout::kVFull + ring.stage * 8}; };
  const auto release_held_v = [&] {
    release(Layout::kVEmpty + held_v.stage * 8);
    if (kSkips == 0) v_ring.advance();
  };
  const auto take_mask = [&](auto part) {
    if constexpr (!Config::kMasks) {
      if (ended != 0 && last_keys < Config::kColumns) mask_behind(scores, last_keys, lane);
      return;
    }
    // Without kMasksByNeed, every warpgroup takes all masks that were made and frees their places, whether it applies
    // them or not.
    const uint32_t mine = weighed & kMasksFirstPart << part.index;
    if ((Config::kMasksByNeed ? mine : weighed & kTileHasMasks) == 0) return;
    const int stage = mask_stage(weighed);
    Barrier{shared + Layout::kMaskFull + stage * 8}.wait_warp(mask_parity(weighed));
    if (mine != 0) {
      apply_mask<Layout>(scores, shared + Layout::kMask + stage * Layout::kMaskBytes + part.index * kScoreGroups * 4,
                         warp, lane);
    }
    if (part.index == kLastPart || (weighed & kMasksLastPart) == 0) release(Layout::kMaskEmpty + stage * 8);
  };
  // High words of the descriptors of Q and of K and V. Constants would be written again before every product: so an
  // instruction less for most of them.
  const uint32_t high_q = hidden<0>(QTile::kHighWord), high_k = hidden<1>(KTile::kHighWord);
  // Low words for the first places; no place is so far away that an addition would reach their other bits.
  const auto low_word = [](uint64_t descriptor) { return static_cast<uint32_t>(descriptor); };
  const uint32_t low_q = low_word(QTile::along_columns(shared + Layout::kQ, 0, 0));
  const uint32_t low_k = low_word(KTile::along_columns(shared + Layout::kK, 0, 0));
  const uint32_t low_v = low_word(KTile::along_rows(shared + Layout::kV, 0, 0));
  // How a descriptor is moved: by an addition of 64 bits, or to its low word only, one uniform instruction either way.
  // After the latter the assembler may write the high word again, too: which is shorter is to be seen in the machine
  // code.
  constexpr bool kAddsToBothWords = Config::kMasks && kHeadDim > 64 && kHeadDim < 256;
  const auto moved = [](uint64_t descriptor, uint64_t distance) {
    return kAddsToBothWords ? descriptor + distance : KTile::moved(descriptor, distance);
  };
  constexpr uint32_t kPartDistance = KTile::row_distance(Config::kPartColumns);  // of descriptors
  const auto issue_scores = [&](auto part) {
    const uint64_t q = descriptor_of(low_q + q_ring.stage * (QTile::kBytes / 16), high_q);
    const uint64_t k = descriptor_of(low_k + part.index * kPartDistance + k_ring.stage * (KTile::kBytes / 16), high_k);
    fence_registers(scores);
    wgmma_begin();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      wgmma<T, Major::kK, Major::kK>(scores, moved(q, QTile::column_distance(d)), moved(k, KTile::column_distance(d)),
                                     d > 0);
    }
    wgmma_commit();
  };
  const auto issue_output = [&](int part) {
    const uint64_t v = descriptor_of(low_v + part * kPartDistance + held_v.stage * (KTile::kBytes / 16), high_k);
    fence_registers(weights);
    fence_registers(output);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, Major::kMN>(output, weights[step], moved(v, KTile::row_distance(step * 16)), step > 0 ? 1 : has_output);
    }
    has_output = 1;
    wgmma_commit();
  };
  // Element i of group n of the scores at work, from memory (softmax.cuh says when).
  const auto score_again = [&](int part, int n, int i) {
    const int column_tile = Config::kMasks ? tile_number(weighed) : (tile != 0 ? tile : tiles) - 1;
    const int row = work.row_tile * Config::kRows + warp * 16 + lane / 4 + i / 2 * 8;
    const int column = column_tile * Config::kColumns + part * Config::kPartColumns + n * 8 + lane % 4 * 2 + i % 2;
    const int head_k = work.head / (p.op.heads_q / p.op.heads_k);
    const auto* const q = reinterpret_cast<const uint32_t*>(head_pointer<T>(p.op.q, work.batch, work.head, row));
    const auto* const k = reinterpret_cast<const uint32_t*>(head_pointer<T>(p.op.k, work.batch, head_k, column));
    float score = 0.0f;
#pragma unroll 1
    for (int pair = 0; pair < p.op.head_dim / 2; ++pair) {
      const float2 left = Half2<T>::unpack(q[pair]), right = Half2<T>::unpack(k[pair]);
      score += left.x * right.x + left.y * right.y;
    }
    return p.negative_scale ? -score : score;
  };
  // The next row tile; if it can follow without a gap, waits for its Q and first K, too. Where there are registers for
  // it (kLooksAhead), while products still run.
  const auto look_ahead = [&] {
    next = read_row_tile<Layout>(shared, &row_tile_ring);
    has_next = true;
    follows = next.has_tiles;
    if (follows) {
      wait_q();
      wait_k();
    }
  };
  // While scores are computed: what comes next, and what these will need.
  const auto look_at_next = [&](auto part) {
    using Part = decltype(part);
    if (Part::kEnters) enter_tile();
    // What is special of the other part is not of this one. With kEveryTile something is left in any case: that the
    // tile is seen.
    special = weighed & special_bits;
    if (kParts > 1 && Part::kEnters != Part::kLeaves) {
      special &= Part::kEnters ? ~(kMasksLastPart | kTileLast) : ~kMasksFirstPart;
    }
    if (!Part::kLeaves) return;
    leave_k();
    if (Config::kWaitsForKeysEarly && ended == 0) wait_k();
  };
  const auto settle_v = [&] {
    while (owed > 0) {
      v_full(v_ring).wait_warp(v_ring.parity);
      release(Layout::kVEmpty + v_ring.stage * 8);
      v_ring.advance();
      --owed;
    }
  };
  // After the scores of a tile's part have come, of the row tile's first or not: frees K if the tile is left with it,
  // and Q if the row tile is; masks; exponentials (weigh of softmax.cuh); then the next K where that was not waited for
  // before, and the next row tile where there are registers for it. Returns whether references have to move.
  const auto scores_to_weights = [&](auto is_first, auto part, const auto& halfway) {
    constexpr bool kFirstOfRows = decltype(is_first)::value, kLeaves = decltype(part)::kLeaves;
    fence_registers(scores);
    if (kLeaves) release_k();
    // All that most tiles do not need, behind one jump: each costs as much as twenty instructions.
    if (kFirstOfRows || special != 0) {
      if (kLeaves && ended != 0) release_q();
      if (p.negative_scale) {
        // References are largest scores, so it is their sign that changes.
#pragma unroll
        for (int n = 0; n < kScoreGroups; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[n][i] = -scores[n][i];
        }
      }
      take_mask(part);
      if (kFirstOfRows || softmax.lacks_reference) softmax.find_references(scores, p.scale_log2);
      if (kSkips > 0 && decltype(part)::kEnters) settle_v();
      special_bits = p.negative_scale || softmax.lacks_reference ? kEveryTile : kSpecialTile;
    }
    const bool large = softmax.weigh(scores, p.scale_log2, halfway);
    fence_registers(scores);  // the exponentials belong here, while P V runs
    if (kLeaves && !Config::kWaitsForKeysEarly && ended == 0) wait_k();
    if (kLeaves && Config::kLooksAhead && ended != 0) look_ahead();
    return !kFirstOfRows && large;  // of a first tile, no weight is above one
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) pack_operand<T>(weights[step], scores[step * 2], scores[step * 2 + 1]);
  };
  // Nothing may be in flight.
  const auto move_references = [&](int part) {
    softmax.move_references(scores, p.scale_log2, [&](int n, int i) { return score_again(part, n, i); });
    rescale(output, softmax.factor);
    pack_weights();
  };

  // Part of a column tile: its scores beside the output of the part before, which ends a row tile or not. Returns
  // whether references have to move.
  const auto pass = [&](auto is_end, int part_before, auto part) {
    constexpr bool kEnds = decltype(is_end)::value;
    using Part = decltype(part);
    // The last part of the tile before, of which the first was seen, too: so its V is there.
    constexpr bool kHasV = Part::kEnters && !Part::kLeaves && !kEnds;
    turn.wait();
    trace(Event::kTurn);
    const bool v_here = kHasV || v_full(held_v).test(held_v.parity);
    issue_scores(part);
    if (!v_here) v_full(held_v).wait(held_v.parity);
    issue_output(part_before);
    turn.pass();
    look_at_next(part);
    wgmma_wait<1>();
    trace(Event::kScoresHere);
    const OnlineSoftmax finished = softmax;
    const RowTile done = work;
    if (kEnds) {
      softmax = OnlineSoftmax();
      work = next;
      has_next = false;
    }
    constexpr bool kRoundsEarly = Config::kRoundsEarly && !kEnds;
    const auto take_output = [&] {
      wgmma_wait<0>();
      trace(Event::kOutputHere);
      fence_registers(output);
      fence_registers(weights);
      if (!Part::kEnters) return;
      release_held_v();
      hold_v();
    };
    const bool large = scores_to_weights(is_end, part, [&] {
      if constexpr (kRoundsEarly) take_output();
    });
    trace(Event::kWeightsMade);
    if constexpr (!kRoundsEarly) take_output();
    if (kEnds) {
      write_output<T, Layout>(p, maps.out, shared, done, output, finished, warpgroup, thread);
      trace(Event::kOutputWritten);
      has_output = 0;
    }
    pack_weights();
    return large;
  };

  // The part in which these rows enter the next tile.
  const auto entry_part = [&] {
    if constexpr (kParts == 1) {
      return WholeTile{0};
    } else {
      return TilePart<true, false>{(flags & kSeesFirstPart) != 0 ? 0 : 1};
    }
  };
  const auto sees_last_part = [&] { return (weighed & kSeesLastPart) != 0; };
  // Behind the only part that is seen of a tile.
  const auto finish_tile = [&] {
    leave_k();
    release_k();
    if (ended != 0) {
      release_q();
    } else {
      wait_k();
    }
  };

  // From the last part of a tile, whose first part's weights are at hand, over all that follow in the row tile, as far
  // as the first part of each is seen. Returns which part's weights are at hand then; its tile is done.
  const auto go_on_in_parts = [&] {
    int at_hand = 0;
    bool resumes = false;  // with the next tile
    while (true) {
      bool large = false;
      do {
        if (!resumes) {
          large = pass(std::false_type{}, 0, TilePart<false, true>{1});
          at_hand = 1;
          if (large) break;
        }
        resumes = false;
        if ((ended != 0) | ((flags & kSeesFirstPart) == 0)) break;
        large = pass(std::false_type{}, 1, TilePart<true, false>{0});
        at_hand = 0;
      } while (!large & sees_last_part());
      if (!large) break;
      // Outside the loop, or the assembler would put it in the way. What follows is the same pass as without: all warps
      // of a warpgroup have to issue the same instructions.
      move_references(at_hand);
      resumes = at_hand == 1;
      if (at_hand == 0 && !sees_last_part()) break;
    }
    if (at_hand == 0) finish_tile();
    return at_hand;
  };

  // A tile that these rows do not see; its V is waited for here, or owed.
  const auto skip_tile = [&](bool owes) {
    turn.wait();
    turn.pass();
    enter_tile();
    leave_k();
    if (!Config::kMasksByNeed) take_mask(WholeTile{0});
    release_k();
    if (ended != 0) release_q();
    ++owed;
    if (!owes) settle_v();
    special_bits = kEveryTile;  // what is owed is settled with the next scores
  };

  look_ahead();
  // Whether tiles of the next row tile were looked at, and perhaps skipped, while weights of this one wait.
  bool begun = false;
  while (next.row_tile >= 0) {
    work = next;
    has_output = 0;
    softmax = OnlineSoftmax();
    special_bits = kEveryTile;
    if (!begun) ended = work.has_tiles == 0;
    begun = false;
    has_next = false;
    if (ended == 0) wait_q();
    while (ended == 0) {
      // Nothing is in flight here.
      wait_k();
      if (!is_seen()) {
        skip_tile(false);
        continue;
      }
      turn.wait();
      trace(Event::kTurn);
      const auto entry = entry_part();
      // Behind a gap: look_at_next does not know that an entry may be the last part. (Passes that end a row tile treat
      // every entry as special.)
      if (kParts > 1) special_bits = kEveryTile;
      issue_scores(entry);
      turn.pass();
      look_at_next(entry);
      wgmma_wait<0>();
      trace(Event::kScoresHere);
      const bool first_large = scores_to_weights(std::false_type{}, entry, [] {});
      trace(Event::kWeightsMade);
      pack_weights();
      hold_v();
      int part_at_work = entry.index;  // that the weights at hand are of
      if (first_large) move_references(entry.index);

      // The first scores of the next row tile are issued with the last output of this one, so that there is no gap
      // between them. The chain breaks at a tile that these rows do not see (in parts: at the end of a row tile only
      // behind kSkips of them).
      if constexpr (kParts == 1) {
        while (true) {
          bool large = false;
          if (ended == 0 && is_seen()) {
            do {
              large = pass(std::false_type{}, 0, WholeTile{0});
            } while (!large & (ended == 0) & is_seen());  // one jump, where && would take three
          }
          if (large) {
            move_references(0);
            continue;
          }
          if (ended == 0) break;
          if (!Config::kLooksAhead) look_ahead();
          if (!follows || !is_seen()) break;
          pass(std::true_type{}, 0, WholeTile{0});
        }
      } else {
        bool goes_on = entry.index == 0 && sees_last_part();  // whether a part of the tile at work is still to come
        if (!goes_on) finish_tile();
        while (true) {
          if (goes_on) part_at_work = go_on_in_parts();
          while (true) {
            if (ended != 0) {
              if (begun) break;  // these rows see nothing of the next row tile
              look_ahead();
              if (!follows) break;
              begun = true;
              ended = 0;
            }
            if (is_seen() || skips == 0) break;
            --skips;
            skip_tile(true);
            if (ended == 0) wait_k();
          }
          // Behind a gap in its own row tile, a chain of its own begins. (That it is no end shows only now.)
          if (!begun || ended != 0 || !is_seen()) break;
          begun = false;
          const auto next_entry = entry_part();
          pass(std::true_type{}, part_at_work, next_entry);
          part_at_work = next_entry.index;
          goes_on = next_entry.index == 0 && sees_last_part();
          if (!goes_on) finish_tile();
        }
      }
      v_full(held_v).wait_warp(held_v.parity);
      issue_output(part_at_work);
      wgmma_wait<0>();
      trace(Event::kOutputHere);
      fence_registers(output);
      release_held_v();
      if (kSkips > 0) settle_v();
      if (begun) break;  // the tiles that come belong to the next row tile
    }
    if (has_output == 0) clear(output);
    write_output<T, Layout>(p, maps.out, shared, work, output, softmax, warpgroup, thread);
    trace(Event::kOutputWritten);
    if (!has_next) look_ahead();
  }
}

}  // namespace flashmask::sm90
