// The Paddle op `paddle_flashmask_attention` (Paddle has an op of its own of the shorter name) and its gradient.
// Shapes and pointers go from Paddle's tensors into FlashmaskParams here; everything else happens in the core.
//
// Only the op interface is included, not paddle/extension.h: that one needs Python.h and takes ten times as long.
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "flashmask.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/ext/tensor_compat.h"

namespace flashmask_paddle {

using OptionalTensor = paddle::optional<paddle::Tensor>;
using Shape = std::vector<int64_t>;
using OptionalShape = paddle::optional<Shape>;
using OptionalDtype = paddle::optional<paddle::DataType>;

FlashmaskDtype core_dtype(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::BFLOAT16:
      return FLASHMASK_BFLOAT16;
    case paddle::DataType::FLOAT16:
      return FLASHMASK_FLOAT16;
    default:
      return FLASHMASK_FLOAT32;  // check_qkv() let nothing else through
  }
}

FlashmaskTensor operand(const paddle::Tensor& tensor) {
  const auto& strides = tensor.strides();
  return FlashmaskTensor{const_cast<void*>(tensor.data()), strides[0], strides[1], strides[2]};
}

// An input of shape [0] stands for one that is absent: Paddle 2.6 cannot always save none for the backward pass.
OptionalTensor if_given(const OptionalTensor& tensor) {
  return tensor && tensor->shape() != Shape{0} ? tensor : OptionalTensor();
}

// The inputs of a call after the checks. It owns what was copied to the device, so it must outlive the launch.
struct Call {
  FlashmaskParams params{};
  paddle::Tensor seed_offset_on_device;
  paddle::Tensor workspace;

  Call(const paddle::Tensor& query, const paddle::Tensor& key, const paddle::Tensor& value,
       const OptionalTensor& bounds_or_empty, const OptionalTensor& block_mask_or_empty,
       const OptionalTensor& seed_offset_or_empty, bool causal, float softmax_scale, float dropout,
       bool deterministic) {
    const OptionalTensor bounds = if_given(bounds_or_empty);
    const OptionalTensor block_mask = if_given(block_mask_or_empty);
    const OptionalTensor seed_offset = if_given(seed_offset_or_empty);
    check_qkv(query, key, value);
    if (bounds) check_bounds(*bounds, query, key, causal);
    if (block_mask) check_block_mask(*block_mask, bounds, query, key);
    check_numbers(softmax_scale, dropout, seed_offset);

    const Shape q = query.shape(), k = key.shape();
    params.abi_version = FLASHMASK_ABI_VERSION;
    params.device = query.is_gpu() ? FLASHMASK_CUDA : FLASHMASK_CPU;
    params.dtype = core_dtype(query.dtype());
    params.batch = static_cast<int32_t>(q[0]);
    params.seqlen_q = static_cast<int32_t>(q[1]);
    params.heads_q = static_cast<int32_t>(q[2]);
    params.head_dim = static_cast<int32_t>(q[3]);
    params.seqlen_k = static_cast<int32_t>(k[1]);
    params.heads_k = static_cast<int32_t>(k[2]);
    params.head_dim_v = static_cast<int32_t>(value.shape()[3]);
    const OptionalTensor& mask = bounds ? bounds : block_mask;
    params.heads_mask = mask ? static_cast<int32_t>(mask->shape()[1]) : 1;
    params.num_bounds = bounds ? static_cast<int32_t>(bounds->shape()[3]) : 0;
    params.causal = causal;
    params.deterministic = deterministic;
    params.softmax_scale = softmax_scale;
    params.dropout = dropout;
    expect_unit_stride(query, "query");
    expect_unit_stride(key, "key");
    expect_unit_stride(value, "value");
    params.q = operand(query);
    params.k = operand(key);
    params.v = operand(value);
    params.bounds = bounds ? bounds->data<int32_t>() : nullptr;
    params.block_mask = block_mask ? block_mask->data<int32_t>() : nullptr;
    if (dropout > 0) {
      const bool moved = seed_offset->place() != query.place();
      // Towards a GPU the copy goes onto the stream of the kernels, and the host goes on.
      seed_offset_on_device = moved ? seed_offset->copy_to(query.place(), !query.is_gpu()) : *seed_offset;
      params.seed_offset = seed_offset_on_device.data<int64_t>();
    }
    if (query.is_gpu()) {
#ifdef PADDLE_WITH_CUDA
      params.stream = reinterpret_cast<void*>(query.stream());
#else
      fail_as(FLASHMASK_NOT_BUILT, "this build holds no CUDA kernels, but query is on " + query.place().DebugString() +
                                       "; rebuild paddle-flashmask where nvcc is installed");
#endif
    } else if (!query.is_cpu()) {
      fail_as(FLASHMASK_NOT_BUILT, "there is no kernel for " + query.place().DebugString());
    }
  }

