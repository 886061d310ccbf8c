"""benchmarks/training.py, small: both masks train alike, and what it writes holds what the plot needs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SEQLEN = 256

pytest.importorskip("paddlenlp")


@pytest.fixture(scope="module")
def worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.training_worker")


@pytest.mark.parametrize("task", ["sft", "lora", "dpo", "reward"])
def test_both_masks_train_alike(worker, task):
    made = {mask: worker.run(task, mask, SEQLEN, 3) for mask in ("flashmask", "dense")}
    for run in made.values():
        assert len(run["losses"]) == 3
        assert len(run["step_seconds"]) == 2
        assert min(run["step_seconds"]) > 0
        assert run["fill"] > 0.95
    np.testing.assert_allclose(made["flashmask"]["losses"], made["dense"]["losses"], rtol=1e-4)
    assert len(set(made["dense"]["losses"])) == 3, "it trains"


@pytest.mark.parametrize("answers", [2, 4])
def test_preferences_are_the_same_documents(worker, answers):
    sizes = [size for row in worker.lengths(2048) for size in row]
    made = worker.preferences(2048, answers)
    assert [len(each["prompt"]) + sum(map(len, each["responses"])) for each in made] == sizes
    for each in made:
        assert len(each["responses"]) == answers
        for response in each["responses"]:
            assert 0.08 < len(response) / len(each["prompt"]) < 0.21


def test_command_line_and_plot(tmp_path):
    out, plot = tmp_path / "training.json", tmp_path / "plot.png"
    command = [sys.executable, "benchmarks/training.py", "--tasks", "reward", "--seqlens", str(SEQLEN), "--steps", "2"]
    made = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    result = json.loads(out.read_text())
    assert [row["mask"] for row in result["rows"]] == ["flashmask", "dense"]
    assert all(row["training_mib"] > 0 and row["tokens_per_s"] > 0 for row in result["rows"])
    assert result["compared"][0]["largest_relative_loss_difference"] < 1e-4
    assert {"measured", "commit", "command", "machine"} <= result.keys()
    assert result["machine"]["versions"]["paddlenlp"] == "3.0.0b4"
    command = [sys.executable, "docs/make_training_plot.py", str(out), "--out", str(plot)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert plot.stat().st_size > 5000
    refused = subprocess.run([*command[:3], "--out", str(plot)], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2, "a picture that is there is kept"


@pytest.mark.parametrize(
    "arguments", [["--tasks", "ppo"], ["--seqlens", "64"], ["--steps", "1"]], ids=["task", "length", "steps"]
)
def test_bad_arguments(arguments):
    made = subprocess.run(
        [sys.executable, "benchmarks/training.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 2
    assert arguments[0] in made.stderr
