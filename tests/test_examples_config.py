"""Every JSON file in examples/config parses with its example's arguments, and says what it seems to say."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = sorted(path.stem for path in (EXAMPLES / "config").glob("*.json"))
NAMES = ("sft", "lora", "dpo", "reward")

pytest.importorskip("paddlenlp")
from paddlenlp.trainer import IntervalStrategy  # noqa: E402


@pytest.fixture
def parse(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def parse(config, *more):
        example = importlib.import_module(config.split("-")[0])
        # Here is no GPU, and bfloat16 wants one.
        here = ["--device", "cpu", "--bf16", "false", "--output_dir", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["example", str(EXAMPLES / "config" / f"{config}.json"), *here])
        return example.parse_arguments()

    return parse


@pytest.mark.parametrize("config", CONFIGS)
def test_parses(config, parse):
    written = json.loads((EXAMPLES / "config" / f"{config}.json").read_text())
    parsed = {}
    for arguments in parse(config):
        parsed |= {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    for name, value in written.items():
        if name in ("device", "bf16", "output_dir", "report_to"):
            continue
        got = getattr(parsed[name], "value", parsed[name])  # of an enumeration
        assert got == pytest.approx(value) if isinstance(value, float) else got == value, name
    assert parsed["flash_mask"] is True
    # PaddleNLP's default evaluates 8 rows at a time, which a model that just fits does not.
    assert written["per_device_eval_batch_size"] == 1
    assert written["seed"] == 42
    assert parsed["logging_steps"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_example_has_a_tiny_and_a_real_model(name):
    mine = [config for config in CONFIGS if config.startswith(f"{name}-")]
    models = [json.loads((EXAMPLES / "config" / f"{c}.json").read_text()).get("model_name_or_path") for c in mine]
    assert f"{name}-tiny-cpu" in mine
    assert any(model and ("Llama" in model or "Qwen2" in model) for model in models)


def test_the_command_line_wins(parse):
    model_args, _, training_args, *_ = parse("sft-tiny-cpu", "--max_steps", "3", "--flash_mask", "false")
    assert training_args.max_steps == 3
    assert model_args.flash_mask is False


def test_an_unknown_argument_is_refused(parse):
    with pytest.raises(ValueError, match="flash_masks"):
        parse("sft-tiny-cpu", "--flash_masks", "true")


def arguments(**changes):
    """What `run_folder` reads of the training arguments."""
    plain = {"world_size": 1, "logging_steps": 1, "logging_strategy": IntervalStrategy.STEPS}
    return SimpleNamespace(**{**plain, "output_dir": "out", "resume_from_checkpoint": None, **changes})


@pytest.mark.parametrize(
    ("changes", "compare", "message"),
    [
        ({"world_size": 2}, False, "run in one process, got 2 processes"),
        ({"logging_steps": 10}, False, "--logging_steps must be 1 .* got 10 and steps"),
        ({"logging_strategy": IntervalStrategy.EPOCH}, False, "got 1 and epoch"),
        ({"resume_from_checkpoint": "."}, True, "--resume_from_checkpoint with --compare true: resume one of the two"),
        ({"resume_from_checkpoint": "checkpoint-9"}, False, "must be a folder that a run has saved, got checkpoint-9"),
    ],
)
def test_what_no_run_can_keep_is_refused_first(changes, compare, message, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("runs").run_folder(arguments(**changes), compare)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_step_is_logged_unless_told_otherwise(parse, monkeypatch, tmp_path):
    sft = importlib.import_module("sft")
    monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path), "--device", "cpu"])
    assert sft.parse_arguments()[2].logging_steps == 1


@pytest.mark.parametrize("given", [("--pissa", "true"), ("--weight_quantize_algo", "nf4"), ("--prefix_tuning", "true")])
def test_other_ways_to_fine_tune_are_refused(given, parse):
    with pytest.raises(SystemExit, match=rf"{given[0]}: the examples train all weights or LoRA adapters, got"):
        parse("lora-tiny-cpu", *given)


def test_sft_refuses_adapters(parse, tmp_path):
    parse("sft-tiny-cpu", "--lora", "true")  # sets the command line
    with pytest.raises(SystemExit, match=r"--lora true .* use examples/lora\.py"):
        importlib.import_module("sft").main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_shows_before_the_model_is_loaded(name, parse, monkeypatch, tmp_path):
    example = importlib.import_module(name)
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    if name in ("sft", "lora"):
        more, missing = ["--dataset_name_or_path", str(train)], train
    else:
        line = {"src": ["What?"], "response": ["That.", "This."], "sort": [1, 0]}
        train.write_text(json.dumps(line) + "\n")
        more, missing = ["--train_dataset_path", str(train), "--dev_dataset_path", str(dev)], dev
    parse(f"{name}-tiny-cpu", "--compare", "false", "--flash_mask", "false", "--model_name_or_path", "DIR", *more)

    def load(*given, **named):
        raise AssertionError("the model was loaded first")

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, None

        def __call__(self, text, **settings):
            return {"input_ids": [3, 4, 5]}

    monkeypatch.setattr(example, "load_tokenizer", lambda *given: Tokenizer())
    if name == "reward":
        monkeypatch.setattr(example.AutoConfig, "from_pretrained", load)
    else:
        monkeypatch.setattr(example, "load_model", load)
    with pytest.raises(FileNotFoundError, match=missing.name):
        example.main()


@pytest.mark.parametrize("path", [None, "folder"])
@pytest.mark.parametrize("also", [None, [".*lm_head.*"]])
def test_adapters(path, also, parse, tmp_path):
    """--rslora and --lora_plus_scale arrive; --lora_path reads what was saved; only what is named is trained."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    add_adapters = importlib.import_module("adapters").add_adapters

    def model():
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))

    more = ["--lora", "true", "--lora_rank", "4", "--rslora", "true", "--lora_plus_scale", "2.0"]
    model_args, *_ = parse("dpo-tiny-cpu", *more)
    adapted = add_adapters(model(), model_args, None if path else also)
    if path:
        adapted.save_pretrained(str(tmp_path / path))
        model_args.lora_path = str(tmp_path / path)
        adapted = add_adapters(model(), model_args, also)
    assert adapted.lora_config.rslora is True
    assert adapted.lora_config.lora_plus_scale == 2.0
    assert adapted.lora_config.r == 4
    trained = {name for name, weight in adapted.named_parameters() if not weight.stop_gradient}
    assert len(trained) == 14 + bool(also), "two matrices for each of 7 layers"
    assert all("lora_" in name or "lm_head" in name for name in trained)


def test_no_model_of_that_name(parse):
    model_args, *_ = parse("sft-tiny-cpu", "--model_name_or_path", "no/such-model")
    sft = importlib.import_module("sft")
    with pytest.raises(OSError, match="--model_name_or_path no/such-model: expected a folder with a checkpoint"):
        sft.load_tokenizer(model_args, "train.json")


@pytest.mark.parametrize("data", ["", "train.json"])
def test_data_without_a_model_needs_a_tokenizer(data, parse, tmp_path):
    model_args, *_ = parse("sft-tiny-cpu")
    sft = importlib.import_module("sft")
    with pytest.raises(FileNotFoundError, match=r"beside the data: there is no .*tokenizer\.json"):
        sft.load_tokenizer(model_args, str(tmp_path / data))
