"""The routed attention call itself: forms of row indices, dense masks, parallel settings.

The tests named `test_stock_...` hold with and without the replacements; each of the others fails without them (tried by
running this file with PatchSet.install doing nothing).
"""

import importlib
import types

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import paddle_flashmask.paddlenlp as flashmask_nlp

ROWS = "attn_mask_startend_row_indices"


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


@pytest.fixture
def fusion_ops():
    return importlib.import_module("paddlenlp.transformers.llama.fusion_ops")


def attend(fusion_ops, query, key, value, mask=None, rows=None, settings=None, **more):
    parallel = {"context_parallel_degree": 1, "sep_parallel_degree": 1, **(settings or {})}
    return fusion_ops.fusion_flash_attention(
        query, types.SimpleNamespace(**parallel), key, value, mask, False, attn_mask_startend_row_indices=rows, **more
    )


@pytest.fixture
def qkv():
    paddle.seed(3)
    return [paddle.randn([2, 24, heads, 16]) for heads in (4, 2, 2)]


def dense_reference(query, key, value, allowed):
    """Plain softmax attention with a boolean [b or 1, h or 1, s_q, s_k] mask; rows that see nothing give 0."""
    query, key, value = (x.numpy().astype(np.float64).transpose(0, 2, 1, 3) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, repeats, 1), np.repeat(value, repeats, 1)
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = (weights @ value).transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1)


I, J = np.arange(24)[:, None], np.arange(24)[None, :]  # noqa: E741


class TestRowIndexForms:
    ends = np.repeat([7, 20, 24], [7, 13, 4]).astype(np.int32)
    allowed = (J <= I) & (ends > I)

    def check(self, fusion_ops, qkv, rows, allowed):
        out = attend(fusion_ops, *qkv, rows=paddle.to_tensor(rows))
        np.testing.assert_allclose(out.numpy(), dense_reference(*qkv, allowed), atol=2e-5)

    def test_two_axes(self, fusion_ops, qkv):
        self.check(fusion_ops, qkv, np.stack([self.ends] * 2), self.allowed)

    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_three_axes(self, fusion_ops, qkv, heads):
        rows = np.broadcast_to(self.ends, (2, heads, 24)).copy()
        rows[:, -1] = np.where(heads > 1, np.minimum(ends := self.ends, np.arange(24) + 3), ends)
        per_head = (J <= I) & (np.repeat(rows, 4 // heads, 1)[:, :, None, :] > I)
        self.check(fusion_ops, qkv, rows, per_head)

    def test_four_axes(self, fusion_ops, qkv):
        self.check(fusion_ops, qkv, np.stack([self.ends] * 2)[:, None, :, None], self.allowed)

    def test_two_columns_are_causal(self, fusion_ops, qkv):
        rows = np.stack([self.ends, np.full(24, 22, np.int32)], -1)[None, None].repeat(2, 0)
        self.check(fusion_ops, qkv, rows, (J <= I) & ~((self.ends <= I) & (I < 22)))

    def test_four_columns_are_not(self, fusion_ops, qkv):
        upper = np.stack([self.ends, np.full(24, 24), np.zeros(24), np.maximum(np.arange(24) - 5, 0)], -1)
        rows = upper.astype(np.int32)[None, None].repeat(2, 0)
        self.check(fusion_ops, qkv, rows, (self.ends > I) & (I >= J - 5))

    def test_int64_and_one_batch_entry(self, fusion_ops, qkv):
        rows = self.ends.astype(np.int64)[None]
        rows = np.where(rows == 24, 2**40, rows)  # "never": must not wrap around in int32
        self.check(fusion_ops, qkv, rows, self.allowed)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((24,), "shape"),
            ((3, 24), "batch size 2"),
            ((2, 3, 24), "heads"),
            ((2, 1, 23), "24 keys"),
            ((2, 1, 24, 3), "1, 2 or 4"),
            ((2, 1, 24, 1, 1), "shape"),
        ],
    )
    def test_bad_shapes(self, fusion_ops, qkv, shape, message):
        with pytest.raises(ValueError, match=message):
            attend(fusion_ops, *qkv, rows=paddle.zeros(shape, dtype="int32"))

    def test_bad_dtype(self, fusion_ops, qkv):
        with pytest.raises(TypeError, match="int32"):
            attend(fusion_ops, *qkv, rows=paddle.zeros([2, 24]))

    @pytest.mark.parametrize("queries", [1, 4, 25])
    def test_other_than_as_many_queries_as_keys(self, fusion_ops, qkv, queries):
        query = paddle.randn([2, queries, 4, 16])
        with pytest.raises(ValueError, match=f"as many queries as keys, got {queries} queries and 24 keys.*key-value"):
            attend(fusion_ops, query, *qkv[1:], rows=paddle.to_tensor(np.stack([self.ends] * 2)))

    @pytest.mark.parametrize("heads", [2, 4])
    def test_heads_under_tensor_parallelism(self, fusion_ops, qkv, heads):
        rows = paddle.to_tensor(np.broadcast_to(self.ends, (2, heads, 24)).copy())
        split = {"tensor_parallel_degree": 2}
        with pytest.raises(ValueError, match=rf"1 head with tensor_parallel_degree=2, got shape \[2, {heads}, 24\]"):
            attend(fusion_ops, *qkv, rows=rows, settings=split)
        one = attend(fusion_ops, *qkv, rows=rows[:, :1], settings=split)
        np.testing.assert_allclose(one.numpy(), dense_reference(*qkv, self.allowed), atol=2e-5)

    def test_output_layouts(self, fusion_ops, qkv):
        rows = paddle.to_tensor(np.stack([self.ends] * 2))
        out = attend(fusion_ops, *qkv, rows=rows)
        merged = attend(fusion_ops, *qkv, rows=rows, sequence_parallel=True)
        assert merged.shape == [48, 64]
        np.testing.assert_array_equal(merged.numpy(), out.numpy().reshape(48, 64))
        settings = types.SimpleNamespace(context_parallel_degree=1)
        with_weights = fusion_ops.fusion_flash_attention(
            qkv[0], settings, qkv[1], qkv[2], None, True, attn_mask_startend_row_indices=rows
        )
        assert with_weights[1] is None
        np.testing.assert_array_equal(with_weights[0].numpy(), out.numpy())


