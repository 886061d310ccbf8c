"""Turning the routing on and off."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .patching import PatchSet

__all__ = ["disable", "enable", "enabled", "expect_row_indices", "is_enabled", "row_indices_are_missed"]

_lock = threading.RLock()
_patches: PatchSet | None = None
_switched_on = False  # by enable()
_open_blocks = 0  # of enabled()
_expects_row_indices = False


def _apply() -> None:
    """Install or remove the patches as the switch and the open blocks say. Called under the lock."""
    global _patches
    wanted = _switched_on or _open_blocks > 0
    if _patches is None:
        if not wanted:
            return
        try:
            import paddlenlp  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"paddle_flashmask.paddlenlp needs PaddleNLP, which cannot be imported ({error}): install paddlenlp "
                "3.0.0b4 with the versions of requirements/runtime.txt"
            ) from error
        from .table import patches

        _patches = PatchSet(patches())
    if wanted:
        _patches.install()
    else:
        _patches.remove()


def enable() -> None:
    """Route PaddleNLP's attention with row indices through this package, in the whole process.

    Models that exist already are routed too. Calling it again does nothing more. Training with recomputation calls the
    attention again during ``backward()``: leave the routing on until that has ended. With the routing off it raises.

    Raises:
        ImportError: PaddleNLP, or a part of it that this package replaces, is missing.
    """
    global _switched_on
    with _lock:
        before, _switched_on = _switched_on, True
        try:
            _apply()
        except BaseException:
            _switched_on = before
            raise


def disable() -> None:
    """Undo ``enable()``: PaddleNLP is exactly as it was. Inside an ``enabled()`` block this waits for the block's end.

    Raises:
        RuntimeError: something else has replaced one of the same attributes since.
    """
    global _switched_on, _expects_row_indices
    with _lock:
        _expects_row_indices = False
        before, _switched_on = _switched_on, False
        try:
            _apply()
        except BaseException:
            _switched_on = before
            raise


def expect_row_indices() -> None:
    """The trainer's flag was read: from now on a batch with a dense mask is worth a warning, once."""
    global _expects_row_indices
    with _lock:
        _expects_row_indices = True


def row_indices_are_missed() -> bool:
    """Whether to warn of a batch without row indices: True once after ``expect_row_indices()``."""
    global _expects_row_indices
    with _lock:
        missed, _expects_row_indices = _expects_row_indices, False
        return missed


def is_enabled() -> bool:
    """Whether PaddleNLP's attention is routed through this package now."""
    with _lock:
        return _patches is not None and _patches.installed


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Route inside a ``with`` block. Blocks nest and may overlap between threads.

    The last one to end restores PaddleNLP, unless ``enable()`` was called. The routing is process-wide: other threads
    see it too.
    """
    global _open_blocks
    with _lock:
        _open_blocks += 1
        try:
            _apply()
        except BaseException:
            _open_blocks -= 1
            raise
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            _apply()
