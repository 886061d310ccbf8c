// Host side of the CUDA kernels: checks, choice of kernels, workspace, launches.
#include "cuda_backend.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>

#include "../philox.h"
#include "launch.h"

namespace flashmask {
namespace {

constexpr int kBackwardRowAlign = 128;   // rows of query data are padded to this: a multiple of every tile
constexpr int kSmallShared = 99 * 1024;  // the least that devices of capability 8.0 and newer grant a block
constexpr int kLargestShared = 1 << 30;
// Heads that run at the same time should find their keys and values (or queries) in the L2 cache of 40 MB and more.
constexpr int64_t kCacheBudget = 20 << 20;
// Column tiles of a head that add to dQ in turn wait for each other; with more heads at once there are fewer of each.
// Where there are lists, that gains more than the cache loses, and most where they leave few pairs of tiles (at most so
// large a part of all): what all wait for is then a row tile that all column tiles see. Measured at 8K.
constexpr int64_t kTurnsBudget = kCacheBudget * 9 / 5;
constexpr int64_t kSparseTurnsBudget = kCacheBudget * 5 / 2, kSparseTurnsBudgetWide = kCacheBudget * 5;
constexpr double kFewTiles = 0.3;
// What heads of the last group (head_groups.h) may take, that is, of the 50 MB of an H100.
constexpr int64_t kLastBudget = kCacheBudget * 12 / 5;
// A head whose rows take more than this in the backward pass is read again by every column tile that is at other rows.
// Up to 64 dims, to stay together was measured to pay only later.
constexpr int64_t kRowsBeyondCache = kCacheBudget * 3 / 2, kRowsBeyondCache64 = kCacheBudget * 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string dtype_name(int32_t dtype) {
  return dtype == FLASHMASK_FLOAT32 ? "float32" : dtype == FLASHMASK_BFLOAT16 ? "bfloat16" : "float16";
}

bool fits(const Kernel& kernel, Direction direction, const FlashmaskParams& op) {
  return kernel.direction == direction && kernel.dtype == op.dtype &&
         std::max(op.head_dim, op.head_dim_v) <= kernel.head_dim;
}

// For comparing architectures' kernels on one device: only those of the folder that it names are used.
bool is_allowed(const Kernel& kernel) {
  const char* forced = getenv("FLASHMASK_FORCE_ARCH");
  return forced == nullptr || *forced == 0 || strcmp(forced, kernel.arch) == 0;
}

// The kernels are ordered by architecture, then head dim: the first fit wastes least.
const Kernel* find_kernel(Direction direction, const FlashmaskParams& op, int capability) {
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& kernel = kKernels[i];
    if (fits(kernel, direction, op) && capability >= kernel.min_capability && capability <= kernel.max_capability &&
        is_allowed(kernel) && kernel.takes(op)) {
      return &kernel;
    }
  }
  return nullptr;
}

std::string version(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

// Why find_kernel() found none.
std::string missing_kernels(const FlashmaskParams& op, int capability) {
  if (op.dtype == FLASHMASK_FLOAT32) {
    return "dtype: the CUDA kernels take bfloat16 and float16, got float32";
  }
  std::string dims;
  bool any_for_device = false;
  int oldest = kAllNewer, newest = 0;
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& kernel = kKernels[i];
    oldest = std::min(oldest, kernel.min_capability);
    newest = std::max(newest, kernel.max_capability);
    if (capability < kernel.min_capability || capability > kernel.max_capability) continue;
    any_for_device = true;
    const std::string dim = std::to_string(kernel.head_dim);
    if (kernel.dtype == op.dtype && (" " + dims + " ").find(" " + dim + " ") == std::string::npos) {
      dims += (dims.empty() ? "" : " ") + dim;
    }
  }
  if (!any_for_device) {
    const std::string to = newest == kAllNewer ? " and newer" : newest > oldest ? " to " + version(newest) : "";
    return "device: this library has CUDA kernels for compute capability " + version(oldest) + to +
           ", the current device has " + version(capability);
  }
  const char* forced = getenv("FLASHMASK_FORCE_ARCH");
  if (forced != nullptr && *forced != 0) {
    return std::string("FLASHMASK_FORCE_ARCH: this library has no kernel of '") + forced +
           "' for this device, dtype, head dim and these options";
  }
  if (dims.empty()) return "dtype: this library was built without " + dtype_name(op.dtype) + " CUDA kernels";
  return "head_dim: this library was built with " + dtype_name(op.dtype) + " kernels for head dims up to those of {" +
         dims + "} on this device, got " + std::to_string(op.head_dim) + " and " + std::to_string(op.head_dim_v);
}

bool needs_lists(const FlashmaskParams& op) { return op.num_bounds > 0 || op.block_mask != nullptr; }

void set_shape(const TileShape& shape, KernelParams* p) {
  TileLists& lists = p->lists;
  lists.tile_rows = shape.rows;
  lists.tile_columns = shape.columns;
  lists.row_tiles = ceil_div(p->op.seqlen_q, shape.rows);
  lists.column_tiles = ceil_div(p->op.seqlen_k, shape.columns);
  lists.row_words = ceil_div(lists.row_tiles, 32);
  lists.column_words = ceil_div(lists.column_tiles, 32);
}

// Cuts the workspace into aligned parts. With a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* part = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(part);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

ListWord* take_list(Workspace* workspace, const FlashmaskParams& op, int64_t tiles, int64_t words) {
  return workspace->take<ListWord>(static_cast<int64_t>(op.batch) * op.heads_mask * tiles * words);
}

// Sets the tile shape and the workspace parts of `p`; returns the bytes used.
int64_t plan_forward(const TileShape& shape, void* workspace_base, KernelParams* p) {
  Workspace workspace(workspace_base);
  set_shape(shape, p);
  p->work_counter = workspace.take<int32_t>(1);
  if (needs_lists(p->op)) {
    p->lists.by_row = take_list(&workspace, p->op, p->lists.row_tiles, p->lists.column_words);
  }
  return workspace.bytes();
}

// What one query row takes: q, dout and the sums of dQ.
int64_t backward_row_bytes(const FlashmaskParams& op, int head_dim) {
  return (op.head_dim + op.head_dim_v) * 2 + head_dim * 4;
}

int64_t plan_backward(const TileShape& shape, int head_dim, void* workspace_base, KernelParams* p) {
  Workspace workspace(workspace_base);
  const FlashmaskParams& op = p->op;
  set_shape(shape, p);
  p->column_works = p->lists.column_tiles * op.batch * op.heads_k;
  p->padded_rows = static_cast<int32_t>(ceil_div(op.seqlen_q, kBackwardRowAlign) * kBackwardRowAlign);
  const int64_t rows = static_cast<int64_t>(op.batch) * op.heads_q * p->padded_rows;
  p->dq_accumulator = workspace.take<float>(rows * head_dim);
  p->query_lse = workspace.take<float>(rows);
  p->query_delta = workspace.take<float>(rows);
  const int64_t heads_q = static_cast<int64_t>(op.batch) * op.heads_q;
  const int64_t heads_k = static_cast<int64_t>(op.batch) * op.heads_k;
  p->counters = 2 + heads_q + 2 * heads_k + heads_q * p->lists.row_tiles * 2 + 1;
  p->work_counter = workspace.take<int32_t>(p->counters);
  p->finish_counter = p->work_counter + 1;
  p->prepared = p->work_counter + 2;
  p->finished = p->prepared + heads_q;
  int32_t* const row_front = p->finished + heads_k;
  int32_t* const of_row_tiles = row_front + heads_k;
  const bool masked = op.causal || needs_lists(op);  // their column tiles differ in length, and stay together anyway
  const int64_t beyond_cache = head_dim > 64 ? kRowsBeyondCache : kRowsBeyondCache64;
  if (!op.deterministic && !masked && backward_row_bytes(op, head_dim) * op.seqlen_q > beyond_cache) {
    p->row_front = row_front;
  }
  (op.deterministic ? p->turns : p->sums) = of_row_tiles;
  if (needs_lists(op)) {
    p->lists.by_column = take_list(&workspace, op, p->lists.column_tiles, p->lists.row_words);
    if (op.deterministic) {
      p->lists.by_row = take_list(&workspace, op, p->lists.row_tiles, p->lists.column_words);
      p->active_tiles = workspace.take<unsigned long long>(1);
    }
  }
  return workspace.bytes();
}

// Which kernel and shape a device takes is not known here: the largest need of all.
int64_t workspace_bytes(Direction direction, const FlashmaskParams& op) {
  int64_t bytes = 0;
  const char* previous_arch = "";
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& kernel = kKernels[i];
    if (!fits(kernel, direction, op) || strcmp(kernel.arch, previous_arch) == 0) continue;
    previous_arch = kernel.arch;  // its larger head dims are never taken
    for (const int shared : {kSmallShared, kLargestShared}) {
      KernelParams p{};
      p.op = op;
      const int64_t need = direction == Direction::kBackward
                               ? plan_backward(kernel.shape(shared), kernel.head_dim, nullptr, &p)
                               : plan_forward(kernel.shape(shared), nullptr, &p);
      bytes = std::max(bytes, need);
    }
  }
  return bytes;
}

