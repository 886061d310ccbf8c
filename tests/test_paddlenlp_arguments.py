"""--flash_mask in a script that uses PaddleNLP's own argument parser."""

import types

import pytest
from paddlenlp_models import SwallowsEverything, config, model

import paddle_flashmask.paddlenlp as flashmask_nlp


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


def parsed(tmp_path, *arguments):
    from paddlenlp.trainer import PdArgumentParser
    from paddlenlp.trl import ModelConfig, SFTConfig

    arguments = [*arguments, "--output_dir", str(tmp_path), "--device", "cpu"]
    return PdArgumentParser((ModelConfig, SFTConfig)).parse_args_into_dataclasses(arguments)


def test_flash_mask_argument(tmp_path):
    from paddlenlp.transformers.configuration_utils import LlmMetaConfig

    model_args, training_args = parsed(tmp_path, "--flash_mask", "true")
    assert not training_args.use_flash_attention
    assert flashmask_nlp.enable_from_args(model_args, training_args) is True
    settings = config("Llama")
    LlmMetaConfig.set_llm_config(settings, training_args)
    assert settings.use_flash_attention is True
    flashmask_nlp.disable()


def test_without_flash_mask(tmp_path):
    model_args, training_args = parsed(tmp_path)
    assert flashmask_nlp.enable_from_args(model_args, training_args) is False
    assert not training_args.use_flash_attention


def test_flash_mask_with_plain_training_arguments(tmp_path):
    from paddlenlp.trainer import TrainingArguments

    training_args = TrainingArguments(output_dir=str(tmp_path), device="cpu")
    assert flashmask_nlp.enable_from_args(types.SimpleNamespace(flash_mask=True), training_args)
    assert training_args.use_flash_attention is True
    flashmask_nlp.disable()


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        ("training", "context_parallel_degree", 2),
        ("training", "sep_parallel_degree", 4),
        ("training", "use_ssa", True),
        ("training", "enable_auto_parallel", True),
        ("training", "device", "npu"),
        ("model", "prefix_tuning", True),
    ],
)
def test_contradictions(tmp_path, holder, name, value):
    model_args, training_args = parsed(tmp_path, "--flash_mask", "true")
    # Set after parsing: SFTConfig itself wants a process group for the parallel ones.
    setattr({"model": model_args, "training": training_args}[holder], name, value)
    with pytest.raises(ValueError, match=rf"--flash_mask true contradicts\s+--{name}.*Use --"):
        flashmask_nlp.enable_from_args(model_args, training_args)
    assert not training_args.use_flash_attention


def test_all_contradictions_are_named(tmp_path):
    model_args, training_args = parsed(tmp_path, "--flash_mask", "true")
    training_args.use_ssa, model_args.prefix_tuning = True, True
    with pytest.raises(ValueError, match=r"(?s)--use_ssa.*--prefix_tuning"):
        flashmask_nlp.enable_from_args(model_args, training_args)


def test_dense_mask_with_use_flash_attention_on_the_cpu(tmp_path):
    model_args, training_args = parsed(tmp_path, "--use_flash_attention", "true")
    with pytest.raises(ValueError, match="--use_flash_attention false"):
        flashmask_nlp.enable_from_args(model_args, training_args)


def test_model_args_without_flash_mask():
    with pytest.raises(TypeError, match="flash_mask"):
        flashmask_nlp.enable_from_args(object(), object())


def test_check_model():
    flashmask_nlp.check_model(model("Llama", use_flash_attention=True))
    with pytest.raises(ValueError, match="use_flash_attention=False"):
        flashmask_nlp.check_model(model("Llama"))
    with pytest.raises(ValueError, match="alibi"):
        flashmask_nlp.check_model(model("Llama", use_flash_attention=True, alibi=True))
    with pytest.raises(ValueError, match=r"does not take attn_mask_startend_row_indices.*LlamaForCausalLM"):
        flashmask_nlp.check_model(SwallowsEverything())
