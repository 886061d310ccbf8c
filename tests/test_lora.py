"""LoRA on packed rows: 20 steps, gradients, recomputation equal to the dense mask; the example, and resuming it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trl import SFTConfig, SFTTrainer
from paddlenlp.trl.llm_utils import get_lora_target_modules
from paddlenlp_models import LENGTH, assert_same, batches, model
from test_paddlenlp_sft import STEPS, Alone, Losses, Tokenizer, dataset, first_batch  # noqa: F401

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp import routing
from paddle_flashmask.paddlenlp.verify import VerificationError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECOMPUTE = [None, "full", "full_attn", "core_attn"]


def adapted(**changes):
    """A Llama with adapters on every linear layer whose product is not zero at the start."""
    net = model("Llama", **changes)
    net = LoRAModel(net, LoRAConfig(target_modules=get_lora_target_modules(net), r=4, lora_alpha=8))
    net.mark_only_lora_as_trainable()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.05)
    net.train()
    return net


def train(rows, folder, mask, lora, callbacks=(), steps=STEPS, cls=SFTTrainer, first=None, **settings):
    """Losses of every step and the trained weights. Loss and gradients of the first batch go to the list `first`."""
    args = SFTConfig(
        output_dir=str(folder / mask),
        device="cpu",
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2 if lora else 1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=["none"],
        seed=5,
        **settings,
    )
    changes = {name: getattr(args, name) for name in ("recompute", "recompute_granularity", "recompute_use_reentrant")}
    net = (adapted if lora else lambda **more: model("Llama", **more))(
        use_flash_attention=mask == "flashmask", **changes
    )
    losses = Losses()
    trainer = cls(
        model=net,
        args=args,
        train_dataset=rows,
        data_collator=flashmask_nlp.PackingCollator(LENGTH, mask="dense" if mask == "dense" else "flashmask"),
        tokenizer=Tokenizer(),
        callbacks=[losses, *callbacks],
    )
    if first is not None:
        first.append(first_batch(trainer, rows))
    trainer.train()
    return np.array(losses.values), {n: p.numpy() for n, p in net.named_parameters() if not p.stop_gradient}


@pytest.fixture(scope="module")
def dense(dataset, tmp_path_factory):  # noqa: F811
    return {lora: train(dataset, tmp_path_factory.mktemp("dense"), "dense", lora) for lora in (True, False)}


@pytest.mark.parametrize("granularity", RECOMPUTE)
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "SFT"])
def test_equal_loss_curves(lora, granularity, dense, dataset, tmp_path):  # noqa: F811
    settings = {"recompute": True, "recompute_granularity": granularity} if granularity else {}
    with flashmask_nlp.enabled():
        losses, weights = train(dataset, tmp_path, "flashmask", lora, **settings)
    expected, expected_weights = dense[lora]
    assert len(losses) == len(expected) == STEPS
    assert expected[-5:].mean() < expected[:5].mean() - 0.2, "it learns something"
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert weights.keys() == expected_weights.keys()
    assert lora == all("lora_" in name for name in weights)
    for name, weight in expected_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-4, err_msg=name)


def test_equal_to_each_sample_alone(dataset, tmp_path):  # noqa: F811
    first = []
    with flashmask_nlp.enabled():
        losses, weights = train(dataset, tmp_path, "flashmask", True, first=first)
    expected, expected_weights = train(dataset, tmp_path, "alone", True, cls=Alone, first=first)
    assert_same(*first)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for name, weight in expected_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_gradients_of_the_adapters(granularity):
    made = batches((13, 20, 15, 30, 18))

    def gradients(batch, use_flash_attention, **changes):
        net = adapted(use_flash_attention=use_flash_attention, **changes)
        if changes:
            net.model.recompute_enable()
        loss = net(**batch)[0]
        loss.backward()
        found = {name: p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}
        assert len(found) == 28, "two matrices for each of 7 layers of each of 2 blocks, and nothing else"
        return float(loss), found

    recompute = {"recompute": True, "recompute_granularity": granularity, "recompute_use_reentrant": False}
    with flashmask_nlp.enabled():
        got = gradients(made["flashmask"], True, **(recompute if granularity else {}))
    assert_same(got, gradients(made["dense"], False))


def test_verify_callback(dataset, tmp_path, monkeypatch):  # noqa: F811
    callback = flashmask_nlp.VerifyCallback()
    with flashmask_nlp.enabled():
        losses, _ = train(dataset, tmp_path, "flashmask", True, [callback], steps=3)
        plain, _ = train(dataset, tmp_path, "flashmask", True, steps=3)
    assert len(callback.report.layers) == 2
    assert callback.report.passed
    np.testing.assert_array_equal(losses, plain, err_msg="the check changes nothing")
    original = routing.as_startend_row_indices
    monkeypatch.setattr(routing, "as_startend_row_indices", lambda *given: (original(*given)[0] + 1, True))
    with flashmask_nlp.enabled(), pytest.raises(VerificationError, match="FAILED"):
        train(dataset, tmp_path, "flashmask", False, [flashmask_nlp.VerifyCallback()], steps=3)
    with pytest.raises(ValueError, match="no mask to verify"):
        train(dataset, tmp_path, "dense", False, [flashmask_nlp.VerifyCallback()], steps=3)


def run_example(folder, **settings):
    small = {
        "max_steps": 4,
        "save_steps": 2,
        "base_steps": 2,
        "max_samples": 150,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "output_dir": folder,
        **settings,
    }
    arguments = [str(part) for key, value in small.items() for part in (f"--{key}", value)]
    run = subprocess.run(
        [sys.executable, EXAMPLES / "lora.py", EXAMPLES / "config" / "lora-tiny-cpu.json", *arguments],
        env={**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "result.json").read_text()), run.stdout + run.stderr


def test_example(tmp_path):
    folder = tmp_path / "lora"
    result, output = run_example(folder)
    assert result["steps"] == 4
    assert result["evaluation"]["after"]["loss"] < result["evaluation"]["before"]["loss"]
    assert result["losses"][-1] < result["losses"][0]
    assert 0 < result["trained_weights"] < 30_000
    assert "row indices [1, 1, 2048]: passed" in output, "--flash_mask_verify is in the configuration"
    assert (folder / "lora_config.json").exists()
    assert list(folder.glob("*lora*")) or list(folder.glob("*peft*"))
    # The same run, continued from its second step, ends where it ended.
    data = {"dataset_name_or_path": folder / "data", "model_name_or_path": folder / "base"}
    unchanged, _ = run_example(folder, resume_from_checkpoint=folder / "checkpoint-2", **data)
    assert unchanged == result
    again = json.loads((folder / "result-2.json").read_text())
    np.testing.assert_allclose(again["losses"], result["losses"][2:], rtol=1e-5)
    after = result["evaluation"]["after"]["loss"]
    assert again["evaluation"]["after"]["loss"] == pytest.approx(after, rel=1e-5)


def test_example_with_own_data_and_no_model(tmp_path):
    """The base is trained on docstrings, the adapters on one's own file, which needs no tokenizer beside it."""
    data = tmp_path / "own.json"
    data.write_text("".join(json.dumps({"src": f"What is {i} + 1?", "tgt": str(i + 1)}) + "\n" for i in range(50)))
    result, output = run_example(tmp_path / "lora", dataset_name_or_path=data, max_samples=40, save_strategy="no")
    assert "Training a base model of its own for 2 steps" in output
    assert "38 samples; tokens" in output, "two of 40 are for evaluation"
    assert result["steps"] == 4
    assert result["losses"][-1] < result["losses"][0]
