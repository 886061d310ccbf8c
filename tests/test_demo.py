"""The demo, small: what `make demo` runs, and the files that it promises."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 4

pytest.importorskip("paddlenlp")


@pytest.fixture(scope="module")
def example_modules():
    """The modules beside the examples, importable as the examples import them."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def sft(folder, **settings):
    small = {
        "max_steps": STEPS,
        "max_samples": 500,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        **settings,
    }
    arguments = [str(part) for key, value in small.items() for part in (f"--{key}", value)]
    unreachable = "http://127.0.0.1:9"  # whoever asks the network for something fails
    run = subprocess.run(
        [sys.executable, EXAMPLES / "sft.py", EXAMPLES / "config" / "sft-tiny-cpu.json", *arguments],
        env={**os.environ, "HTTP_PROXY": unreachable, "HTTPS_PROXY": unreachable, "NO_PROXY": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, sft(folder, output_dir=folder / "runs" / "demo")


def test_summary(demo):
    folder, _ = demo
    summary = json.loads((folder / "runs" / "demo" / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["seq_len"] >= 2048
    assert 0 <= summary["max_loss_difference"] < 1e-4
    for name in ("flashmask", "dense"):
        run = summary[name]
        assert run["tokens_per_s"] > 0
        assert run["peak_mib"] > run["before_training_mib"] > 50
        losses = json.loads((folder / "runs" / "demo" / name / "result.json").read_text())["losses"]
        assert len(losses) == STEPS
        assert run["final_loss"] == losses[-1]
        # From log(512), the loss of a guess, downwards.
        assert np.log(512) + 0.5 > losses[0] > losses[-1]
    # The dense mask costs one layer's scores, [1, 4, 2048, 2048] in float32, several times over.
    assert summary["dense"]["peak_mib"] > summary["flashmask"]["peak_mib"] + 64


@pytest.mark.parametrize("name", ["loss.png", "mask.png"])
def test_pictures(demo, name):
    import matplotlib.image

    folder, _ = demo
    pixels = matplotlib.image.imread(folder / "runs" / "demo" / name)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02, "not blank"


def test_output_is_quiet(demo):
    _, run = demo
    assert "tokens/s" in run.stdout
    assert "Largest difference of the losses" in run.stdout
    for noise in ("Warning", "WARNING", "[    INFO]", "deprecated", "Traceback"):
        assert noise not in run.stdout + run.stderr, run.stdout + run.stderr
    assert len((run.stdout + run.stderr).splitlines()) < 50


def test_what_is_printed_before_training(demo):
    _, run = demo
    printed = run.stdout + run.stderr
    for expected in (
        "tokens shortest/median/longest",
        "the mask skips",
        "kept for evaluation",
        "passed, tolerance",
        "skipped 1 of",
    ):
        assert expected in printed, printed


def test_evaluation_and_resume(demo, tmp_path):
    """dev.json is evaluated; the same run, continued from its second step, ends where it ended."""
    data = tmp_path / "data"
    shutil.copytree(demo[0] / "runs" / "demo" / "data", data)
    lines = (data / "train.json").read_text().splitlines(keepends=True)
    (data / "dev.json").write_text("".join(lines[-20:]))
    out = tmp_path / "out"
    settings = {"compare": "false", "dataset_name_or_path": data, "output_dir": out}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    assert "20 samples are kept" in sft(tmp_path, **settings).stdout
    whole = json.loads((out / "result.json").read_text())
    assert whole["evaluation"]["after"]["loss"] < whole["evaluation"]["before"]["loss"]
    assert (out / "model_state.pdparams").exists()
    before = {name: (out / name).read_bytes() for name in ("result.json", "loss.png")}
    sft(tmp_path, **settings, resume_from_checkpoint=out / "checkpoint-2")
    for name, content in before.items():
        assert (out / name).read_bytes() == content, "a resumed run writes files of its own"
    assert (out / "loss-2.png").stat().st_size > 5000
    resumed = json.loads((out / "result-2.json").read_text())
    assert (whole["first_step"], resumed["first_step"], resumed["steps"]) == (1, 3, 2)
    np.testing.assert_allclose(resumed["losses"], whole["losses"][2:], rtol=1e-5)
    assert resumed["evaluation"]["before"] is None, "the model of the first run's beginning, not the checkpoint's"
    assert resumed["evaluation"]["after"]["loss"] == pytest.approx(whole["evaluation"]["after"]["loss"], rel=1e-5)


def test_one_step_has_no_speed(demo, tmp_path):
    data = demo[0] / "runs" / "demo" / "data"
    printed = sft(tmp_path, dataset_name_or_path=data, output_dir=tmp_path / "out", max_steps=1).stdout
    for name in ("flashmask", "dense"):
        assert json.loads((tmp_path / "out" / name / "result.json").read_text())["tokens_per_s"] is None
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["dense"]["tokens_per_s"] is None
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "tokens/s" in line]
    assert shown == [["tokens/s", "", "-"], ["tokens/s", "", "-"], ["tokens/s", "-", "-", ""]]


def test_nothing_is_written_elsewhere(demo):
    folder, _ = demo
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["demo"]


def test_new_folder_never_reuses_one(example_modules, tmp_path):
    from runs import new_folder

    made = [new_folder(tmp_path / "runs" / "demo") for _ in range(3)]
    assert [path.name for path in made] == ["demo", "demo-2", "demo-3"]


@pytest.mark.parametrize("name", [".", "../demo", "deeper/.."])
def test_new_folder_beside_the_one_that_it_is_in(name, example_modules, tmp_path, monkeypatch):
    from runs import new_folder

    here = tmp_path / "demo"
    (here / "deeper").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert new_folder(Path(name)).resolve() == tmp_path / "demo-2"


def test_no_new_folder_beside_the_root(example_modules):
    from runs import new_folder

    with pytest.raises(SystemExit, match=r"--output_dir must be a folder that can be made, got /"):
        new_folder(Path("/"))


def test_corpus(example_modules, tmp_path):
    from corpus import write_corpus
    from paddlenlp.transformers import PretrainedTokenizerFast

    from paddle_flashmask.paddlenlp import read_pairs

    data, tokenizer_file = write_corpus(tmp_path, vocabulary=512, limit=200)
    pairs = list(read_pairs(data))
    assert len(pairs) == 200
    tokenizer = PretrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for source, target in pairs[:20]:
        assert source[0].endswith("?\n")
        ids = tokenizer(target[0], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == target[0]
    ids = tokenizer("What?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
