"""benchmarks/shared_prompt.py, small: what it times has gradients, and both layouts have the same losses."""

import argparse
import importlib
from pathlib import Path

import pytest

pytest.importorskip("paddlenlp")

SIZES = argparse.Namespace(prompt=16, answer=8, prompts=4, row=256, repeats=1)


@pytest.fixture
def benchmark(monkeypatch):
    import paddle_flashmask.paddlenlp as flashmask_nlp

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    with flashmask_nlp.enabled():
        yield importlib.import_module("benchmarks.shared_prompt")


@pytest.mark.parametrize(("task", "answers"), [("dpo", 2), ("reward", 3)])
def test_shared_prompts_save_tokens(task, answers, benchmark):
    """`compare` raises where the losses differ, and where there is nothing to differentiate."""
    figures = benchmark.compare(task, answers, SIZES)
    assert figures["shared"]["tokens"] < figures["copies"]["tokens"]
    assert figures["shared"]["seconds"] > 0


@pytest.mark.parametrize("share", [True, False])
def test_the_dpo_loss_trains_the_policy_alone(share, benchmark):
    config = benchmark.LlamaConfig(
        vocab_size=benchmark.VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_flash_attention=True,
        initializer_range=0.1,
    )
    policy, reference = benchmark.LlamaForCausalLM(config), benchmark.LlamaForCausalLM(config)
    made = benchmark.samples(SIZES.prompts, 2, SIZES.prompt, SIZES.answer)
    batch = benchmark.without_padding(benchmark.dpo_batches(made, SIZES.row, share)[0])
    tensors = {key: benchmark.paddle.to_tensor(value) for key, value in batch.items()}
    benchmark.dpo_loss(policy, reference, tensors).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert all(parameter.grad is None for parameter in reference.parameters())
