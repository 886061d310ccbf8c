"""Corrections of PaddleNLP 3.0.0b4 that training with row indices needs. Each one is guarded by what it corrects."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.distributed import fleet

from .patching import stands_in_for

__all__ = [
    "all_chosen_tokens",
    "cumsum_promotes_int32",
    "dpo_pipeline_inputs",
    "expert_slots",
    "fleet_must_be_initialised",
    "lone_reference",
    "mixtral_experts",
    "pipeline_arguments",
    "rng_tracker",
    "rng_tracker_wants_more",
    "where_gives_vectors",
]


def pipeline_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of a pipeline file's ``parse_args``: tell masks, row indices and position ids apart by what they are.

    A stage hands the next one a tuple without the entries that are None, so a place in the tuple says nothing. On the
    CPU the Llama file then takes row indices for position ids, on a GPU an integer padding mask for row indices.
    """
    # 5 for Llama (the last one is alibi), 4 for the others.
    width = len(original(paddle.zeros([1])))

    @stands_in_for(original)
    def parse_args(args: Any) -> tuple[Any, ...]:
        if not isinstance(args, tuple):
            return (args,) + (None,) * (width - 1)
        first, rest = args[0], list(args[1:])
        mask = rows = positions = alibi = None
        if not paddle.is_floating_point(first) and len(rest) == 3:
            # The first stage gets the four named inputs in order, None included.
            mask, rows, positions = rest
        else:
            for extra in rest:
                if extra is None:
                    continue
                if extra.dtype == paddle.int32:
                    rows = extra
                elif extra.dtype == paddle.int64 and extra.ndim == 2:
                    # Of two such tensors the padding mask comes first.
                    mask, positions = (positions if positions is not None else mask), extra
                elif mask is None:
                    mask = extra
                else:
                    alibi = extra
        if mask is not None and not paddle.is_floating_point(mask):
            mask = mask.astype("bool")  # an integer mask would be taken for row indices or positions further on
        if rows is not None and positions is None:
            # Llama's file takes row indices without position ids for position ids.
            positions = paddle.arange(rows.shape[-1] if rows.ndim < 4 else rows.shape[2], dtype="int64")
            positions = positions.unsqueeze(0).expand([rows.shape[0], -1])
        for extra in (mask, rows, positions, alibi):
            if extra is not None:
                extra.stop_gradient = True
        return (first, mask, rows, positions, alibi)[:width]

    return parse_args


def dpo_pipeline_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``dpo_trainer.prepare_pipeline_dpo_inputs_func``, which misspells the key of the row indices."""
    first_stage = ("input_ids", "attention_mask", "attn_mask_startend_row_indices", "position_ids")
    last_stage = (
        "chosen_labels",
        "rejected_labels",
        "response_indexs",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )

    @stands_in_for(original)
    def prepare_pipeline_dpo_inputs_func(inputs: Any) -> list[Any]:
        if not isinstance(inputs, dict):
            inputs = {key: [micro.pop(key) for micro in inputs] for key in list(inputs[0])}
        if "attn_mask_start_row_indices" in inputs:
            raise ValueError(
                "attn_mask_start_row_indices: no model of PaddleNLP 3.0.0b4 takes it, its pipeline would drop it. "
                "Rename it attn_mask_startend_row_indices"
            )

        def take(keys: tuple[str, ...]) -> Any:
            found = tuple(inputs.pop(key) for key in keys if key in inputs)
            return found[0] if len(found) == 1 else found

        return [take(first_stage), take(last_stage)]

    return prepare_pipeline_dpo_inputs_func


def fleet_must_be_initialised() -> bool:
    """Whether ``fleet.distributed_model`` fails in a process that is alone (Paddle 3.3.1), where nobody calls
    ``fleet.init``."""
    if paddle.distributed.get_world_size() > 1:
        return False
    try:
        fleet.distributed_model(paddle.nn.Layer())
    except AttributeError:
        return True
    return False


def lone_reference(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``DPOTrainer._wrap_ref_model``: a process that is alone has nothing to wrap the model for."""

    @stands_in_for(original)
    def _wrap_ref_model(self: Any, model: Any) -> Any:
        if paddle.distributed.get_world_size() > 1 or hasattr(fleet.fleet, "_user_defined_strategy"):
            return original(self, model)
        self.amp_dtype = "float16" if self.args.fp16 else "bfloat16"
        return paddle.amp.decorate(models=model, level=self.args.fp16_opt_level, dtype=self.amp_dtype)

    return _wrap_ref_model


