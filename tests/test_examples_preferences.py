"""examples/dpo.py and reward.py, small: what they write, and that they resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 4

pytest.importorskip("paddlenlp")


def run(script, folder, **settings):
    small = {
        "max_steps": STEPS,
        "max_samples": 60,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "max_seq_len": 1024,
    }
    arguments = [str(part) for key, value in {**small, **settings}.items() for part in (f"--{key}", value)]
    unreachable = "http://127.0.0.1:9"  # whoever asks the network for something fails
    made = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", EXAMPLES / "config" / f"{script}-tiny-cpu.json", *arguments],
        env={**os.environ, "HTTP_PROXY": unreachable, "HTTPS_PROXY": unreachable, "NO_PROXY": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout + made.stderr


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    return folder / "runs" / "dpo", run("dpo", folder)


def test_dpo(dpo):
    folder, printed = dpo
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert 0 <= summary["max_loss_difference"] < 1e-3
    for name in ("flashmask", "dense"):
        result = json.loads((folder / name / "result.json").read_text())
        assert len(result["losses"]) == len(result["margins"]) == STEPS
        # Before training the policy is the reference.
        assert result["losses"][0] == pytest.approx(np.log(2), rel=1e-5)
        assert result["evaluation"]["before"]["margin"] == pytest.approx(0, abs=1e-5)
        assert result["evaluation"]["after"]["loss"] != result["evaluation"]["before"]["loss"]
        assert 0.1 < result["tokens_saved"] < 0.5
    for name in ("loss", "margin", "mask"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert not list(folder.glob("*/model_state*")), "save_strategy is no"
    for expected in ("prompts that are stored once save", "the mask skips", "evaluation accuracy", "passed, tolerance"):
        assert expected in printed, printed
    for noise in ("Warning", "WARNING", "[    INFO]", "deprecated", "Traceback"):
        assert noise not in printed, printed


def test_reward_and_resume(dpo, tmp_path):
    data = dpo[0] / "data"
    settings = {
        "compare": "false",
        "loss_type": "listwise",
        "train_dataset_path": data / "preferences.json",
        "dev_dataset_path": data / "preferences-dev.json",
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": "out",
    }
    run("reward", tmp_path, **settings)
    whole = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(whole["losses"]) == len(whole["margins"]) == STEPS
    assert (tmp_path / "out" / "model_state.pdparams").exists()
    run("reward", tmp_path, **settings, resume_from_checkpoint="out/checkpoint-2")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == whole, "not overwritten"
    resumed = json.loads((tmp_path / "out" / "result-2.json").read_text())
    assert (tmp_path / "out" / "margin-2.png").exists()
    np.testing.assert_allclose(resumed["losses"], whole["losses"][2:], rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a resumed run goes on in its folder"


def test_reward_with_adapters(dpo, tmp_path):
    """--lora true trains adapters and the score head, saves both, and --lora_path reads both."""
    data = dpo[0] / "data"
    settings = {
        "compare": "false",
        "lora": "true",
        "train_dataset_path": data / "preferences.json",
        "dev_dataset_path": data / "preferences-dev.json",
        "learning_rate": 1e-2,
        "warmup_steps": 0,
    }
    printed = run("reward", tmp_path, **settings, save_strategy="steps", save_steps=STEPS, output_dir="first")
    assert "weights are trained (rank 8)" in printed
    first = json.loads((tmp_path / "first" / "result.json").read_text())["evaluation"]
    assert first["after"]["loss"] != pytest.approx(first["before"]["loss"], rel=1e-4)
    run("reward", tmp_path, **{**settings, "max_steps": 1}, lora_path="first", output_dir="second")
    second = json.loads((tmp_path / "second" / "result.json").read_text())["evaluation"]
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)
