"""enable(), disable(), enabled(): installing and removing the replacements in PaddleNLP."""

import importlib
import threading
import types

import paddle
import pytest
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trainer import trainer as trainer_module
from paddlenlp_models import FAMILIES, assert_same, batches, loss_and_gradients, model
from paddlenlp_zoo import zoo_model

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp.patching import Patch, PatchSet
from paddle_flashmask.paddlenlp.table import patches


@pytest.fixture(autouse=True)
def off_before_and_after():
    flashmask_nlp.disable()
    yield
    flashmask_nlp.disable()
    assert not flashmask_nlp.is_enabled()


def snapshot():
    found = {}
    for patch in patches():
        owner, name = patch.owner()
        found[patch.target] = vars(owner)[name]
    return found


def test_replaces_and_restores_exactly():
    before = snapshot()
    needed = {patch.target for patch in patches() if patch.needed()}
    flashmask_nlp.enable()
    during = snapshot()
    assert {target for target in before if during[target] is not before[target]} == needed
    flashmask_nlp.disable()
    assert {target: id(value) for target, value in snapshot().items()} == {t: id(v) for t, v in before.items()}


def test_idempotent():
    flashmask_nlp.enable()
    first = snapshot()
    flashmask_nlp.enable()
    assert snapshot() == first
    flashmask_nlp.disable()
    assert not flashmask_nlp.is_enabled()
    flashmask_nlp.disable()


def test_blocks_nest_and_keep_an_outer_switch():
    with flashmask_nlp.enabled():
        with flashmask_nlp.enabled():
            assert flashmask_nlp.is_enabled()
        assert flashmask_nlp.is_enabled()
        flashmask_nlp.disable()
        assert flashmask_nlp.is_enabled(), "the open block still wants it"
    assert not flashmask_nlp.is_enabled()
    flashmask_nlp.enable()
    with flashmask_nlp.enabled():
        pass
    assert flashmask_nlp.is_enabled()


def test_block_restores_after_an_exception():
    with pytest.raises(KeyError), flashmask_nlp.enabled():
        raise KeyError
    assert not flashmask_nlp.is_enabled()


def test_overlapping_blocks_of_threads():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with flashmask_nlp.enabled():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with flashmask_nlp.enabled():
        thread.start()
        assert inside.wait(10)
    assert flashmask_nlp.is_enabled()
    leave.set()
    thread.join(10)
    assert not flashmask_nlp.is_enabled()


def test_refuses_to_restore_over_another_replacement(monkeypatch):
    fusion_ops = importlib.import_module("paddlenlp.transformers.llama.fusion_ops")
    original = fusion_ops.fusion_flash_attention
    flashmask_nlp.enable()
    ours = fusion_ops.fusion_flash_attention
    fusion_ops.fusion_flash_attention = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="fusion_flash_attention was replaced again"):
        flashmask_nlp.disable()
    assert flashmask_nlp.is_enabled()
    fusion_ops.fusion_flash_attention = ours
    flashmask_nlp.disable()
    assert fusion_ops.fusion_flash_attention is original


@pytest.mark.parametrize(
    "target",
    ["paddlenlp.trainer.trainer:no_such_function", "paddlenlp.no_such_module:x", "paddlenlp.trl:SFTTrainer.log2"],
)
def test_another_paddlenlp_version_is_refused(target):
    before = snapshot()
    everything = PatchSet([*patches(), Patch(target, lambda original: original, "does not exist")])
    with pytest.raises(ImportError, match=r"paddlenlp 3\.0\.0b4"):
        everything.install()
    assert snapshot() == before
    assert not everything.installed


@pytest.mark.parametrize("family", FAMILIES)
def test_models_built_before_are_routed_and_restored(family):
    net = model(family)
    made = batches((13, 20, 15, 30, 18))
    with flashmask_nlp.enabled():
        got = loss_and_gradients(net, made["flashmask"], use_flash_attention=True)
        reference = loss_and_gradients(model(family), made["dense"], use_flash_attention=False)
    assert_same(got, reference)


