"""Every decoder of the PaddleNLP wheel, tiny: which ones train with row indices, and docs/models.md, which says so.

python tests/paddlenlp_zoo.py     # writes docs/models.md anew
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import paddle
from paddlenlp import transformers
from paddlenlp_models import _COMMON, _SPECIFIC, LENGTH, VOCABULARY, assert_same, batches, loss_and_gradients

import paddle_flashmask.paddlenlp as flashmask_nlp
from paddle_flashmask.paddlenlp.carried_table import REFUSED
from paddle_flashmask.paddlenlp.families import CARRIED, FAMILIES

ROWS = "attn_mask_startend_row_indices"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"

_GPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "ignore_index": -100,
    "initializer_range": 0.2,
}

ZOO: dict[str, dict[str, Any]] = {
    **{f"{family}ForCausalLM": {**_COMMON, **specific} for family, specific in _SPECIFIC.items()},
    "DeepseekV3ForCausalLM": {
        **_COMMON,
        **_SPECIFIC["DeepseekV2"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    },
    "MistralForCausalLM": _COMMON,
    "MixtralForCausalLM": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GemmaForCausalLM": {**_COMMON, "head_dim": 8},
    "QWenForCausalLM": {
        **_COMMON,
        "intermediate_size": 96,
        "kv_channels": 8,
        "seq_length": 128,
        "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
    },
    "ChatGLMv2ForCausalLM": {
        "padded_vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "kv_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "max_sequence_length": 128,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "GPTForCausalLM": _GPT,
}
"""Class name -> arguments of its configuration."""


def zoo_model(name: str, **changes: Any) -> Any:
    """A model with the same random weights each time, in training mode."""
    paddle.seed(7)
    made = getattr(transformers, name)
    made = made(made.config_class(**{**ZOO[name], **changes}))
    assert LENGTH <= 128, "max_position_embeddings above"
    made.train()
    return made


def outcome(name: str) -> str:
    """Train with row indices: "equal" if loss and every gradient are the dense mask's, else what was raised."""
    made = batches((13, 20, 15, 30, 18))
    with flashmask_nlp.enabled():
        expected = loss_and_gradients(zoo_model(name), made["dense"], use_flash_attention=False)
        try:
            got = loss_and_gradients(zoo_model(name), made["flashmask"], use_flash_attention=True)
        except ValueError as error:
            return str(error)
    assert_same(got, expected)
    plain = {key: value for key, value in made["flashmask"].items() if key != ROWS}
    with flashmask_nlp.enabled():
        causal = loss_and_gradients(zoo_model(name), plain, use_flash_attention=False)
    assert abs(causal[0] - expected[0]) > 1e-3, "the comparison cannot tell masks apart"
    return "equal"


def refusal(name: str) -> str:
    """What the class raises when it gets row indices. It raises before it looks at anything else."""
    made = getattr(transformers, name)
    bare = made.__new__(made)
    paddle.nn.Layer.__init__(bare)
    with flashmask_nlp.enabled():
        try:
            made.forward(bare, input_ids=None, **{ROWS: paddle.zeros([1, 8], dtype="int32")})
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{name} takes row indices and says nothing")


def decoders() -> dict[str, Any]:
    """The classes of the wheel that generate text, by name."""
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForGeneration")
    found = {name: getattr(transformers, name) for name in sorted(dir(transformers)) if name.endswith(endings)}
    found = {name: made for name, made in found.items() if inspect.isclass(made)}
    return {
        name: made
        for name, made in found.items()
        # One name for each class, and only those that have a forward at all.
        if issubclass(made, paddle.nn.Layer) and made.__name__ == name and made.forward is not paddle.nn.Layer.forward
    }


def render(outcomes: dict[str, str], refusals: dict[str, str]) -> str:
    """The text of docs/models.md."""
    carried = {f"{prefix}ForCausalLM" for prefix in CARRIED.values()}
    own = {f"{prefix}ForCausalLM" for prefix in FAMILIES.values()}
    lines = [
        "# Models of PaddleNLP 3.0.0b4 and row indices",
        "",
        "Made by `python tests/paddlenlp_zoo.py`; a test checks that it is current. Each class that generates text was",
        "tried, tiny and with random weights in float32 on a CPU, with the routing on.",
        "",
        "## These train with row indices",
        "",
        "Tried on two rows of packed samples: loss and every gradient equal those of the dense mask.",
        "",
        "| class | how the row indices reach the attention |",
        "|---|---|",
    ]
    for name in flashmask_nlp.MODELS:
        assert outcomes[name] == "equal", (name, outcomes[name])
        how = "PaddleNLP's own argument" if name in own else "an argument that `enable()` adds"
        if name in carried:
            how += "; the layers' dense mask is bypassed and not built"
        if name == "GPTForCausalLM":
            how = how.replace(" and not built", ", but still built: memory stays quadratic there")
        if name == "DeepseekV3ForCausalLM":
            how += "; not with `num_nextn_predict_layers`"
        lines.append(f"| `{name}` | {how} |")
    lines += [
        "",
        "## These refuse them",
        "",
        "Each raises `ValueError` with its reason.",
        "",
        "| class | reason |",
        "|---|---|",
    ]
    for name, (_, reason) in sorted(REFUSED.items()):
        assert reason in refusals[name], (name, refusals[name])
        lines.append(f"| `{name}` | {reason} |")
    others = [name for name in refusals if name not in REFUSED]
    lines += ["", "## These know no such argument", "", "`TypeError` from Python.", ""]
    for name in others:
        assert "unexpected keyword argument" in refusals[name], (name, refusals[name])
    lines.append(", ".join(f"`{name}`" for name in others) + ".")
    lines += ["", "Baichuan has no class in this wheel. A Llama with `alibi` in its configuration is refused."]
    return "\n".join(lines) + "\n"


def current_document() -> str:
    """docs/models.md as it should be."""
    outcomes = {name: outcome(name) for name in flashmask_nlp.MODELS}
    taking = tuple(getattr(transformers, name) for name in flashmask_nlp.MODELS)
    # A subclass (ArtistForConditionalGeneration is a GPT) does as its base does.
    return render(outcomes, {name: refusal(name) for name, made in decoders().items() if not issubclass(made, taking)})


if __name__ == "__main__":
    DOCUMENT.write_text(current_document())
