"""--flash_mask in a script that uses PaddleNLP's own argument parser."""

import contextlib
import logging
import types

import paddle
import pytest
from paddlenlp_models import SwallowsEverything, batches, config, loss_and_gradients, model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp import routing


@pytest.fixture(autouse=True)
def routed(request):
    with contextlib.nullcontext() if "not_routed" in request.fixturenames else flashmask_nlp.enabled():
        yield


@pytest.fixture
def not_routed():
    """A script that never called enable(): the models have no guards."""
    assert not flashmask_nlp.is_enabled()


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


@pytest.mark.parametrize("half", [None, "bf16", "fp16"])
@pytest.mark.parametrize("capability", [None, (7, 0), (8, 0), (9, 0)])
def test_dense_mask_with_use_flash_attention_on_a_gpu(half, capability, tmp_path, monkeypatch):
    """Paddle 3.3 hands the mask to flash attention only, which takes 16 bits and compute capability 8.0."""
    model_args, training_args = parsed(tmp_path, "--use_flash_attention", "true")
    training_args.device = "gpu"
    if half:
        setattr(training_args, half, True)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: capability is not None)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
    if half and (capability is None or capability >= (8, 0)):
        assert flashmask_nlp.enable_from_args(model_args, training_args) is False
        return
    with pytest.raises(ValueError, match=r"on a GPU in float32 or below .* 8\.0: .*--flash_mask true, .*--bf16 true"):
        flashmask_nlp.enable_from_args(model_args, training_args)


def test_dense_mask_with_use_flash_attention_on_other_devices(tmp_path):
    model_args, training_args = parsed(tmp_path, "--use_flash_attention", "true")
    training_args.device = "npu"  # kernels of its own
    assert flashmask_nlp.enable_from_args(model_args, training_args) is False


@pytest.mark.parametrize("use_flash_attention", ["true", "false"])
def test_use_casual_mask_without_flash_mask(use_flash_attention, tmp_path, monkeypatch, not_routed, caplog):
    model_args, training_args = parsed(tmp_path, "--use_flash_attention", use_flash_attention)
    monkeypatch.setattr(routing, "drops_dense_mask", lambda: False)  # which is refused for itself
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    with caplog.at_level(logging.WARNING, "paddle_flashmask"):
        assert flashmask_nlp.enable_from_args(model_args, training_args) is False
    assert "USE_CASUAL_MASK=True in the environment without --flash_mask" in caplog.text
    assert not flashmask_nlp.is_enabled()


def test_use_casual_mask_goes_with_flash_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("USE_CASUAL_MASK", "True")
    model_args, training_args = parsed(tmp_path, "--flash_mask", "true")
    assert flashmask_nlp.enable_from_args(model_args, training_args) is True
    flashmask_nlp.disable()


def test_a_dense_mask_after_flash_mask_is_logged_once(tmp_path, caplog):
    model_args, training_args = parsed(tmp_path, "--flash_mask", "true")
    batch = batches()
    net = model("Llama", use_flash_attention=True)

    def messages():
        return [record.message for record in caplog.records if "trains with dense attention" in record.message]

    with caplog.at_level(logging.WARNING, "paddle_flashmask"):
        loss_and_gradients(net, batch["dense"], use_flash_attention=True)
        assert not messages(), "routed by enabled(), not by the flag"
        assert flashmask_nlp.enable_from_args(model_args, training_args) is True
        with paddle.no_grad():
            net(**batch["dense"])
        loss_and_gradients(net, batch["flashmask"], use_flash_attention=True)
        assert not messages(), "nothing was trained with it"
        for _ in range(2):
            loss_and_gradients(net, batch["dense"], use_flash_attention=True)
        assert len(messages()) == 1
        flashmask_nlp.enable_from_args(model_args, training_args)
        flashmask_nlp.disable()
        loss_and_gradients(net, batch["dense"], use_flash_attention=True)
        assert len(messages()) == 1, "the flag's routing has ended"


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
