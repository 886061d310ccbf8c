"""Rows of results as the JSON that benchmarks/results/ keeps, and as a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import Case

ROOT = Path(__file__).resolve().parent.parent


def row(case: Case, rival: str, answer: dict[str, Any]) -> dict[str, Any]:
    """One measured rival on one case. TFLOPs/s count visible scores; `by_tile` counts every 128x128 tile that is not
    fully masked as full (the paper's way). The backward pass counts 2.5 times the forward's operations."""
    area, tiles = case.area()
    fwd_ms, bwd_ms = answer["fwd_ms"], answer["bwd_ms"]
    total_ms = None if bwd_ms is None else fwd_ms + bwd_ms

    def tflops(share: float, passes: float, milliseconds: float | None) -> float | None:
        if milliseconds is None:
            return None
        return float(f"{case.forward_flops() * share * passes / milliseconds / 1e9:.4g}")

    return {
        "mask": case.mask,
        "seqlen": case.seqlen,
        "head_dim": case.head_dim,
        "heads": case.heads,
        "batch": case.batch,
        "dtype": case.dtype,
        "rival": rival,
        "total_tokens": case.seqlen * case.batch,
        "fwd_ms": fwd_ms,
        "bwd_ms": bwd_ms,
        "tflops_fwd": tflops(area, 1, fwd_ms),
        "tflops_bwd": tflops(area, 2.5, bwd_ms),
        "tflops_total": tflops(area, 3.5, total_ms),
        "tflops_total_by_tile": tflops(tiles, 3.5, total_ms),
        "unmasked_area": round(area, 4),
        "unskipped_tiles_128": round(tiles, 4),
        "runs": answer["runs"],
        **{name: answer[name] for name in ("peak_mib", "kernels") if name in answer},
    }


def commit() -> str:
    """$FLASHMASK_COMMIT, for a copy of the tree whose history is missing or says nothing; else what git says."""
    named = os.environ.get("FLASHMASK_COMMIT")
    if named:
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_machine() -> dict[str, Any]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "os": platform.platform(),
    }


def cuda_machine() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("--device cuda: there is no nvidia-smi here, and so no NVIDIA GPU")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


def numpy_sgemm_tflops(size: int = 2048, repeats: int = 5) -> float:
    """The best rate of NumPy's float32 matrix product: what this machine's arithmetic yields in this run."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return float(f"{2 * size**3 / best / 1e12:.4g}")


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {key: value for key, value in report.items() if key != "rows"}
    rows = ",\n  ".join(json.dumps(entry) for entry in report["rows"])
    path.write_text(json.dumps(body, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n')


def header(device: str, command: str, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "measured": datetime.date.today().isoformat(),
        "device": device,
        "commit": commit(),
        "command": command,
        "machine": machine,
    }


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def show(rows: list[dict[str, Any]], unit: str = "TFLOPs/s", factor: float = 1.0) -> None:
    """Prints the rows. The last column compares forward + backward, or forward alone where a rival has no backward."""
    table = Table(title=f"forward + backward, {unit} by true area")
    for name in ("mask", "seqlen", "d", "rival", "fwd ms", "bwd ms", unit, "by tile", "rival's time / ours"):
        table.add_column(name, justify="left" if name in ("mask", "rival") else "right")
    ours = {(r["mask"], r["seqlen"], r["head_dim"], r["dtype"]): r for r in rows if r["rival"] == "ours"}
    for r in rows:
        mine = ours.get((r["mask"], r["seqlen"], r["head_dim"], r["dtype"]))
        directions = ("fwd_ms",) if r["bwd_ms"] is None else ("fwd_ms", "bwd_ms")
        ratio = sum(r[d] for d in directions) / sum(mine[d] for d in directions) if mine else None
        table.add_row(
            r["mask"],
            str(r["seqlen"]),
            str(r["head_dim"]),
            r["rival"],
            _number(r["fwd_ms"]),
            _number(r["bwd_ms"]),
            _number(r["tflops_total"], factor),
            _number(r["tflops_total_by_tile"], factor),
            _number(ratio, digits=2),
        )
    Console(width=120).print(table)