bool aligned(const FlashmaskTensor& tensor, const FlashmaskParams& op, int64_t seqlen, int64_t heads) {
  // The stride of an axis of one element says nothing.
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && (op.batch == 1 || tensor.batch_stride % 8 == 0) &&
         (seqlen == 1 || tensor.seq_stride % 8 == 0) && (heads == 1 || tensor.head_stride % 8 == 0);
}

FlashmaskStatus cuda_failure(const char* what, cudaError_t status, std::string* error) {
  *error = std::string(what) + ": " + cudaGetErrorString(status);
  cudaGetLastError();  // takes it out of the runtime: the thread's next launch would report it as its own
  if (status == cudaErrorMemoryAllocation) return FLASHMASK_OUT_OF_MEMORY;
  if (status == cudaErrorNoKernelImageForDevice) return FLASHMASK_NOT_BUILT;
  return FLASHMASK_DEVICE_ERROR;
}

#define FLASHMASK_CUDA_CHECK(call, what)                                             \
  do {                                                                               \
    const cudaError_t check_status = (call);                                         \
    if (check_status != cudaSuccess) return cuda_failure(what, check_status, error); \
  } while (0)

struct Device {
  int id = 0;
  int capability = 0;
  int shared_limit = 0;
};

FlashmaskStatus ask_device(Device* device, std::string* error) {
  int major = 0, minor = 0;
  FLASHMASK_CUDA_CHECK(cudaGetDevice(&device->id), "cudaGetDevice");
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device->id);
  };
  FLASHMASK_CUDA_CHECK(ask(&major, cudaDevAttrComputeCapabilityMajor), "compute capability");
  FLASHMASK_CUDA_CHECK(ask(&minor, cudaDevAttrComputeCapabilityMinor), "compute capability");
  FLASHMASK_CUDA_CHECK(ask(&device->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin), "shared memory limit");
  device->capability = 10 * major + minor;
  // For tests: the kernels that smaller GPUs take can so be run on a large one.
  const char* pretended = getenv("FLASHMASK_CUDA_SHARED_LIMIT");
  if (pretended != nullptr && atoi(pretended) >= kSmallShared) {
    device->shared_limit = std::min(device->shared_limit, atoi(pretended));
  }
  return FLASHMASK_OK;
}

