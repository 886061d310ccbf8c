// CPU backend: picks the instruction set, classifies column tiles, lays out scratch, runs the threads.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/queues.h"

namespace flashmask {
namespace {

int best_isa() {
#if defined(FLASHMASK_X86)
  static const int best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return FLASHMASK_ISA_AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FLASHMASK_ISA_AVX2;
    return FLASHMASK_ISA_PORTABLE;
  }();
  return best;
#else
  return FLASHMASK_ISA_PORTABLE;
#endif
}

// Null where the machine or the build lacks the instruction set asked for.
const CpuKernels* kernels_for(int isa) {
  if (isa == FLASHMASK_ISA_AUTO) isa = best_isa();
  if (isa > best_isa()) return nullptr;
  switch (isa) {
#if defined(FLASHMASK_X86)
    case FLASHMASK_ISA_AVX512:
      return &avx512_kernels();
    case FLASHMASK_ISA_AVX2:
      return &avx2_kernels();
#endif
    default:
      return &portable_kernels();
  }
}

int divide_up(int a, int b) { return a / b + (a % b != 0); }

CpuPlan make_plan(const FlashmaskParams& params, int tile_rows, int tile_columns) {
  CpuPlan plan{};
  plan.params = params;
  plan.tile_rows = tile_rows;
  plan.tile_columns = tile_columns;
  plan.num_row_tiles = divide_up(params.seqlen_q, tile_rows);
  plan.num_column_tiles = divide_up(params.seqlen_k, tile_columns);
  return plan;
}

int thread_count(const FlashmaskParams& params, int64_t items) {
  const int64_t wanted = params.num_threads > 0 ? params.num_threads : omp_get_max_threads();
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, items)));
}

std::vector<ColumnTileSummary> summarise(const CpuPlan& plan, int threads) {
  const FlashmaskParams& p = plan.params;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads_mask;
  std::vector<ColumnTileSummary> summaries(static_cast<size_t>(heads * plan.num_column_tiles));
  const int64_t tiles = static_cast<int64_t>(summaries.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t head = index / plan.num_column_tiles;
    const int column = static_cast<int>(index % plan.num_column_tiles) * plan.tile_columns;
    const int end = std::min(column + plan.tile_columns, p.seqlen_k);
    ColumnTileSummary summary;
    for (int j = column; j < end; ++j) {
      const int32_t* bounds = p.num_bounds == 0 ? nullptr : p.bounds + (head * p.seqlen_k + j) * p.num_bounds;
      summary.add(column_mask(bounds, p.num_bounds, p.causal != 0, j, p.seqlen_q, p.seqlen_k));
    }
    summaries[static_cast<size_t>(index)] = summary;
  }
  return summaries;
}

struct FreeDeleter {
  void operator()(void* pointer) const { std::free(pointer); }
};

// One stretch of scratch per thread, each starting on a cache line of its own.
class ThreadScratch {
 public:
  ThreadScratch(int64_t floats, int threads)
      : stride_((floats + 15) / 16 * 16),
        memory_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(stride_ * threads) * sizeof(float)))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  float* of(int thread) { return memory_.get() + stride_ * thread; }

 private:
  int64_t stride_;
  std::unique_ptr<float, FreeDeleter> memory_;
};

FlashmaskStatus no_isa(std::string* error) {
  *error = std::string("cpu_isa: this machine or build goes up to ") + cpu_best_isa();
  return FLASHMASK_NOT_BUILT;
}

int64_t round_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

const char* cpu_best_isa() { return kernels_for(FLASHMASK_ISA_AUTO)->name; }

FlashmaskStatus cpu_kernel_name(const FlashmaskParams& params, std::string* name, std::string* error) {
  const CpuKernels* kernels = kernels_for(params.cpu_isa);
  if (kernels == nullptr) return no_isa(error);
  *name = std::string("cpu ") + kernels->name;
  return FLASHMASK_OK;
}

int64_t cpu_forward_workspace_bytes(const FlashmaskParams&) { return 0; }

// delta, and for 16-bit types the float32 sum of dq.
int64_t cpu_backward_workspace_bytes(const FlashmaskParams& params) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads_q * params.seqlen_q;
  const int64_t delta = round_to_line(rows * static_cast<int64_t>(sizeof(float)));
  const int64_t dq =
      params.dtype == FLASHMASK_FLOAT32 ? 0 : rows * params.head_dim * static_cast<int64_t>(sizeof(float));
  return delta + dq;
}

FlashmaskStatus cpu_forward(const FlashmaskParams& params, std::string* error) {
  const CpuKernels* kernels = kernels_for(params.cpu_isa);
  if (kernels == nullptr) return no_isa(error);
  CpuPlan plan = make_plan(params, kForwardTileRows, kForwardTileColumns);
  const int64_t items = static_cast<int64_t>(params.batch) * params.heads_q * plan.num_row_tiles;
  const int threads = thread_count(params, items);
  const std::vector<ColumnTileSummary> summaries = summarise(plan, threads);
  plan.summaries = summaries.data();
  ThreadScratch scratch(kernels->forward_scratch_floats(params), threads);
  AtomicQueue queue(items);
#pragma omp parallel num_threads(threads)
  kernels->forward(plan, queue, scratch.of(omp_get_thread_num()));
  return FLASHMASK_OK;
}

FlashmaskStatus cpu_backward(const FlashmaskParams& params, std::string* error) {
  const CpuKernels* kernels = kernels_for(params.cpu_isa);
  if (kernels == nullptr) return no_isa(error);
  CpuPlan plan = make_plan(params, kBackwardTileRows, kBackwardTileColumns);
  const int64_t groups = static_cast<int64_t>(params.batch) * params.heads_k;
  const int64_t column_items = groups * plan.num_column_tiles;
  const int64_t row_items = static_cast<int64_t>(params.batch) * params.heads_q * plan.num_row_tiles;
  const int threads = thread_count(params, std::max(column_items, row_items));
  const std::vector<ColumnTileSummary> summaries = summarise(plan, threads);
  plan.summaries = summaries.data();

  BackwardBuffers buffers{};
  char* workspace = static_cast<char*>(params.workspace);
  buffers.delta = reinterpret_cast<float*>(workspace);
  if (params.dtype != FLASHMASK_FLOAT32) {
    const int64_t rows = static_cast<int64_t>(params.batch) * params.heads_q * params.seqlen_q;
    buffers.dq_float = reinterpret_cast<float*>(workspace + round_to_line(rows * static_cast<int64_t>(sizeof(float))));
  }
  ThreadScratch scratch(kernels->backward_scratch_floats(params), threads);
  AtomicQueue prepare(row_items);
  SlotQueue columns(column_items, groups, threads);
  AtomicQueue finish(row_items);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    kernels->backward_prepare(plan, buffers, prepare);
#pragma omp barrier
    kernels->backward(plan, buffers, columns, thread, scratch.of(thread));
#pragma omp barrier
    kernels->backward_finish(plan, buffers, finish);
  }
  return FLASHMASK_OK;
}

}  // namespace flashmask
