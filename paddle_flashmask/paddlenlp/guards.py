"""Checks in front of PaddleNLP's models and trainers: the calls that would train with another mask raise instead."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import paddle

from ._common import drops_masks_by_environment
from .dpo import check_reference_updates
from .patching import stands_in_for
from .positions import rotary_trouble

__all__ = [
    "ROW_INDICES",
    "accepts_row_indices",
    "exactly_causal",
    "guard_attention",
    "guard_dpo_layout",
    "guard_generate",
    "guard_generation",
    "guard_model",
    "guard_preference_batch",
    "guard_prepared_inputs",
    "guard_reference_updates",
    "guard_sequence_split",
]

ROW_INDICES = "attn_mask_startend_row_indices"


def argument_reader(function: Callable[..., Any], name: str) -> Callable[[tuple, dict], Any]:
    """A reader of argument ``name`` of a call of a method, whichever way it was passed; None if it was not."""
    index = list(inspect.signature(function).parameters).index(name) - 1  # without self

    @paddle.jit.not_to_static
    def read(args: tuple, kwargs: dict) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[index] if len(args) > index else None

    return read


def accepts_row_indices(layer: Any) -> bool:
    """Whether the model's ``forward`` names ``attn_mask_startend_row_indices``.

    LoRA and other wrappers are looked through. A ``**kwargs`` that would swallow it does not count.

    Raises:
        ValueError: a wrapper keeps a ``forward`` of its model from before ``enable()``, which does not name it.
    """
    seen = set()
    while layer is not None and id(layer) not in seen:
        seen.add(id(layer))
        if ROW_INDICES in inspect.signature(layer.forward).parameters:
            return True
        # A pipeline model takes one tuple, and packs the inputs that it knows into it.
        prepare = getattr(layer, "_prepare_pipeline_inputs_func", None)
        if prepare is not None:
            marker = object()
            packed = prepare({ROW_INDICES: marker})[0]
            return packed is marker or (isinstance(packed, tuple) and any(entry is marker for entry in packed))
        # Wrappers: LoRAModel and VeRAModel hold `.model`, Paddle's parallel wrappers hold `._layers`.
        inner = vars(layer).get("_sub_layers", {}).get("model") or vars(layer).get("_sub_layers", {}).get("_layers")
        # LoRAModel calls the method that it took from its model when it was built.
        kept = vars(layer).get("forward")
        if (
            inspect.ismethod(kept)
            and kept.__self__ is inner
            and ROW_INDICES in inspect.signature(inner.forward).parameters
        ):
            raise ValueError(
                f"{ROW_INDICES}: {type(layer).__name__} was built around {type(inner).__name__} before enable(), and "
                f"calls the forward of that time, which does not take them. Build the {type(layer).__name__} after "
                "enable()"
            )
        layer = inner
    return False


def _looks_plain_causal(attention_mask: paddle.Tensor) -> bool:
    """Whether plain causal attention gives the real tokens what ``attention_mask`` would give them."""
    if attention_mask.ndim == 2:
        # 1 for tokens, 0 for padding. Padding on the right lies in the future of every token: causal hides it.
        keep = attention_mask.astype("int32")
        return bool((keep[:, :-1] >= keep[:, 1:]).all())
    if attention_mask.dtype == paddle.bool:
        allowed = attention_mask
    elif paddle.is_floating_point(attention_mask):
        allowed = attention_mask >= 0
    else:
        allowed = attention_mask != 0
    return _is_lower_triangle(allowed)


def _is_lower_triangle(allowed: paddle.Tensor) -> bool:
    length = allowed.shape[-1]
    if allowed.shape[-2] != length:
        return False
    place = paddle.arange(length)
    return bool((allowed == (place.unsqueeze(1) >= place)).all())


# Scores below it vanish in the softmax; PaddleNLP's masks hide with the smallest number of their type.
_HIDDEN = -1e4


def exactly_causal(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``is_casual_mask``, which decides whether a model drops its dense mask for plain causal attention.

    PaddleNLP's looks below the diagonal only, so that a mask that shows the future counts as causal, and so does one
    row of any mask: a step of generation, where the padding must stay hidden.
    """

    @paddle.jit.not_to_static
    @stands_in_for(original)
    def is_casual_mask(attention_mask: paddle.Tensor | None) -> bool:
        if attention_mask is None:  # it was not built, see carried.no_mask
            return True
        if not paddle.in_dynamic_mode():
            return False  # unknown while a static program is built: dense attention is right for every mask
        if not paddle.is_floating_point(attention_mask):
            return _is_lower_triangle(attention_mask.astype("bool"))
        length = attention_mask.shape[-1]
        if attention_mask.shape[-2] != length:
            return False
        # What the mask would have to be, with the number that it hides with, so that one comparison is enough. A mask
        # with several such numbers counts as another mask, which costs time and no more.
        hides = attention_mask.reshape([-1, length, length])[0, :1, -1:].astype("float32")
        hides = paddle.minimum(hides, paddle.full_like(hides, _HIDDEN))
        causal = paddle.triu(hides.expand([length, length]), 1)  # in float32: on a CPU triu knows no bfloat16
        return bool((attention_mask == causal.astype(attention_mask.dtype)).all())

    return is_casual_mask


