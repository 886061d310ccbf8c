"""Where the time of one block of a persistent kernel goes (Hopper; backward up to 128 dims).

    CUDAFLAGS=-DFLASHMASK_TRACE make cuda-lib
    python -m benchmarks.cuda.trace --mask sliding_window --head-dim 128
    python -m benchmarks.cuda.trace --mask causal_document --seqlen 32768 --events build/events.txt
    python -m benchmarks.cuda.trace --direction forward --head-dim 64

The table says of all that the first consumer warpgroup does how often it comes, how long it takes, and its share of the
block's time; --events writes every event, of the warp that brings rows too, in order, with the time since the first. A
trace point takes about 0.1 us of the traced block: little against a step of the backward kernel, which has one, but a
visit of the forward kernel has four, and its block did 13% fewer of them than the others (sliding window, d = 64).
"""

from __future__ import annotations

import argparse
import ctypes
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

# As in custom_ops/flashmask/sm90/trace.cuh.
EVENTS = {
    1: "prepare rows",
    2: "finish rows",
    3: "row tile here",
    4: "row tile done",
    5: "row item end",
    6: "column tile",
    7: "keys here",
    8: "step",
    9: "column tile end",
    10: "turn",
    11: "scores here",
    12: "weights made",
    13: "output here",
    14: "output written",
    20: "finds next",
    21: "next found",
    22: "waits for rows",
    23: "rows prepared",
    24: "place free",
}
CONSUMERS, PRODUCER = range(2)
MOST_EVENTS = 16384

Event = tuple[float, int, str]  # time, CONSUMERS or PRODUCER, name


class Trace(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int32),
        ("event", ctypes.c_int32 * MOST_EVENTS),
        ("clock", ctypes.c_int64 * MOST_EVENTS),
    ]


def in_order(traces: Iterable[Trace], cycles_of_microsecond: float) -> list[Event]:
    """Events of both traces by time, in microseconds since the first."""
    found = [
        (trace.clock[i], who, EVENTS[trace.event[i]]) for who, trace in enumerate(traces) for i in range(trace.count)
    ]
    found.sort()
    return [((clock - found[0][0]) / cycles_of_microsecond, who, name) for clock, who, name in found]


def parts(events: list[Event]) -> dict[str, list[float]]:
    """What the consumers' time is made of: name of the part -> how long it took, each time."""
    mine = [(time, name) for time, who, name in events if who == CONSUMERS]
    found: dict[str, list[float]] = defaultdict(list)
    kind = ""  # of the row item at work
    forward = {EVENTS[number] for number in range(10, 15)}
    for (time, name), (later, follower) in pairwise(mine):
        if name in ("prepare rows", "finish rows"):
            kind = name
        if name in forward:
            part = f"from {name} to {follower}"
        elif name in ("column tile end", "row item end"):
            before = "column tile" if name == "column tile end" else kind
            part = f"from {before} to {follower}"
        elif name == "step" and follower != "step":
            part = "last step and end of column tile" if follower == "column tile end" else name
        elif name in ("prepare rows", "finish rows"):
            part = f"{kind}: wait for the first"
        elif name == "row tile here":
            part = f"{kind}: a row tile"
        elif name == "row tile done":
            part = f"{kind}: end" if follower == "row item end" else f"{kind}: wait for the next"
        elif name == "column tile":
            part = "wait for keys"
        elif name == "keys here":
            part = "wait for the first rows"
        else:
            part = name
        found[part].append(later - time)
    return dict(found)


def show(found: dict[str, list[float]]) -> None:
    total = sum(map(sum, found.values()))
    table = Table(title=f"consumers of one block, {total:.0f} us")
    for column in ("part", "times", "mean us", "median us", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, times in sorted(found.items(), key=lambda item: -sum(item[1])):
        share = f"{100 * sum(times) / total:.1f}%"
        table.add_row(part, str(len(times)), f"{mean(times):.2f}", f"{median(times):.2f}", share)
    Console().print(table)


def measure(library: Path, mask: str, seqlen: int, head_dim: int, tokens: int, direction: str) -> list[Event]:
    """Events of one call in bfloat16, after some that are not looked at."""
    import numpy as np
    import torch

    from benchmarks.cuda.compare import ours
    from benchmarks.cuda.timing import alternating_medians_ms, random_inputs
    from benchmarks.workloads import Case
    from paddle_flashmask import _core

    take = getattr(ctypes.CDLL(str(library)), f"flashmask_take_trace_{direction}_{head_dim}__nv_bfloat16", None)
    if take is None:
        wanted = f"{direction}, head dim {head_dim}"
        raise SystemExit(f"{library} has no traces of {wanted}: build with CUDAFLAGS=-DFLASHMASK_TRACE")
    batch, heads = max(1, tokens // seqlen), 4096 // head_dim
    case = Case(mask, seqlen, head_dim, heads, batch, "bfloat16")
    call = ours(_core.load_library(library), case, random_inputs(batch, seqlen, heads, head_dim), direction)
    traces = (Trace * 2)()

    def take_traces() -> None:
        if status := take(ctypes.byref(traces)):
            raise SystemExit(f"CUDA error {status}")

    (milliseconds,) = alternating_medians_ms([call], at_least=10)
    take_traces()
    call()
    torch.cuda.synchronize()
    take_traces()
    clocks = np.concatenate([np.ctypeslib.as_array(trace.clock)[: trace.count] for trace in traces])
    if len(clocks) == 0:
        raise SystemExit("no events: the persistent kernel did not run, or has fewer blocks than the one traced")
    # The block is at work from the beginning to the end of the call.
    return in_order(traces, float(np.ptp(clocks)) / (milliseconds * 1e3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path("build/cuda/libflashmask.so"))
    parser.add_argument("--direction", default="backward", choices=["forward", "backward"])
    parser.add_argument("--mask", default="sliding_window")
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128, help="one that kernels are compiled for")
    parser.add_argument("--tokens", type=int, default=32768, help="batch * seqlen; heads * head_dim is 4096")
    parser.add_argument("--events", type=Path, help="a file to write all events to")
    args = parser.parse_args()
    events = measure(args.library, args.mask, args.seqlen, args.head_dim, args.tokens, args.direction)
    if args.events:
        args.events.write_text("".join(f"{time:10.3f} {'    ' * who}{name}\n" for time, who, name in events))
    show(parts(events))


if __name__ == "__main__":
    main()
