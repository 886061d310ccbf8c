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


# max_position_embeddings in the config.json of each.
POSITIONS = {
    "Qwen/Qwen2-7B": 131072,
    "Qwen/Qwen2-7B-Instruct": 32768,
    "meta-llama/Meta-Llama-3-8B": 8192,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8192,
}


@pytest.mark.parametrize("config", [config for config in CONFIGS if "tiny" not in config])
def test_no_sample_is_longer_than_the_model_takes(config):
    """A sample may be as long as a row: nothing else limits it."""
    written = json.loads((EXAMPLES / "config" / f"{config}.json").read_text())
    row = written["max_length" if "max_length" in written else "max_seq_len"]
    assert row <= POSITIONS[written["model_name_or_path"]]


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
    plain = {"world_size": 1, "logging_steps": 1, "logging_strategy": IntervalStrategy.STEPS, "output_dir": "out"}
    steps = {
        "max_steps": -1,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    others = {"resume_from_checkpoint": None, "ignore_load_lr_and_optim": False, "device": "cpu", "fp16": False}
    others["dataloader_drop_last"] = False
    return SimpleNamespace(**{**plain, **steps, **others, **changes})


@pytest.mark.parametrize(
    ("changes", "compare", "message"),
    [
        ({"world_size": 2}, False, "run in one process, got 2 processes"),
        ({"logging_steps": 10}, False, "--logging_steps must be 1 .* got 10 and steps"),
        ({"logging_strategy": IntervalStrategy.EPOCH}, False, "got 1 and epoch"),
        ({"fp16": True}, False, "--fp16 true does not train on a CPU"),
        ({"resume_from_checkpoint": "."}, True, "--resume_from_checkpoint with --compare true: resume one of the two"),
        ({"resume_from_checkpoint": "checkpoint-9"}, False, "must be a folder that a run has saved, got checkpoint-9"),
        ({"resume_from_checkpoint": "."}, False, "with its trainer_state.json; got .* .*No such file"),
    ],
)
def test_what_no_run_can_keep_is_refused_first(changes, compare, message, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("runs").run_folder(arguments(**changes), compare)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", NAMES)
def test_float16_on_a_cpu_is_refused_before_anything_is_made(name, parse, tmp_path):
    parse(f"{name}-tiny-cpu", "--compare", "false", "--fp16", "true")  # sets the command line
    with pytest.raises(SystemExit, match=r"--fp16 true does not train on a CPU: .* --device gpu"):
        importlib.import_module(name).main()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    """What a run left after 4 steps, as far as it is read before anything is loaded."""
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    return str(folder)


@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_checkpoint_at_the_end_is_not_trained_further(max_steps, checkpoint, parse, tmp_path):
    """PaddleNLP would make one more step, and its model replace the one that is there."""
    out = tmp_path / "out"
    given = {"resume_from_checkpoint": checkpoint, "max_steps": max_steps, "output_dir": str(out)}
    run_folder = importlib.import_module("runs").run_folder
    with pytest.raises(
        SystemExit, match=rf"--max_steps must be above the 4 steps that .*-4 has made, got {max_steps}:"
    ):
        run_folder(arguments(**given), False)
    assert not out.exists()
    assert run_folder(arguments(**{**given, "max_steps": 5}), False) == out
    assert run_folder(arguments(**given, ignore_load_lr_and_optim=True), False) == out, "counts from 1 again"


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_train_epochs": 2}, 4),
        ({"num_train_epochs": 1.5}, 3),
        ({"num_train_epochs": 4, "gradient_accumulation_steps": 2}, 4),
        ({"num_train_epochs": 3, "dataloader_drop_last": True}, 3),
        ({"num_train_epochs": 4, "gradient_accumulation_steps": 8}, 4),
        ({"num_train_epochs": 3}, None),
        ({"num_train_epochs": 1, "max_steps": 5}, None),
    ],
)
def test_a_checkpoint_at_the_end_of_the_epochs(changes, steps, checkpoint, parse):
    """Three rows are two batches."""
    check_steps = importlib.import_module("runs").check_steps
    check_steps(arguments(**changes), range(3))
    given = arguments(**changes, resume_from_checkpoint=checkpoint)
    if steps is None:
        check_steps(given, range(3))
    else:
        with pytest.raises(
            SystemExit, match=rf"--num_train_epochs .* are {steps} steps of these rows, and .* made 4: "
        ):
            check_steps(given, range(3))


