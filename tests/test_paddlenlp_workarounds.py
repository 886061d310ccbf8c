"""Corrections of PaddleNLP: the expert gate, and the random state of refined recompute."""

import importlib
import types

import numpy as np
import paddle
import pytest

import paddle_flashmask.paddlenlp as flashmask_nlp


@pytest.fixture(autouse=True)
def routed():
    with flashmask_nlp.enabled():
        yield


@pytest.mark.parametrize("name", ["moe_gate", "moe_gate_auto"])
@pytest.mark.parametrize("capacity", [2, 5, 64])
def test_expert_slots(name, capacity):
    gate_class = importlib.import_module(f"paddlenlp.transformers.{name}").PretrainedMoEGate
    tokens, experts, top_k = 17, 5, 3
    random = np.random.default_rng(0)
    chosen = np.stack([random.permutation(experts)[:top_k] for _ in range(tokens)])
    gate = types.SimpleNamespace(num_experts=experts, top_k=top_k)
    got = gate_class._priority(gate, paddle.to_tensor(chosen), capacity).numpy()
    expected = np.zeros((tokens, experts, capacity), np.int32)
    queue = [0] * experts
    for choice in range(top_k):
        for token in range(tokens):
            expert = chosen[token, choice]
            if queue[expert] < capacity:
                expected[token, expert, queue[expert]] = 1
            queue[expert] += 1
    np.testing.assert_array_equal(got, expected)


def test_refined_recompute_restores_the_random_state():
    switch = importlib.import_module("paddlenlp.transformers.refined_recompute").switch_rng_state_tracker
    from paddle.distributed.fleet.meta_parallel.parallel_layers.random import get_rng_state_tracker

    tracker = get_rng_state_tracker().get_states_tracker()
    state = paddle.get_rng_state()
    first = paddle.rand([4]).numpy()
    after = paddle.get_rng_state()
    with switch(state, tracker):
        np.testing.assert_array_equal(paddle.rand([4]).numpy(), first)
    second = paddle.rand([4]).numpy()
    paddle.set_rng_state(after)
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), second)
