"""Replacing attributes of another package, and putting them back exactly as they were."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Patch", "PatchSet", "stands_in_for"]


def stands_in_for(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a replacement: the name, the documentation and the signature of ``original``.

    Unlike ``functools.wraps`` it leaves no way back to ``original``: ``paddle.jit.to_static`` would take it and
    translate the original instead of the replacement. The signature is set for ``inspect.getfullargspec``.
    """

    def decorate(replacement: Callable[..., Any]) -> Callable[..., Any]:
        functools.update_wrapper(replacement, original)
        del replacement.__wrapped__  # type: ignore[attr-defined]
        replacement.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return replacement

    return decorate


def _always() -> bool:
    return True


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        # Past the metaclass: PaddleNLP's wraps a new `forward` in a function that drops some of its arguments.
        type.__setattr__(owner, name, value)
    else:
        setattr(owner, name, value)


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    Attributes:
        target: ``package.module:attribute`` or ``package.module:Class.attribute``.
        build: takes the original object and returns its replacement.
        reason: what goes wrong without it, in one sentence.
        needed: says whether the installed versions need it; asked when the patch is installed.
    """

    target: str
    build: Callable[[Any], Any]
    reason: str
    needed: Callable[[], bool] = _always

    def owner(self) -> tuple[Any, str]:
        """The module or class that holds the attribute, and the attribute's name.

        Raises:
            ImportError: the installed package has no such module, class or attribute.
        """
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            # In the owner's own dictionary: an inherited method must not be pinned to the subclass.
            vars(owner)[name]
        except (ImportError, AttributeError, KeyError) as error:
            raise ImportError(
                f"{self.target} is not in the installed version of {module.split('.')[0]} ({error!r}). "
                "paddle_flashmask.paddlenlp is written for paddlenlp 3.0.0b4: pip install paddlenlp==3.0.0b4"
            ) from error
        return owner, name


class PatchSet:
    """Installs a list of patches together and removes them together. Not thread-safe: the caller holds a lock."""

    def __init__(self, patches: list[Patch]) -> None:
        self.patches = patches
        self._installed: list[tuple[Any, str, Any, Any]] = []

    @property
    def installed(self) -> bool:
        return bool(self._installed)

    def install(self) -> None:
        """Replace every target that the installed versions need replaced; all of them or, on an error, none."""
        if self._installed:
            return
        found = [(patch, *patch.owner()) for patch in self.patches if patch.needed()]
        replaced = []
        for patch, owner, name in found:
            original = vars(owner)[name]
            replaced.append((owner, name, original, patch.build(original)))
        for owner, name, _, replacement in replaced:
            _put(owner, name, replacement)
        self._installed = replaced

    def remove(self) -> None:
        """Put every original back.

        Raises:
            RuntimeError: something else has replaced one of the attributes since; nothing is removed then.
        """
        for owner, name, _, replacement in self._installed:
            if vars(owner).get(name) is not replacement:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was replaced again after paddle_flashmask.paddlenlp.enable(): "
                    "undo that replacement first, then call disable()"
                )
        for owner, name, original, _ in self._installed:
            _put(owner, name, original)
        self._installed = []