def test_fewer_rows_than_a_batch_that_is_dropped(parse):
    """PaddleNLP ends with an UnboundLocalError then."""
    check_steps = importlib.import_module("runs").check_steps
    check_steps(arguments(), range(1))
    check_steps(arguments(dataloader_drop_last=True), range(2))
    message = "--dataloader_drop_last true leaves no batch of --per_device_train_batch_size 2: .* 2 rows, got 1;"
    with pytest.raises(SystemExit, match=message):
        check_steps(arguments(dataloader_drop_last=True), range(1))


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_checked_before_the_model_is_loaded(name, parse, monkeypatch, tmp_path):
    example = importlib.import_module(name)
    line, named = {"src": ["What?"], "tgt": ["That."]}, "dataset_name_or_path"
    if name in ("dpo", "reward"):
        line, named = {"src": ["What?"], "response": ["That.", "This."], "sort": [1, 0]}, "train_dataset_path"
    file = tmp_path / "train.json"
    file.write_text((json.dumps(line) + "\n") * 5)
    plain = ["--compare", "false", "--flash_mask", "false", "--model_name_or_path", "DIR", f"--{named}", str(file)]
    parse(f"{name}-tiny-cpu", *plain, "--dataloader_drop_last", "true", "--per_device_train_batch_size", "2")
    monkeypatch.setattr(example, "load_tokenizer", lambda *given: Tokenizer())
    with pytest.raises(SystemExit, match="--dataloader_drop_last true leaves no batch of"):
        example.main()


def test_every_step_is_logged_unless_told_otherwise(parse, monkeypatch, tmp_path):
    sft = importlib.import_module("sft")
    monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path), "--device", "cpu"])
    assert sft.parse_arguments()[2].logging_steps == 1


@pytest.mark.parametrize("given", [("--pissa", "true"), ("--weight_quantize_algo", "nf4"), ("--prefix_tuning", "true")])
def test_other_ways_to_fine_tune_are_refused(given, parse):
    with pytest.raises(SystemExit, match=rf"{given[0]}: the examples train all weights or LoRA adapters, got"):
        parse("lora-tiny-cpu", *given)


@pytest.mark.parametrize("name", ["sft", "lora"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--chat_template", "mine.json"), "texts are used as they are; put the template into src; expected None, got"),
        (("--src_length", "16"), "no prompt is cut; .*; expected 1024, got 16"),
        (("--max_seq_length", "16"), "the tokens of a row are --max_length; expected 2048, got 16"),
        (("--zero_padding", "false"), "samples always share rows of --max_length tokens; expected True, got False"),
        (("--autoregressive", "true"), "answers are learned and prompts are not; expected False, got True"),
        (("--use_pose_convert", "true"), "position ids count .* from 0; expected False, got True"),
        (("--eval_with_do_generation", "true"), "evaluation computes the loss .*; expected False, got True"),
        (("--save_generation_output", "true"), "evaluation computes the loss .*; expected False, got True"),
        (("--task_name", "mine"), "--dataset_name_or_path is a file or a folder .*; expected None, got mine"),
    ],
)
def test_data_options_that_no_example_reads_are_refused(given, message, name, parse):
    with pytest.raises(SystemExit, match=f"{given[0]}: {message}"):
        parse(f"{name}-tiny-cpu", *given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--hidden_dropout_prob", "0.0"), "dropout is what the model's config.json says; expected 0.1, got 0.0"),
        (("--attention_probs_dropout_prob", "0.2"), "dropout is what .*; expected 0.1, got 0.2"),
        (("--fuse_attention_qkv", "true"), "which weights and layers are fused .*; expected None, got True"),
        (("--fuse_attention_ffn", "true"), "which weights and layers are fused .*; expected None, got True"),
        (("--use_fast_layer_norm", "true"), "which weights and layers are fused .*; expected False, got True"),
        (("--continue_training", "false"), "--model_name_or_path always starts from .*; expected True, got False"),
        (("--from_aistudio", "true"), "--model_name_or_path is a folder, or .*; expected False, got True"),
        (("--save_to_aistudio", "true"), "the model is saved to --output_dir only; expected False, got True"),
    ],
)
def test_model_options_that_no_example_reads_are_refused(given, message, name, parse):
    with pytest.raises(SystemExit, match=f"{given[0]}: {message}"):
        parse(f"{name}-tiny-cpu", *given)