# `paddle.jit.to_static` must not translate the checks and the functions around the models: it would lose *args and
# **kwargs on the way.


@paddle.jit.not_to_static
def _check_model(model: Any, rows: Any, mask: Any, input_ids: Any, position_ids: Any) -> None:
    if rows is not None and getattr(model.config, "alibi", False):
        raise ValueError(
            f"{ROW_INDICES} with config.alibi=True: {type(model).__name__} leaves alibi out when it gets row indices. "
            "Use a model with rotary positions, or a dense attention_mask with use_flash_attention=False"
        )
    trouble = rotary_trouble(model, input_ids, position_ids, packed=rows is not None)
    if trouble:
        raise ValueError(f"{type(model).__name__}: " + "; ".join(trouble))
    if rows is not None or mask is None:
        return
    if drops_masks_by_environment():
        cause, remedy = "USE_CASUAL_MASK=True in the environment", "Unset USE_CASUAL_MASK"
    elif getattr(model.config, "use_flash_attention_for_generation", False):
        cause, remedy = "config.use_flash_attention_for_generation=True", "Set it to False"
    else:
        return
    # What a static program will be given is not known while it is built.
    if not (paddle.in_dynamic_mode() and _looks_plain_causal(mask)):
        raise ValueError(
            f"{cause} makes {type(model).__name__} ignore attention_mask and train plain causal attention. {remedy}, "
            "or pass row indices (they are not affected)"
        )


@paddle.jit.not_to_static
def _check_attention(layer: Any, rows: Any, module: Any) -> None:
    if rows is None:
        return
    if not layer.config.use_flash_attention:
        raise ValueError(
            f"{ROW_INDICES} with use_flash_attention=False: PaddleNLP would ignore the row indices and train plain "
            "causal attention. Set config.use_flash_attention=True (or --use_flash_attention true)"
        )
    if getattr(module, "flash_attention", None) is None:
        raise ValueError(
            f"{ROW_INDICES}: this Paddle has no paddle.nn.functional.flash_attention, so PaddleNLP would ignore the "
            "row indices. Install paddlepaddle 3.0 or later"
        )
    attend = layer.attn_func
    attend = attend.func if isinstance(attend, functools.partial) else attend
    if attend.__module__ != module.__name__:
        raise ValueError(
            f"{ROW_INDICES} with attention replaced by {attend.__module__}.{attend.__name__} (shifted sparse "
            "attention?), which ignores them. Build the model without that replacement"
        )


