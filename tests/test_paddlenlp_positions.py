"""Positions for which a model has no rotary embedding, and embeddings that depend on the row: refused, not computed.

PaddleNLP reads behind the table without a word (Llama, ChatGLM2), or gives samples of long rows other positions than
the same samples alone (dynamic NTK, logn attention).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp_models import LENGTH, batches, model, samples
from paddlenlp_zoo import zoo_model

import paddle_flashmask.paddlenlp as flashmask_nlp

SHORT = (12, 15, 10, 9)  # a row of LENGTH tokens, of samples of at most 16
LONG = (40,)
MADE = {
    "Llama": lambda **more: model("Llama", use_flash_attention=True, max_position_embeddings=16, **more),
    "ChatGLMv2": lambda: zoo_model("ChatGLMv2ForCausalLM", use_flash_attention=True, max_sequence_length=16),
}


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


def logits(net: Any, lengths: tuple[int, ...]) -> np.ndarray:
    made = {key: value for key, value in batches(lengths)["flashmask"].items() if key != "labels"}
    with paddle.no_grad():
        out = net(**made)
    return (out[0] if isinstance(out, tuple) else out).numpy()


@pytest.mark.parametrize("name", MADE)
def test_a_sample_with_more_positions_than_the_table(name):
    with pytest.raises(ValueError, match=r"position_ids reach 39, .* table of 16 positions"):
        logits(MADE[name](), LONG)


@pytest.mark.parametrize("name", MADE)
def test_a_long_row_of_samples_that_fit(name):
    assert np.isfinite(logits(MADE[name](), SHORT)).all()


def test_a_dense_mask_and_no_position_ids():
    """The table is as short there, and without positions the last is the row's."""
    net = MADE["Llama"]()
    net.config.use_flash_attention = False
    made = batches(LONG)["dense"]
    with pytest.raises(ValueError, match="position_ids reach 39"):
        net(**made)
    with pytest.raises(ValueError, match=f"position_ids reach {LENGTH - 1}"):
        net(made["input_ids"])


@pytest.mark.parametrize("kind", ["linear", "ntk"])
def test_scaled_tables_are_longer(kind):
    net = MADE["Llama"](rope_scaling_type=kind, rope_scaling_factor=4.0)
    assert np.isfinite(logits(net, LONG)).all()


def test_dynamic_ntk():
    net = MADE["Llama"](rope_scaling_type="dynamic_ntk", rope_scaling_factor=4.0)
    with pytest.raises(ValueError, match=r'"dynamic_ntk" scales .* here 48, beyond max_position_embeddings=16'):
        logits(net, SHORT)
    net(batches(LONG)["flashmask"]["input_ids"])  # one sample alone is what it is made for


@pytest.mark.parametrize("setting", ["use_dynamic_ntk", "use_logn_attn"])
def test_qwen_in_evaluation(setting):
    off = {"use_dynamic_ntk": False, "use_logn_attn": False}
    net = zoo_model("QWenForCausalLM", use_flash_attention=True, seq_length=16, **{**off, setting: True})
    logits(net, SHORT)  # in training neither is used
    net.eval()
    with pytest.raises(ValueError, match=rf"{setting} in evaluation .* here 48, beyond config.seq_length=16"):
        logits(net, SHORT)
    net = zoo_model("QWenForCausalLM", use_flash_attention=True, seq_length=16, **off)
    net.eval()
    logits(net, SHORT)


def test_the_longest_sample_is_looked_at_before_training():
    llama, glm, long = MADE["Llama"](), MADE["ChatGLMv2"](), 17
    for net in (llama, glm, llama.llama):
        flashmask_nlp.check_positions(net, 16)
        with pytest.raises(ValueError, match=r"longest_sample must be at most the 16 positions of .* got 17"):
            flashmask_nlp.check_positions(net, long)
    flashmask_nlp.check_positions(MADE["Llama"](rope_scaling_type="linear", rope_scaling_factor=2.0), 32)
    flashmask_nlp.check_positions(MADE["Llama"](rope_scaling_type="dynamic_ntk", rope_scaling_factor=2.0), 1000)
    flashmask_nlp.check_positions(model("Qwen2", max_position_embeddings=16), 1000)  # its table grows


def test_longest_samples():
    assert flashmask_nlp.PackedDataset(samples((5, 12, 9)), 16).longest_sample == 12
    sample = {"prompt": [1, 2, 3], "responses": [[4, 5, 6, 7, 2], [8, 2]], "sort": [1.0, 0.0]}
    for share in (True, False):
        dataset = flashmask_nlp.PreferenceDataset([sample], 64, "reward", share_prompt=share)
        assert dataset.longest_sample == 8
