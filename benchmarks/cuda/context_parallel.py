"""One sequence on several GPUs of one machine: what the steps of paddle_flashmask.distributed take there.

    torchrun --nproc_per_node 2 benchmarks/cuda/context_parallel.py      # needs `make cuda-lib`, PyTorch and GPUs

PyTorch moves the tensors here, as paddle_flashmask.distributed has Paddle do it, by NCCL; the kernels and what they are
called with are the same. So what Paddle itself takes is not in these times. For each mask, forward and backward:
- one: the whole sequence on one GPU;
- all: the busiest worker's step (keys and values gathered, two chunks of rows; shares of dK and dV added);
- kernels, communication: the same steps with only one of the two.
Times are medians in ms; all workers begin a step together. Every result is compared with that of one GPU first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests" / "gpu"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from benchmarks import report  # noqa: E402
from benchmarks.workloads import MASKS, Case  # noqa: E402

LARGEST_ERROR = 0.005  # dK and dV are sums of shares that were rounded to bfloat16
DIRECTIONS = ("forward", "backward")


class Steps:
    """A worker's part of one attention call, and the whole of it, on its GPU. Tensors are `[1, tokens, heads, dim]`."""

    def __init__(self, case: Case, heads_k: int, rank: int, workers: int) -> None:
        import torch
        from device_tensors import Call

        from benchmarks.cuda.timing import random_inputs

        indices, causal = case.indices()
        self.workers, self.length = workers, case.seqlen // (2 * workers)
        self.chunks = (rank, 2 * workers - 1 - rank)
        q, k, v, dout = random_inputs(1, case.seqlen, case.heads, case.head_dim, heads_k)
        bounds = None if indices is None else torch.from_numpy(np.ascontiguousarray(indices)).cuda()
        self.whole = Call(q, k, v, bounds, causal=causal, deterministic=False)
        self.whole.set_gradient(dout)

        self.parts = [self.of_worker(x) for x in (k, v)]
        self.gathered = [x.new_empty((workers, *part.shape)) for x, part in zip((k, v), self.parts, strict=True)]
        self.keys = [torch.empty_like(x) for x in (k, v)]
        order = [2 * r for r in range(workers)] + [2 * r + 1 for r in reversed(range(workers))]
        self.by_rank = torch.tensor([c for r in range(workers) for c in (r, 2 * workers - 1 - r)], device="cuda")
        self.in_order = torch.tensor(order, device="cuda")
        self.sums = [x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v)]
        self.sent = [torch.empty_like(x) for x in self.sums]
        self.own = [x.new_empty(x.shape, dtype=torch.float32) for x in self.parts]
        self.calls = []
        for chunk in self.chunks:
            first = chunk * self.length
            seen = first + self.length if causal else case.seqlen
            rows = slice(first, first + self.length)
            part = None if bounds is None else (bounds[:, :, :seen].clamp(0, case.seqlen) - first).contiguous()
            call = Call(q[:, rows].contiguous(), *(x[:, :seen] for x in self.keys), part, causal=causal)
            call.set_gradient(dout[:, rows].contiguous())
            self.calls.append(call)

    def of_worker(self, whole: Any) -> Any:
        import torch

        return torch.cat([whole[:, c * self.length : (c + 1) * self.length] for c in self.chunks], 1)

    def chunked(self, whole: Any) -> Any:
        """A view by chunks."""
        return whole.view(2 * self.workers, self.length, *whole.shape[2:])

    def gather(self) -> None:
        import torch
        import torch.distributed as dist

        for part, gathered, whole in zip(self.parts, self.gathered, self.keys, strict=True):
            dist.all_gather_into_tensor(gathered, part)
            torch.index_select(self.chunked(gathered[:, 0]), 0, self.in_order, out=self.chunked(whole))

    def add(self) -> None:
        """Gradients of this worker's keys and values into `own`."""
        import torch
        import torch.distributed as dist

        shares = zip(*(call.gradients[1:] for call in self.calls), strict=True)
        for (early, late), whole, sent, own in zip(shares, self.sums, self.sent, self.own, strict=True):
            whole.zero_()
            for share in (early, late):
                whole[:, : share.shape[1]] += share
            torch.index_select(self.chunked(whole), 0, self.by_rank, out=self.chunked(sent))
            dist.reduce_scatter_tensor(own, sent)

    def steps(self) -> dict[str, dict[str, list[Callable[[], Any]]]]:
        forward, backward = [[getattr(call, name) for call in self.calls] for name in DIRECTIONS]
        return {
            "forward": {
                "one": [self.whole.forward],
                "all": [self.gather, *forward],
                "kernels": forward,
                "communication": [self.gather],
            },
            "backward": {
                "one": [self.whole.backward],
                "all": [*backward, self.add],
                "kernels": backward,
                "communication": [self.add],
            },
        }

    def errors(self) -> dict[str, float]:
        """||together - alone|| / ||alone|| of this worker's part of each result."""
        import torch

        for direction in self.steps().values():
            for step in (*direction["one"], *direction["all"]):
                step()
        names = ("out", "dq", "dk", "dv")
        alone = (self.whole.out, *self.whole.gradients)
        chunked = [torch.cat(parts, 1) for parts in zip(*((c.out, c.gradients[0]) for c in self.calls), strict=True)]
        found = {}
        for name, got, want in zip(names, (*chunked, *self.own), alone, strict=True):
            expected = self.of_worker(want).float()
            found[name] = ((got.float() - expected).norm() / expected.norm()).item()
        return found


