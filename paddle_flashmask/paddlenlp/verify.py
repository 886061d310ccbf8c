"""One call before a long run: does every layer's attention see the mask of the batch?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from paddle_flashmask.masks import to_dense

from .guards import ROW_INDICES, accepts_row_indices
from .switch import enabled, is_enabled
from .watch import RoutedCall, watching

__all__ = ["LayerDifference", "VerificationError", "VerificationReport", "verify"]

TOLERANCE = {paddle.float32: 1e-4, paddle.float16: 4e-3, paddle.bfloat16: 3e-2}
"""Largest relative difference that rounding explains, by the dtype of the query."""

SCORES_AT_ONCE = 1 << 24
"""Scores that the dense reference holds at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer's routed attention is from the dense reference.

    Attributes:
        layer: name of the sublayer that attended.
        max_absolute: largest absolute difference of an output.
        max_relative: that, over the largest absolute output of the reference.
    """

    layer: str
    max_absolute: float
    max_relative: float


@dataclass(frozen=True)
class VerificationReport:
    """What ``verify`` found.

    Attributes:
        layers: one entry for each routed attention call, in the order of the calls.
        tolerance: largest ``max_relative`` that passes.
        mask_shape: shape of the batch's row indices.
        warnings: what is unusual but not wrong by itself.
    """

    layers: tuple[LayerDifference, ...]
    tolerance: float
    mask_shape: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerDifference:
        """The layer with the largest relative difference; a NaN is the largest."""
        return max(self.layers, key=lambda found: np.inf if np.isnan(found.max_relative) else found.max_relative)

    @property
    def passed(self) -> bool:
        """Whether every layer is within the tolerance."""
        return all(found.max_relative <= self.tolerance for found in self.layers)

    def __str__(self) -> str:
        width = max(len(name) for name in ("layer", *(found.layer for found in self.layers)))
        lines = [
            f"FlashMask against dense attention, row indices {list(self.mask_shape)}: "
            f"{'passed' if self.passed else 'FAILED'}, tolerance {self.tolerance:.0e}",
            f"{'layer':{width}}  largest difference  relative",
        ]
        for found in self.layers:
            mark = "" if found.max_relative <= self.tolerance else "  <-- too large"
            lines.append(f"{found.layer:{width}}  {found.max_absolute:18.2e}  {found.max_relative:8.1e}{mark}")
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


class VerificationError(RuntimeError):
    """The routed attention is not what the batch's mask asks for.

    Attributes:
        report: what was compared, if it came to that.
    """

    def __init__(self, message: str, report: VerificationReport | None = None) -> None:
        super().__init__(message)
        self.report = report


def verify(model: Any, batch: Mapping[str, Any], tolerance: float | None = None) -> VerificationReport:
    """Run the model on a batch and compare each layer's attention with dense attention under the batch's mask.

    The model's forward runs once, with the routing on, in evaluation mode and without gradients. The reference is
    computed in float32 from the queries, keys and values of the routed calls and from the row indices of the batch,
    which are read here anew; a few rows at a time, so that memory stays below a few hundred MiB. Neither weights nor
    the state of the random generators change.

    Args:
        model: a model that takes ``attn_mask_startend_row_indices``, or a LoRA or other wrapper of one.
        batch: what the model is called with, tensors or arrays; ``labels`` and what the model does not take are left
            out. int ``position_ids`` ``[b, s]`` are compared with the mask; without them it is 0, 1, 2, ...
        tolerance: largest difference, relative to the layer's largest output, that passes. None: 1e-4 in float32, 4e-3
            in float16, 3e-2 in bfloat16.

    Returns:
        The differences of every layer, and a warning if the routing is off outside of this call. ``print`` it.

    Raises:
        TypeError: ``batch`` is not a mapping.
        ValueError: the batch has no row indices, the model takes none, the tolerance is not positive, or
            ``position_ids`` are of another shape than the row indices or restart at a token that sees earlier ones.
        VerificationError: no routed call was made, a layer did not use the mask, or a difference is too large.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors, got {type(batch).__name__}")
    if batch.get(ROW_INDICES) is None:
        raise ValueError(f"batch must hold {ROW_INDICES}, got {sorted(batch)}: there is no mask to verify")
    if not isinstance(tolerance, (int, float, type(None))) or (tolerance is not None and not tolerance > 0):
        raise ValueError(f"tolerance must be a positive number or None, got {tolerance!r}")
    tensors = {
        name: value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value) for name, value in batch.items()
    }
    was_on = is_enabled()
    with enabled():
        if not accepts_row_indices(model):
            raise ValueError(f"model must take {ROW_INDICES}, got {type(model).__name__}, whose forward does not")
        rows, causal = _rows_of(tensors[ROW_INDICES])
        warnings = _position_warnings(rows, causal, tensors.get("position_ids"))
        if not was_on:
            warnings += ("the routing is off outside this check: call enable() before training",)
        taken = inspect.signature(_innermost(model).forward).parameters
        inputs = {name: value for name, value in tensors.items() if name in taken and name != "labels"}
        check = _Check(rows, causal)
        _run(model, inputs, check)
    return check.conclude(tolerance, tuple(tensors[ROW_INDICES].shape), warnings)


