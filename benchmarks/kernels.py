"""Times attention kernels: this package's against its rivals, same inputs, same run.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cpu --masks causal,document --seqlens 2048 --rivals ours,sdpa
    python benchmarks/kernels.py --device cuda --head-dims 128     # needs `make cuda-lib` and PyTorch

Each rival runs in a process of its own. Results go to --out as JSON, after every case, and to the terminal as a table.
Rivals take turns: in the next round, and in the next case, the last is the first, so that heat and clocks favour none.

Each case's results (output, gradients; 4,096 values of each) are compared with those of its first rival that was
measured, ours unless --rivals says otherwise: `difference` is the largest ||a - b|| / ||b||. Where it is NaN or more
than rounding explains, the end of the output says so and the status is 1: something computes another thing, and its
time means nothing. A mistake in a few of very many values is not found so; that is what the tests are for.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
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


# Of one answer, compilation of a variant included; after that the process is ended, which costs one figure.
PATIENCE_SECONDS = 240.0
# What `difference` may be. Rivals round P and dS to 16 bits in different places; 0.0052 is the largest that
# benchmarks/results has, all in bfloat16. In float32 only the order of sums differs; there it is 1.8e-6.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
# On a device, before the first measurement: clocks and temperature as under load.
WARM_UP_SECONDS = 3.0


class Worker:
    """A process of one rival; started again after a crash."""

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
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # a worker that ended early says why, or says nothing, below
            print(json.dumps({"case": case.as_dict(), "seconds": seconds}), file=self.process.stdin, flush=True)
        watchdog = threading.Timer(PATIENCE_SECONDS, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            return {"failed": f"the process ended with status {self.process.wait()}"}
        answer = json.loads(line)
        if "unavailable" in answer:
            self.unavailable = answer["unavailable"]
            return {"skipped": self.unavailable}
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait()


class Pool:
    """The processes of one rival: one, or with `processes` several among which the variants to compile are dealt out.

    The process that compiled a variant also measures it: its code need not be found again on disk and loaded.
    """

    def __init__(self, device: str, rival: str, cases: list[Case], processes: int) -> None:
        self.rival = rival
        first: dict[Hashable, Case] = {}  # of each variant
        for case in cases:
            first.setdefault(rivals.variant(device, rival, case), case)
        self.number = {case: list(first).index(rivals.variant(device, rival, case)) for case in cases}
        self.to_compile = [] if None in first else list(first.values())
        self.workers = [Worker(device, rival) for _ in range(max(1, min(processes, len(first))))]

    def worker(self, case: Case) -> Worker:
        return self.workers[self.number[case] % len(self.workers)]

    def ask(self, case: Case, seconds: float) -> dict[str, Any]:
        return self.worker(case).ask(case, seconds)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def compile_ahead(pools: list[Pool]) -> None:
    """Compiles all variants, every process its share, all processes at once: FlexAttention takes about 20 s each."""
    shares = [
        (worker, [case for case in pool.to_compile if pool.worker(case) is worker])
        for pool in pools
        for worker in pool.workers
    ]

    def work(share: tuple[Worker, list[Case]]) -> None:
        for case in share[1]:
            if reason := share[0].ask(case, 0).get("failed"):
                print(f"not compiled: {share[0].command[-1]} on {_place(case)}: {reason}", flush=True)

    with ThreadPoolExecutor(max(1, len(shares))) as threads:
        list(threads.map(work, shares))


def measure_case(case: Case, pools: list[Pool], rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The answer of each rival: in every round each is asked once, the order reversed from round to round."""
    answers: dict[str, list[dict[str, Any]]] = {pool.rival: [] for pool in pools}
    for number in range(rounds):
        for pool in pools[:: -1 if number % 2 else 1]:
            earlier = answers[pool.rival]
            if not (earlier and _reason(earlier[-1])):
                earlier.append(pool.ask(case, seconds))
    return {
        rival: given[-1] if _reason(given[-1]) else measure.combine(given) for rival, given in answers.items() if given
    }