@pytest.fixture
def aborted_backward(monkeypatch):
    """What an error inside backward() leaves behind: gradients switched off, and tensors kept for recomputation."""
    refined = importlib.import_module("paddlenlp.transformers.refined_recompute")
    monkeypatch.setattr(refined, "global_rr_queue_dict", {})
    yield
    paddle.base.framework._dygraph_tracer()._has_grad = True


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in flashmask_nlp.MODELS if name != "GPTForCausalLM"),
        ("GPTForCausalLM", {"recompute_granularity": "core_attn"}),
        ("LlamaForCausalLM", {"recompute_granularity": "core_attn"}),
        ("LlamaForCausalLM", {"recompute_granularity": "full_attn"}),
        ("LlamaForCausalLM", {"recompute_use_reentrant": True}),
        ("MistralForCausalLM", {"recompute_use_reentrant": True}),
        ("LlamaForCausalLM", {"refined_recompute": {"flash_attn": 1}}),
    ],
)
@pytest.mark.parametrize("mask", ["flashmask", "dense"])
def test_switched_off_before_recomputation(name, settings, mask, aborted_backward):
    """The loss would be that of the mask, and the gradients not."""
    defaults = {"recompute": True, "recompute_granularity": "full", "recompute_use_reentrant": False}
    net = zoo_model(name, use_flash_attention=mask == "flashmask", **{**defaults, **settings})
    net.recompute_enable()
    with flashmask_nlp.enabled():
        out = net(**batches((13, 20, 15, 30, 18))[mask])
    loss = out[0] if isinstance(out, tuple) else out
    # Paddle makes an OSError of it.
    with pytest.raises((RuntimeError, OSError), match=r"keep it enabled until backward\(\) has ended"):
        loss.backward()


def lora(name):
    # Without experts: PaddleNLP's fail without the routing.
    dense = {"first_k_dense_replace": 2} if name == "DeepseekV3ForCausalLM" else {}
    net = zoo_model(name, use_flash_attention=True, **dense)
    return LoRAModel(net, LoRAConfig(target_modules=[".*q_proj.*", ".*q_a_proj.*"], r=2, lora_alpha=4))


@pytest.mark.parametrize("name", ["MistralForCausalLM", "DeepseekV3ForCausalLM"])
def test_lora_models_keep_the_forward_of_their_time(name):
    """LoRAModel takes its model's forward when it is built: without the argument before enable(), alone after it."""
    batch = batches((13, 20, 15, 30, 18))["flashmask"]
    early = lora(name)
    with flashmask_nlp.enabled():
        right = lora(name)
        flashmask_nlp.check_model(right)
        assert flashmask_nlp.verify(right, batch).passed
        trainer = types.SimpleNamespace(model=early)
        for check in (
            lambda: flashmask_nlp.check_model(early),
            lambda: flashmask_nlp.verify(early, batch),
            lambda: trainer_module.Trainer._prepare_inputs(trainer, batch),
        ):
            with pytest.raises(ValueError, match=rf"built around {name} before enable\(\).*the LoRAModel after enable"):
                check()
    with pytest.raises(RuntimeError, match=r"did not pick the|0 of 2 layers"):
        right(**batch)


def test_lora_model_of_a_model_that_takes_row_indices_by_itself():
    """The order is free there."""
    early = lora("LlamaForCausalLM")
    with flashmask_nlp.enabled():
        flashmask_nlp.check_model(early)
        assert flashmask_nlp.verify(early, batches()["flashmask"]).passed


def test_listed_models_take_row_indices():
    import inspect

    from paddlenlp import transformers

    assert {f"{family}ForCausalLM" for family in FAMILIES} <= set(flashmask_nlp.MODELS)
    with flashmask_nlp.enabled():
        for name in flashmask_nlp.MODELS:
            forward = getattr(transformers, name).forward
            assert "attn_mask_startend_row_indices" in inspect.signature(forward).parameters
        spec = inspect.getfullargspec(transformers.LlamaModel.forward)
        assert "position_ids" in spec.args


def test_enabling_from_a_static_program():
    paddle.enable_static()
    try:
        with flashmask_nlp.enabled():
            assert flashmask_nlp.is_enabled()
        assert not paddle.in_dynamic_mode()
    finally:
        paddle.disable_static()