def guard_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around a decoder model's ``forward``: masks that the model drops before any layer sees them, and positions."""
    read_mask = argument_reader(original, "attention_mask")
    read_ids = argument_reader(original, "input_ids")
    read_positions = argument_reader(original, "position_ids")
    has_rows = ROW_INDICES in inspect.signature(original).parameters
    read_rows = argument_reader(original, ROW_INDICES) if has_rows else lambda args, kwargs: None

    @paddle.jit.not_to_static
    @stands_in_for(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, positions = read_ids(args, kwargs), read_positions(args, kwargs)
        _check_model(self, read_rows(args, kwargs), read_mask(args, kwargs), ids, positions)
        return original(self, *args, **kwargs)

    return forward


def guard_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around an attention layer's ``forward``: row indices that would not reach the routed call."""
    read_rows = argument_reader(original, ROW_INDICES)
    module = sys.modules[original.__module__]

    @paddle.jit.not_to_static
    @stands_in_for(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_attention(self, read_rows(args, kwargs), module)
        return original(self, *args, **kwargs)

    return forward


def guard_sequence_split(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the trainer's split of a batch along the sequence (sep and context parallelism)."""

    @stands_in_for(original)
    def split(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        masks = [key for key in (ROW_INDICES, "attention_mask") if isinstance(inputs, dict) and key in inputs]
        if masks:
            raise ValueError(
                f"{masks[0]} in a batch that {original.__name__} would cut along the sequence "
                "(sep_parallel_degree > 1 or context_parallel_degree > 1): the pieces no longer describe the mask. "
                "Set sep_parallel_degree=1 and context_parallel_degree=1"
            )
        return original(inputs, *args, **kwargs)

    return split


def guard_prepared_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``Trainer._prepare_inputs``: row indices that a model would swallow, or DPO's and KTO's trainers drop."""

    @stands_in_for(original)
    def prepare(self: Any, inputs: Any) -> Any:
        if isinstance(inputs, dict) and inputs.get(ROW_INDICES) is not None:
            if not accepts_row_indices(self.model):
                raise ValueError(
                    f"{ROW_INDICES} in a batch for {type(self.model).__name__}, whose forward does not take them. "
                    "Use a model of paddle_flashmask.paddlenlp.MODELS, or --flash_mask false"
                )
            # Pipeline stages get their inputs without get_batch_metrics. Other trainers pass both masks on: there the
            # models follow the row indices, or refuse.
            if hasattr(self, "get_batch_metrics"):
                _check_preference_batch(self, inputs)
        return original(self, inputs)

    return prepare


def _check_preference_batch(trainer: Any, batch: Any) -> None:
    # The key alone decides: with attention_mask=None the model would get no mask at all.
    if batch.get(ROW_INDICES) is not None and "attention_mask" in batch:
        raise ValueError(
            f"{ROW_INDICES} and attention_mask in one batch: {type(trainer).__name__} would pass attention_mask on and "
            "drop the row indices. Leave attention_mask out of the batch"
        )


def guard_preference_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``get_batch_metrics`` of DPO's and KTO's trainers. Their evaluation skips ``_prepare_inputs``."""

    @stands_in_for(original)
    def get_batch_metrics(self: Any, ref_model: Any, model: Any, batch: Any, train_eval: str = "train") -> Any:
        _check_preference_batch(self, batch)
        return original(self, ref_model, model, batch, train_eval)

    return get_batch_metrics


def guard_generation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``SFTTrainer.prediction_step``: generation takes a dense mask only."""

    @stands_in_for(original)
    def prediction_step(self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        if self.do_generation and not prediction_loss_only and inputs.get(ROW_INDICES) is not None:
            raise ValueError(
                f"{ROW_INDICES} with do_generation=True: PaddleNLP generates without them, across the packed samples. "
                "Evaluate with do_generation=False, or give an evaluation set that is not packed"
            )
        return original(self, model, inputs, prediction_loss_only, ignore_keys)

    return prediction_step


def guard_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``generate``: the models prepare the inputs of each step without row indices."""

    @stands_in_for(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(ROW_INDICES) is not None:
            raise ValueError(
                f"{ROW_INDICES} with {type(self).__name__}.generate, which ignores them. Generate from prompts that "
                "are not packed, with attention_mask for their padding"
            )
        return original(self, *args, **kwargs)

    return generate


def guard_dpo_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``DPOTrainer.__init__``: a loss that skips what is a learned token in ``PreferenceCollator``'s rows."""
    from .shared_prompt import PreferenceCollator

    @stands_in_for(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # The criterion, not the argument: one that is given brings its own setting. In a model it is always off.
        skips = getattr(getattr(self, "dpo_criterion", None), "ignore_eos_token", False)
        if skips and isinstance(self.data_collator, PreferenceCollator):
            raise ValueError(
                "ignore_eos_token must be False with a PreferenceCollator, got True: the loss would leave out the "
                "first token of every rejected answer, and of no chosen one. False is the default of DPOTrainer"
            )

    return __init__


def guard_reference_updates(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``Trainer.train``, which DPO's trainer inherits: updates of the reference model that go wrong."""
    read_checkpoint = argument_reader(original, "resume_from_checkpoint")

    @stands_in_for(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "dpo_config"):
            check_reference_updates(self.dpo_config, self.args, read_checkpoint(args, kwargs))
        return original(self, *args, **kwargs)

    return train