def median_ms(step: list[Callable[[], Any]], seconds: float) -> float:
    """Of the slowest worker in each round."""
    import torch
    import torch.distributed as dist

    together = torch.zeros(1, device="cuda")
    times: list[float] = []
    rounds = 1
    while len(times) < 2 + rounds:  # two to warm up
        dist.all_reduce(together)  # nobody begins before all are here
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for part in step:
            part()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end)], device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(slowest.item())
        if len(times) == 2:
            rounds = max(5, min(50, int(seconds * 1e3 / times[-1])))
    return statistics.median(times[2:])


def measure(case: Case, heads_k: int, seconds: float, rank: int, workers: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    steps = Steps(case, heads_k, rank, workers)
    names, values = zip(*steps.errors().items(), strict=True)
    errors = torch.nan_to_num(torch.tensor(values, device="cuda"), nan=float("inf"))  # a maximum may forget NaN
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    times = {
        direction: {name: round(median_ms(step, seconds), 4) for name, step in each.items()}
        for direction, each in steps.steps().items()
    }
    return {
        **case.as_dict(),
        "heads_k": heads_k,
        "workers": workers,
        "kernels": [steps.calls[1].kernel(), steps.calls[1].kernel(backward=True)],
        "errors": {name: float(f"{error:.3g}") for name, error in zip(names, errors.tolist(), strict=True)},
        "ms": times,
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("mask", "tokens", "", "one GPU, ms", "all, ms", "kernels", "communication", "faster", "error")
    for row in rows:
        for direction, ms in row["ms"].items():
            times = (f"{ms[name]:.3f}" for name in ("one", "all", "kernels", "communication"))
            worst = f"{max(row['errors'].values()):.2g}" if direction == "backward" else ""
            table.add_row(row["mask"], str(row["seqlen"]), direction, *times, f"{ms['one'] / ms['all']:.2f}", worst)
    Console(width=130).print(table)


def parse_arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=words, default=["full", "causal", "causal_document", "document"])
    parser.add_argument("--seqlens", type=lambda text: [int(each) for each in words(text)], default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--heads-k", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time, roughly")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "context-parallel.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.masks) - set(MASKS):
        parser.error(f"--masks: expected some of {', '.join(MASKS)}, got {', '.join(sorted(unknown))}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from device_tensors import why_not

    if reason := why_not():
        raise SystemExit(f"context_parallel.py: {reason}")
    if "RANK" not in os.environ:
        raise SystemExit("context_parallel.py: start it with torchrun --nproc_per_node, a process for each GPU")
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    rank, workers = dist.get_rank(), dist.get_world_size()
    if wrong := [seqlen for seqlen in arguments.seqlens if seqlen % (2 * workers)]:
        raise SystemExit(f"--seqlens: expected multiples of twice the {workers} workers, got {wrong}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    machine = report.cuda_machine() | {
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl}
    }
    words = ["torchrun", "--nproc_per_node", str(workers), "benchmarks/cuda/context_parallel.py"]
    words += ["--masks", ",".join(arguments.masks), "--seqlens", ",".join(map(str, arguments.seqlens))]
    words += ["--heads", str(arguments.heads), "--heads-k", str(arguments.heads_k)]
    words += ["--head-dim", str(arguments.head_dim), "--seconds", str(arguments.seconds)]
    result = report.header("cuda", " ".join(words), machine)
    rows: list[dict[str, Any]] = []
    for seqlen in arguments.seqlens:
        for mask in arguments.masks:
            case = Case(mask, seqlen, arguments.head_dim, arguments.heads, 1, "bfloat16")
            rows.append(measure(case, arguments.heads_k, arguments.seconds, rank, workers))
            torch.cuda.empty_cache()
            if rank == 0:
                report.write(arguments.out, result | {"rows": rows})
    if rank == 0:
        show(rows)
        print(f"written to {arguments.out}")
    dist.destroy_process_group()
    return int(any(not error <= LARGEST_ERROR for row in rows for error in row["errors"].values()))


if __name__ == "__main__":
    sys.exit(main())