// Kernels run on the current device. From another one's memory they could not read, or, where the two GPUs see each
// other, would read what that one's streams may not have written yet.
FlashmaskStatus check_place(const FlashmaskParams& op, const Device& device, std::string* error) {
  cudaPointerAttributes place{};
  FLASHMASK_CUDA_CHECK(cudaPointerGetAttributes(&place, op.q.data), "cudaPointerGetAttributes");
  if (place.type == cudaMemoryTypeDevice && place.device != device.id) {
    const std::string of_q = std::to_string(place.device);
    *error = "device: q lies in the memory of GPU " + of_q + ", but the current device is GPU " +
             std::to_string(device.id) + "; make GPU " + of_q + " the current device for this call";
    return FLASHMASK_INVALID_ARGUMENT;
  }
  return FLASHMASK_OK;
}

KernelParams common_params(const FlashmaskParams& op) {
  KernelParams p{};
  p.op = op;
  p.negative_scale = op.softmax_scale < 0;
  // Masked scores are -inf, and -inf * 0 would be NaN: a scale of zero becomes one that no finite score can feel.
  p.scale_log2 = std::max(fabsf(op.softmax_scale) * 1.4426950408889634f, 1e-30f);
  p.signed_scale_log2 = p.negative_scale ? -p.scale_log2 : p.scale_log2;
  p.no_skip = (op.flags & FLASHMASK_FLAG_NO_SKIP) != 0;
  p.keep_threshold = dropout_keep_threshold(op.dropout);
  p.keep_scale = dropout_keep_scale(p.keep_threshold);
  return p;
}

int32_t heads_in_cache(int64_t budget, int64_t bytes_per_head, int64_t heads, int64_t multiple) {
  const int64_t fitting = std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_head));
  return static_cast<int32_t>(std::min(heads, ceil_div(fitting, multiple) * multiple));
}

