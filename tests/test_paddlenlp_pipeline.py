"""Pipeline stages and the DPO pipeline keep row indices, masks and position ids apart.

Without the replacements (tried by running this file with PatchSet.install doing nothing) every test with row indices
fails, as do position ids alone and dense masks in some models; tests of the helper itself do not depend on them.
"""

import importlib

import numpy as np
import paddle
import pytest
from paddlenlp_models import batches, model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp import carried, workarounds

FULL_ROWS = (13, 20, 15, 30, 18)
ROWS = "attn_mask_startend_row_indices"


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


FOLDERS = {"Llama": "llama", "Qwen2": "qwen2", "Qwen2Moe": "qwen2_moe", "DeepseekV2": "deepseek_v2"}


def pipeline_layers(family, net):
    """The embedding and decoder layers of the pipeline file with the weights of `net`, to run one after the other."""
    folder = FOLDERS[family]
    module = importlib.import_module(f"paddlenlp.transformers.{folder}.modeling_pp")
    backbone = getattr(net, folder)
    embedding = getattr(module, f"{family}EmbeddingPipe")(net.config)
    embedding.embed_tokens.weight.set_value(backbone.embed_tokens.weight)
    stages = [embedding]
    for number, layer in enumerate(backbone.layers):
        position = (number,) if family == "DeepseekV2" else ()  # its first layers have no experts
        stage = getattr(module, f"{family}DecoderLayerPipe")(net.config, *position)
        stage.set_state_dict(layer.state_dict())
        stage.eval()
        stages.append(stage)
    return stages, backbone


PIPELINE_INPUTS = {
    "rows and positions": (ROWS, "position_ids"),
    "rows": (ROWS,),
    "dense mask and positions": ("attention_mask", "position_ids"),
    "dense mask": ("attention_mask",),
    "positions": ("position_ids",),
    "nothing": (),
}


@pytest.mark.parametrize("none_dropped", [False, True], ids=["four inputs", "without None"])
@pytest.mark.parametrize("given", PIPELINE_INPUTS.values(), ids=PIPELINE_INPUTS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen2Moe", "DeepseekV2"])
def test_pipeline_stages_keep_masks_and_positions_apart(family, given, none_dropped):
    made = batches(FULL_ROWS)
    batch = {**made["flashmask"], **made["dense"]}
    net = model(family, use_flash_attention=ROWS in given)
    net.eval()
    stages, backbone = pipeline_layers(family, net)
    inputs = {key: batch[key] for key in given}
    first = tuple(inputs.get(key) for key in ("attention_mask", ROWS, "position_ids"))
    if none_dropped:
        first = tuple(x for x in first if x is not None)
    passed = (batch["input_ids"], *first) if first else batch["input_ids"]
    for stage in stages:
        passed = stage(passed)
    hidden = passed[0] if isinstance(passed, tuple) else passed
    expected = backbone(batch["input_ids"], **inputs, return_dict=False)
    expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(backbone.norm(hidden).numpy(), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("family", FOLDERS)
def test_pipeline_stages_recompute(family, monkeypatch):
    batch = batches(FULL_ROWS)["flashmask"]

    def run(recompute):
        net = model(family, use_flash_attention=True, recompute_granularity="full", recompute_use_reentrant=False)
        stages, _ = pipeline_layers(family, net)
        passed = (batch["input_ids"], None, batch[ROWS], batch["position_ids"])
        for stage in stages:
            stage.train()
            stage.enable_recompute = stage.layerwise_recompute = recompute
            passed = stage(passed)
        return stages, (passed[0] ** 2).mean()

    gradients = []
    for recompute in (False, True):
        stages, loss = run(recompute)
        loss.backward()
        named = [(name, p) for stage in stages for name, p in stage.named_parameters()]
        gradients.append([(name, p.grad.numpy()) for name, p in named if p.grad is not None])
    assert len(gradients[0]) > 10
    for (name, expected), (_, got) in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * max(np.abs(expected).max(), 1e-3), err_msg=name)

    _, loss = run(True)
    monkeypatch.setattr(carried, "is_enabled", lambda: False)
    try:
        with pytest.raises((RuntimeError, OSError), match=r"keep it enabled until backward\(\) has ended"):
            loss.backward()
    finally:
        paddle.base.framework._dygraph_tracer()._has_grad = True  # Paddle leaves it off after an error in there


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("dtype", ["bool", "int64", "int32"])
def test_pipeline_first_stage_takes_integer_padding_masks(width, dtype):
    parse = workarounds.pipeline_arguments(lambda args: (args,) + (None,) * (width - 1))
    ids, mask = paddle.zeros([2, 8], dtype="int64"), paddle.ones([2, 8], dtype=dtype)
    positions = paddle.arange(8).expand([2, 8])
    _, got_mask, rows, got_positions, *_ = parse((ids, mask, None, positions))
    assert rows is None
    assert got_mask.dtype == paddle.bool
    assert got_positions is positions
    if dtype != "int32":
        _, got_mask, rows, got_positions, *_ = parse((ids, mask, positions))
        assert rows is None
        assert got_mask.dtype == paddle.bool
        assert got_positions is positions


def test_pipeline_parse_keeps_alibi():
    parse = workarounds.pipeline_arguments(lambda args: (args,) + (None,) * 4)
    hidden, mask, alibi = paddle.zeros([2, 8, 4]), paddle.zeros([2, 1, 8, 8]), paddle.zeros([8, 1, 8])
    positions = paddle.arange(8).expand([2, 8])
    got = parse((hidden, mask, positions, alibi))
    assert [a is b for a, b in zip(got, (hidden, mask, None, positions, alibi), strict=True)] == [True] * 5


@pytest.mark.parametrize("form", ["dict", "list of dicts"])
def test_dpo_pipeline_keeps_row_indices(form):
    prepare = importlib.import_module("paddlenlp.trl.dpo_trainer").prepare_pipeline_dpo_inputs_func
    rows = paddle.ones([1, 1, 8], dtype="int32")
    last = ("chosen_labels", "rejected_labels", "response_indexs", "reference_chosen_logps", "reference_rejected_logps")
    batch = {"input_ids": 1, "position_ids": 3, ROWS: rows, **dict.fromkeys(last, 4)}
    if form == "dict":
        first_stage, last_stage = prepare(dict(batch))
        assert first_stage == (1, rows, 3)
        assert last_stage == (4,) * 5
    else:
        first_stage, last_stage = prepare([dict(batch), dict(batch)])
        assert first_stage == ([1, 1], [rows, rows], [3, 3])
        assert last_stage == ([4, 4],) * 5


def test_stock_dpo_pipeline_keeps_dense_masks():
    prepare = importlib.import_module("paddlenlp.trl.dpo_trainer").prepare_pipeline_dpo_inputs_func
    first_stage, last_stage = prepare({"input_ids": 1, "attention_mask": 2, "position_ids": 3, "chosen_labels": 4})
    assert first_stage == (1, 2, 3)
    assert last_stage == 4


def test_dpo_pipeline_refuses_the_old_name():
    prepare = importlib.import_module("paddlenlp.trl.dpo_trainer").prepare_pipeline_dpo_inputs_func
    with pytest.raises(ValueError, match="attn_mask_startend_row_indices"):
        prepare({"input_ids": 1, "attn_mask_start_row_indices": 2})
