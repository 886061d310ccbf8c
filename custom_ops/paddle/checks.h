// Checks of the op's inputs. The Python layer makes the same checks first and with more context; these stand for
// static programs, whose sizes are known only at run time, and for anybody who calls the registered op directly.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "flashmask.h"
#include "paddle/common/ddim.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/ext/op_meta_info.h"

namespace flashmask_paddle {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// In Python, under Paddle 3: InvalidArgument is a ValueError, Unimplemented a NotImplementedError, ResourceExhausted a
// MemoryError, External an OSError. Paddle 2.6 keeps that macro in a header that needs cuDNN in a GPU build; there all
// become OSError or RuntimeError.
[[noreturn]] inline void fail_as(FlashmaskStatus status, const std::string& message) {
#ifdef PADDLE_THROW
  namespace errors = common::errors;
  const char* const format = "flashmask_attention: %s";
  if (status == FLASHMASK_NOT_BUILT) PADDLE_THROW(errors::Unimplemented(format, message));
  if (status == FLASHMASK_OUT_OF_MEMORY) PADDLE_THROW(errors::ResourceExhausted(format, message));
  if (status == FLASHMASK_DEVICE_ERROR) PADDLE_THROW(errors::External(format, message));
  PADDLE_THROW(errors::InvalidArgument(format, message));
#else
  static_cast<void>(status);
  PD_THROW("flashmask_attention: ", message);
#endif
}

[[noreturn]] inline void fail(const std::string& message) { fail_as(FLASHMASK_INVALID_ARGUMENT, message); }

template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) fail(concat(parts...));
}

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t axis = 0; axis < shape.size(); ++axis) text << (axis ? ", " : "") << shape[axis];
  text << ']';
  return text.str();
}

// Sparse tensors and tensors whose memory was given back have no data to point at.
inline void expect_dense(const paddle::Tensor& tensor, const char* name) {
  expect(tensor.is_dense_tensor(), name, " must be a dense tensor");
  expect(tensor.initialized(), name, " holds no data");
}

// Paddle copies views before it calls a custom op; if a version did not, these would tell.
inline void expect_unit_stride(const paddle::Tensor& tensor, const char* name) {
  expect(tensor.strides()[3] == 1 || tensor.shape()[3] == 1, "the last axis of ", name, " must be contiguous");
}

inline void expect_contiguous(const paddle::Tensor& tensor, const char* name) {
  const std::vector<int64_t> shape = tensor.shape();
  int64_t stride = 1;
  for (int axis = static_cast<int>(shape.size()) - 1; axis >= 0; --axis) {
    expect(shape[axis] == 1 || tensor.strides()[axis] == stride, name, " must be contiguous");
    stride *= shape[axis];
  }
}

inline void expect_like_query(const paddle::Tensor& tensor, const char* name, const paddle::Tensor& query) {
  expect_dense(tensor, name);
  expect(tensor.place() == query.place(), name, " is on ", tensor.place().DebugString(), ", but query is on ",
         query.place().DebugString());
  expect(tensor.dtype() == query.dtype(), name, " must have the dtype of query, ", query.dtype(), "; got ",
         tensor.dtype());
}

inline void expect_shape(const paddle::Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  expect(tensor.shape() == shape, name, " must have shape ", text_of(shape), "; got ", text_of(tensor.shape()));
}

inline void expect_int32_on(const paddle::Tensor& tensor, const char* name, const paddle::Tensor& query) {
  expect_dense(tensor, name);
  expect(tensor.dtype() == paddle::DataType::INT32, name, " must be int32; got ", tensor.dtype());
  expect(tensor.place() == query.place(), name, " is on ", tensor.place().DebugString(), ", but query is on ",
         query.place().DebugString());
  expect(tensor.shape().size() == 4, name, " must have 4 axes; got shape ", text_of(tensor.shape()));
  expect_contiguous(tensor, name);
}