// Heads of the last group, which should have `rows` in all; 0 where all tiles see as much.
int64_t heads_of_last_group(const FlashmaskParams& op, int64_t rows, int64_t seqlen, int64_t bytes_per_head) {
  if (seqlen == 0 || !(op.causal || needs_lists(op))) return 0;
  const int64_t fitting = std::max<int64_t>(2, kLastBudget / std::max<int64_t>(1, bytes_per_head));
  return std::min(ceil_div(rows, seqlen), fitting);
}

struct NamedTensor {
  const char* name;
  const FlashmaskTensor* tensor;
  int64_t seqlen;
  int64_t heads;
};

template <size_t kCount>
FlashmaskStatus check(const FlashmaskParams& op, const NamedTensor (&tensors)[kCount], std::string* error) {
  for (const NamedTensor& named : tensors) {
    if (!aligned(*named.tensor, op, named.seqlen, named.heads)) {
      *error = std::string(named.name) +
               ": the address and all strides must be multiples of 16 bytes (8 elements) for the CUDA kernels";
      return FLASHMASK_INVALID_ARGUMENT;
    }
  }
  if (reinterpret_cast<uintptr_t>(op.workspace) % 16 != 0) {
    *error = "workspace: the address must be a multiple of 16 bytes";
    return FLASHMASK_INVALID_ARGUMENT;
  }
  // Work is numbered with 32 bits; the smallest unit is 16 rows of one head, and sm90 numbers those of 64 rows, too.
  const int64_t rows = std::max<int64_t>(op.seqlen_q, op.seqlen_k) + 128;
  if (static_cast<int64_t>(op.batch) * op.heads_q * (rows / 16) >= INT32_MAX / 5 * 4 || rows > INT32_MAX - 4096) {
    *error = "batch, heads_q, seqlen_q: batch * heads_q * seqlen / 16 must stay below 4/5 of 2^31";
    return FLASHMASK_INVALID_ARGUMENT;
  }
  return FLASHMASK_OK;
}

FlashmaskStatus check_workspace(const FlashmaskParams& op, int64_t needed, std::string* error) {
  if (needed > 0 && (op.workspace == nullptr || op.workspace_bytes < needed)) {
    *error = "workspace: " + std::to_string(needed) + " bytes are needed, got " +
             std::to_string(op.workspace == nullptr ? 0 : op.workspace_bytes);
    return FLASHMASK_INVALID_ARGUMENT;
  }
  return FLASHMASK_OK;
}

}  // namespace

int64_t cuda_forward_workspace_bytes(const FlashmaskParams& params) {
  return workspace_bytes(Direction::kForward, params);
}
int64_t cuda_backward_workspace_bytes(const FlashmaskParams& params) {
  return workspace_bytes(Direction::kBackward, params);
}

FlashmaskStatus cuda_kernel_name(const FlashmaskParams& op, bool backward, std::string* name, std::string* error) {
  Device device;
  const FlashmaskStatus status = ask_device(&device, error);
  if (status != FLASHMASK_OK) return status;
  const Kernel* kernel = find_kernel(backward ? Direction::kBackward : Direction::kForward, op, device.capability);
  if (kernel == nullptr) {
    *error = missing_kernels(op, device.capability);
    return FLASHMASK_NOT_BUILT;
  }
  *name = std::string("cuda ") + kernel->arch + " d" + std::to_string(kernel->head_dim);
  return FLASHMASK_OK;
}

