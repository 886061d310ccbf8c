"""verify(): passes on what is right, and catches routing that is broken on purpose."""

import sys

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp_models import LENGTH, SwallowsEverything, batches, model
from paddlenlp_zoo import zoo_model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp import routing
from paddle_flashmask.paddlenlp import verify as verify_function
from paddle_flashmask.paddlenlp.verify import VerificationError

verify_module = sys.modules["paddle_flashmask.paddlenlp.verify"]  # its name in the package is the function's
ROWS = "attn_mask_startend_row_indices"


@pytest.fixture
def batch():
    return batches((13, 20, 9, 30, 11))["flashmask"]


@pytest.mark.parametrize("family", ["Llama", "Qwen2Moe", "DeepseekV2"])
def test_passes(family, batch):
    with flashmask_nlp.enabled():
        report = verify_function(model(family, use_flash_attention=True), batch)
    assert len(report.layers) == 2
    assert report.passed
    assert not report.warnings
    assert [found.layer.split(".")[-1] for found in report.layers] == ["self_attn", "self_attn"]
    assert 0 < report.worst.max_relative < 1e-5, "not compared with itself"
    text = str(report)
    assert "passed" in text
    assert all(found.layer in text for found in report.layers)
    assert not flashmask_nlp.is_enabled()


def test_a_few_scores_at_a_time(batch, monkeypatch):
    net = model("Llama", use_flash_attention=True)
    monkeypatch.setattr(verify_module, "SCORES_AT_ONCE", 7 * LENGTH)
    assert 0 < verify_function(net, batch).worst.max_relative < 1e-5
    later = {**batch, ROWS: batch[ROWS].clone()}
    later[ROWS][1, 0, 40] = 0  # one key of the last sample, hidden from its rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "_rows_of", lambda rows, original=verify_module._rows_of: original(batch[ROWS]))
        with pytest.raises(VerificationError, match="FAILED"):
            verify_function(net, later)


@pytest.mark.parametrize("form", ["[b, s]", "[b, 2, s, 1]", "n=2", "n=4"])
def test_forms(form, batch):
    rows = batch[ROWS]
    never = paddle.full_like(rows, LENGTH)
    batch[ROWS] = {
        "[b, s]": lambda: rows[:, 0],
        # Key head 1 sees the samples of the row, key head 0 is plain causal.
        "[b, 2, s, 1]": lambda: paddle.stack([never[:, 0], rows[:, 0]], axis=1).unsqueeze(-1),
        "n=2": lambda: paddle.stack([rows, never], axis=-1),
        "n=4": lambda: paddle.stack([rows, never, never * 0, paddle.arange(LENGTH, dtype="int32") + rows * 0], axis=-1),
    }[form]()
    if form == "[b, 2, s, 1]":
        del batch["position_ids"]  # head 0 sees across the samples
    assert verify_function(model("Llama", use_flash_attention=True), batch).passed


def test_changes_nothing(batch):
    net = model("Llama", use_flash_attention=True)
    net.llama.layers[0].eval()
    before = {name: weight.numpy() for name, weight in net.state_dict().items()}
    state = [s.current_seed() if hasattr(s, "current_seed") else s for s in paddle.get_rng_state()]
    verify_function(net, {name: value.numpy() for name, value in batch.items()})
    assert net.training
    assert not net.llama.layers[0].training
    assert net.llama.layers[1].self_attn.training
    assert all(np.array_equal(weight.numpy(), before[name]) for name, weight in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert [s.current_seed() if hasattr(s, "current_seed") else s for s in paddle.get_rng_state()] == state
    assert not net.llama.layers[0].self_attn._forward_pre_hooks


def test_lora(batch):
    net = LoRAModel(
        model("Llama", use_flash_attention=True), LoRAConfig(target_modules=[".*q_proj.*"], r=2, lora_alpha=4)
    )
    assert len(verify_function(net, batch).layers) == 2


def shifted(monkeypatch):
    """Off by one: each sample's last token no longer sees it."""
    original = routing.as_startend_row_indices

    def broken(*args):
        indices, causal = original(*args)
        return indices - 1, causal

    monkeypatch.setattr(routing, "as_startend_row_indices", broken)


def causal_only(monkeypatch):
    original = routing.flashmask_attention
    monkeypatch.setattr(routing, "flashmask_attention", lambda startend_row_indices=None, **given: original(**given))


def not_a_number(monkeypatch):
    original = routing.flashmask_attention
    monkeypatch.setattr(routing, "flashmask_attention", lambda **given: original(**given) * float("nan"))


def other_batch_order(monkeypatch):
    original = routing.as_startend_row_indices
    monkeypatch.setattr(routing, "as_startend_row_indices", lambda rows, *rest: original(rows[::-1], *rest))


@pytest.mark.parametrize("break_it", [shifted, causal_only, not_a_number, other_batch_order])
def test_catches_a_broken_routing(break_it, batch, monkeypatch):
    monkeypatch.setattr(routing, "_inputs_as_saved", lambda: ("query", "key", "value", "startend_row_indices"))
    break_it(monkeypatch)
    with pytest.raises(VerificationError, match="FAILED") as error:
        verify_function(model("Llama", use_flash_attention=True), batch)
    assert not error.value.report.passed
    assert "too large" in str(error.value)


def test_catches_a_layer_without_the_mask(batch, monkeypatch):
    net = model("Llama", use_flash_attention=True)
    attention = net.llama.layers[1].self_attn
    original = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda *args, **kwargs: original(*args, **{**kwargs, ROWS: None}), raising=False
    )
    with pytest.raises(VerificationError, match=r"1 attention layers did not use .* llama.layers.1.self_attn"):
        verify_function(net, batch)


