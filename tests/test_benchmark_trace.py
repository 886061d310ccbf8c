"""benchmarks/cuda/trace.py on events whose times are known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trace(load):
    return load("benchmarks.cuda.trace")


def events_of(trace, *named):
    """(time, name) of the consumers, in between one event of the producer that is not to count."""
    return sorted([(time, trace.CONSUMERS, name) for time, name in named] + [(2.5, trace.PRODUCER, "place free")])


def test_every_moment_belongs_to_one_part(trace) -> None:
    events = events_of(
        trace,
        *((0.0, "column tile"), (1.0, "keys here"), (3.0, "step"), (6.0, "step"), (10.0, "column tile end")),
        *((15.0, "prepare rows"), (21.0, "row tile here"), (28.0, "row tile done"), (36.0, "row tile here")),
        *((45.0, "row tile done"), (55.0, "row item end"), (66.0, "finish rows"), (78.0, "row tile here")),
        *((91.0, "row tile done"), (105.0, "row item end"), (120.0, "column tile"), (136.0, "keys here")),
        *((153.0, "column tile end"),),
    )
    assert trace.parts(events) == {
        "wait for keys": [1.0, 16.0],
        "wait for the first rows": [2.0, 17.0],
        "step": [3.0],
        "last step and end of column tile": [4.0],
        "from column tile to prepare rows": [5.0],
        "prepare rows: wait for the first": [6.0],
        "prepare rows: a row tile": [7.0, 9.0],
        "prepare rows: wait for the next": [8.0],
        "prepare rows: end": [10.0],
        "from prepare rows to finish rows": [11.0],
        "finish rows: wait for the first": [12.0],
        "finish rows: a row tile": [13.0],
        "finish rows: end": [14.0],
        "from finish rows to column tile": [15.0],
    }
    assert sum(map(sum, trace.parts(events).values())) == 153.0


def test_forward_parts_are_named_by_their_ends(trace) -> None:
    events = events_of(trace, (0.0, "turn"), (3.0, "scores here"), (4.0, "weights made"), (9.0, "turn"))
    assert trace.parts(events) == {
        "from turn to scores here": [3.0],
        "from scores here to weights made": [1.0],
        "from weights made to turn": [5.0],
    }


def test_events_come_in_order_and_in_microseconds(trace) -> None:
    traces = (trace.Trace * 2)()
    for who, pairs in enumerate([[(1, 5000), (5, 9000)], [(20, 6000)]]):
        traces[who].count = len(pairs)
        for i, (event, clock) in enumerate(pairs):
            traces[who].event[i], traces[who].clock[i] = event, clock
    assert trace.in_order(traces, 1000.0) == [
        (0.0, trace.CONSUMERS, "prepare rows"),
        (1.0, trace.PRODUCER, "finds next"),
        (4.0, trace.CONSUMERS, "row item end"),
    ]


def test_the_kernels_and_the_script_mean_the_same(trace) -> None:
    source = (ROOT / "custom_ops" / "flashmask" / "sm90" / "trace.cuh").read_text()
    numbers = {
        int(number): re.sub("(?<!^)([A-Z])", r" \1", name).lower()
        for name, number in re.findall(r"k([A-Z]\w+) = (\d+),", source)
        if not name.startswith("Traced")
    }
    assert numbers == trace.EVENTS
    assert f"kTracedEvents = {trace.MOST_EVENTS};" in source
