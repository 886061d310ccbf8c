"""The Hopper kernels without a GPU: compiled for an emulated multiprocessor (emulator/README.md)."""

from __future__ import annotations

import dataclasses
import platform
import re
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
from emulated import LIMIT, Emulated, EmulatedError, Problem, is_noticed

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64" or sys.platform != "linux", reason="fibers for x86-64 Linux only"
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

# Compiled head dim, and the smallest that is tried with it.
FORWARD = ((64, 8), (96, 72), (128, 104), (192, 136), (256, 200))
BACKWARD = ((64, 8), (128, 72), (192, 136), (256, 200))
KERNELS = [*(("forward", *dims) for dims in FORWARD), *(("backward", *dims) for dims in BACKWARD)]
UNMASKED = (FORWARD[0], FORWARD[2])  # head dims with a kernel of its own for calls in which nothing masks
CASES = 24

Libraries = Callable[[str, int], Emulated]


@pytest.fixture(scope="session")
def libraries(emulator_builder: compilation.Builder) -> Libraries:
    """Compiles what is asked for, once."""
    built: dict[tuple[str, int], Emulated] = {}

    def get(direction: str, head_dim: int) -> Emulated:
        key = (direction, head_dim)
        if key not in built:
            built[key] = Emulated(emulator_builder.library(*key))
        return built[key]

    return get


def assert_as_with_every_tile(got: dict[str, np.ndarray], case: Problem, library: Emulated) -> None:
    """To the bit, as if nothing were skipped."""
    everything = dataclasses.replace(case, no_skip=True).run(library)
    for name, array in got.items():
        np.testing.assert_array_equal(array, everything[name], name)


@pytest.mark.parametrize(("direction", "head_dim", "low_dim"), KERNELS)
def test_random_problems_match_the_reference(direction: str, head_dim: int, low_dim: int, libraries: Libraries) -> None:
    library = libraries(direction, head_dim)
    for number in range(CASES):
        case = emulated.random_problem(np.random.default_rng((head_dim, number)), head_dim, low_dim)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


@pytest.mark.parametrize(("head_dim", "low_dim"), UNMASKED)
def test_random_problems_without_a_mask(head_dim: int, low_dim: int, libraries: Libraries) -> None:
    """Column tiles of 128 or 64 keys, of which the last may have one to all."""
    library = libraries("forward", head_dim)
    drawn = np.random.default_rng(head_dim)
    lengths = [1, 16, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257, 384, *drawn.integers(1, 600, 10).tolist()]
    for number, s_k in enumerate(lengths):
        rng = np.random.default_rng((head_dim, 1, number))
        case = emulated.random_problem(rng, head_dim, low_dim, s_k=s_k, n=0, causal=False, block_mask=False)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


@pytest.mark.parametrize(("direction", "head_dim", "low_dim"), KERNELS)
def test_results_do_not_depend_on_the_schedule(
    direction: str, head_dim: int, low_dim: int, libraries: Libraries
) -> None:
    """To the bit: the forward pass always, the backward pass when asked to be deterministic."""
    library = libraries(direction, head_dim)
    # Nothing masks; without lists of tiles; with them.
    for number, causal in ((0, False), (0, True), (1, False)):
        growth = 150.0 if direction == "forward" else 0.0  # references move
        case = dense_case(head_dim, number, deterministic=True, blocks=3, causal=causal, growth=growth)
        first = case.run(library)
        for schedule in range(1, 4):
            case.schedule, case.blocks = schedule, 1 + schedule % 3
            for name, array in case.run(library).items():
                np.testing.assert_array_equal(array, first[name], f"{name} of {number}, schedule {schedule}")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_groups_of_heads(head_dim: int, libraries: Libraries) -> None:
    """Rows of some are prepared and finished between the column tiles of others; the last group is smaller."""
    library = libraries("backward", head_dim)
    for number, s_q in enumerate((40, 300, 520)):
        shape: dict[str, Any] = {"b": 2, "s_q": s_q, "s_k": 150, "h_q": 10, "h_k": 5, "h_m": 1}
        case = dense_case(head_dim, number, **shape, deterministic=number == 1, blocks=3)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("no_skip", [False, True])
