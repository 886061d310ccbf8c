// What a multiprocessor of Hopper makes of the forward pass's main loop when nothing else is in the way: no barriers,
// no copies, no masks, no ends of row tiles. Exponentials (with their sums and roundings) and products alone, then as
// the kernel has them: scores of the next keys beside the output of these. Prints cycles for 64 rows x 128 keys as
// JSON.
//
//     nvcc -gencode arch=compute_90a,code=sm_90a -O3 -std=c++17 -I custom_ops/flashmask -o roof benchmarks/cuda/roof.cu
//     ./roof
//
// One block on one multiprocessor, so that clocks are not lowered for power.
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "cuda/element.cuh"
#include "sm90/barrier.cuh"
#include "sm90/panels.cuh"
#include "sm90/softmax.cuh"

namespace flashmask::sm90 {

using T = __nv_bfloat16;

// Keys: of one pass of the loop, half of a tile of 128 or all of it.
template <int kHeadDim, int kWarpgroups, int kKeys, bool kExponentials, bool kProducts>
__global__ void __launch_bounds__(kWarpgroups * 128, 1)
    roof_kernel(int passes, float scale, float* out, int64_t* cycles) {
  extern __shared__ __align__(1024) char raw[];
  using QTile = Panels<64 * kWarpgroups, kHeadDim>;
  using KTile = Panels<128, kHeadDim>;
  const uint32_t shared = shared_address(raw);
  constexpr int kWords = (QTile::kBytes + 2 * KTile::kBytes) / 4;
  for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(raw)[i] = 0x3c003c00u + (i * 2654435761u >> 16 & 0x007f007fu);  // around 0.008
  }
  fence_async_proxy();
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  const auto low_word = [](uint64_t descriptor) { return static_cast<uint32_t>(descriptor); };
  const uint32_t high_q = hidden<0>(QTile::kHighWord), high_k = hidden<1>(KTile::kHighWord);
  const uint32_t low_q = low_word(QTile::along_columns(shared, warpgroup * 64, 0));
  const uint32_t low_k = low_word(KTile::along_columns(shared + QTile::kBytes, 0, 0));
  const uint32_t low_v = low_word(KTile::along_rows(shared + QTile::kBytes + KTile::kBytes, 0, 0));
  float output[kHeadDim / 8][4] = {}, scores[kKeys / 8][4] = {};
  uint32_t weights[kKeys / 16][4] = {};
  OnlineSoftmax softmax;
  softmax.reference[0] = softmax.reference[1] = 1.0f;
  int moved = 0;

  // Without exponentials they are summed up: the assembler drops scores that nothing reads.
  const auto issue_scores = [&](int first_key) {
    const uint64_t q = descriptor_of(low_q, high_q);
    const uint64_t k = descriptor_of(low_k + static_cast<uint32_t>(KTile::row_distance(first_key)), high_k);
    fence_registers(scores);
    wgmma_begin();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      wgmma<T, Major::kK, Major::kK>(scores, QTile::moved(q, QTile::column_distance(d)),
                                     KTile::moved(k, KTile::column_distance(d)), !kExponentials || d > 0);
    }
    wgmma_commit();
  };
  const auto issue_output = [&](int first_key) {
    const uint64_t v = descriptor_of(low_v + static_cast<uint32_t>(KTile::row_distance(first_key)), high_k);
    fence_registers(weights);
    fence_registers(output);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      wgmma<T, Major::kMN>(output, weights[step], KTile::moved(v, KTile::row_distance(step * 16)), 1);
    }
    wgmma_commit();
  };
  const auto take_output = [&] {
    wgmma_wait<0>();
    fence_registers(output);
    fence_registers(weights);
  };
  const auto pass = [&](int first_key) {
    if (kProducts) {
      issue_scores(first_key);
      issue_output(128 - kKeys - first_key);
      wgmma_wait<1>();
    }
    fence_registers(scores);
    if (!kExponentials) return take_output();
    const bool large = softmax.weigh(scores, scale, [&] {
      if (kProducts) take_output();
    });
    fence_registers(scores);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      pack_operand<T>(weights[step], scores[step * 2], scores[step * 2 + 1]);
    fence_registers(weights);
    if (large) ++moved;
  };

  __syncthreads();
  const int64_t begin = clock64();
#pragma unroll 1
  for (int i = 0; i < passes; ++i) {
    pass(0);
    if constexpr (kKeys < 128) pass(kKeys);
  }
  const int64_t end = clock64();
  float sum = softmax.row_sum[0] + softmax.row_sum[1] + moved;
  for (const auto& row : output) sum += row[0] + row[1] + row[2] + row[3];
  for (const auto& row : scores) sum += row[0] + row[1] + row[2] + row[3];
  for (const auto& row : weights) sum += row[0] + row[1] + row[2] + row[3];
  out[threadIdx.x] = sum;
  if (threadIdx.x % 128 == 0) cycles[warpgroup] = end - begin;
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(status));
  exit(1);
}

template <int kHeadDim, int kWarpgroups, int kKeys, bool kExponentials, bool kProducts>
double cycles_per_tile() {
  const auto kernel = roof_kernel<kHeadDim, kWarpgroups, kKeys, kExponentials, kProducts>;
  constexpr int kPasses = 4000, kBytes = (64 * kWarpgroups + 2 * 128) * kHeadDim * 2;
  float* out;
  int64_t* cycles;
  check(cudaMalloc(&out, 1024 * sizeof(float)));
  check(cudaMallocManaged(&cycles, kWarpgroups * sizeof(int64_t)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  for (int run = 0; run < 2; ++run) {  // the first loads the code
    kernel<<<1, kWarpgroups * 128, kBytes>>>(kPasses, 0.001f, out, cycles);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
  }
  double sum = 0.0;
  for (int i = 0; i < kWarpgroups; ++i) sum += static_cast<double>(cycles[i]);
  check(cudaFree(out));
  check(cudaFree(cycles));
  return sum / kWarpgroups / kPasses / kWarpgroups;
}

template <int kHeadDim, int kWarpgroups, int kKeys>
void measure(const char* end) {
  printf(
      "  {\"head_dim\": %d, \"warpgroups\": %d, \"keys_per_pass\": %d, \"exponentials\": %.1f, \"products\": %.1f, "
      "\"main_loop\": %.1f}%s\n",
      kHeadDim, kWarpgroups, kKeys, cycles_per_tile<kHeadDim, kWarpgroups, kKeys, true, false>(),
      cycles_per_tile<kHeadDim, kWarpgroups, kKeys, false, true>(),
      cycles_per_tile<kHeadDim, kWarpgroups, kKeys, true, true>(), end);
}

}  // namespace flashmask::sm90

int main() {
  using namespace flashmask::sm90;
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  printf("{\"device\": \"%s\", \"unit\": \"cycles for 64 rows x 128 keys\", \"loops\": [\n", device.name);
  measure<64, 1, 128>(",");
  measure<64, 2, 128>(",");
  measure<64, 3, 128>(",");
  measure<64, 3, 64>(",");
  measure<64, 4, 64>(",");
  measure<96, 2, 128>(",");
  measure<96, 3, 64>(",");
  measure<128, 1, 128>(",");
  measure<128, 2, 128>(",");
  measure<128, 3, 64>("");
  printf("]}\n");
  return 0;
}