FlashmaskStatus cuda_forward(const FlashmaskParams& op, std::string* error) {
  const NamedTensor tensors[] = {{"q", &op.q, op.seqlen_q, op.heads_q},
                                 {"k", &op.k, op.seqlen_k, op.heads_k},
                                 {"v", &op.v, op.seqlen_k, op.heads_k},
                                 {"out", &op.out, op.seqlen_q, op.heads_q}};
  FlashmaskStatus status = check(op, tensors, error);
  if (status != FLASHMASK_OK) return status;
  Device device;
  status = ask_device(&device, error);
  if (status != FLASHMASK_OK) return status;
  status = check_place(op, device, error);
  if (status != FLASHMASK_OK) return status;
  const Kernel* kernel = find_kernel(Direction::kForward, op, device.capability);
  if (kernel == nullptr) {
    *error = missing_kernels(op, device.capability);
    return FLASHMASK_NOT_BUILT;
  }
  KernelParams p = common_params(op);
  status = check_workspace(op, plan_forward(kernel->shape(device.shared_limit), op.workspace, &p), error);
  if (status != FLASHMASK_OK) return status;

  const int64_t group = op.heads_q / op.heads_k;
  const int64_t bytes = static_cast<int64_t>(op.seqlen_k) * (op.head_dim + op.head_dim_v) * 2 / group;
  const int64_t heads = static_cast<int64_t>(op.batch) * op.heads_q;
  p.groups = make_head_groups(heads, heads_in_cache(kCacheBudget, bytes, heads, group),
                              heads_of_last_group(op, kRowsOfLastGroup, op.seqlen_q, bytes));
  const cudaStream_t stream = static_cast<cudaStream_t>(op.stream);
  if (p.lists.by_row != nullptr) FLASHMASK_CUDA_CHECK(launch_tile_lists(p, stream), "tile list kernel");
  FLASHMASK_CUDA_CHECK(kernel->launch(p, device.shared_limit, stream), "forward kernel");
  return FLASHMASK_OK;
}

FlashmaskStatus cuda_backward(const FlashmaskParams& op, std::string* error) {
  const NamedTensor tensors[] = {{"q", &op.q, op.seqlen_q, op.heads_q},       {"k", &op.k, op.seqlen_k, op.heads_k},
                                 {"v", &op.v, op.seqlen_k, op.heads_k},       {"out", &op.out, op.seqlen_q, op.heads_q},
                                 {"dout", &op.dout, op.seqlen_q, op.heads_q}, {"dq", &op.dq, op.seqlen_q, op.heads_q},
                                 {"dk", &op.dk, op.seqlen_k, op.heads_k},     {"dv", &op.dv, op.seqlen_k, op.heads_k}};
  FlashmaskStatus status = check(op, tensors, error);
  if (status != FLASHMASK_OK) return status;
  Device device;
  status = ask_device(&device, error);
  if (status != FLASHMASK_OK) return status;
  status = check_place(op, device, error);
  if (status != FLASHMASK_OK) return status;
  const Kernel* kernel = find_kernel(Direction::kBackward, op, device.capability);
  if (kernel == nullptr) {
    *error = missing_kernels(op, device.capability);
    return FLASHMASK_NOT_BUILT;
  }
  KernelParams p = common_params(op);
  const TileShape shape = kernel->shape(device.shared_limit);
  status = check_workspace(op, plan_backward(shape, kernel->head_dim, op.workspace, &p), error);
  if (status != FLASHMASK_OK) return status;

  const int64_t query_head_bytes = backward_row_bytes(op, kernel->head_dim) * op.seqlen_q;
  const int64_t bytes = query_head_bytes * (op.heads_q / op.heads_k);
  const int64_t heads = static_cast<int64_t>(op.batch) * op.heads_k;
  const int64_t budget = p.active_tiles != nullptr ? kTurnsBudget : kCacheBudget;
  // Not more than a third of all heads: before the last group begins, the rows of all its heads have to be prepared.
  // With turns the heaviest tiles come last, and more heads at the end would not help.
  const int64_t of_last =
      std::min(ceil_div(heads, 3), heads_of_last_group(op, kKeysOfLastGroup, op.seqlen_k, query_head_bytes));
  p.groups = make_head_groups(heads, heads_in_cache(budget, bytes, heads, 1), p.turns != nullptr ? 0 : of_last);
  const cudaStream_t stream = static_cast<cudaStream_t>(op.stream);
  if (p.active_tiles != nullptr) {
    const int64_t sparse_budget = kernel->head_dim > 128 ? kSparseTurnsBudgetWide : kSparseTurnsBudget;
    p.sparse_groups = make_head_groups(heads, heads_in_cache(sparse_budget, bytes, heads, 1), 0);
    p.few_tiles = static_cast<unsigned long long>(kFewTiles * op.batch * op.heads_mask * p.lists.row_tiles *
                                                  p.lists.column_tiles);
    FLASHMASK_CUDA_CHECK(cudaMemsetAsync(p.active_tiles, 0, sizeof(*p.active_tiles), stream), "zeroed counter");
  }
  if (p.lists.by_column != nullptr) FLASHMASK_CUDA_CHECK(launch_tile_lists(p, stream), "tile list kernel");
  FLASHMASK_CUDA_CHECK(kernel->launch(p, device.shared_limit, stream), "backward kernels");
  return FLASHMASK_OK;
}

}  // namespace flashmask
