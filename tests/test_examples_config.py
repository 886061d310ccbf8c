"""Every JSON file in examples/config parses with its example's arguments, and says what it seems to say."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = sorted(path.stem for path in (EXAMPLES / "config").glob("*.json"))
NAMES = ("sft", "lora", "dpo", "reward")

pytest.importorskip("paddlenlp")


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
