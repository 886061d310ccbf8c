"""Settings that all tests share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# No deadline: a loaded machine must not fail a correct test. Fixed examples: a failure is the change's, not the draw's.
settings.register_profile("flashmask", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("flashmask")


@pytest.fixture(scope="session")
def emulator_builder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles kernels for the emulated multiprocessor (emulator/README.md)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "emulator"))
        return importlib.import_module("compilation").Builder(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the repository that is not part of the package, such as benchmarks.summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
        yield importlib.import_module