def test_dense_mask_is_applied(fusion_ops, qkv):
    allowed = TestRowIndexForms.allowed
    mask = paddle.to_tensor(np.where(allowed, 0.0, np.finfo(np.float32).min).astype(np.float32)).reshape([1, 1, 24, 24])
    mask = mask.expand([2, 1, 24, 24])
    np.testing.assert_allclose(attend(fusion_ops, *qkv, mask=mask).numpy(), dense_reference(*qkv, allowed), atol=2e-5)


def test_dense_mask_with_alibi_is_applied(fusion_ops, qkv):
    mask = (
        paddle.to_tensor(np.where(J <= I, 0.0, -1e30).astype(np.float32)).reshape([1, 1, 24, 24]).expand([2, 1, 24, 24])
    )
    bias = paddle.to_tensor(np.outer([0.5, 0.25, 0.1, 0.0], np.arange(24)).astype(np.float32))
    alibi = bias.reshape([1, 4, 1, 24]).expand([2, 4, 1, 24]).reshape([8, 1, 24])
    out = attend(fusion_ops, *qkv, mask=mask, alibi=alibi)
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in qkv)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = paddle.matmul(query, key, transpose_y=True) / 4.0 + mask + bias.reshape([1, 4, 1, 24])
    expected = paddle.matmul(F.softmax(scores, -1), value).transpose([0, 2, 1, 3]).reshape([2, 24, 64])
    np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=2e-5)


def test_stock_plain_causal_stays_with_paddlenlp(fusion_ops, qkv):
    out = attend(fusion_ops, *qkv)
    np.testing.assert_allclose(out.numpy(), dense_reference(*qkv, J <= I), atol=2e-5)


def test_alibi_at_the_call(fusion_ops, qkv):
    rows = paddle.to_tensor(np.stack([TestRowIndexForms.ends] * 2))
    with pytest.raises(ValueError, match="alibi"):
        attend(fusion_ops, *qkv, rows=rows, alibi=paddle.zeros([8, 1, 24]))


def test_device_with_a_kernel_of_its_own(fusion_ops, qkv, monkeypatch):
    monkeypatch.setattr(fusion_ops, "get_env_device", lambda: "npu")
    with pytest.raises(ValueError, match="npu"):
        attend(fusion_ops, *qkv, rows=paddle.to_tensor(np.stack([TestRowIndexForms.ends] * 2)))


@pytest.mark.parametrize("setting", ["context_parallel_degree", "sep_parallel_degree"])
@pytest.mark.parametrize("mask", ["rows", "mask"])
def test_parallel_settings_at_the_call(fusion_ops, qkv, setting, mask):
    given = {
        "rows": paddle.to_tensor(np.stack([TestRowIndexForms.ends] * 2)),
        "mask": paddle.zeros([2, 1, 24, 24]),
    }[mask]
    with pytest.raises(ValueError, match=f"{setting}=2.*Set {setting}=1"):
        attend(fusion_ops, *qkv, settings={setting: 2}, **{mask: given})


def test_reshard_layer_at_the_call(fusion_ops, qkv):
    rows = paddle.to_tensor(np.stack([TestRowIndexForms.ends] * 2))
    with pytest.raises(ValueError, match="sep_parallel_degree"):
        attend(fusion_ops, *qkv, rows=rows, reshard_layer=lambda x, **axes: x)
