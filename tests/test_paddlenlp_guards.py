"""Where PaddleNLP would train with another mask than the one that was given: an error says what to change.

The tests named `test_stock_...` hold with and without the replacements; each of the others fails without them (tried by
running this file with PatchSet.install doing nothing).
"""

import importlib
import types

import numpy as np
import paddle
import pytest
from paddlenlp_models import LENGTH, SwallowsEverything, assert_same, batches, loss_and_gradients, model
from paddlenlp_zoo import zoo_model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp.guards import accepts_row_indices

FULL_ROWS = (13, 20, 15, 30, 18)
ROWS = "attn_mask_startend_row_indices"


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen2Moe", "DeepseekV2"])
def test_row_indices_without_use_flash_attention(family):
    with pytest.raises(ValueError, match=r"use_flash_attention=True"):
        loss_and_gradients(model(family), batches()["flashmask"], use_flash_attention=False)


def test_row_indices_without_paddle_flash_attention(monkeypatch):
    modeling = importlib.import_module("paddlenlp.transformers.llama.modeling")
    monkeypatch.setattr(modeling, "flash_attention", None)
    with pytest.raises(ValueError, match="flash_attention"):
        loss_and_gradients(model("Llama"), batches()["flashmask"], use_flash_attention=True)


def test_shifted_sparse_attention(monkeypatch):
    modeling = importlib.import_module("paddlenlp.transformers.llama.modeling")
    longlora = importlib.import_module("paddlenlp.transformers.longlora")
    monkeypatch.setattr(modeling, "scaled_dot_product_attention", longlora.ssa_scaled_dot_product_attention)
    with pytest.raises(ValueError, match="ssa_scaled_dot_product_attention"):
        loss_and_gradients(model("Llama"), batches()["flashmask"], use_flash_attention=True)


def test_alibi():
    with pytest.raises(ValueError, match="alibi"):
        loss_and_gradients(model("Llama", alibi=True), batches()["flashmask"], use_flash_attention=True)


@pytest.mark.parametrize("key", [ROWS, "attention_mask"])
@pytest.mark.parametrize("name", ["split_inputs_sequence_dim", "split_inputs_sequence_dim_load_balance"])
def test_trainer_does_not_cut_masks(name, key):
    split = getattr(importlib.import_module("paddlenlp.trainer.trainer"), name)
    batch = {"input_ids": paddle.zeros([2, 8], dtype="int64"), key: paddle.ones([2, 8], dtype="int32")}
    with pytest.raises(ValueError, match=f"{key}.*parallel_degree=1"):
        split(batch, 0, 2)


def test_stock_trainer_cuts_batches_without_masks():
    split = importlib.import_module("paddlenlp.trainer.trainer").split_inputs_sequence_dim
    batch = {"input_ids": paddle.arange(16).reshape([2, 8])}
    assert split(batch, 1, 2)["input_ids"].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen2Moe", "DeepseekV2"])
@pytest.mark.parametrize("use_flash_attention", [False, True])
def test_use_casual_mask_and_a_dense_mask(family, use_flash_attention, monkeypatch):
    batch = batches()["dense"]  # the collator refuses the variable too
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with pytest.raises(ValueError, match=r"makes \w+Model ignore attention_mask.*Unset USE_CASUAL_MASK"):
        loss_and_gradients(model(family), batch, use_flash_attention)


def test_use_casual_mask_and_left_padding(monkeypatch):
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :5] = 0
    batch = {k: v for k, v in batches((30, 20))["flashmask"].items() if k != ROWS}
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with pytest.raises(ValueError, match=r"makes \w+Model ignore attention_mask.*Unset USE_CASUAL_MASK"):
        loss_and_gradients(
            model("Llama"), {**batch, "attention_mask": paddle.to_tensor(mask)}, use_flash_attention=False
        )


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_use_casual_mask_leaves_row_indices_alone(family, monkeypatch):
    batch = batches(FULL_ROWS)
    expected = loss_and_gradients(model(family), batch["dense"], use_flash_attention=False)
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    assert_same(loss_and_gradients(model(family), batch["flashmask"], use_flash_attention=True), expected)


@pytest.mark.parametrize("form", ["right padding", "causal", "none"])
def test_stock_use_casual_mask_allows_what_is_causal(form, monkeypatch):
    mask = {
        "right padding": np.array([[1] * LENGTH, [1] * 40 + [0] * 8]),
        "causal": np.tri(LENGTH, dtype=bool)[None, None].repeat(2, 0),
        "none": None,
    }[form]
    batch = {k: v for k, v in batches(FULL_ROWS)["flashmask"].items() if k != ROWS}
    if mask is not None:
        batch["attention_mask"] = paddle.to_tensor(mask)
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    loss, _ = loss_and_gradients(model("Llama"), batch, use_flash_attention=False)
    assert np.isfinite(loss)


def test_trainer_refuses_models_that_swallow_row_indices():
    trainer_class = importlib.import_module("paddlenlp.trainer.trainer").Trainer
    batch = {"input_ids": paddle.zeros([1, 4], dtype="int64"), ROWS: paddle.ones([1, 1, 4], dtype="int32")}
    trainer = types.SimpleNamespace(
        model=SwallowsEverything(), _prepare_input=dict, args=types.SimpleNamespace(past_index=-1), _past=None
    )
    with pytest.raises(ValueError, match="SwallowsEverything, whose forward does not take them"):
        trainer_class._prepare_inputs(trainer, batch)
    trainer.model = model("Llama")
    assert trainer_class._prepare_inputs(trainer, batch) == batch