def _innermost(model: Any) -> Any:
    """The layer whose forward names the row indices: LoRA and parallel wrappers pass their arguments on."""
    while ROW_INDICES not in inspect.signature(model.forward).parameters:
        inner = getattr(model, "model", None)
        model = inner if inner is not None else model._layers
    return model


def _rows_of(row_indices: paddle.Tensor) -> tuple[np.ndarray, bool]:
    """int64 ``[b, h, s, n]`` and causal. Written apart from the routing, whose reading of them is what is checked."""
    rows = row_indices.numpy().astype(np.int64)
    if rows.ndim == 2:
        rows = rows[:, None]
    if rows.ndim == 3:
        rows = rows[..., None]
    if rows.ndim != 4 or rows.shape[3] not in (1, 2, 4):
        raise ValueError(
            f"{ROW_INDICES} must have shape [b, s], [b, h, s] or [b, h, s, n] with n of 1, 2 or 4, "
            f"got {list(row_indices.shape)}"
        )
    return rows, rows.shape[3] != 4


def _position_warnings(rows: np.ndarray, causal: bool, position_ids: paddle.Tensor | None) -> tuple[str, ...]:
    """Compare the samples that the mask separates with the places where the position ids restart."""
    if not causal:
        return ()
    batch, _, length, columns = rows.shape
    missing = position_ids is None
    if position_ids is None:
        # Every model counts them from 0 then. Rotary ones see differences alone, but GPT learns each position.
        position_ids = paddle.arange(length, dtype="int64")
    given = list(position_ids.shape)
    sequences = given[0] if len(given) == 2 else 1
    if len(given) not in (1, 2) or given[-1] != length or (sequences != batch and 1 not in (sequences, batch)):
        raise ValueError(
            f"position_ids must have shape {[batch, length]} as {ROW_INDICES} have"
            f"{' (or another batch size)' if batch == 1 else ''}, got {given}"
        )
    # Row indices of one sequence hold for the whole batch.
    batch = max(batch, sequences)
    rows = np.broadcast_to(rows, (batch, *rows.shape[1:]))
    positions = np.broadcast_to(position_ids.numpy(), (batch, length))
    # Keys that each row sees: key j is seen from row j on, but not in [start, end).
    change = np.zeros((batch, length + 1), dtype=np.int64)
    key = np.arange(length)
    for index in range(batch):
        start = rows[index, 0, :, 0].clip(key, length)
        end = rows[index, 0, :, 1].clip(start, length) if columns == 2 else np.full(length, length)
        for at, step in ((key, 1), (start, -1), (end, 1)):
            np.add.at(change[index], at, step)
    seen = np.cumsum(change[:, :length], axis=1)
    leaks = np.argwhere((positions == 0) & (seen > 1))
    if len(leaks):
        row, token = leaks[0]
        raise ValueError(
            f"position_ids restart at token {token} of row {row}, but {ROW_INDICES} let it see {seen[row, token] - 1} "
            f"earlier tokens ({len(leaks)} such tokens in the batch): a sample that begins there sees the one before"
        )
    late = np.argwhere((positions > 0) & (seen == 1))
    if len(late):
        row, token = late[0]
        return (
            f"token {token} of row {row} sees no earlier token, but its position is {positions[row, token]}, not 0 "
            f"({len(late)} such tokens in the batch): "
            + ("the batch has no position_ids" if missing else "do the position ids restart in every sample?"),
        )
    return ()


