"""The portable kernels without a GPU: compiled for an emulated multiprocessor (emulator/README.md)."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import compilation
import emulated
from emulated import LIMIT, Emulated, Problem, is_noticed

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64" or sys.platform != "linux", reason="fibers for x86-64 Linux only"
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

# Compiled head dim, and the smallest that is tried with it. Forward 192 has 8 warps of 16 rows, the others 4 of 32.
FORWARD = ((64, 40), (128, 104), (192, 136))
BACKWARD = ((32, 8), (64, 40), (96, 72), (128, 104), (192, 136), (256, 200))
DTYPES = {64: "fp16"}  # bf16 where nothing is said: nothing but one instruction depends on it
SHARED_LIMITS = {"large": "", "small": str(99 * 1024)}
CASES = 6

Libraries = Callable[[str, int], Emulated]


@pytest.fixture(scope="session")
def libraries(emulator_builder: compilation.Builder) -> Libraries:
    """Compiles what is asked for, once."""
    built: dict[tuple[str, int], Emulated] = {}

    def get(direction: str, head_dim: int) -> Emulated:
        if (direction, head_dim) not in built:
            dtype = DTYPES.get(head_dim, "bf16")
            built[direction, head_dim] = Emulated(emulator_builder.library(direction, head_dim, (dtype,), "sm80"))
        return built[direction, head_dim]

    return get


@pytest.mark.parametrize(
    ("direction", "limit", "head_dim", "low_dim"),
    [
        *(("forward", "large", *dims) for dims in FORWARD),
        *(("backward", limit, *dims) for dims in BACKWARD for limit in SHARED_LIMITS),
    ],
)
def test_random_problems_match_the_reference(
    direction: str, limit: str, head_dim: int, low_dim: int, libraries: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has one shape for every device; half of the problems have dropout."""
    monkeypatch.setenv("FLASHMASK_CUDA_SHARED_LIMIT", SHARED_LIMITS[limit])
    library = libraries(direction, head_dim)
    for number in range(CASES):
        rng = np.random.default_rng((head_dim, number))
        dropout = 0.0 if number % 2 else float(rng.choice([0.1, 0.5]))
        dtype = DTYPES.get(head_dim, "bf16")
        case = emulated.random_problem(rng, head_dim, low_dim, dtype=dtype, dropout=dropout)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


def dense_case(number: int, **changes: Any) -> Problem:
    """Several tiles each way: every place in shared memory is used again."""
    shape: dict[str, Any] = {"b": 1, "s_q": 300, "s_k": 390, "h_q": 4, "h_k": 2, "h_m": 1, "n": 0, "causal": False}
    return Problem(**{**shape, "d": 128, "d_v": 128, "schedule": number, "blocks": 1 + number % 2, **changes})


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_results_do_not_depend_on_the_schedule(direction: str, libraries: Libraries) -> None:
    """To the bit: the forward pass always, the backward pass when asked to be deterministic."""
    case = dense_case(0, n=2, h_m=4, deterministic=True)
    first = case.run(libraries(direction, 128))
    for schedule in range(1, 4):
        case.schedule, case.blocks = schedule, 1 + schedule
        for name, array in case.run(libraries(direction, 128)).items():
            np.testing.assert_array_equal(array, first[name], f"{name}, schedule {schedule}")


# ---- that it can fail ----


@pytest.mark.parametrize(
    ("direction", "fault"),
    [
        ("forward", (emulated.COPY_WAIT, 0)),
        ("forward", (emulated.NAMED_BARRIER, 0)),
        ("backward", (emulated.COPY_WAIT, 0)),
        ("backward", (emulated.NAMED_BARRIER, 0)),
    ],
)
def test_no_wait_can_be_left_out(direction: str, fault: tuple[int, int], libraries: Libraries) -> None:
    """For copies, and for the other warps."""
    assert any(is_noticed(dense_case(number), libraries(direction, 128), fault) for number in range(8))


@pytest.mark.parametrize("count", [2, 3])
def test_turns_are_waited_for(count: int, libraries: Libraries) -> None:
    """For two or three later column tiles to have added to the row tile: other bits otherwise.

    The order of the first two does not matter: 0 + a + b = 0 + b + a.
    """
    cases = (dense_case(number, deterministic=True, blocks=4) for number in range(12))
    fault = (emulated.COUNT_WAIT, count)
    assert any(is_noticed(case, libraries("backward", 128), fault) for case in cases)
