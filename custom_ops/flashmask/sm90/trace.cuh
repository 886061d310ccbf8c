// When a block of a persistent kernel does what: for benchmarks/cuda/trace.py, in builds with -DFLASHMASK_TRACE. In all
// others a trace point is nothing.
//
// One block writes what its first consumer thread and, in the backward kernel, the first thread of the warp that brings
// rows come to, with the multiprocessor's clock. Numbers of events are known to trace.py too.
#pragma once

#include <stdint.h>

namespace flashmask::sm90 {

enum class Event : int {
  // of the consumers of the backward kernel
  kPrepareRows = 1,  // a row item begins
  kFinishRows = 2,
  kRowTileHere = 3,
  kRowTileDone = 4,
  kRowItemEnd = 5,
  kColumnTile = 6,  // its first step is here
  kKeysHere = 7,
  kStep = 8,  // its rows are here
  kColumnTileEnd = 9,
  // of the consumers of the forward kernel
  kTurn = 10,  // to issue the products of a column tile
  kScoresHere = 11,
  kWeightsMade = 12,
  kOutputHere = 13,     // of the column tile before
  kOutputWritten = 14,  // of a row tile
  // of the warp that brings rows
  kFindsNext = 20,  // what comes next is asked for
  kNextFound = 21,
  kWaitsForRows = 22,  // until they are prepared
  kRowsPrepared = 23,
  kPlaceFree = 24,  // the rows of a step can be asked for
};

#ifdef FLASHMASK_TRACE
#define FLASHMASK_HAS_TRACE
constexpr int kTracedBlock = 37, kTracedEvents = 16384;
struct Trace {
  int32_t count;
  int32_t event[kTracedEvents];
  int64_t clock[kTracedEvents];
};
static __device__ Trace traces[2];  // of the consumers, and of the producer

__device__ __forceinline__ void trace(Event event) {
  const int thread = threadIdx.x;
  if (blockIdx.x != kTracedBlock || (thread != 0 && thread != 128)) return;
  Trace& mine = traces[thread == 0];
  if (mine.count == kTracedEvents) return;
  mine.event[mine.count] = static_cast<int>(event);
  mine.clock[mine.count] = clock64();
  ++mine.count;
}
#else
__device__ __forceinline__ void trace(Event) {}
#endif

}  // namespace flashmask::sm90