  void run(int64_t (*workspace_bytes)(const FlashmaskParams*), FlashmaskStatus (*kernel)(const FlashmaskParams*),
           const phi::Place& place) {
    const int64_t bytes = workspace_bytes(&params);
    if (bytes < 0) fail(flashmask_last_error());
    if (bytes > 0) {
      workspace = paddle::empty({bytes}, paddle::DataType::UINT8, place);
      params.workspace = workspace.data<uint8_t>();
      params.workspace_bytes = bytes;
    }
    const FlashmaskStatus status = kernel(&params);
    if (status != FLASHMASK_OK) fail_as(status, flashmask_last_error());
  }
};

std::vector<paddle::Tensor> Forward(const paddle::Tensor& query, const paddle::Tensor& key, const paddle::Tensor& value,
                                    const OptionalTensor& bounds, const OptionalTensor& block_mask,
                                    const OptionalTensor& seed_offset, bool causal, float softmax_scale, float dropout,
                                    bool deterministic) {
  Call call(query, key, value, bounds, block_mask, seed_offset, causal, softmax_scale, dropout, deterministic);
  const Shape q = query.shape();
  paddle::Tensor out = paddle::empty({q[0], q[1], q[2], value.shape()[3]}, query.dtype(), query.place());
  paddle::Tensor lse = paddle::empty({q[0], q[2], q[1]}, paddle::DataType::FLOAT32, query.place());
  call.params.out = operand(out);
  call.params.lse = lse.data<float>();
  call.run(flashmask_forward_workspace_bytes, flashmask_forward, query.place());
  return {out, lse};
}

std::vector<paddle::Tensor> Backward(const paddle::Tensor& query, const paddle::Tensor& key,
                                     const paddle::Tensor& value, const OptionalTensor& bounds,
                                     const OptionalTensor& block_mask, const OptionalTensor& seed_offset,
                                     const paddle::Tensor& out, const paddle::Tensor& lse,
                                     const paddle::Tensor& out_grad, bool causal, float softmax_scale, float dropout,
                                     bool deterministic) {
  Call call(query, key, value, bounds, block_mask, seed_offset, causal, softmax_scale, dropout, deterministic);
  const Shape q = query.shape();
  const Shape out_shape = {q[0], q[1], q[2], value.shape()[3]};
  expect_like_query(out, "out", query);
  expect_shape(out, "out", out_shape);
  expect_like_query(out_grad, "the gradient of out", query);
  expect_shape(out_grad, "the gradient of out", out_shape);
  expect_unit_stride(out_grad, "the gradient of out");
  expect(lse.dtype() == paddle::DataType::FLOAT32 && lse.place() == query.place(), "softmax_lse must be float32 on ",
         query.place().DebugString());
  expect_shape(lse, "softmax_lse", {q[0], q[2], q[1]});

  paddle::Tensor query_grad = paddle::empty(query.shape(), query.dtype(), query.place());
  paddle::Tensor key_grad = paddle::empty(key.shape(), key.dtype(), query.place());
  paddle::Tensor value_grad = paddle::empty(value.shape(), value.dtype(), query.place());
  call.params.out = operand(out);
  call.params.lse = const_cast<float*>(lse.data<float>());
  call.params.dout = operand(out_grad);
  call.params.dq = operand(query_grad);
  call.params.dk = operand(key_grad);
  call.params.dv = operand(value_grad);
  call.run(flashmask_backward_workspace_bytes, flashmask_backward, query.place());
  return {query_grad, key_grad, value_grad};
}

// Sizes may be -1 here (not known before run time), so nothing is checked but what the indexing needs.
std::vector<Shape> ForwardShapes(const Shape& query, const Shape& key, const Shape& value, const OptionalShape&,
                                 const OptionalShape&, const OptionalShape&) {
  expect(query.size() == 4, "query must have 4 axes; got shape ", text_of(query));
  expect(key.size() == 4, "key must have 4 axes; got shape ", text_of(key));
  expect(value.size() == 4, "value must have 4 axes; got shape ", text_of(value));
  return {{query[0], query[1], query[2], value[3]}, {query[0], query[2], query[1]}};
}