@pytest.mark.parametrize("name", ["dpo_trainer:DPOTrainer", "kto_trainer:KTOTrainer"])
@pytest.mark.parametrize("mask", ["padding", None])
def test_preference_trainers_drop_row_indices_beside_a_mask(name, mask):
    file, _, cls = name.partition(":")
    trainer_class = getattr(importlib.import_module(f"paddlenlp.trl.{file}"), cls)
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = model("Llama")
    batch = {"input_ids": paddle.zeros([1, 4], dtype="int64"), ROWS: paddle.ones([1, 1, 4], dtype="int32")}
    batch["attention_mask"] = mask and paddle.ones([1, 4], dtype="int64")
    message = f"{ROWS} and attention_mask in one batch: {cls} would .* Leave attention_mask out"
    with pytest.raises(ValueError, match=message):
        trainer._prepare_inputs(batch)  # pipelines
    with pytest.raises(ValueError, match=message):
        trainer.get_batch_metrics(None, trainer.model, batch)
    # Evaluation prepares nothing.
    trainer.args = types.SimpleNamespace(pipeline_parallel_degree=1)
    trainer.ref_model_wrapped, trainer.autocast_smart_context_manager = None, paddle.no_grad
    with pytest.raises(ValueError, match=message):
        trainer.prediction_step(trainer.model, batch, True)


def test_stock_other_trainers_may_pass_both_masks():
    """The models follow the row indices then."""
    trainer_class = importlib.import_module("paddlenlp.trainer.trainer").Trainer
    made = batches(FULL_ROWS)
    both = {**made["flashmask"], "attention_mask": paddle.ones([2, LENGTH], dtype="int64")}
    trainer = types.SimpleNamespace(
        model=model("Llama"), _prepare_input=dict, args=types.SimpleNamespace(past_index=-1), _past=None
    )
    assert trainer_class._prepare_inputs(trainer, both) == both
    expected = loss_and_gradients(model("Llama"), made["dense"], use_flash_attention=False)
    assert_same(loss_and_gradients(model("Llama"), both, use_flash_attention=True), expected)


@pytest.mark.parametrize("use_flash_attention", [False, True])
def test_flash_attention_for_generation_and_a_dense_mask(use_flash_attention):
    made = batches(FULL_ROWS)
    net = model("Llama", use_flash_attention_for_generation=True)
    with pytest.raises(
        ValueError, match=r"use_flash_attention_for_generation=True makes LlamaModel .* Set it to False"
    ):
        loss_and_gradients(net, made["dense"], use_flash_attention)
    whole = {"input_ids": made["dense"]["input_ids"], "attention_mask": paddle.ones([2, LENGTH], dtype="int64")}
    net(**whole)
    net.config.use_flash_attention = use_flash_attention
    net.generate(**whole, max_new_tokens=2, decode_strategy="greedy_search", bos_token_id=1, pad_token_id=0)
    expected = loss_and_gradients(model("Llama"), made["dense"], use_flash_attention=False)
    assert_same(loss_and_gradients(net, made["flashmask"], use_flash_attention=True), expected)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_generate_ignores_row_indices(name):
    net = zoo_model(name, use_flash_attention=True)
    tokens = paddle.arange(1, 9).reshape([1, 8])
    rows = paddle.full([1, 1, 8], 8, dtype="int32")
    settings = {"max_new_tokens": 2, "decode_strategy": "greedy_search", "bos_token_id": 1, "pad_token_id": 0}
    with pytest.raises(ValueError, match=rf"{ROWS} with {name}.generate, which ignores them"):
        net.generate(tokens, attn_mask_startend_row_indices=rows, **settings)
    assert net.generate(tokens, attention_mask=paddle.ones_like(tokens), **settings)[0].shape == [1, 2]


def test_stock_which_models_accept_row_indices():
    from paddlenlp.peft import LoRAConfig, LoRAModel
    from paddlenlp.transformers import LlamaForCausalLMPipe

    net = model("Llama")
    assert accepts_row_indices(net)
    assert accepts_row_indices(LoRAModel(net, LoRAConfig(target_modules=[".*q_proj.*"], r=2, lora_alpha=4)))
    assert not accepts_row_indices(SwallowsEverything())
    pipeline = LlamaForCausalLMPipe.__new__(LlamaForCausalLMPipe)
    paddle.nn.Layer.__init__(pipeline)
    assert accepts_row_indices(pipeline)


def test_generation_while_evaluating():
    trainer_class = importlib.import_module("paddlenlp.trl.sft_trainer").SFTTrainer
    trainer = types.SimpleNamespace(do_generation=True, args=types.SimpleNamespace(pipeline_parallel_degree=1))
    batch = {"input_ids": paddle.zeros([1, 4], dtype="int64"), ROWS: paddle.ones([1, 1, 4], dtype="int32")}
    with pytest.raises(ValueError, match="do_generation=False"):
        trainer_class.prediction_step(trainer, model("Llama"), batch, False)


def test_use_casual_mask_and_a_dense_mask_qwen(monkeypatch):
    """The first Qwen takes no row indices but drops dense masks in the same way."""
    from paddlenlp.transformers import QWenConfig, QWenForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64, "seq_length": 64}
    net = QWenForCausalLM(QWenConfig(vocab_size=64, hidden_size=32, intermediate_size=64, kv_channels=8, **sizes))
    inputs = {"input_ids": paddle.arange(8).reshape([1, 8])}
    blocks = np.tri(8, dtype=bool)
    blocks[4:, :4] = False
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with pytest.raises(ValueError, match="QWenModel ignore attention_mask"):
        net(**inputs, attention_mask=paddle.to_tensor(blocks[None, None]))
    net(**inputs, attention_mask=paddle.ones([1, 8], dtype="int64"))