def _reason(answer: dict[str, Any]) -> str | None:
    """Why there are no figures."""
    return answer.get("failed") or answer.get("skipped")


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
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="RIVAL:SEQLEN,...",
        help="run a rival at these lengths only; may be given repeatedly",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each direction in each round")
    parser.add_argument("--rounds", type=numbers, default=[1], help="one number, or one for each of --seqlens")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument(
        "--compile-processes",
        type=int,
        default=0,
        help="compile all cases of rivals that compile (FlexAttention, flash-attn-4) first, each in so many processes",
    )
    parser.add_argument("--wait-for", type=Path, help="measure once this file exists, which others on the device make")
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
    arguments.only = {rival: numbers(lengths) for rival, _, lengths in (each.partition(":") for each in arguments.only)}
    for rival in arguments.only:
        if rival not in arguments.rivals:
            parser.error(f"--only: {rival!r} is not one of {', '.join(arguments.rivals)}")
    if len(arguments.rounds) not in (1, len(arguments.seqlens)) or min(arguments.rounds) < 1:
        parser.error(
            f"--rounds: expected one number of at least 1, or one for each of --seqlens, got {arguments.rounds}"
        )
    arguments.rounds = dict(zip(arguments.seqlens, arguments.rounds * len(arguments.seqlens), strict=False))
    arguments.out = arguments.out or ROOT / "build" / "bench" / f"{arguments.device}.json"
    return arguments


def recorded_command() -> str:
    """The command line without the names of files, which say nothing about the results."""
    words = ["python", "benchmarks/kernels.py", *sys.argv[1:]]
    for option in ("--out", "--wait-for"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return " ".join(words)


def selected(arguments: argparse.Namespace, rival: str, case: Case) -> bool:
    return case.seqlen in arguments.only.get(rival, [case.seqlen]) and (
        rival not in arguments.slow_rivals or case.mask in arguments.slow_masks
    )


def main() -> None:
    started = time.monotonic()
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
    pools = []
    for rival in arguments.rivals:
        mine = [case for case in cases if selected(arguments, rival, case)]
        pools.append(Pool(arguments.device, rival, mine, arguments.compile_processes))
    if arguments.compile_processes:
        # Processes enough for all cores: none needs helpers of its own.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        compile_ahead([pool for pool in pools if pool.to_compile])
        print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    while arguments.wait_for and not arguments.wait_for.exists():
        time.sleep(0.2)
    if not on_cpu and pools[0].number:
        pools[0].ask(next(iter(pools[0].number)), WARM_UP_SECONDS)
    rows: list[dict[str, Any]] = []
    not_measured: list[dict[str, Any]] = []
    different: list[str] = []
    versions: dict[str, Any] = {}
    machine["versions"] = versions
    result = report.header(arguments.device, recorded_command(), machine)
    result |= {"not_measured": not_measured, "rows": rows}
    for number, case in enumerate(track(cases, description="benchmarking", console=None)):
        chosen = [pool for pool in pools if selected(arguments, pool.rival, case)]
        if time.monotonic() - started > arguments.time_limit:
            late = f"not begun after {arguments.time_limit:.0f} s"
            not_measured += [{**_place(case), "rival": pool.rival, "reason": late} for pool in chosen]
            continue
        answers = measure_case(
            case, chosen[:: -1 if number % 2 else 1], arguments.rounds[case.seqlen], arguments.seconds
        )
        reference = None
        for rival in (pool.rival for pool in chosen):
            answer = answers[rival]
            reason = _reason(answer)
            if reason:
                not_measured.append({**_place(case), "rival": rival, "reason": reason})
                continue
            versions |= answer.pop("versions")
            entry = report.row(case, rival, answer)
            sampled = answer.pop("sample")
            reference = reference or sampled  # the first rival's: ours, unless --rivals says otherwise
            entry["difference"] = float(f"{measure.largest_difference(sampled, reference):.2g}")
            rows.append(entry)
            if not entry["difference"] <= LARGEST_DIFFERENCE[case.dtype]:  # NaN, too
                different.append(
                    "different results: {rival} on {mask}, {seqlen}, d = {head_dim}: {difference}".format(**entry)
                )
        report.write(arguments.out, result)  # a run that is ended leaves what it has
    for pool in pools:
        pool.close()
    report.write(arguments.out, result)
    report.show(rows, *(("GFLOP/s", 1e3) if on_cpu else ()))
    if on_cpu:
        print(f"NumPy's float32 matrix product in this run: {machine['numpy_sgemm_tflops'] * 1e3:.1f} GFLOP/s")
    for entry in not_measured:
        if not entry["reason"].startswith(("takes no mask", "no mask to hold")):
            print("not measured: {rival} on {mask}, {seqlen}, d = {head_dim}: {reason}".format(**entry))
    print(f"written to {arguments.out} after {time.monotonic() - started:.0f} s")
    if different:
        print("\n".join(different), flush=True)
        limit = LARGEST_DIFFERENCE[arguments.dtype]
        raise SystemExit(
            f"{len(different)} of {len(rows)} differ by more than {limit} ({arguments.dtype}) from the first rival"
        )


def _place(case: Case) -> dict[str, Any]:
    return {"mask": case.mask, "seqlen": case.seqlen, "head_dim": case.head_dim}


if __name__ == "__main__":
    main()
