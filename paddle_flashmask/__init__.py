"""FlashMask attention for PaddlePaddle.

What needs Paddle is imported on first use, so that `paddle_flashmask.masks` works where Paddle is not installed. The
import of `flashmask_attention` loads the op; a build made for another Paddle version is refused there with ImportError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import masks as masks
    from .functional import flashmask_attention as flashmask_attention

__all__ = ["__version__", "flashmask_attention", "masks"]

_SUBMODULES = ("distributed", "functional", "incubate", "masks", "paddleformers", "paddlenlp", "plotting")


def __getattr__(name: str) -> Any:
    if name == "flashmask_attention":
        return importlib.import_module(f"{__name__}.functional").flashmask_attention
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, "flashmask_attention"})