class _Check:
    """Compares the routed calls as they come and knows which attention layers ran."""

    def __init__(self, rows: np.ndarray, causal: bool) -> None:
        self.rows, self.causal = rows, causal
        self.found: list[LayerDifference] = []
        self.tolerance = 0.0
        self.stack: list[str] = []
        self.attended: dict[str, int] = {}

    def enter(self, name: str) -> None:
        self.stack.append(name)
        self.attended.setdefault(name, 0)

    def leave(self) -> None:
        self.stack.pop()

    def __call__(self, call: RoutedCall) -> None:
        name = self.stack[-1] if self.stack else "model"
        for layer in self.stack:
            self.attended[layer] += 1
        self.tolerance = max(self.tolerance, TOLERANCE.get(call.query.dtype, TOLERANCE[paddle.float32]))
        absolute = scale = 0.0
        for expected, got in _reference(call, self.rows, self.causal):
            # np.maximum, not max: it keeps a NaN.
            absolute = float(np.maximum(absolute, float((got - expected).abs().max())))
            scale = max(scale, float(expected.abs().max()))
        relative = 0.0 if absolute == 0.0 else absolute / scale if scale else np.inf
        self.found.append(LayerDifference(name, absolute, relative))

    def conclude(
        self, tolerance: float | None, mask_shape: tuple[int, ...], warnings: tuple[str, ...]
    ) -> VerificationReport:
        if not self.found:
            raise VerificationError(
                "the model made no attention call with row indices: its attention does not use the batch's mask"
            )
        report = VerificationReport(
            tuple(self.found), self.tolerance if tolerance is None else tolerance, mask_shape, warnings
        )
        idle = [name for name, calls in self.attended.items() if not calls]
        if idle:
            raise VerificationError(
                f"{len(idle)} attention layers did not use the batch's mask: {', '.join(idle[:8])}\n{report}", report
            )
        if not report.passed:
            raise VerificationError(
                f"routed attention differs from dense attention under the batch's mask\n{report}", report
            )
        return report


def _run(model: Any, inputs: dict[str, paddle.Tensor], check: _Check) -> None:
    hooks = []
    for name, layer in model.named_sublayers():
        if "Attention" in type(layer).__name__:
            hooks.append(layer.register_forward_pre_hook(lambda layer, given, name=name: check.enter(name)))
            hooks.append(layer.register_forward_post_hook(lambda layer, given, out: check.leave()))
    modes = {id(layer): layer.training for layer in model.sublayers(include_self=True)}
    random_state = paddle.get_rng_state()
    model.eval()
    try:
        with paddle.no_grad(), watching(check):
            model(**inputs)
    finally:
        for layer in model.sublayers(include_self=True):
            layer.training = modes[id(layer)]
        paddle.set_rng_state(random_state)
        for hook in hooks:
            hook.remove()


def _reference(call: RoutedCall, rows: np.ndarray, causal: bool) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
    """(dense attention, routed attention) in float32 ``[heads, rows, d_v]``, a part at a time."""
    batch, length, heads, head_dim = call.query.shape
    _, keys, key_heads, _ = call.key.shape
    if rows.shape[2] != keys or length != keys or rows.shape[0] not in (1, batch):
        raise VerificationError(
            f"attention over {length} rows and {keys} keys of {batch} sequences, but the batch's row indices have "
            f"shape {list(rows.shape)}"
        )
    rows = np.broadcast_to(rows, (batch, *rows.shape[1:]))
    heads_at_once = min(heads, max(1, SCORES_AT_ONCE // (128 * keys)))
    rows_at_once = max(1, SCORES_AT_ONCE // (heads_at_once * keys))
    for index in range(batch):
        for first_head in range(0, heads, heads_at_once):
            part = np.arange(first_head, min(first_head + heads_at_once, heads))
            key_part = paddle.to_tensor(part // (heads // key_heads))
            of_part = slice(first_head, first_head + len(part))
            mask_heads = part * rows.shape[1] // heads
            query, got = (x[index].astype("float32").transpose([1, 0, 2]) for x in (call.query, call.out))
            key, value = (
                x[index].astype("float32").index_select(key_part, axis=1).transpose([1, 0, 2])
                for x in (call.key, call.value)
            )
            for start in range(0, length, rows_at_once):
                stop = min(start + rows_at_once, length)
                visible = _visible(rows[index], causal, start, stop)
                seen = visible.shape[2]
                mask = paddle.to_tensor(visible[mask_heads])
                scores = paddle.matmul(
                    query[part[0] : part[-1] + 1, start:stop] * head_dim**-0.5, key[:, :seen], transpose_y=True
                )
                scores = paddle.where(mask, scores, paddle.full_like(scores, -np.inf))
                weights = paddle.exp(scores - scores.max(axis=-1, keepdim=True).clip(min=-1e30))
                weights = weights / weights.sum(axis=-1, keepdim=True).clip(min=1e-30)
                yield paddle.matmul(weights, value[:, :seen]), got[of_part, start:stop]


def _visible(rows: np.ndarray, causal: bool, start: int, stop: int) -> np.ndarray:
    """bool ``[h, stop - start, keys]``: rows start to stop of the dense mask. Keys that causality hides are cut off."""
    keys = stop if causal else rows.shape[1]
    shifted = (rows[:, :keys] - start).clip(0, stop - start).astype(np.int32)
    return to_dense(shifted[None], causal, stop - start, keys)[0]
