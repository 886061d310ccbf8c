"""What results files of benchmarks/kernels.py say: rates over the own causal's, time ratios to rivals, goals.

    python benchmarks/summary.py benchmarks/results/h100-kernels-64-128.json

Ratios are taken within one file, which is one run. Rates count every 128x128 tile that is not fully masked as full. Of
several files of one machine, goals are counted over all head dims as well, those of each in one of the files.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[dict[str, Any]]
Place = tuple[int, int, str]  # seqlen, head dim, mask

PASSES = ("forward", "backward")
DIRECTIONS = (*PASSES, "total")
OURS = ("ours", "ours_sm80")
UNMASKED = ("full", "causal")


def milliseconds(row: dict[str, Any], direction: str) -> float:
    forward, backward = float(row["fwd_ms"]), float(row["bwd_ms"])
    return {"forward": forward, "backward": backward, "total": forward + backward}[direction]


def by_place(rows: Rows, rival: str) -> dict[Place, dict[str, Any]]:
    """The rows of a rival that has both directions."""
    return {
        (row["seqlen"], row["head_dim"], row["mask"]): row
        for row in rows
        if row["rival"] == rival and row["bwd_ms"] is not None
    }


def over_causal(rows: Rows, rival: str) -> dict[Place, dict[str, float]]:
    """By-tile rate of each mask over the same rival's causal rate at the same length and head dim, by direction."""
    mine = by_place(rows, rival)
    found = {}
    for (seqlen, head_dim, mask), row in mine.items():
        causal = mine.get((seqlen, head_dim, "causal"))
        if causal is not None and mask != "causal":
            work = row["unskipped_tiles_128"] / causal["unskipped_tiles_128"]
            found[seqlen, head_dim, mask] = {
                each: work * milliseconds(causal, each) / milliseconds(row, each) for each in DIRECTIONS
            }
    return found


def time_ratios(rows: Rows, rival: str, baseline: str = "ours", direction: str = "total") -> dict[Place, float]:
    """The rival's time over the baseline's, for each case that both ran."""
    theirs, mine = by_place(rows, rival), by_place(rows, baseline)
    return {
        place: milliseconds(theirs[place], direction) / milliseconds(mine[place], direction)
        for place in theirs
        if place in mine
    }


@dataclass(frozen=True)
class Goal:
    """A value that ought to reach `target`, and has to reach `floor`; with `at_most`, to stay below."""

    name: str
    values: dict[str, float]  # by what they belong to; the worst counts
    target: float
    floor: float | None = None
    at_most: bool = False

    def worst(self) -> tuple[str, float]:
        return (max if self.at_most else min)(self.values.items(), key=lambda item: item[1])

    def reaches(self, bound: float) -> int:
        return sum(value <= bound if self.at_most else value >= bound for value in self.values.values())

    def verdict(self) -> str:
        if not self.values:
            return "not measured"
        if self.reaches(self.target) == len(self.values):
            return "met"
        if self.floor is not None and self.reaches(self.floor) == len(self.values):
            return "floor kept"
        return "missed"


def name(place: Place) -> str:
    seqlen, head_dim, mask = place
    return f"{mask} {seqlen // 1024}K d={head_dim}"


def best_rival_ratios(rows: Rows, rivals: list[str], baseline: str) -> dict[str, float]:
    """Best rival's time over the baseline's for full and causal, forward and backward apart."""
    found: dict[str, float] = {}
    for direction in PASSES:
        best: dict[Place, tuple[float, str]] = {}
        for rival in rivals:
            for place, ratio in time_ratios(rows, rival, baseline, direction).items():
                if place[2] in UNMASKED:
                    best[place] = min(best.get(place, (ratio, rival)), (ratio, rival))
        found |= {f"{direction} {name(place)} ({rival})": ratio for place, (ratio, rival) in best.items()}
    return found


