"""Times attention kernels: this package's against its rivals, same inputs, same run.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cpu --masks causal,document --seqlens 2048 --rivals ours,sdpa
    python benchmarks/kernels.py --device cuda --head-dims 128     # needs `make cuda-lib` and PyTorch

Each rival runs in a process of its own. Results go to --out as JSON and to the terminal as a table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Before any library that reads it: Paddle would set it to 1.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.progress import track  # noqa: E402

from benchmarks import measure, report, rivals  # noqa: E402
from benchmarks.workloads import MASKS, Case  # noqa: E402

# What --device implies where nothing else is said. On a GPU: the official benchmark's 131,072 tokens, 4,096 channels.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"seqlens": [4096], "head_dims": [128], "heads": 8, "batch": 1, "dtype": "float32", "sample": 3},
    "cuda": {"seqlens": [8192, 32768, 131072], "head_dims": [64, 128, 256], "dtype": "bfloat16", "sample": 0},
}


class Worker:
    """The process of one rival; started again after a crash."""

    def __init__(self, device: str, rival: str) -> None:
        self.command = [sys.executable, "-m", "benchmarks.worker", device, rival]
        self.process: subprocess.Popen[str] | None = None
        self.unavailable: str | None = None

    def ask(self, case: Case, seconds: float) -> dict[str, Any]:
        if self.unavailable is not None:
            return {"skipped": self.unavailable}
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        with contextlib.suppress(BrokenPipeError):  # a worker that ended early says why, or says nothing, below
            print(json.dumps({"case": case.as_dict(), "seconds": seconds}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with status {self.process.wait()}"}
        answer = json.loads(line)
        if "unavailable" in answer:
            self.unavailable = answer["unavailable"]
            return {"skipped": self.unavailable}
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait()


def compile_ahead(device: str, rival: str, cases: list[Case], processes: int) -> None:
    """Fills the compiler's cache, which the measuring process then reads: a case alone takes about 20 s."""

    def work(share: list[Case]) -> None:
        worker = Worker(device, rival)
        for case in share:
            worker.ask(case, 0)
        worker.close()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, [cases[first::processes] for first in range(processes)]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--device", choices=list(DEFAULTS), required=True)
    parser.add_argument("--masks", type=names, default=list(MASKS), help="comma-separated; default: all twelve")
    parser.add_argument("--seqlens", type=numbers)
    parser.add_argument("--head-dims", type=numbers)
    parser.add_argument("--heads", type=int, help="default: 8 (cpu), 4096 / head_dim (cuda)")
    parser.add_argument("--batch", type=int, help="default: 1 (cpu), 131072 / seqlen (cuda)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sample", type=int, help="document sample of the first row; 3 has six documents at 8K")
    parser.add_argument("--rivals", type=names, default=None)
    parser.add_argument("--slow-rivals", type=names, default=["paddle_dense"], help="run on --slow-masks only")
    parser.add_argument("--slow-masks", type=names, default=["causal", "causal_document"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each direction of a measurement")
    parser.add_argument(
        "--compile-processes",
        type=int,
        default=0,
        help="compile FlexAttention for all cases first, in so many processes at once, into PyTorch's cache on disk",
    )
    parser.add_argument("--out", type=Path, default=None, help="default: build/bench/DEVICE.json")
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for mask in arguments.masks:
        if mask not in MASKS:
            parser.error(f"--masks: {mask!r} is not one of {', '.join(MASKS)}")
    known = rivals.names(arguments.device)
    arguments.rivals = arguments.rivals or known
    for rival in arguments.rivals:
        if rival not in known:
            parser.error(f"--rivals: {rival!r} is not one of {', '.join(known)}")
    arguments.out = arguments.out or ROOT / "build" / "bench" / f"{arguments.device}.json"
    return arguments


def recorded_command() -> str:
    """The command line without --out: where somebody kept the results says nothing about them."""
    words = ["python", "benchmarks/kernels.py", *sys.argv[1:]]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(words)


def main() -> None:
    arguments = parse_arguments()
    on_cpu = arguments.device == "cpu"
    machine = report.cpu_machine() if on_cpu else report.cuda_machine()
    if on_cpu:
        machine["numpy_sgemm_tflops"] = report.numpy_sgemm_tflops()
    cases = [
        Case(
            mask,
            seqlen,
            head_dim,
            arguments.heads or 4096 // head_dim,
            arguments.batch or max(1, 131072 // seqlen),
            arguments.dtype,
            arguments.sample,
        )
        for seqlen, head_dim, mask in itertools.product(arguments.seqlens, arguments.head_dims, arguments.masks)
    ]
    if arguments.compile_processes and "flex" in arguments.rivals:
        compile_ahead(arguments.device, "flex", cases, arguments.compile_processes)
    workers = {rival: Worker(arguments.device, rival) for rival in arguments.rivals}
    rows: list[dict[str, Any]] = []
    not_measured: list[dict[str, str]] = []
    versions: dict[str, Any] = {}
    for case in track(cases, description="benchmarking", console=None):
        reference = None
        for rival, worker in workers.items():
            if rival in arguments.slow_rivals and case.mask not in arguments.slow_masks:
                continue
            answer = worker.ask(case, arguments.seconds)
            reason = answer.get("failed") or answer.get("skipped")
            if reason:
                not_measured.append({"mask": case.mask, "rival": rival, "reason": reason})
                continue
            versions |= answer.pop("versions")
            entry = report.row(case, rival, answer)
            sampled = answer.pop("sample")
            reference = reference or sampled  # the first rival's: ours, unless --rivals says otherwise
            entry["difference"] = float(f"{measure.largest_difference(sampled, reference):.2g}")
            rows.append(entry)
    for worker in workers.values():
        worker.close()
    machine["versions"] = versions
    result = report.header(arguments.device, recorded_command(), machine)
    result |= {"not_measured": not_measured, "rows": rows}
    report.write(arguments.out, result)
    report.show(rows, *(("GFLOP/s", 1e3) if on_cpu else ()))
    if on_cpu:
        print(f"NumPy's float32 matrix product in this run: {machine['numpy_sgemm_tflops'] * 1e3:.1f} GFLOP/s")
    for entry in not_measured:
        if not entry["reason"].startswith(("takes no mask", "no mask to hold")):
            print(f"not measured: {entry['rival']} on {entry['mask']}: {entry['reason']}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
