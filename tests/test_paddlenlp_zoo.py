"""Models beyond the four that take row indices by themselves: equal to the dense mask, or a refusal.

And which dense masks the models keep, for all that would drop some.
"""

import importlib

import numpy as np
import paddle
import pytest
from paddlenlp_models import assert_same, batches, loss_and_gradients
from paddlenlp_zoo import DOCUMENT, ROWS, current_document, zoo_model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp import carried, workarounds
from paddle_flashmask.paddlenlp.families import CARRIED, FAMILIES

ADDED = tuple(f"{prefix}ForCausalLM" for prefix in CARRIED.values())


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


@pytest.fixture
def made():
    return batches((13, 20, 15, 30, 18))


def test_the_document_is_current():
    """Trains every model that takes row indices and asks every other one, see paddlenlp_zoo.py."""
    assert DOCUMENT.read_text() == current_document(), "docs/models.md is out of date: python tests/paddlenlp_zoo.py"


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", *ADDED])
def test_verify(name, made):
    report = flashmask_nlp.verify(zoo_model(name, use_flash_attention=True), made["flashmask"])
    assert len(report.layers) == 2
    assert 0 < report.worst.max_relative < 1e-5


# PaddleNLP itself fails, with any mask, at full_attn of DeepSeek and GPT; core_attn is recomputed by these only.
@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, "full") for name in ("DeepseekV3ForCausalLM", *ADDED) if name != "GPTForCausalLM"),
        *((name, "core_attn") for name in ADDED if name not in ("ChatGLMv2ForCausalLM", "MistralForCausalLM")),
        ("MixtralForCausalLM", "full_attn"),
        ("GemmaForCausalLM", "full_attn"),
    ],
)
def test_recompute(name, granularity, made, monkeypatch):
    calls = []
    original = carried.flashmask_attention
    monkeypatch.setattr(carried, "flashmask_attention", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    settings = {"recompute": True, "recompute_granularity": granularity, "recompute_use_reentrant": False}
    net = zoo_model(name, **settings)
    net.recompute_enable()
    got = loss_and_gradients(net, made["flashmask"], use_flash_attention=True)
    assert_same(got, loss_and_gradients(zoo_model(name), made["dense"], use_flash_attention=False))
    if name in ADDED:
        assert len(calls) == 4, "two layers, forward and recomputation"


@pytest.mark.parametrize("name", ADDED)
def test_padding_and_whole_batches_without_row_indices(name):
    made = batches((13, 20, 9, 30, 11))
    plain = {key: value for key, value in made["flashmask"].items() if key != ROWS}
    got = loss_and_gradients(zoo_model(name), made["flashmask"], use_flash_attention=True)
    assert all(np.isfinite(gradient).all() for gradient in got[1].values())
    if name != "MixtralForCausalLM":  # its experts' balance counts padding, which sees nothing here
        assert_same(got, loss_and_gradients(zoo_model(name), made["dense"], use_flash_attention=False))
    # A call without row indices is PaddleNLP's own again, right after one with them.
    assert carried._current.get() is None
    if name != "GPTForCausalLM":  # no flash attention on a CPU
        assert_same(
            loss_and_gradients(zoo_model(name), plain, use_flash_attention=True),
            loss_and_gradients(zoo_model(name), plain, use_flash_attention=False),
        )


DROPPING = tuple(f"{prefix}ForCausalLM" for prefix in (*FAMILIES.values(), "DeepseekV3", "Mixtral", "Gemma"))
"""Those that drop a dense mask which they take for plain causal."""


@pytest.mark.parametrize("name", DROPPING)
def test_dense_masks_that_show_the_future(name, made):
    def outcome(mask, use_flash_attention):
        batch = {**made["dense"], "attention_mask": mask}
        return loss_and_gradients(zoo_model(name), batch, use_flash_attention)

    causal = paddle.tril(paddle.ones([2, 1, 48, 48], dtype="int32")).astype("bool")
    prefix = causal | (paddle.arange(48) < 20)
    plain = outcome(causal, True)
    assert_same(plain, outcome(causal, False))
    for mask in (prefix, paddle.ones_like(causal)):
        expected = outcome(mask, False)
        assert abs(plain[0] - expected[0]) > 1e-3, "the comparison cannot tell masks apart"
        assert_same(outcome(mask, True), expected, tolerance=3e-5)


@pytest.mark.parametrize("name", DROPPING)
def test_padding_on_the_left_at_a_step_of_generation(name):
    net = zoo_model(name, use_flash_attention=True)
    net.eval()
    alone = paddle.to_tensor([[5, 9, 11, 7, 8]])
    padded = paddle.to_tensor([[0, 0, 5, 9, 11, 7, 8], [3, 4, 8, 9, 10, 12, 2]])
    mask = paddle.to_tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    places = (mask.cumsum(-1) - 1).clip(min=0)
    settings = {"use_cache": True, "return_dict": False}
    with paddle.no_grad():
        first = net(padded[:, :6], attention_mask=mask[:, :6], position_ids=places[:, :6], **settings)
        step = net(
            padded[:, 6:],
            attention_mask=mask,
            position_ids=places[:, 6:],
            past_key_values=first[1],
            **settings,
        )
        net.config.use_flash_attention = False
        expected = net(alone, **settings)
    np.testing.assert_allclose(step[0][0, -1].numpy(), expected[0][0, -1].numpy(), atol=2e-5)


def additive(allowed, dtype, hidden=None):
    hidden = paddle.finfo(dtype).min if hidden is None else hidden
    return paddle.where(allowed, paddle.zeros([1], dtype="float32"), paddle.full([1], hidden, "float32")).astype(dtype)


@pytest.mark.parametrize("folder", ["llama", "qwen2", "qwen2_moe", "deepseek_v2", "mixtral", "gemma"])
def test_which_masks_count_as_causal(folder):
    is_casual_mask = importlib.import_module(f"paddlenlp.transformers.{folder}.modeling").is_casual_mask
    assert is_casual_mask(None)
    causal = paddle.to_tensor(np.tri(6, dtype=bool)[None, None].repeat(2, 0))
    others = {
        "shows one token of the future": causal | paddle.to_tensor(np.eye(6, k=3)[0] > 0),
        "shows everything": paddle.ones_like(causal),
        "of one row": causal[:, :, -1:],
        "with keys before the queries": causal[:, :, 2:],
        "hides the diagonal": causal & paddle.to_tensor(~np.eye(6, dtype=bool)),
        "hides the first token": causal & (paddle.arange(6) > 0),
        "of two kinds": paddle.concat([causal[:1], paddle.ones_like(causal[:1])]),
    }
    forms = [lambda allowed: allowed, lambda allowed: allowed.astype("int64")]
    forms += [lambda allowed, dtype=dtype: additive(allowed, dtype) for dtype in ("float32", "bfloat16")]
    forms += [lambda allowed, hidden=hidden: additive(allowed, "float32", hidden) for hidden in (-1e4 - 1, -np.inf)]
    for form in forms:
        assert is_casual_mask(form(causal))
        assert is_casual_mask(form(causal[:, :, :1, :1]))
        for name, mask in others.items():
            assert not is_casual_mask(form(mask)), name
    assert not is_casual_mask(additive(causal, "float32", -2.0)), "a bias hides nothing"
    biased = additive(causal, "float32")
    biased[1, 0, 4, 2] = -2.0
    assert not is_casual_mask(biased)


@pytest.mark.parametrize("mask", ["dense", "none"])
def test_rows_of_a_batch_stay_apart_in_chatglm(mask, made):
    batch = dict(made["dense"])
    if mask == "none":
        batch.pop("attention_mask")
    name = "ChatGLMv2ForCausalLM"
    assert_same(loss_and_gradients(zoo_model(name), batch, True), loss_and_gradients(zoo_model(name), batch, False))
    batch.pop("labels")
    net = zoo_model(name, use_flash_attention=True)
    net.eval()
    with paddle.no_grad():
        together = net(**batch)[0].numpy()
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            alone = net(**one)[0].numpy()
            np.testing.assert_allclose(together[row], alone[0], atol=2e-5)
            net.config.use_flash_attention = False
            np.testing.assert_allclose(alone, net(**one)[0].numpy(), atol=2e-5)
            net.config.use_flash_attention = True


@pytest.mark.parametrize("name", ADDED)
def test_a_layer_that_attends_otherwise(name, made, monkeypatch):
    net = zoo_model(name, use_flash_attention=True)
    attention = next(layer for layer in net.sublayers() if type(layer).__name__.endswith("Attention"))
    original = attention.forward

    def without(*args, **kwargs):
        with carried._carrying(None):
            return original(*args, **kwargs)

    if name == "GPTForCausalLM":  # plain flash attention has no CPU kernel
        monkeypatch.setattr(attention, "_flash_attention", lambda q, *rest, **more: q.flatten(start_axis=2))
    monkeypatch.setattr(attention, "forward", without, raising=False)
    with pytest.raises((RuntimeError, ValueError), match=r"1 of 2 layers|Broadcast|dimension"):
        net(**made["flashmask"])


def test_arguments_that_contradict_row_indices(made):
    batch = made["flashmask"]

    def refused(match, name="MistralForCausalLM", more=None, **config):
        net = zoo_model(name)
        for key, value in {"use_flash_attention": True, **config}.items():
            setattr(net.config, key, value)
        with pytest.raises(ValueError, match=match):
            net(**batch, **(more or {}))

    refused("one of them, not both", more={"attention_mask": made["dense"]["attention_mask"]})
    for name in ADDED:
        refused("use_flash_attention=False", name, use_flash_attention=False)
    refused("context_parallel_degree=2", context_parallel_degree=2)
    for name in ADDED:
        heads = {**batch, ROWS: batch[ROWS].expand([-1, 2, -1])}
        net = zoo_model(name, use_flash_attention=True)
        net.config.tensor_parallel_degree = 2
        with pytest.raises(ValueError, match=r"must have 1 head with tensor_parallel_degree=2, got shape \[2, 2, 48\]"):
            net(**heads)
    refused("refined_recompute", "QWenForCausalLM", refined_recompute={"flash_attn": 1})
    refused("scale_qk_coeff=2.0", "GPTForCausalLM", scale_qk_coeff=2.0)
    refused("sequence_parallel", "ChatGLMv2ForCausalLM", sequence_parallel=True)
    refused("num_nextn_predict_layers=0", "DeepseekV3ForCausalLM", num_nextn_predict_layers=1)
    for name in ("GemmaModel", "MixtralModel"):
        net = zoo_model(name.replace("Model", "ForCausalLM"))
        inner = getattr(net, name.removesuffix("Model").lower())
        with pytest.raises(ValueError, match="it swallows them"):
            inner(batch["input_ids"], **{ROWS: batch[ROWS]})


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *ADDED])
def test_a_key_value_cache_is_refused(name):
    """With as many row indices as keys: rows would be counted from the first query of the call."""
    net = zoo_model(name, use_flash_attention=True)
    net.eval()
    tokens, places = paddle.arange(1, 17).reshape([1, 16]), paddle.arange(8).tile([2]).reshape([1, 16])
    rows = paddle.to_tensor([[[8] * 8 + [16] * 8]], dtype="int32")
    settings = {"use_cache": True, "return_dict": True}
    with paddle.no_grad():
        first = net(tokens[:, :12], position_ids=places[:, :12], **{ROWS: rows[:, :, :12].clip(0, 12)}, **settings)
        with pytest.raises(ValueError, match="got 4 queries and 16 keys"):
            net(
                tokens[:, 12:],
                position_ids=places[:, 12:],
                past_key_values=first.past_key_values,
                **{ROWS: rows},
                **settings,
            )