inline void check_qkv(const paddle::Tensor& query, const paddle::Tensor& key, const paddle::Tensor& value) {
  expect_dense(query, "query");
  const paddle::DataType dtype = query.dtype();
  expect(
      dtype == paddle::DataType::FLOAT32 || dtype == paddle::DataType::BFLOAT16 || dtype == paddle::DataType::FLOAT16,
      "query must be float32, bfloat16 or float16; got ", dtype);
  expect(!query.is_gpu() || dtype != paddle::DataType::FLOAT32,
         "query must be bfloat16 or float16 on a GPU; got float32");
  expect_like_query(key, "key", query);
  expect_like_query(value, "value", query);
  const std::vector<int64_t> q = query.shape(), k = key.shape(), v = value.shape();
  expect(q.size() == 4, "query must have shape [batch, seqlen_q, heads_q, head_dim]; got ", text_of(q));
  expect(k.size() == 4, "key must have shape [batch, seqlen_k, heads_k, head_dim]; got ", text_of(k));
  expect(v.size() == 4, "value must have shape [batch, seqlen_k, heads_k, head_dim_v]; got ", text_of(v));
  for (const std::vector<int64_t>& shape : {q, k, v}) {
    for (const int64_t size : shape) {
      expect(size > 0 && size <= INT32_MAX, "every axis of query, key and value must have 1 to 2^31 - 1 entries; got ",
             text_of(q), ", ", text_of(k), ", ", text_of(v));
    }
  }
  expect(k[0] == q[0] && v[0] == q[0], "query, key and value must have the same batch size; got ", q[0], ", ", k[0],
         ", ", v[0]);
  expect(k[3] == q[3], "key must have the head dim of query, ", q[3], "; got ", k[3]);
  expect(v[1] == k[1] && v[2] == k[2], "value must have the seqlen and heads of key, ", k[1], " and ", k[2], "; got ",
         v[1], " and ", v[2]);
  expect(q[2] % k[2] == 0, "the heads of query must be a multiple of the heads of key; got ", q[2], " and ", k[2]);
  for (const int64_t head_dim : {q[3], v[3]}) {
    expect(head_dim % 8 == 0 && head_dim <= FLASHMASK_MAX_HEAD_DIM,
           "the head dims of query and value must be multiples of 8, at most ", FLASHMASK_MAX_HEAD_DIM, "; got ", q[3],
           " and ", v[3]);
  }
}

inline void check_mask_heads(int64_t heads, const char* name, int64_t heads_q, int64_t heads_k) {
  expect(heads == 1 || heads == heads_k || heads == heads_q, "axis 1 of ", name, " must be 1, the ", heads_k,
         " heads of key or the ", heads_q, " heads of query; got ", heads);
}

inline void check_bounds(const paddle::Tensor& bounds, const paddle::Tensor& query, const paddle::Tensor& key,
                         bool causal) {
  const char* name = "startend_row_indices";
  expect_int32_on(bounds, name, query);
  const std::vector<int64_t> shape = bounds.shape(), q = query.shape(), k = key.shape();
  check_mask_heads(shape[1], name, q[2], k[2]);
  expect(shape[0] == q[0] && shape[2] == k[1], name, " must have shape [", q[0], ", 1 or heads, ", k[1],
         ", n], from batch and seqlen_k; got ", text_of(shape));
  const bool matches = causal ? shape[3] == 1 || shape[3] == 2 : shape[3] == 2 || shape[3] == 4;
  expect(matches, "the last axis of ", name, " must be ", causal ? "1 or 2 with causal" : "2 or 4 without causal",
         "; got ", shape[3]);
}

inline void check_block_mask(const paddle::Tensor& block_mask, const paddle::optional<paddle::Tensor>& bounds,
                             const paddle::Tensor& query, const paddle::Tensor& key) {
  const char* name = "block_mask";
  expect_int32_on(block_mask, name, query);
  const std::vector<int64_t> shape = block_mask.shape(), q = query.shape(), k = key.shape();
  check_mask_heads(shape[1], name, q[2], k[2]);
  if (bounds) {
    expect(shape[1] == bounds->shape()[1], name, " must have the mask heads of startend_row_indices, ",
           bounds->shape()[1], "; got ", shape[1]);
  }
  constexpr int64_t tile = FLASHMASK_BLOCK_MASK_TILE;
  expect_shape(block_mask, name, {q[0], shape[1], (q[1] + tile - 1) / tile, (k[1] + tile - 1) / tile});
}

inline void check_numbers(float softmax_scale, float dropout, const paddle::optional<paddle::Tensor>& seed_offset) {
  expect(std::isfinite(softmax_scale), "softmax_scale must be finite; got ", softmax_scale);
  expect(dropout >= 0 && dropout <= 1, "dropout must be from 0 to 1; got ", dropout);
  if (dropout > 0) {
    expect(static_cast<bool>(seed_offset), "dropout needs seed_offset");
    expect_dense(*seed_offset, "seed_offset");
    expect(seed_offset->dtype() == paddle::DataType::INT64 && seed_offset->shape() == std::vector<int64_t>{2},
           "seed_offset must be int64 of shape [2]; got ", seed_offset->dtype(), " of shape ",
           text_of(seed_offset->shape()));
  }
}

}  // namespace flashmask_paddle