def all_chosen_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``DPOCriterion.dpo_logps``: average the SFT loss over all tokens of the chosen answers.

    PaddleNLP counts the labels that are not 0, although 0 is a token like any other: "!" in Qwen2.
    """

    @stands_in_for(original)
    def dpo_logps(
        self: Any,
        logits: Any,
        chosen_labels: paddle.Tensor,
        rejected_labels: paddle.Tensor,
        response_indexs: paddle.Tensor,
        average_log_prob: bool = False,
    ) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        chosen, rejected, sft_loss = original(
            self, logits, chosen_labels, rejected_labels, response_indexs, average_log_prob
        )
        places = response_indexs[0] if response_indexs.ndim == 3 else response_indexs
        tokens = (places[:, 2] - places[:, 1]).sum()
        return chosen, rejected, sft_loss * ((chosen_labels != 0).sum() / tokens).astype(sft_loss.dtype)

    return dpo_logps


def cumsum_promotes_int32() -> bool:
    """Whether ``paddle.cumsum`` of int32 gives int64 (Paddle 3.2 and later). The gate multiplies it by int32."""
    return paddle.cumsum(paddle.ones([1], dtype="int32"), axis=0).dtype != paddle.int32


def expert_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``PretrainedMoEGate._priority``: the same slots, without mixing int32 and int64."""

    @stands_in_for(original)
    def _priority(self: Any, topk_idx: paddle.Tensor, capacity: int) -> paddle.Tensor:
        # First choices of all tokens queue at their experts before the second choices, and so on.
        chosen = F.one_hot(topk_idx.transpose([1, 0]).flatten(), self.num_experts).astype("int64")
        place = paddle.where(chosen > 0, paddle.cumsum(chosen, axis=0) - 1, paddle.full_like(chosen, -1))
        place = place.reshape([self.top_k, -1, self.num_experts]).max(axis=0)
        return (place.unsqueeze(-1) == paddle.arange(int(capacity), dtype="int64")).astype("int32")

    return _priority


def rng_tracker_wants_more() -> bool:
    """Whether ``switch_rng_state_tracker`` also wants the states of NumPy and ``random`` (Paddle 3.1 and later)."""
    from paddle.distributed.fleet.recompute.recompute import switch_rng_state_tracker

    return "numpy_state" in inspect.signature(switch_rng_state_tracker).parameters


def rng_tracker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``refined_recompute.switch_rng_state_tracker``: PaddleNLP passes Paddle's two states only.

    The states of NumPy and ``random`` are left as they are, as Paddle 3.0 did.
    """

    @stands_in_for(original)
    @contextlib.contextmanager
    def switch_rng_state_tracker(rng_state: Any, tracker: Any, *states: Any, **more: Any) -> Iterator[None]:
        if not states and "numpy_state" not in more:
            states = (np.random.get_state(), random.getstate())
        with original(rng_state, tracker, *states, **more):
            yield

    return switch_rng_state_tracker


def where_gives_vectors() -> bool:
    """Whether ``paddle.where(condition)`` gives ``[n]`` (Paddle 3), not ``[n, 1]``, as Mixtral expects."""
    return paddle.where(paddle.ones([1], dtype="bool"))[0].ndim == 1


def mixtral_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``MixtralSparseMoeBlock.forward``: the same sum of the chosen experts' outputs."""

    @stands_in_for(original)
    def forward(self: Any, hidden_states: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        tokens = hidden_states.reshape([-1, hidden_states.shape[-1]])
        router_logits = self.gate(tokens)
        with paddle.amp.auto_cast(False):
            shares = F.softmax(router_logits.astype("float32"), axis=-1)
        shares, chosen = paddle.topk(shares, self.top_k, axis=-1)
        shares = (shares / shares.sum(axis=-1, keepdim=True)).astype(tokens.dtype)
        out = paddle.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            places = paddle.nonzero(chosen == number)  # [n, 2]: token, and which of its choices
            if places.shape[0] > 0:
                token = places[:, 0]
                given = expert(paddle.gather(tokens, token)) * paddle.gather_nd(shares, places).unsqueeze(-1)
                out = paddle.index_add(out, token, 0, given.astype(out.dtype))
        return out.reshape(hidden_states.shape), router_logits

    return forward