def test_schedules_of_the_deterministic_mode(no_skip: bool, head_dim: int, libraries: Libraries) -> None:
    """With few active tiles (a block mask) more heads at once than with all."""
    library = libraries("backward", head_dim)
    shape: dict[str, Any] = {"b": 2, "s_q": 40, "s_k": 600, "h_q": 10, "h_k": 5, "h_m": 5}
    case = dense_case(head_dim, 1, **shape, block_mask=not no_skip, no_skip=no_skip, deterministic=True)
    first = case.run(library)
    errors = case.errors(first)
    assert max(errors.values()) < LIMIT, (case, errors)
    for schedule in range(1, 4):
        case.schedule, case.blocks = schedule, 1 + schedule
        for name, array in case.run(library).items():
            np.testing.assert_array_equal(array, first[name], f"{name}, schedule {schedule}")


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_column_tiles_begin_where_others_are(head_dim: int, libraries: Libraries) -> None:
    """Rows beyond the cache (a small one here), nothing masked: from any row tile on and around."""
    library = libraries("backward", head_dim)
    for number, s_q in enumerate((250, 450, 2100)):  # 2,100: more row tiles than one word of the lists has
        h_q = 4 if s_q < 1000 else 1
        shape: dict[str, Any] = {"b": 1, "s_q": s_q, "s_k": 200, "h_q": h_q, "h_k": (h_q + 1) // 2, "n": 0, "h_m": 1}
        case = dense_case(head_dim, number, **shape, causal=False, schedule=number, blocks=3)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_that_see_nothing_of_a_step(head_dim: int, libraries: Libraries) -> None:
    """Where documents end in the middle of a column tile, half of its keys see none of the rows that the others see."""
    library = libraries("backward", head_dim)
    # The last 64 keys of the last column tile do not exist where there are 520.
    for number, (s_q, s_k, h_m) in enumerate(((600, 600, 1), (600, 600, 2), (600, 520, 2), (450, 600, 1))):
        ends = np.random.default_rng(number).choice(np.arange(1, s_k), 3 + number, replace=False)
        shape: dict[str, Any] = {"s_q": s_q, "s_k": s_k, "h_q": 2, "h_k": 1, "n": 1, "h_m": h_m}
        case = dense_case(head_dim, number, **shape, documents=(*sorted(ends.tolist()), s_k), causal=True)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)
        case.deterministic = True
        got = case.run(library)
        errors = case.errors(got)
        assert max(errors.values()) < LIMIT, (case, errors)
        assert_as_with_every_tile(got, case, library)


@pytest.mark.parametrize(("head_dim", "low_dim"), FORWARD[:3])
def test_skipped_tiles_change_no_bit(head_dim: int, low_dim: int, libraries: Libraries) -> None:
    library = libraries("forward", head_dim)
    for number in range(6):
        rng = np.random.default_rng((1, number))
        case = emulated.random_problem(rng, head_dim, low_dim, no_skip=False, n=4, causal=False)
        assert_as_with_every_tile(case.run(library), case, library)


@pytest.mark.parametrize(("head_dim", "low_dim"), FORWARD)
@pytest.mark.parametrize("growth", [4, 20, 150])
def test_scores_that_outgrow_the_first_tile(growth: int, head_dim: int, low_dim: int, libraries: Libraries) -> None:
    """The reference of a row's weights moves, and weights beyond float32 are computed again.

    Weights of up to 2^15, 2^80 and 2^600, if the first tile's largest were 1.
    """
    library = libraries("forward", head_dim)
    for number, (n, causal) in enumerate(((0, False), (0, True), (1, True), (2, False), (4, False))):
        case = emulated.random_problem(
            np.random.default_rng((head_dim, 2, number)),
            head_dim,
            low_dim,
            **{"s_q": 140 + 50 * number, "s_k": 420, "n": n, "causal": causal, "block_mask": False},
            **{"growth": growth, "scale": (-1.0) ** number * head_dim**-0.5, "no_skip": False},
        )
        got = case.run(library)
        errors = case.errors(got)
        assert max(errors.values()) < LIMIT, (case, errors)
        assert_as_with_every_tile(got, case, library)
        # Rows decide for themselves: those between others that grow more keep their bits.
        case.stored["q"][:, ::3] = case.store(100 * case.values["q"][:, ::3])
        others = np.arange(case.s_q) % 3 != 0
        for name, array in case.run(library).items():
            axis = 1 if name == "out" else 2
            rows = [x.compress(others, axis) for x in (array, got[name])]
            np.testing.assert_array_equal(*rows, name)


@pytest.mark.parametrize(("head_dim", "low_dim"), FORWARD)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_first_tile_far_below_all_others(dtype: str, head_dim: int, low_dim: int, libraries: Libraries) -> None:
    """What follows is computed again, and to no lower precision for the size of the old reference."""
    library = libraries("forward", head_dim)
    for number, (n, causal) in enumerate(((0, False), (0, True), (2, False))):
        rng = np.random.default_rng((head_dim, 3, number))
        options: dict[str, Any] = {"s_q": 200, "s_k": 420, "n": n, "causal": causal, "block_mask": False, "scale": None}
        case = emulated.random_problem(rng, head_dim, head_dim, **options, dtype=dtype, sunk=30000.0)
        errors = case.errors(case.run(library))
        assert max(errors.values()) < LIMIT, (case, errors)