std::vector<paddle::DataType> ForwardDtypes(const paddle::DataType& query, const paddle::DataType&,
                                            const paddle::DataType&, const OptionalDtype&, const OptionalDtype&,
                                            const OptionalDtype&) {
  return {query, paddle::DataType::FLOAT32};
}

std::vector<Shape> BackwardShapes(const Shape& query, const Shape& key, const Shape& value, const OptionalShape&,
                                  const OptionalShape&, const OptionalShape&, const Shape&, const Shape&,
                                  const Shape&) {
  return {query, key, value};
}

std::vector<paddle::DataType> BackwardDtypes(const paddle::DataType& query, const paddle::DataType& key,
                                             const paddle::DataType& value, const OptionalDtype&, const OptionalDtype&,
                                             const OptionalDtype&, const paddle::DataType&, const paddle::DataType&,
                                             const paddle::DataType&) {
  return {query, key, value};
}

// Without an op for them Paddle takes second derivatives to be zero, and says nothing.
std::vector<paddle::Tensor> RefuseSecondDerivative(const paddle::Tensor&, const paddle::Tensor&, const paddle::Tensor&,
                                                   const paddle::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                   const OptionalTensor&, bool, float, float, bool) {
  expect(false,
         "second derivatives are not implemented: differentiate with create_graph=False, or use dense attention");
  return {};
}

std::vector<Shape> SecondShapes(const Shape& query, const Shape& key, const Shape& value, const Shape& out_grad,
                                const OptionalShape&, const OptionalShape&, const OptionalShape&) {
  return {query, key, value, out_grad};
}

std::vector<paddle::DataType> SecondDtypes(const paddle::DataType& query, const paddle::DataType& key,
                                           const paddle::DataType& value, const paddle::DataType& out_grad,
                                           const OptionalDtype&, const OptionalDtype&, const OptionalDtype&) {
  return {query, key, value, out_grad};
}

}  // namespace flashmask_paddle

PD_BUILD_OP(paddle_flashmask_attention)
    .Inputs({"query", "key", "value", paddle::Optional("startend_row_indices"), paddle::Optional("block_mask"),
             paddle::Optional("seed_offset")})
    .Outputs({"out", "softmax_lse"})
    .Attrs({"causal: bool", "softmax_scale: float", "dropout: float", "deterministic: bool"})
    .SetKernelFn(PD_KERNEL(flashmask_paddle::Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(flashmask_paddle::ForwardShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(flashmask_paddle::ForwardDtypes));

// softmax_lse has no gradient: nothing in flashmask.h takes one.
PD_BUILD_GRAD_OP(paddle_flashmask_attention)
    .Inputs({"query", "key", "value", paddle::Optional("startend_row_indices"), paddle::Optional("block_mask"),
             paddle::Optional("seed_offset"), "out", "softmax_lse", paddle::Grad("out")})
    .Outputs({paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value")})
    .Attrs({"causal: bool", "softmax_scale: float", "dropout: float", "deterministic: bool"})
    .SetKernelFn(PD_KERNEL(flashmask_paddle::Backward))
    .SetInferShapeFn(PD_INFER_SHAPE(flashmask_paddle::BackwardShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(flashmask_paddle::BackwardDtypes));

PD_BUILD_DOUBLE_GRAD_OP(paddle_flashmask_attention)
    .Inputs({"query", "key", "value", paddle::Grad("out"), paddle::Optional(paddle::Grad(paddle::Grad("query"))),
             paddle::Optional(paddle::Grad(paddle::Grad("key"))),
             paddle::Optional(paddle::Grad(paddle::Grad("value")))})
    .Outputs({paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value"), paddle::Grad(paddle::Grad("out"))})
    .Attrs({"causal: bool", "softmax_scale: float", "dropout: float", "deterministic: bool"})
    .SetKernelFn(PD_KERNEL(flashmask_paddle::RefuseSecondDerivative))
    .SetInferShapeFn(PD_INFER_SHAPE(flashmask_paddle::SecondShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(flashmask_paddle::SecondDtypes));