def test_gpt_and_a_dense_mask_that_its_flash_attention_ignores(made):
    net = zoo_model("GPTForCausalLM", use_flash_attention=True)
    with pytest.raises(ValueError, match="would ignore it"):
        net(**made["dense"])


def test_dropout_of_attention(made):
    names = {
        "GPTForCausalLM": "attention_probs_dropout_prob",
        "MixtralForCausalLM": "attention_dropout",
        "ChatGLMv2ForCausalLM": "attention_dropout",
    }
    for name, argument in names.items():
        losses = []
        for probability in (0.0, 0.5):
            net = zoo_model(name, use_flash_attention=True, **{argument: probability})
            losses.append(loss_and_gradients(net, made["flashmask"], use_flash_attention=True)[0])
        assert abs(losses[0] - losses[1]) > 1e-4


def test_experts_of_mixtral():
    """The same as a loop over tokens."""
    block = importlib.import_module("paddlenlp.transformers.mixtral.modeling").MixtralSparseMoeBlock
    assert workarounds.where_gives_vectors() == (paddle.where(paddle.ones([2], dtype="bool"))[0].ndim == 1)
    net = zoo_model("MixtralForCausalLM")
    layer = next(layer for layer in net.sublayers() if isinstance(layer, block))
    given = paddle.randn([2, 5, 32])
    out, logits = layer(given)
    for token, row in enumerate(given.reshape([-1, 32])):
        shares = paddle.nn.functional.softmax(logits[token]).numpy()
        best = np.argsort(shares)[::-1][:2]
        expected = (
            sum(layer.experts[int(e)](row.unsqueeze(0)).numpy()[0] * shares[e] for e in best) / shares[best].sum()
        )
        np.testing.assert_allclose(out.reshape([-1, 32])[token].numpy(), expected, atol=1e-5)