@pytest.mark.parametrize("races", [emulated.BY_WARPS, emulated.BY_LANES])
@pytest.mark.parametrize(
    ("direction", "head_dim"), [("forward", 96), *((k, d) for k in ("forward", "backward") for d in (64, 128, 256))]
)
def test_shared_memory_has_no_races(direction: str, head_dim: int, races: int, libraries: Libraries) -> None:
    """Between threads, the copy engine and the tensor cores."""
    for number in range(4):
        case = dense_case(head_dim, number, blocks=1 + number % 2, deterministic=number == 2, races=races)
        case.run(libraries(direction, head_dim))


# ---- that it can fail ----


def dense_case(head_dim: int, number: int, **changes: Any) -> Problem:
    """Work enough for every buffer to be used again; long lists, and lists of one tile."""
    shape: dict[str, Any] = {"b": 1, "s_q": 390, "s_k": (390, 100, 200)[number % 3], "h_q": 4, "h_k": 2}
    mask: dict[str, Any] = {"n": 4, "h_m": 4, "causal": False} if number % 2 else {"n": 0, "h_m": 1, "causal": False}
    values: dict[str, Any] = {"d": head_dim, "d_v": head_dim, "seed": number, "schedule": number + 6}
    return Problem(**{**shape, **mask, **values, "blocks": 1 + number % 2, **changes})


def make_fault_cases(kernel: str, head_dim: int) -> list[Problem]:
    # Few steps for each of many column tiles: what is brought ahead of them is in time only if waited for.
    few: dict[str, Any] = {"s_q": 40, "s_k": 600, "h_k": 1, "blocks": 1}
    if kernel == "unmasked":
        few["blocks"] = 2
        short: dict[str, Any] = {"s_k": 170, "blocks": 1}  # one column tile for each of many row tiles
        return [
            *(dense_case(head_dim, 2 * number) for number in range(15)),
            *(dense_case(head_dim, 2 * number, **short) for number in range(10)),
            *(dense_case(head_dim, 2 * number, **few) for number in range(10)),
        ]
    cases = [dense_case(head_dim, number, causal=kernel == "forward" and number % 2 == 0) for number in range(15)]
    cases.append(dense_case(head_dim, 0, **few, h_q=1, h_m=1, causal=kernel == "forward"))
    cases += [dense_case(head_dim, number, **few, h_q=8, h_m=8, n=4, causal=False) for number in range(20)]
    # One step a column tile: warps that are late there are a whole column tile late.
    one: dict[str, Any] = {**few, "h_q": 3, "h_k": 3, "h_m": 3, "n": 4, "causal": False}
    cases += [dense_case(head_dim, number, **one) for number in range(21)]
    if kernel == "forward":  # few column tiles for each of many row tiles of all warpgroups
        cases += [dense_case(head_dim, number, s_q=768, s_k=100, blocks=1) for number in range(20)]
    return cases


@pytest.fixture(scope="session")
def fault_cases() -> Callable[[str, int], list[Problem]]:
    made: dict[tuple[str, int], list[Problem]] = {}

    def get(kernel: str, head_dim: int) -> list[Problem]:
        if (kernel, head_dim) not in made:
            made[kernel, head_dim] = make_fault_cases(kernel, head_dim)
        return made[kernel, head_dim]

    return get


def direction_of(kernel: str) -> str:
    return "forward" if kernel == "unmasked" else kernel


# mbarriers in the order of their init, without those that the head dim does not use (P^T up to 128; dQ above, but for
# turns). Above, these waits are left out too: for an empty P^T or dS^T, which follow from the waits for full ones of
# the step before; for the wish for a ticket, which only may come too early; for a place to tell it, which is free when
# it is wanted; and for the end of column tiles, without which rows are left to the kernel that follows. "unmasked" is
# the forward kernel for calls in which nothing masks.
USED_BARRIERS = [
    ("forward", 64, range(56)),
    ("forward", 96, range(46)),
    ("forward", 128, range(52)),
    ("forward", 192, range(38)),  # 256 has the same
    ("unmasked", 64, range(44)),  # 128 has the same
    ("backward", 128, sorted({*range(38)} - {12, 13, 16, 17})),
    ("backward", 64, range(26, 32)),  # K in three places: the rest is as at 128
    ("backward", 256, [*range(8), 8, 10, 12, 14, 18, 19, *range(24, 28), 30, 32]),
]


