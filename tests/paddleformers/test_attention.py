"""The registered attention against PaddleFormers' eager attention: loss and gradients of a tiny Llama."""

from __future__ import annotations

import types

import numpy as np
import paddle
import pytest

pytest.importorskip("paddleformers.nn.attention.interface", reason="PaddleFormers: make test-paddleformers")

from paddleformers.nn.attention.eager_attention import eager_attention_forward
from paddleformers.nn.attention.interface import AttentionInterface
from paddleformers.transformers.llama.configuration import LlamaConfig
from paddleformers.transformers.llama.modeling import LlamaForCausalLM

import paddle_flashmask.paddleformers as flashmask_formers

LENGTHS = ((13, 20, 15), (30, 18))
TOKENS = 48


@pytest.fixture(autouse=True)
def registered():
    assert flashmask_formers.register() == flashmask_formers.register() == "flashmask_custom"
    assert AttentionInterface._global_mapping["flashmask_custom"] is flashmask_formers.flashmask_custom_forward


def packed(lengths=LENGTHS):
    random = np.random.default_rng(0)
    ends = np.stack([np.repeat(np.cumsum(row), row) for row in lengths]).astype(np.int32)
    arrays = {
        "input_ids": random.integers(1, 61, ends.shape),
        "labels": random.integers(1, 61, ends.shape),
        "position_ids": np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]),
        "attn_mask_startend_row_indices": ends[:, None],
    }
    return {name: paddle.to_tensor(array) for name, array in arrays.items()}


def loss_and_gradients(implementation, batch, **changes):
    paddle.seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        fuse_rms_norm=False,
        **changes,
    )
    net = LlamaForCausalLM(config)
    net.config._attn_implementation = implementation
    net.train()
    if changes:
        net.recompute_enable()
    loss = net(**batch)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return float(loss), {name: p.grad.numpy() for name, p in net.named_parameters()}


def assert_same(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(got[1][name], gradient, atol=1e-5 * max(np.abs(gradient).max(), 1e-3), err_msg=name)


def change(batch, form):
    rows = batch["attn_mask_startend_row_indices"]
    causal_end = paddle.arange(TOKENS, dtype="int32") + rows * 0
    never = paddle.full_like(rows, TOKENS)
    if form == "[b, 1, s, 1]":
        batch["attn_mask_startend_row_indices"] = rows.unsqueeze(-1)
    elif form == "[b, h_k, s]":
        batch["attn_mask_startend_row_indices"] = paddle.concat([rows, never], axis=1)
    elif form == "n=4":
        batch["attn_mask_startend_row_indices"] = paddle.stack([rows, never, rows * 0, causal_end], axis=-1)
    elif form != "[b, 1, s]":
        del batch["attn_mask_startend_row_indices"]
        if form == "padding":
            batch["attention_mask"] = paddle.to_tensor(np.arange(TOKENS)[None] >= np.array([[0], [7]])).astype("int64")
    return batch


@pytest.mark.parametrize("form", ["[b, 1, s]", "[b, 1, s, 1]", "n=4", "causal", "padding"])
def test_equal_to_eager(form):
    batch = change(packed(), form)
    expected = loss_and_gradients("eager", batch)
    assert_same(loss_and_gradients("flashmask_custom", batch), expected)
    if form not in ("causal", "padding"):
        plain = loss_and_gradients("eager", change(packed(), "causal"))
        assert abs(plain[0] - expected[0]) > 1e-3, "the comparison can tell masks apart"


@pytest.mark.parametrize("granularity", ["full", "core_attn"])
def test_recompute(granularity):
    got = loss_and_gradients("flashmask_custom", packed(), recompute_granularity=granularity)
    assert_same(got, loss_and_gradients("eager", packed()))


def heads(*shape, seed=0):
    paddle.seed(seed)
    return paddle.randn(shape)


@pytest.mark.parametrize("form", ["[b, h_k, s]", "[b, 1, s]"])
def test_heads_and_scaling(form):
    query, key, value = heads(2, 4, TOKENS, 16), heads(2, 2, TOKENS, 16, seed=1), heads(2, 2, TOKENS, 8, seed=2)
    rows = change(packed(), form)["attn_mask_startend_row_indices"]
    layer = types.SimpleNamespace(training=False, num_key_value_groups=2)
    out, weights = flashmask_formers.flashmask_custom_forward(
        layer, query, key, value, attn_mask_startend_row_indices=rows, scaling=0.3
    )
    if rows.shape[1] == 2:  # eager attention needs a mask for each query head
        rows = rows.repeat_interleave(2, axis=1)
    expected, _ = eager_attention_forward(layer, query, key, value, attn_mask_startend_row_indices=rows, scaling=0.3)
    assert weights is None
    assert out.shape == [2, TOKENS, 4 * 8]
    np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=2e-6)


def test_two_columns_follow_is_causal():
    query = heads(1, 2, TOKENS, 8)
    end = packed(((20, 28),))["attn_mask_startend_row_indices"]
    start = paddle.where(end == 20, paddle.zeros_like(end), paddle.full_like(end, 20))
    layer = types.SimpleNamespace(training=False)
    call = flashmask_formers.flashmask_custom_forward
    rows = paddle.stack([end, start], axis=-1)
    got, _ = call(layer, query, query, query, attn_mask_startend_row_indices=rows, is_causal=False, scaling=1.0)
    expected, _ = eager_attention_forward(
        layer, query, query, query, attn_mask_startend_row_indices=rows, is_causal=False, scaling=1.0
    )
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=2e-6)
    both = paddle.stack([end, paddle.full_like(end, TOKENS)], axis=-1)
    causal, _ = call(layer, query, query, query, attn_mask_startend_row_indices=both)
    alone, _ = call(layer, query, query, query, attn_mask_startend_row_indices=end)
    np.testing.assert_array_equal(causal.numpy(), alone.numpy())


def test_what_is_refused():
    query = heads(1, 2, 8, 8)
    rows = paddle.full([1, 1, 8], 8, dtype="int32")
    layer = types.SimpleNamespace(training=True)

    def call(**given):
        flashmask_formers.flashmask_custom_forward(layer, query, query, query, **given)

    with pytest.raises(ValueError, match="sinks are not supported"):
        call(attn_mask_startend_row_indices=rows, sink=paddle.zeros([2]))
    with pytest.raises(ValueError, match="one of them, not both"):
        call(attn_mask_startend_row_indices=rows, attention_mask=paddle.zeros([1, 1, 8, 8]))
    with pytest.raises(ValueError, match="1 columns are for is_causal=True"):
        call(attn_mask_startend_row_indices=rows, is_causal=False)
    with pytest.raises(ValueError, match="one entry for each of the 8 keys"):
        call(attn_mask_startend_row_indices=rows[:, :, :4])
    with pytest.raises(TypeError, match="must be an int32 tensor"):
        call(attn_mask_startend_row_indices=rows.astype("float32"))
    call(attn_mask_startend_row_indices=rows)
    with pytest.raises(ValueError, match="as many queries as keys, got 3 queries and 8 keys"):
        flashmask_formers.flashmask_custom_forward(
            layer, query[:, :, 5:], query, query, attn_mask_startend_row_indices=rows
        )
    layer.config = types.SimpleNamespace(tensor_model_parallel_size=2)
    call(attn_mask_startend_row_indices=rows)
    with pytest.raises(ValueError, match="1 head with tensor_model_parallel_size=2"):
        call(attn_mask_startend_row_indices=rows.expand([1, 2, 8]))