def test_every_model_option_is_read_or_refused_or_without_effect(parse):
    """So that none is passed over in silence when PaddleNLP gets another."""
    from paddlenlp.trl import ModelConfig

    runs = importlib.import_module("runs")
    sources = "".join(file.read_text() for file in EXAMPLES.glob("*.py"))
    read = {field.name for field in dataclasses.fields(ModelConfig) if f"model_args.{field.name}" in sources}
    of_others = {  # say how something is done that is refused
        "weight_quantize_algo": {"weight_blocksize", "weight_double_quant", "weight_double_quant_block_size"},
        "vera": {"vera_rank"},
        "lokr": {"lokr_dim"},
        "prefix_tuning": {"num_prefix_tokens"},
        "neftune": {"neftune_noise_alpha"},
        "use_long_sequence_strategies": {"rope_scaling_factor", "strategy_type", "strategy_name"},
        "save_to_aistudio": {f"aistudio_{name}" for name in ("repo_id", "repo_private", "repo_license", "token")},
    }
    refused = {*runs.OTHER_METHODS, *runs.OTHER_MODEL}
    assert of_others.keys() <= refused
    known = read | refused | set().union(*of_others.values()) | {"flash_mask"}  # enable_from_args reads it
    assert {field.name for field in dataclasses.fields(ModelConfig)} == known


def test_options_of_what_is_done_anyway(parse, monkeypatch, tmp_path):
    """As the JSON files of PaddleNLP's own scripts have them."""
    same = {
        "zero_padding": True,
        "src_length": 1024,
        "chat_template": "",
        "eval_with_do_generation": False,
        "lazy": False,
        "hidden_dropout_prob": 0.1,
        "fuse_attention_qkv": False,
        "vera_rank": 4,
        "pad_to_multiple_of": 64,
    }
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "device": "cpu", **same}))
    monkeypatch.setattr(sys, "argv", ["example", str(file)])
    assert importlib.import_module("sft").parse_arguments()[1].zero_padding is True


def test_sft_refuses_adapters(parse, tmp_path):
    parse("sft-tiny-cpu", "--lora", "true")  # sets the command line
    with pytest.raises(SystemExit, match=r"--lora true .* use examples/lora\.py"):
        importlib.import_module("sft").main()
    assert not list(tmp_path.iterdir())


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __call__(self, text, **settings):
        return {"input_ids": [3, 4, 5]}


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

    monkeypatch.setattr(example, "load_tokenizer", lambda *given: Tokenizer())
    if name == "reward":
        monkeypatch.setattr(example.AutoConfig, "from_pretrained", load)
    else:
        monkeypatch.setattr(example, "load_model", load)
    with pytest.raises(FileNotFoundError, match=missing.name):
        example.main()


class Packed(Exception):
    """Stops an example once its data is packed."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("given", "train_samples", "dev_samples"), [(0, 5, 4), (2, 2, 2), (9, 5, 4)])
def test_max_samples_of_ones_own_data(given, train_samples, dev_samples, name, parse, monkeypatch, tmp_path):
    example = importlib.import_module(name)
    line = {"src": ["What?"], "tgt": ["That."]}
    data_arguments = ["--dataset_name_or_path", str(tmp_path)]
    if name in ("dpo", "reward"):
        line = {"src": ["What?"], "response": ["That.", "This."], "sort": [1, 0]}
        files = [str(tmp_path / file) for file in ("train.json", "dev.json")]
        data_arguments = ["--train_dataset_path", files[0], "--dev_dataset_path", files[1]]
    (tmp_path / "train.json").write_text((json.dumps(line) + "\n") * 5)
    (tmp_path / "dev.json").write_text((json.dumps(line) + "\n") * 4)
    plain = ["--compare", "false", "--flash_mask", "false", "--model_name_or_path", "DIR"]
    parse(f"{name}-tiny-cpu", *plain, *data_arguments, "--max_samples", str(given))
    packs = "packed_preferences" if name in ("dpo", "reward") else "packed_pairs"
    original = getattr(example, packs)

    def stop(*arguments):
        raise Packed(*original(*arguments))

    monkeypatch.setattr(example, "load_tokenizer", lambda *given: Tokenizer())
    monkeypatch.setattr(example, packs, stop)
    with pytest.raises(Packed) as stopped:
        example.main()
    dataset, eval_dataset, _ = stopped.value.args
    assert (dataset.stats().samples, eval_dataset.stats().samples) == (train_samples, dev_samples)


def test_a_negative_max_samples_is_refused(parse):
    with pytest.raises(ValueError, match=r"max_samples must be 0 \(all\) or more, got -1"):
        parse("sft-tiny-cpu", "--max_samples", "-1")


@pytest.fixture
def docstrings(parse, monkeypatch):
    """30 made-up functions instead of the thousands of Python's library, which take a while to read."""
    pairs = [(f"What does f{i} do?\n", f"Gives {i} times its argument.") for i in range(30)]
    corpus, preferences = (importlib.import_module(name) for name in ("corpus", "preferences"))
    monkeypatch.setattr(corpus, "docstring_pairs", lambda: iter(pairs))
    monkeypatch.setattr(preferences, "documented_functions", lambda: iter(pairs))
    return pairs


def lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize(("name", "ranks"), [("dpo", (0, 3)), ("reward", (0, 1, 2, 3))])
@pytest.mark.parametrize(("given", "questions"), [((), 30), (("--max_samples", "0"), 30), (("--max_samples", "8"), 8)])
def test_max_samples_without_data(given, questions, name, ranks, docstrings, monkeypatch, tmp_path):
    example = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path), "--device", "cpu", *given])
    _, data_args, *_, example_args = example.parse_arguments()
    files = example.preference_files(tmp_path, data_args, example_args, ranks)
    data = tmp_path / "data"
    train, dev = data / "preferences.json", data / "preferences-dev.json"
    assert files == {"train_dataset_path": str(train), "dev_dataset_path": str(dev)}
    # Where two answers happen to be the same, the question is left out.
    assert questions * 2 / 3 < len(lines(train)) + len(lines(dev)) <= questions
    assert len(lines(data / "train.json")) == questions, "what the tokenizer is trained on"
    assert (data / "tokenizer.json").exists()


def test_one_sample_without_data_is_refused(parse, tmp_path):
    _, data_args, *_, example_args = parse("dpo-tiny-cpu", "--max_samples", "1")
    preferences = importlib.import_module("preferences")
    with pytest.raises(SystemExit, match=r"--max_samples without --train_dataset_path must be 0 .* at least 2"):
        preferences.preference_files(tmp_path, data_args, example_args, (0, 3))


@pytest.mark.parametrize("name", ["dpo-tiny-cpu", "reward-tiny-cpu"])
def test_evaluation_data_alone_is_refused(name, parse, tmp_path):
    """What is written in its place would replace it without a word."""
    _, data_args, *_, example_args = parse(name, "--dev_dataset_path", "mine.json")
    preferences = importlib.import_module("preferences")
    with pytest.raises(SystemExit, match=r"--dev_dataset_path without --train_dataset_path: .* got mine\.json"):
        preferences.preference_files(tmp_path, data_args, example_args, (0, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("samples", "every"), [(1, 20), (5, 1)])
def test_samples_must_be_left_to_train_on(samples, every, parse, tmp_path):
    file = tmp_path / "train.json"
    file.write_text((json.dumps({"src": ["What?"], "tgt": ["That."]}) + "\n") * samples)
    parsed = parse("sft-tiny-cpu", "--dataset_name_or_path", str(file), "--eval_every", str(every))
    data_args, example_args = parsed[1], parsed[-1]
    rows = importlib.import_module("rows")
    with pytest.raises(SystemExit, match=rf"--eval_every must leave samples .*: {every} keeps all of {samples} "):
        rows.packed_pairs(Tokenizer(), data_args, example_args, "flashmask")


@pytest.mark.parametrize("own_data", [False, True])
@pytest.mark.parametrize("model", [None, "DIR"])
@pytest.mark.parametrize("tokenizer", [None, "TOKENIZER"])
def test_what_lora_trains_on(tokenizer, model, own_data, docstrings, parse, monkeypatch, tmp_path):
    """Without a model one half of the docstrings trains a base; the adapters get one's own data or the other half."""
    lora = importlib.import_module("lora")
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"src": ["What?"], "tgt": ["That."]}) + "\n")
    folder = tmp_path / "run"
    runs = []
    monkeypatch.setattr(lora.subprocess, "run", lambda command, **settings: runs.append([*map(str, command)]))
    given = {"dataset_name_or_path": own_data and own, "model_name_or_path": model, "tokenizer_name_or_path": tokenizer}
    more = [str(part) for name, value in given.items() if value for part in (f"--{name}", value)]
    model_args, data_args, *others = parse("lora-tiny-cpu", *more)
    lora.prepare(folder, model_args, data_args, *others)

    assert data_args.dataset_name_or_path == str(own if own_data else folder / "data")
    assert (folder / "data").exists() != own_data
    if not own_data:
        assert len(lines(folder / "data" / "train.json")) == 15
        assert (folder / "data" / "tokenizer.json").exists()
    assert model_args.model_name_or_path == (model or str(folder / "base"))
    assert len(runs) == (not model)
    for run in runs:
        base_data = Path(run[run.index("--dataset_name_or_path") + 1])
        assert lines(base_data / "train.json") == [json.dumps({"src": s, "tgt": t}) for s, t in docstrings[::2]]
        assert (base_data / "tokenizer.json").exists()
        assert run[run.index("--output_dir") + 1] == model_args.model_name_or_path
        # The base must know the tokens that the adapters' data is made of.
        passed = [run[i + 1] for i, part in enumerate(run) if part == "--tokenizer_name_or_path"]
        assert passed == ([tokenizer] if tokenizer else [])