def goals(rows: Rows) -> list[Goal]:
    """What the kernels are meant to reach on an H100 or H200; of rivals and modes that a file lacks: not measured."""
    rivals = [each for each in dict.fromkeys(row["rival"] for row in rows) if not each.startswith("ours")]
    made = []

    def rows_of(*head_dims: int) -> Rows:
        return [row for row in rows if row["head_dim"] in head_dims]

    def named(ratios: dict[Place, float]) -> dict[str, float]:
        return {name(place): ratio for place, ratio in ratios.items()}

    def mean(ratios: dict[Place, float]) -> dict[str, float]:
        return {f"{len(ratios)} cases": geometric_mean(ratios.values())} if ratios else {}

    def masked(rival: str, eviction: bool) -> dict[str, float]:
        """Of random eviction, or of all other masks; what masks nothing is none of them."""
        return {
            f"{direction} {name(place)}": ratios[direction]
            for place, ratios in over_causal(rows, rival).items()
            for direction in PASSES
            if place[2] not in UNMASKED and (place[2] == "random_eviction") == eviction
        }

    made.append(
        Goal(
            "full, causal: best rival / ours, d = 64, 128",
            best_rival_ratios(rows_of(64, 128), rivals, "ours"),
            1.0,
            0.92,
        )
    )
    made.append(
        Goal("full, causal: cuDNN / ours, d = 256", best_rival_ratios(rows_of(256), ["sdpa"], "ours"), 1.0, 0.92)
    )
    made.append(Goal("by-tile rate over own causal", masked("ours", False), 0.95, 0.85))
    made.append(Goal("the same, random eviction", masked("ours", True), 0.85, 0.70))
    narrow, wide = time_ratios(rows_of(64, 128), "flex"), time_ratios(rows_of(256), "flex")
    made.append(Goal("FlexAttention / ours, d = 64, 128: geometric mean", mean(narrow), 1.6, 1.45))
    made.append(Goal("FlexAttention / ours, d = 64, 128: smallest", named(narrow), 1.25, 1.1))
    made.append(Goal("FlexAttention / ours, d = 256: geometric mean", mean(wide), 2.3))
    slower = time_ratios(rows, "ours_deterministic", "ours", "backward")
    made.append(Goal("deterministic backward / default", named(slower), 1.15, at_most=True))
    portable = best_rival_ratios(rows_of(64, 128), ["sdpa_flash"], "ours_sm80")
    made.append(Goal("portable, full, causal: FlashAttention-2 / ours, d = 64, 128", portable, 0.95))
    made.append(Goal("portable: by-tile rate over own causal", masked("ours_sm80", False), 0.9))
    made.append(Goal("portable: the same, random eviction", masked("ours_sm80", True), 0.75))
    return made


def causal_table(rows: Rows, rival: str, head_dim: int) -> Table | None:
    ratios = {(s, mask): each for (s, d, mask), each in over_causal(rows, rival).items() if d == head_dim}
    if not ratios:
        return None
    table = Table(title=f"{rival}, d = {head_dim}: by-tile rate over own causal, forward / backward / total")
    table.add_column("mask")
    lengths = list(dict.fromkeys(seqlen for seqlen, _ in ratios))
    masks = list(dict.fromkeys(mask for _, mask in ratios))
    for seqlen in lengths:
        table.add_column(f"{seqlen // 1024}K", justify="right")
    for mask in masks:
        cells = [ratios.get((seqlen, mask)) for seqlen in lengths]
        table.add_row(mask, *(" / ".join(f"{x[each]:.2f}" for each in DIRECTIONS) if x else "-" for x in cells))
    return table


def rival_table(rows: Rows) -> Table:
    """Time ratios to each rival, by head dim and over all, for each of our kernels that ran."""
    table = Table(title="rival's time over ours: geometric mean (smallest) of the cases that both ran")
    for column in ("ours", "rival", "d", "cases", *DIRECTIONS, "smallest total at"):
        table.add_column(column, justify="left" if column in ("ours", "rival", "smallest total at") else "right")
    present = list(dict.fromkeys(row["rival"] for row in rows))
    for baseline in (each for each in OURS if each in present):
        for rival in (each for each in present if each != baseline):
            groups: dict[str, Rows] = defaultdict(list)
            for row in rows:
                groups[str(row["head_dim"])].append(row)
                groups["all"].append(row)
            if len(groups) == 2:
                del groups["all"]
            for group, members in sorted(groups.items(), key=lambda item: (item[0] == "all", len(item[0]), item[0])):
                found = {each: time_ratios(members, rival, baseline, each) for each in DIRECTIONS}
                if not found["total"]:
                    continue
                cells = [f"{geometric_mean(x.values()):.2f} ({min(x.values()):.2f})" for x in found.values()]
                least = min(found["total"], key=found["total"].__getitem__)
                table.add_row(baseline, rival, group, str(len(found["total"])), *cells, name(least))
    return table


