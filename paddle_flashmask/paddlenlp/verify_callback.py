"""``--flash_mask_verify``: the first batch of a training run, checked before the first step."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

from paddlenlp.trainer import TrainerCallback

from .verify import verify

__all__ = ["VerifyArguments", "VerifyCallback"]

logger = logging.getLogger(__name__)


@dataclass
class VerifyArguments:
    """For ``PdArgumentParser``, beside PaddleNLP's own argument classes."""

    flash_mask_verify: bool = field(
        default=False,
        metadata={
            "help": "Compare each layer's attention with dense attention on the first batch; stop if it differs."
        },
    )


class VerifyCallback(TrainerCallback):
    """Runs ``verify`` on the first batch that a PaddleNLP trainer trains on. For any of its trainers.

    The run ends with ``verify``'s error, before the first step, if a layer's attention is not that of the batch's mask.
    A batch without row indices is an error too: add the callback only where FlashMask is on.

    Args:
        tolerance: see ``verify``.

    Attributes:
        report: the report of the last run, None before it.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self.report: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Wait for the model's first call: only then the batch is what the trainer really hands over."""
        original = model.forward
        own = "forward" in vars(model)  # LoRAModel puts the forward of its model there

        @functools.wraps(original)
        def forward(*given: Any, **named: Any) -> Any:
            if own:
                object.__setattr__(model, "forward", original)
            else:
                object.__delattr__(model, "forward")  # the class's again
            self._verify(model, given, named)
            return original(*given, **named)

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        object.__setattr__(model, "forward", forward)

    def _verify(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
        batch = {**dict(zip(names, given, strict=False)), **named}
        self.report = verify(model, {name: value for name, value in batch.items() if value is not None}, self.tolerance)
        logger.log(logging.WARNING if self.report.warnings else logging.INFO, "%s", self.report)
