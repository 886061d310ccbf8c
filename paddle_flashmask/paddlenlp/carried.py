"""Row indices for models of PaddleNLP whose forward has no argument for them.

Mistral, Mixtral, Gemma, Qwen (the first), ChatGLM2 and GPT hand a dense mask from layer to layer. Here the row indices
go around it: ``...ForCausalLM.forward`` gets the argument and puts them down beside the call, the attention that the
layers end in picks them up, and recomputation takes them along. A call in which a layer attended without them raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import paddle

from paddle_flashmask.functional import flashmask_attention

from .guards import ROW_INDICES, _looks_plain_causal, argument_reader, guard_model
from .patching import stands_in_for
from .positions import rotary_trouble
from .routing import ROUTED_DEVICES, _refuse_parallel, as_startend_row_indices, refuse_split_heads
from .switch import is_enabled
from .watch import report_call

__all__ = [
    "carry_through_recompute",
    "everything",
    "guard_dropped_mask",
    "guard_shared_model",
    "hand_over",
    "no_mask",
    "refuse",
    "route_functional",
    "route_functional_length_first",
    "route_gpt",
    "take_row_indices",
]


@dataclass
class _Carried:
    """The row indices of one call of a model.

    Attributes:
        rows: the row indices.
        calls: routed attention calls so far; with ``hand_over`` how often the model picked the rows up.
    """

    rows: paddle.Tensor
    calls: int = field(default=0)


_current: contextvars.ContextVar[_Carried | None] = contextvars.ContextVar("row_indices", default=None)


@contextlib.contextmanager
def _carrying(carried: _Carried | None) -> Iterator[None]:
    token = _current.set(carried)
    try:
        yield
    finally:
        _current.reset(token)


def _with_argument(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``function`` the signature of ``original`` and the row indices as its last argument."""
    signature = inspect.signature(original)
    parameter = inspect.Parameter(ROW_INDICES, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind == inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*parameters, parameter, *rest])  # type: ignore[attr-defined]
    return function