def test_catches_a_model_that_uses_none(batch, monkeypatch):
    net = model("Llama", use_flash_attention=True)
    for layer in net.llama.layers:
        original = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *a, f=original, **k: f(*a, **{**k, ROWS: None}), raising=False
        )
    with pytest.raises(VerificationError, match="no attention call with row indices"):
        verify_function(net, batch)


def test_positions_that_do_not_fit_the_mask(batch):
    net = model("Llama", use_flash_attention=True)
    running = {**batch, "position_ids": paddle.arange(LENGTH).unsqueeze(0).expand([2, LENGTH])}
    report = verify_function(net, running)
    assert "token 13 of row 0 sees no earlier token, but its position is 13" in report.warnings[0]
    assert "warning: token 13" in str(report)
    # A mask of plain causal attention over rows whose positions restart: the samples see each other.
    leaking = {**batch, ROWS: paddle.full_like(batch[ROWS], LENGTH)}
    with pytest.raises(ValueError, match=r"restart at token 13 of row 0, but .* see 13 earlier tokens"):
        verify_function(net, leaking)


def test_positions_that_are_missing(batch):
    """Models count from 0 then, over all samples of a row; GPT has learned each position."""
    net = zoo_model("GPTForCausalLM", use_flash_attention=True)
    without = {key: value for key, value in batch.items() if key != "position_ids"}
    assert "token 13 of row 0 sees no earlier token, but its position is 13" in (
        warning := flashmask_nlp.verify(net, without).warnings[0]
    )
    assert "the batch has no position_ids" in warning
    alone = {**without, ROWS: paddle.full_like(batch[ROWS], LENGTH)}
    with flashmask_nlp.enabled():
        assert not flashmask_nlp.verify(net, batch).warnings
        assert not flashmask_nlp.verify(net, alone).warnings, "one sample in each row"


def test_says_that_the_routing_is_off(batch):
    report = verify_function(model("Llama", use_flash_attention=True), batch)
    assert report.passed
    assert report.warnings == ("the routing is off outside this check: call enable() before training",)
    assert "call enable()" in str(report)
    assert not flashmask_nlp.is_enabled()


def test_row_indices_of_one_sequence_for_a_batch(batch):
    net = model("Llama", use_flash_attention=True)
    one = {ROWS: batch[ROWS][:1]}
    four = {key: value[:1].expand([4, LENGTH]) for key, value in batch.items() if key != ROWS}
    assert verify_function(net, {**four, **one}).passed
    # The mask of the batch's sequences is looked at in each of them.
    running = four["position_ids"].clone()
    running[2] = paddle.arange(LENGTH)
    report = verify_function(net, {**four, **one, "position_ids": running})
    assert "token 13 of row 2 sees no earlier token" in report.warnings[0]


@pytest.mark.parametrize("shape", [[3, LENGTH], [2, LENGTH - 1], [2, 1, LENGTH], []])
def test_position_ids_of_another_shape(shape, batch):
    with pytest.raises(ValueError, match=rf"position_ids must have shape \[2, {LENGTH}\] .*, got \{shape}"):
        verify_function(
            model("Llama", use_flash_attention=True), {**batch, "position_ids": paddle.zeros(shape, dtype="int64")}
        )


def test_bad_input(batch):
    net = model("Llama", use_flash_attention=True)
    with pytest.raises(TypeError, match="batch must be a mapping"):
        verify_function(net, [batch])
    with pytest.raises(ValueError, match="no mask to verify"):
        verify_function(net, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="tolerance must be"):
        verify_function(net, batch, tolerance=0.0)
    with pytest.raises(ValueError, match="model must take"):
        verify_function(SwallowsEverything(), batch)
    with pytest.raises(ValueError, match="must have shape"):
        verify_function(net, {**batch, ROWS: batch[ROWS][0, 0]})
    assert not flashmask_nlp.is_enabled()