def joined(results: dict[str, dict[str, Any]]) -> tuple[Rows, dict[int, str]]:
    """Of each head dim the rows of one file, so that ratios stay within a run, and which file that is.

    It is the one in which our masks ran at most lengths, of several the newest, of several the last.
    """
    best: dict[int, tuple[int, str, int, str]] = {}
    for position, (file, result) in enumerate(results.items()):
        lengths: dict[int, set[int]] = defaultdict(set)
        for seqlen, head_dim, mask in by_place(result["rows"], "ours"):
            if mask not in UNMASKED:
                lengths[head_dim].add(seqlen)
        for head_dim, found in lengths.items():
            candidate = (len(found), result.get("measured", ""), position, file)
            best[head_dim] = max(best.get(head_dim, candidate), candidate)
    files = {head_dim: best[head_dim][-1] for head_dim in sorted(best)}
    rows = [row for head_dim, file in files.items() for row in results[file]["rows"] if row["head_dim"] == head_dim]
    return rows, files


def goal_table(listed: list[Goal], title: str = "goals") -> Table:
    table = Table(title=title)
    numbers = ("target", "reached by", "floor", "kept by", "worst")
    for column in ("goal", *numbers, "at", ""):
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    for goal in listed:
        sign = "<= " if goal.at_most else ">= "
        worst = goal.worst() if goal.values else ("", float("nan"))
        table.add_row(
            goal.name,
            f"{sign}{goal.target:.2f}",
            f"{goal.reaches(goal.target)} of {len(goal.values)}" if goal.values else "-",
            "-" if goal.floor is None else f"{goal.floor:.2f}",
            f"{goal.reaches(goal.floor)} of {len(goal.values)}" if goal.values and goal.floor is not None else "-",
            f"{worst[1]:.3f}" if goal.values else "-",
            worst[0],
            goal.verdict(),
        )
    return table


def machine_name(result: dict[str, Any]) -> str:
    return str(result["machine"].get("gpu", result["machine"].get("cpu")))


def show(result: dict[str, Any], width: int = 150) -> None:
    rows = result["rows"]
    console = Console(width=width)
    console.print(f"{machine_name(result)}, commit {result['commit']}, {len(rows)} rows", highlight=False)
    for rival in OURS:
        for head_dim in sorted({row["head_dim"] for row in rows}):
            table = causal_table(rows, rival, head_dim)
            if table is not None:
                console.print(table)
    console.print(rival_table(rows))
    console.print(goal_table(goals(rows)))


def show_joined(results: dict[str, dict[str, Any]], width: int = 150) -> None:
    """Goals over all head dims, for each machine of which there are several files."""
    console = Console(width=width)
    for machine in dict.fromkeys(map(machine_name, results.values())):
        of_machine = {file: result for file, result in results.items() if machine_name(result) == machine}
        if len(of_machine) > 1:
            rows, files = joined(of_machine)
            dims = {file: [str(each) for each in files if files[each] == file] for file in files.values()}
            taken = "; ".join(f"d = {', '.join(dims[file])}: {Path(file).name}" for file in dims)
            measured = [goal for goal in goals(rows) if goal.values]  # the others may be in files that were not taken
            console.print(goal_table(measured, f"goals on {machine} over all head dims ({taken})"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of benchmarks/kernels.py")
    results: dict[str, dict[str, Any]] = {}
    for path in parser.parse_args().results:
        result = json.loads(path.read_text())
        if any("rival" in row for row in result.get("rows", ())):
            results[str(path)] = result
            show(result)
        else:
            print(f"{path}: no times in it, passed over")
    show_joined(results)


if __name__ == "__main__":
    main()