@pytest.mark.parametrize(
    ("kernel", "head_dim", "barrier"), [(k, n, i) for k, n, barriers in USED_BARRIERS for i in barriers]
)
def test_no_wait_can_be_left_out(
    kernel: str, head_dim: int, barrier: int, libraries: Libraries, fault_cases: Callable[[str, int], list[Problem]]
) -> None:
    library = libraries(direction_of(kernel), head_dim)
    assert any(is_noticed(case, library, (emulated.BARRIER_WAIT, barrier)) for case in fault_cases(kernel, head_dim))


@pytest.mark.parametrize(
    ("direction", "barrier"),
    [
        *(("forward", barrier) for barrier in (8, 12, 19, 24, 33, 40, 42, 46)),  # of Q, K, V, masks, row tiles, orders
        *(("backward", barrier) for barrier in (0, 1, 5, 8, 19, 23)),  # of Q and steps, dO, dQ
        *(("backward", barrier) for barrier in (20, 21, 26, 27)),  # of V and K
        *(("backward", barrier) for barrier in (28, 32, 37)),  # of intervals, column tiles, the scheduler
    ],
)
def test_races_are_noticed(direction: str, barrier: int, libraries: Libraries) -> None:
    # V and K are free for the next column tile: so there have to be several.
    tiles = {"s_q": 40, "s_k": 600, "blocks": 1} if (direction, barrier) in {("backward", 21), ("backward", 27)} else {}
    case = dense_case(128, 1, races=emulated.BY_WARPS, **tiles)
    with pytest.raises(EmulatedError, match="race"):
        case.run(libraries(direction, 128), (emulated.BARRIER_WAIT, barrier))


def test_who_arrives_for_a_warp(tmp_path: Path) -> None:
    """One lane's arrival stands for its warp if that was synchronised before, but not as racecheck sees it."""
    builder = compilation.Builder(tmp_path / "emulator")
    producer = builder.source / "sm90" / "backward_producer.cuh"
    text = producer.read_text()
    assert "asked().arrive_warp();" in text
    asked = "BackwardBarriers<kHeadDim>{opaque(shared_base)}.asked()"
    one_lane = f"if (__syncwarp(), threadIdx.x % 32 == 0) {asked}.arrive();"
    producer.write_text(text.replace(f"{asked}.arrive_warp();", one_lane))
    library = Emulated(builder.library("backward", 64, ("bf16",)))
    dense_case(64, 1, races=emulated.BY_WARPS).run(library)
    with pytest.raises(EmulatedError, match="race"):
        dense_case(64, 1, races=emulated.BY_LANES).run(library)


def test_gradients_wait_for_their_buffer(tmp_path: Path, fault_cases: Callable[[str, int], list[Problem]]) -> None:
    """At d = 64 dV and dK leave by the buffer of the next dS^T: no wait for it follows from another one."""
    builder = compilation.Builder(tmp_path / "emulator")
    mainloop = builder.source / "sm90" / "backward_mainloop.cuh"
    text = mainloop.read_text()
    waits = {
        "step": "if (count == 1) wait_gradients_read();",
        "no_steps": "wait_for_other_keys();\n      wait_gradients_read();",
        "end": "wait_gradients_read();            // the shared memory must outlive the copies",
        "products": "barriers.ds_empty(ds.stage).wait(ds.parity ^ 1);\n      gradient_to_panel(0, dv);",
    }
    kept = {"no_steps": "wait_for_other_keys();", "products": "gradient_to_panel(0, dv);"}
    cases = [*fault_cases("backward", 64), *(dense_case(64, n, s_q=40, s_k=600, block_mask=True) for n in range(20))]
    for name, wait in waits.items():
        assert text.count(wait) == 1, name
        mainloop.write_text(text.replace(wait, kept.get(name, "")))
        library = Emulated(builder.library("backward", 64, ("bf16",), variant=name))
        assert any(is_noticed(case, library, (emulated.NO_FAULT, 0)) for case in cases), name


@pytest.mark.parametrize("barrier", [16, 17, 20, 21])
def test_turns_are_waited_for(barrier: int, libraries: Libraries) -> None:
    """Above 128 dims: that the turn has come, and that the turn before it was used, for both halves of the dims."""
    cases = (dense_case(256, number, deterministic=True, blocks=3) for number in range(15))
    assert any(is_noticed(case, libraries("backward", 256), (emulated.BARRIER_WAIT, barrier)) for case in cases)


