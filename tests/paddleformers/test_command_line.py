"""SFT and DPO from PaddleFormers' own command line: the same losses and weights as with eager attention."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddleformers.nn.attention.interface", reason="PaddleFormers: make test-paddleformers")

from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama's configuration, a tokenizer, and data in PaddleFormers' format."""
    root = tmp_path_factory.mktemp("formers")
    (root / "model").mkdir()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"the quick fox jumps over the lazy dog {i} times" for i in range(50)], trainer)
    bpe.save(str(root / "model" / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "model_max_length": 1024}
    tokenizer |= {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": bpe.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "fuse_rms_norm": False,
    }
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (root / "model" / "config.json").write_text(json.dumps(config))
    samples = {
        "SFT": [
            {"src": [f"number {i}?"], "tgt": [f"the fox jumps {i} times over {'dogs ' * (i % 5)}"]} for i in range(60)
        ],
        "DPO": [
            {
                "src": [f"number {i}?"],
                "tgt": [],
                "response": [[f"the fox jumps {i} times"], [f"the dog {'sleeps ' * (1 + i % 4)}"]],
                "sort": [1, 0],
            }
            for i in range(60)
        ],
    }
    for stage, lines in samples.items():
        (root / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def settings(folder: Path, stage: str, out: Path) -> dict[str, object]:
    data = {"path": str(folder / f"{stage}.jsonl"), "type": "erniekit", "prob": "1.0"}
    return {
        **{f"{split}_dataset_{key}": value for split in ("train", "eval") for key, value in data.items()},
        "stage": stage,
        "model_name_or_path": str(folder / "model"),
        "continue_training": False,
        "output_dir": str(out),
        "max_seq_len": 128,
        "max_prompt_len": 64,
        "packing": True,
        "mix_strategy": "concat",
        "template_backend": "jinja",
        "fine_tuning": "full",
        "device": "cpu",
        "compute_type": "float32",
        "amp_master_grad": False,
        "use_attn_mask_startend_row_indices": True,
        "seed": 5,
        "do_train": True,
        "do_eval": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "evaluation_strategy": "no",
    }


def train(folder: Path, stage: str, implementation: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    out = folder / f"{stage}-{implementation}"
    config = folder / f"{stage}-{implementation}.json"
    config.write_text(json.dumps(settings(folder, stage, out)))
    command = [*launcher, "train", str(config), f"_attn_implementation={implementation}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


def result(folder: Path, stage: str, implementation: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    run = train(folder, stage, implementation, sys.executable, "-m", "paddle_flashmask.paddleformers")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    out = folder / f"{stage}-{implementation}"
    losses = np.array(
        [float(loss) for loss in re.findall(r" loss: ([\d.e+-]+), learning_rate", run.stdout + run.stderr)]
    )
    return losses, load_file(next(out.glob("*.safetensors")))


@pytest.mark.parametrize("stage", ["SFT", "DPO"])
def test_training_equals_eager(folder, stage):
    losses, weights = result(folder, stage, "flashmask_custom")
    expected, expected_weights = result(folder, stage, "eager")
    assert len(expected) == STEPS
    assert expected[-1] < expected[0] - 0.1, "it learns something"
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert len(expected_weights) > 10
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=1e-4, err_msg=name)


def test_an_unregistered_name_is_refused(folder):
    """By PaddleFormers itself: the name must not fall back to another attention."""
    launcher = "import sys; from paddleformers.cli.launcher import launch; sys.argv[0] = 'x'; launch()"
    run = train(folder, "SFT", "flashmask_custom", sys.executable, "-c", launcher)
    assert run.returncode != 0
    assert "Invalid _attn_implementation" in run.stdout + run.stderr


def test_usage():
    run = subprocess.run(
        [sys.executable, "-m", "paddle_flashmask.paddleformers", "serve"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "usage: python -m paddle_flashmask.paddleformers" in run.stderr