def test_lora_misses_data_before_a_base_is_trained(docstrings, parse, monkeypatch, tmp_path):
    lora = importlib.import_module("lora")
    monkeypatch.setattr(lora.subprocess, "run", lambda *given, **settings: pytest.fail("a base was trained first"))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        lora.prepare(tmp_path, *parse("lora-tiny-cpu", "--dataset_name_or_path", str(tmp_path / "none.json")))
    assert not list(tmp_path.iterdir())


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


def tiny_llama(layers=1, kind="LlamaForCausalLM"):
    import paddlenlp.transformers as models

    import paddle_flashmask.paddlenlp as flashmask_nlp

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    config = models.LlamaConfig(**sizes, num_attention_heads=2)
    return (flashmask_nlp.LlamaForScore if kind == "LlamaForScore" else getattr(models, kind))(config)


@pytest.fixture
def adapters_of(parse, tmp_path):
    """A folder with the adapters of a model, as a LoRA run saves them, in either of PaddleNLP's formats."""
    from paddlenlp.peft import LoRAConfig, LoRAModel

    def save(net, rank=4, form="pdparams", targets=".*[qv]_proj.*", **settings):
        folder = tmp_path / "adapters"
        adapted = LoRAModel(net, LoRAConfig(target_modules=[targets], r=rank, **settings))
        adapted.mark_only_lora_as_trainable()
        adapted.save_pretrained(str(folder))
        if form == "safetensors":
            (folder / "lora_model_state.pdparams").unlink()
            from safetensors.numpy import save_file

            weights = {name: weight.numpy() for name, weight in adapted.get_trainable_state_dict().items()}
            save_file(weights, folder / "peft_model-00001-of-00001.safetensors", {"format": "np"})
            where = dict.fromkeys(weights, "peft_model-00001-of-00001.safetensors")
            index = {"metadata": {}, "weight_map": where}
            (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return save


@pytest.mark.parametrize("form", ["pdparams", "safetensors"])
def test_adapters_that_fit_are_loaded(form, adapters_of, parse):
    net = tiny_llama()
    folder = adapters_of(net, form=form)
    model_args, *_ = parse("dpo-tiny-cpu", "--lora_path", str(folder))
    got = importlib.import_module("adapters").add_adapters(tiny_llama(), model_args)
    # PaddleNLP replaces the layers of the model that it puts adapters into.
    saved = {name: weight.numpy() for name, weight in net.state_dict().items() if "lora_A" in name}
    assert len(saved) == 2
    for name, weight in saved.items():
        assert (got.model.state_dict()[name].numpy() == weight).all()


@pytest.mark.parametrize(
    ("form", "layers", "message"),
    [
        ("pdparams", (1, 2), r"4 of 8 do not fit, the first of them .*layers\.1.*lora_A: expected \(16, 4\), got none"),
        ("pdparams", (2, 1), r"4 of 4 do not fit, the first of them .*layers\.1.*lora_A: expected none, got \(16, 4\)"),
        ("safetensors", (2, 1), r"4 of 4 do not fit, the first of them .*layers\.1.*lora_A: expected none"),
    ],
)
def test_adapters_of_another_model_are_refused(form, layers, message, adapters_of, parse):
    """PaddleNLP would train new ones where none fit."""
    model_args, *_ = parse("dpo-tiny-cpu", "--lora_path", str(adapters_of(tiny_llama(layers[0]), form=form)))
    with pytest.raises(SystemExit, match=f"--lora_path .* has the adapters of another model: {message}"):
        importlib.import_module("adapters").add_adapters(tiny_llama(layers[1]), model_args)


def test_adapters_of_another_rank_than_written_are_refused(adapters_of, parse):
    folder = adapters_of(tiny_llama())
    settings = json.loads((folder / "lora_config.json").read_text())
    (folder / "lora_config.json").write_text(json.dumps({**settings, "r": 2}))
    model_args, *_ = parse("dpo-tiny-cpu", "--lora_path", str(folder))
    with pytest.raises(SystemExit, match=r"4 of 4 do not fit, .*: expected \(16, 2\), got \(16, 4\)"):
        importlib.import_module("adapters").add_adapters(tiny_llama(), model_args)


def test_a_folder_without_adapters_is_refused(adapters_of, parse):
    folder = adapters_of(tiny_llama())
    (folder / "lora_model_state.pdparams").unlink()
    model_args, *_ = parse("dpo-tiny-cpu", "--lora_path", str(folder))
    with pytest.raises(SystemExit, match=r"4 of 4 do not fit"):
        importlib.import_module("adapters").add_adapters(tiny_llama(), model_args)


@pytest.mark.parametrize("name", ["lora", "dpo", "reward"])
@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ({"rank": 4}, (), "--lora_rank must be that of --resume_from_checkpoint .*: expected 4, got 8"),
        ({"rank": 8, "rslora": True}, (), "--rslora must be that of .*: expected True, got False"),
        (None, (), r"--resume_from_checkpoint must be a folder that a LoRA run has saved, with its lora_config\.json"),
    ],
)
def test_resuming_with_other_adapters_is_refused(saved, given, message, name, adapters_of, parse, tmp_path):
    """PaddleNLP would go on with new ones."""
    checkpoint = tmp_path if saved is None else adapters_of(tiny_llama(), **saved)
    parse(f"{name}-tiny-cpu", "--lora", "true", "--compare", "false", "--resume_from_checkpoint", str(checkpoint))
    before = list(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        importlib.import_module(name).main()
    assert list(tmp_path.rglob("*")) == before


def test_resuming_with_the_same_adapters(adapters_of, parse):
    check_checkpoint = importlib.import_module("adapters").check_checkpoint
    folder = str(adapters_of(tiny_llama()))
    check_checkpoint(parse("lora-tiny-cpu", "--lora_rank", "4")[0], folder)
    check_checkpoint(parse("lora-tiny-cpu", "--lora_path", folder)[0], folder)
    check_checkpoint(parse("lora-tiny-cpu")[0], None)


@pytest.mark.parametrize("kind", ["LlamaForScore", "LlamaForCausalLM"])
def test_a_model_without_a_language_model_head_is_refused(kind, parse, tmp_path):
    """PaddleNLP would train on from a random one."""
    sft = importlib.import_module("sft")
    tiny_llama(kind=kind).save_pretrained(str(tmp_path / "model"))
    model_args, data_args, training_args, example_args = parse(
        "sft-tiny-cpu", "--model_name_or_path", f"{tmp_path}/model"
    )

    def load():
        return sft.load_model(model_args, training_args, example_args, None, data_args.max_length)

    if kind == "LlamaForCausalLM":
        load()
    else:
        with pytest.raises(
            SystemExit, match=r"--model_name_or_path .*model holds a LlamaForScore, which has no language"
        ):
            load()


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


def test_a_resumed_run_takes_the_data_that_is_there(parse, tmp_path, monkeypatch):
    """A person may have changed it."""
    model_args, data_args, training_args, example_args = parse("lora-llama3-8b", "--model_name_or_path", "there")
    lora = importlib.import_module("lora")
    data_args.dataset_name_or_path = None
    written = tmp_path / "data" / "train.json"
    written.parent.mkdir()
    written.write_text("mine")
    monkeypatch.setattr(lora, "write_corpus", lambda *_: pytest.fail("written anew"))
    lora.prepare(tmp_path, model_args, data_args, training_args, example_args)
    assert data_args.dataset_name_or_path == str(written.parent)

    sft = importlib.import_module("sft")
    monkeypatch.setattr(sft, "write_corpus", lambda *_: pytest.fail("written anew"))
    monkeypatch.setattr(sft, "run_folder", lambda *_: tmp_path)
    monkeypatch.setattr(sft, "compare", lambda *arguments: seen.append(arguments[3]))
    seen = []
    monkeypatch.setattr(sys, "argv", ["sft.py", "--output_dir", str(tmp_path), "--compare", "true", "--device", "cpu"])
    sft.main()
    assert seen == [str(written.parent)]