@pytest.mark.parametrize(
    ("head_dim", "count"),
    # Of prepared rows: by 8 warps for every item; of column tiles: by 2 warps; of sums: that they are stored. Above 128
    # dims of four column tiles, each by one warp.
    [(64, 8), (64, 4), (64, 2), (128, 8), (128, 4), (128, 2), (256, 4)],
)
def test_rows_are_waited_for(head_dim: int, count: int, libraries: Libraries) -> None:
    """That they are prepared, that sums are there to add to, and that all column tiles have added."""
    cases = [dense_case(head_dim, number, s_k=200, blocks=2 + number % 2) for number in range(24)]
    # Many column tiles for few rows.
    cases += [dense_case(head_dim, number, s_q=70, s_k=900, blocks=4) for number in range(24)]
    library = libraries("backward", head_dim)
    assert any(is_noticed(case, library, (emulated.COUNT_WAIT, count)) for case in cases)


def test_zeros_are_waited_for(tmp_path: Path) -> None:
    """Above 128 dims: before dQ is added to them. They are always in time unless something holds them up."""
    builder = compilation.Builder(tmp_path / "emulator")
    rows = builder.source / "sm90" / "backward_wide_rows.cuh"
    text = rows.read_text()
    zeroed = "  float* zeroed = p.dq_accumulator"
    assert text.count(zeroed) == 1
    rows.write_text(text.replace(zeroed, "  for (int i = 0; i < 100; ++i) emulator::linger();\n" + zeroed))
    library = Emulated(builder.library("backward", 256, ("bf16",)))
    cases = [dense_case(256, number) for number in range(6)]
    for case in cases:
        assert max(case.errors(case.run(library)).values()) < LIMIT
    row_tiles = 7  # of 64 rows, which are counted
    assert any(is_noticed(case, library, (emulated.COUNT_WAIT, row_tiles)) for case in cases)


@pytest.mark.parametrize(
    ("kernel", "head_dim", "fault"),
    [
        ("forward", 128, (emulated.NAMED_BARRIER, 0)),
        *(("forward", 192, (emulated.NAMED_BARRIER, barrier)) for barrier in (1, 2, 5, 6)),
        ("unmasked", 128, (emulated.NAMED_BARRIER, 0)),
        *(("backward", 128, (emulated.NAMED_BARRIER, barrier)) for barrier in (0, 4, 5)),
        ("backward", 256, (emulated.NAMED_BARRIER, 0)),
        *(
            (direction, head_dim, (fault, 0))
            for fault in (emulated.PROXY_FENCE, emulated.STORE_WAIT)
            for direction, head_dim in (("forward", 192), ("backward", 128))
        ),
        ("backward", 64, (emulated.STORE_WAIT, 128)),  # of consumers: dV and dK have left the buffer of dS^T
        *((direction, 128, (emulated.WGMMA_WAIT, 0)) for direction in ("forward", "backward")),
        *((direction, 128, (emulated.WGMMA_BEGIN, 0)) for direction in ("forward", "backward")),
        *(("unmasked", 128, (fault, 0)) for fault in (emulated.WGMMA_WAIT, emulated.WGMMA_BEGIN)),
    ],
)
def test_nor_anything_else(
    kernel: str,
    head_dim: int,
    fault: tuple[int, int],
    libraries: Libraries,
    fault_cases: Callable[[str, int], list[Problem]],
) -> None:
    library = libraries(direction_of(kernel), head_dim)
    assert any(is_noticed(case, library, fault) for case in fault_cases(kernel, head_dim))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_deadlock_says_who_waits_for_what(direction: str, libraries: Libraries) -> None:
    barrier = {"forward": 6, "backward": 1}[direction]  # "K or Q may be overwritten"
    with pytest.raises(
        EmulatedError, match=rf"(?s)deadlock.*block 0 warp \d+ lanes 0-31 for mbarrier {barrier}, parity"
    ):
        dense_case(128, 0).run(libraries(direction, 128), (emulated.ARRIVAL, barrier))


def test_all_ptx_is_in_files_that_the_machine_replaces() -> None:
    overlay = compilation.HERE / "overlay"
    replaced = {path.relative_to(overlay) for path in overlay.rglob("*.cuh")}
    sources = {path.relative_to(compilation.FLASHMASK): path for path in compilation.FLASHMASK.rglob("*.cuh")}
    with_ptx = {name for name, path in sources.items() if re.search(r"\basm\b|<<<", path.read_text())}
    assert with_ptx == replaced