def take_row_indices(
    contradictions: Callable[[Any], list[str]] = lambda config: [],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around a ``ForCausalLM.forward``: an argument for the row indices.

    Args:
        contradictions: says what in a config does not go with row indices, and what to change.
    """

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        read_mask = argument_reader(original, "attention_mask")
        read_ids = argument_reader(original, "input_ids")
        read_positions = argument_reader(original, "position_ids")

        @stands_in_for(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            rows = kwargs.pop(ROW_INDICES, None)
            if rows is None:
                return original(self, *args, **kwargs)
            name, config = type(self).__name__, self.config
            if read_mask(args, kwargs) is not None:
                raise ValueError(f"{ROW_INDICES} and attention_mask: {name} can follow one of them, not both")
            if not config.use_flash_attention:
                raise ValueError(
                    f"{ROW_INDICES} with use_flash_attention=False: {name} would compute dense attention. Set "
                    "config.use_flash_attention=True (or --use_flash_attention true)"
                )
            _refuse_parallel(config, None, ROW_INDICES)
            refuse_split_heads(config, rows)
            found = contradictions(config)
            found += rotary_trouble(self, read_ids(args, kwargs), read_positions(args, kwargs), packed=True)
            if getattr(config, "refined_recompute", None):
                found.append("refined_recompute keeps dense attention's tensors: leave it out")
            device = paddle.get_device().split(":")[0]
            if device not in ROUTED_DEVICES:
                found.append(f"device {device}: use one of {', '.join(ROUTED_DEVICES)}")
            if found:
                raise ValueError(f"{ROW_INDICES} with {name}: " + "; ".join(found))
            carried = _Carried(rows)
            with _carrying(carried):
                out = original(self, *args, **kwargs)
            if carried.calls != config.num_hidden_layers:
                raise RuntimeError(
                    f"{name}: {carried.calls} of {config.num_hidden_layers} layers attended with {ROW_INDICES}. The "
                    "result is not that of the mask; was an attention layer replaced?"
                )
            return out

        return _with_argument(forward, original)

    return build


def _attend(
    carried: _Carried,
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    dropout: float,
    training: bool,
) -> paddle.Tensor:
    batch, query_length, query_heads, _ = query.shape
    _, key_length, key_heads, _ = key.shape
    indices, causal = as_startend_row_indices(carried.rows, batch, query_length, key_length, key_heads, query_heads)
    out = flashmask_attention(query, key, value, indices, causal=causal, dropout=dropout, training=training)
    report_call(query, key, value, carried.rows, out)
    carried.calls += 1
    return out


def route_functional(original: Any) -> types.ModuleType:
    """Replacement of a modeling file's ``F``: the same functions, but row indices that are carried are used."""
    return _routed_functional(original, length_first=False)


def route_functional_length_first(original: Any) -> types.ModuleType:
    """``route_functional`` for a file that reshapes the attention's output as if it were ``[s, b, h, d]``.

    It does so with any mask and with none, which mixes up the rows of a batch. Such a file gets what it expects.
    """
    return _routed_functional(original, length_first=True)


def _routed_functional(original: Any, length_first: bool) -> types.ModuleType:
    functional = types.ModuleType(original.__name__)
    attend_dense = original.scaled_dot_product_attention

    @functools.wraps(attend_dense)
    def scaled_dot_product_attention(
        query: paddle.Tensor,
        key: paddle.Tensor,
        value: paddle.Tensor,
        attn_mask: paddle.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        training: bool = True,
        **more: Any,
    ) -> paddle.Tensor:
        carried = _current.get()
        if carried is None:
            out = attend_dense(query, key, value, attn_mask, dropout_p, is_causal, training, **more)
        elif attn_mask is not None and attn_mask.size != 1:
            raise RuntimeError(f"{ROW_INDICES} beside a dense mask of shape {list(attn_mask.shape)}")
        else:
            out = _attend(carried, query, key, value, dropout_p, training)
        return out.transpose([1, 0, 2, 3]) if length_first else out

    functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
    functional.__getattr__ = lambda name: getattr(original, name)  # type: ignore[method-assign]
    return functional


def route_gpt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of GPT's ``MultiHeadAttention._flash_attention``, which takes a mask and ignores it."""

    @stands_in_for(original)
    def _flash_attention(
        self: Any, q: Any, k: Any, v: Any, attention_mask: Any = None, output_attentions: bool = False
    ) -> Any:
        carried = _current.get()
        if carried is None:
            return original(self, q, k, v, attention_mask, output_attentions)
        out = _attend(carried, q, k, v, self.config.attention_probs_dropout_prob, self.training)
        out = out.flatten(start_axis=2)
        return (out, None) if output_attentions else out

    return _flash_attention


def carry_through_recompute(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of a modeling file's ``recompute``: what is recomputed during backward finds the routing again.

    That is the row indices, where they are carried. Without the routing PaddleNLP's own attention would be recomputed,
    and the gradients be those of another mask than the loss.
    """

    @stands_in_for(original)
    def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        carried = _current.get()
        if carried is None and not paddle.in_dynamic_mode():
            return original(function, *args, **kwargs)

        target = function.forward if isinstance(function, paddle.nn.Layer) else function

        @functools.wraps(target)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not is_enabled():
                # Paddle hands it on from backward() as an OSError that holds this text.
                raise RuntimeError(
                    "the routing of paddle_flashmask.paddlenlp was on in the forward pass and is off in backward(), "
                    "which recomputes the attention: keep it enabled until backward() has ended"
                )
            with _carrying(carried):
                return function(*args, **kwargs)

        # Of a replaced method `wraps` copies the signature with self, by which Paddle would take the arguments apart.
        run.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
        return original(run, *args, **kwargs)

    return recompute


def no_mask(value: Any) -> Callable[[Any], Any]:
    """Around the method that builds a dense mask: beside carried row indices it gives ``value()`` instead."""

    def build(original: Any) -> Any:
        function = original.__func__ if isinstance(original, staticmethod) else original

        @stands_in_for(function)
        def build_mask(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if _current.get() is None else value()

        return staticmethod(build_mask) if isinstance(original, staticmethod) else build_mask

    return build


def everything() -> paddle.Tensor:
    """A mask that hides nothing, of one element: it stands where a model wants some mask."""
    return paddle.ones([1, 1, 1, 1], dtype="bool")


def hand_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``DeepseekV3ForCausalLM.forward``: an argument that its model takes but it does not pass on."""

    @stands_in_for(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop(ROW_INDICES, None)
        if rows is not None and getattr(self.config, "num_nextn_predict_layers", 0) > 0:
            raise ValueError(
                f"{ROW_INDICES} with num_nextn_predict_layers={self.config.num_nextn_predict_layers}: the layers that "
                "predict further tokens cut the sequence, and would predict one packed sample from another. Set "
                "config.num_nextn_predict_layers=0"
            )
        carried = None if rows is None else _Carried(rows)
        with _carrying(carried):
            out = original(self, *args, **kwargs)
        if carried is not None and not carried.calls:
            raise RuntimeError(
                f"{type(self).__name__}: its model did not pick the {ROW_INDICES} up and attended without them. Was a "
                "LoRAModel built inside enabled() and called outside of it? Call enable() before"
            )
        return out

    return _with_argument(forward, original)


def guard_shared_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``DeepseekV2Model.forward``, that DeepSeek-V3 shares: ``guard_model``, and what ``hand_over`` put down."""
    guarded = guard_model(original)

    @stands_in_for(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return guarded(self, *args, **_picked_up(kwargs))

    return forward


@paddle.jit.not_to_static
def _picked_up(kwargs: dict[str, Any]) -> dict[str, Any]:
    carried = _current.get()
    if carried is None:
        return kwargs
    carried.calls += 1
    return {**kwargs, ROW_INDICES: carried.rows}


def guard_dropped_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``GPTModel.forward``: with use_flash_attention its layers ignore a dense mask."""
    read_mask = argument_reader(original, "attention_mask")

    @stands_in_for(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = read_mask(args, kwargs)
        if mask is not None and self.config.use_flash_attention and not _looks_plain_causal(mask):
            raise ValueError(
                f"attention_mask with use_flash_attention=True: {type(self).__name__} would ignore it and train plain "
                f"causal attention. Set config.use_flash_attention=False, or pass {ROW_INDICES} to GPTForCausalLM"
            )
        return original(self, *args, **kwargs)

    return forward


def refuse(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around a ``forward`` that must not get row indices: an error with the reason."""

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        @stands_in_for(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get(ROW_INDICES) is not None:
                raise ValueError(f"{ROW_INDICES} with {type(self).__name__}: {reason}")
            return original(self, *args, **kwargs)

        return forward

    return build
