"""PaddleNLP models: loss and all gradients with row indices equal those of the dense-mask path."""

import numpy as np
import paddle
import pytest
from paddlenlp_models import FAMILIES, LENGTH, assert_same, batches, loss_and_gradients, model

import paddle_flashmask.paddlenlp as flashmask_nlp


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


def expected(family, lengths=(13, 20, 15, 30, 18)):
    """The dense path of PaddleNLP: use_flash_attention off, 4-D boolean mask. Rows are full: see test_padding."""
    return loss_and_gradients(model(family), batches(lengths)["dense"], use_flash_attention=False)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the attention op."""
    from paddlenlp.transformers.llama import fusion_ops

    made = []
    original = fusion_ops.no_recompute

    def counting(function, *args, **kwargs):
        made.append(function.__qualname__.split(".")[0])
        return original(function, *args, **kwargs)

    monkeypatch.setattr(fusion_ops, "no_recompute", counting)
    return made


def plain_causal(batch):
    return {key: value for key, value in batch.items() if key != "attn_mask_startend_row_indices"}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_dense(family):
    batch = batches((13, 20, 15, 30, 18))["flashmask"]
    reference = expected(family)
    assert_same(loss_and_gradients(model(family), batch, use_flash_attention=True), reference)
    # The comparison can tell masks apart: without the row indices the loss is another one.
    causal = loss_and_gradients(model(family), plain_causal(batch), use_flash_attention=False)
    assert abs(causal[0] - reference[0]) > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_padding(family):
    # Mixtures of experts are left out: their balancing loss counts the padding's routing too, and padding sees nothing
    # here but everything in the dense path, where its softmax is over equal scores.
    made = batches((13, 20, 9, 30, 11))
    assert (made["flashmask"]["labels"].numpy() == -100).sum() == 2 * LENGTH - 83
    assert_same(
        loss_and_gradients(model(family), made["flashmask"], use_flash_attention=True),
        loss_and_gradients(model(family), made["dense"], use_flash_attention=False),
    )


def test_packed_equals_each_sample_alone():
    lengths = (13, 20, 15, 30, 18)
    batch = batches(lengths)["flashmask"]
    net = model("Llama", use_flash_attention=True)
    net.eval()
    packed = net(**{k: v for k, v in batch.items() if k != "labels"})
    packed = (packed[0] if isinstance(packed, tuple) else packed).numpy()
    start = {0: 0, 1: 0}
    for length, row in zip(lengths, (0, 0, 0, 1, 1), strict=True):
        at = start[row]
        alone = net(input_ids=batch["input_ids"][row : row + 1, at : at + length])
        alone = (alone[0] if isinstance(alone, tuple) else alone).numpy()
        np.testing.assert_allclose(packed[row, at : at + length], alone[0], atol=2e-5)
        start[row] += length


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("granularity", ["full", "full_attn", "core_attn"])
def test_recompute_llama(granularity, reentrant, calls):
    net = model("Llama", recompute=True, recompute_granularity=granularity, recompute_use_reentrant=reentrant)
    net.recompute_enable()
    got = loss_and_gradients(net, batches((13, 20, 15, 30, 18))["flashmask"], use_flash_attention=True)
    assert_same(got, expected("Llama"))
    assert calls == ["_in_saved_order"] * 4, "two layers, forward and recomputation"


@pytest.mark.parametrize("family", ["Qwen2", "Qwen2Moe", "DeepseekV2"])
def test_recompute_full(family, calls):
    net = model(family, recompute=True, recompute_granularity="full", recompute_use_reentrant=False)
    net.recompute_enable()
    got = loss_and_gradients(net, batches((13, 20, 15, 30, 18))["flashmask"], use_flash_attention=True)
    assert_same(got, expected(family))
    assert calls == ["_in_saved_order"] * 4


@pytest.mark.parametrize("operations", [{"flash_attn": -1}, {"flash_attn": 1}])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_refined_recompute(family, operations):
    # As many key heads as query heads: query, key and value then have one shape, and a mix-up of what is kept cannot be
    # found by its shape.
    heads = {"num_key_value_heads": 4}
    net = model(family, recompute=True, recompute_use_reentrant=False, refined_recompute=operations, **heads)
    net.recompute_enable()
    made = batches((13, 20, 15, 30, 18))
    got = loss_and_gradients(net, made["flashmask"], use_flash_attention=True)
    assert_same(got, loss_and_gradients(model(family, **heads), made["dense"], use_flash_attention=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_mask_with_use_flash_attention(family):
    dense = batches((13, 20, 15, 30, 18))["dense"]
    assert_same(loss_and_gradients(model(family), dense, use_flash_attention=True), expected(family))


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_plain_causal_and_right_padding(family):
    made = batches((30, 20, 25), length=32)["flashmask"]
    plain = plain_causal(made)
    right_padded = {**plain, "attention_mask": paddle.to_tensor(np.tri(3, 32, 29, dtype=np.int64))}
    for batch in (plain, right_padded):
        assert_same(
            loss_and_gradients(model(family), batch, use_flash_attention=True),
            loss_and_gradients(model(family), batch, use_flash_attention=False),
        )


def test_left_padding():
    made = batches((30, 20, 25), length=32)["flashmask"]
    batch = {
        **plain_causal(made),
        "attention_mask": paddle.to_tensor(np.tri(3, 32, 29, dtype=np.int64)[:, ::-1].copy()),
    }
    assert_same(
        loss_and_gradients(model("Llama"), batch, use_flash_attention=True),
        loss_and_gradients(model("Llama"), batch, use_flash_attention=False),
    )


def test_to_static_as_one_graph():
    batch = batches((13, 20, 15, 30, 18))["flashmask"]
    net = paddle.jit.to_static(model("Llama", use_flash_attention=True), full_graph=True)
    assert_same(loss_and_gradients(net, batch, use_flash_attention=True), expected("Llama"))
