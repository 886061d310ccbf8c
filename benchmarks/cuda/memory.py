"""Device memory that the CUDA kernels ask for beyond operands and results; whether very long sequences come out right.

    python benchmarks/cuda/memory.py --out build/bench/memory.json      # needs `make cuda-lib`, PyTorch and a GPU

For each case (length and number of heads), one causal-document batch row in bfloat16:
- bytes of workspace that the entry points ask for, forward and backward, and of the mask's bounds and lse;
- the peak of PyTorch's allocator during a forward and a backward, less operands, output, lse and gradients;
- what a dense bfloat16 mask of one head would take;
- errors against attention in float64. A document sees nothing but itself, so whole documents are computed alone
  (--documents of them: the shortest, the longest, the first, the last, ...), out, lse, dq, dk and dv of all their rows.
  Everything else has to be finite.

Exits with status 1 if an error is larger than --tolerance. Documents are those of benchmarks/workloads.json; a length
that is not there scales the nearest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "gpu"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from benchmarks import report  # noqa: E402
from benchmarks.workloads import Case, documents  # noqa: E402

Rows = list[dict[str, Any]]


def chosen_documents(lengths: list[int], count: int) -> list[tuple[int, int]]:
    """Up to `count` different documents as (first row, row after the last): shortest, longest, first, last, then others
    evenly over the sequence."""
    ends = np.cumsum(lengths)
    order = [int(np.argmin(lengths)), int(np.argmax(lengths)), 0, len(lengths) - 1]
    order += [int(i) for i in np.linspace(0, len(lengths) - 1, 2 + count)[1:-1]]
    numbers = list(dict.fromkeys(order))[:count]
    return [(int(ends[i]) - lengths[i], int(ends[i])) for i in sorted(numbers)]


def errors(inputs: tuple[Any, ...], got: dict[str, Any], document: tuple[int, int], head: int) -> dict[str, float]:
    """||got - reference|| / ||reference|| of each result over the rows of one document and one head.

    Args:
        inputs: query, key, value and the output's gradient, `[1, s, h, d]`.
        got: out, dq, dk, dv `[1, s, h, d]` and lse `[1, h, s]`.
    """
    import dense
    import torch

    first, end = document
    q, k, v, dout = (x[:, first:end, head : head + 1] for x in inputs)
    nothing_masked = torch.full((1, 1, end - first, 1), end - first, dtype=torch.int32, device=q.device)
    want = dense.attention_by_rows(q, k, v, nothing_masked, True, q.shape[-1] ** -0.5, dout, rows=1024)
    found = {}
    for name, reference in want.items():
        part = got[name][:, head : head + 1, first:end] if name == "lse" else got[name][:, first:end, head : head + 1]
        found[name] = ((part.double() - reference).norm() / reference.norm()).item()
    return found


def measure(seqlen: int, heads: int, head_dim: int, documents_to_check: int) -> dict[str, Any]:
    import torch
    from device_tensors import Call

    case = Case("causal_document", seqlen, head_dim, heads, 1, "bfloat16")
    indices, causal = case.indices()
    assert indices is not None
    torch.manual_seed(0)
    shape = (1, seqlen, heads, head_dim)
    inputs = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    bounds = torch.from_numpy(np.ascontiguousarray(indices)).cuda()
    call = Call(*inputs[:3], bounds, causal=causal)
    call.set_gradient(inputs[3])
    entry: dict[str, Any] = {
        "mask": case.mask,
        "seqlen": seqlen,
        "heads": heads,
        "head_dim": head_dim,
        "documents": len(documents(case)[0]),
        "kernels": [call.kernel(), call.kernel(backward=True)],
        "forward_workspace_bytes": call.library.forward_workspace_bytes(call.params),
        "backward_workspace_bytes": call.library.backward_workspace_bytes(call.params),
        "bounds_bytes": bounds.numel() * bounds.element_size(),
        "lse_bytes": call.lse.numel() * call.lse.element_size(),
        "operand_bytes": case.operand_bytes(),
        "dense_bf16_mask_bytes": 2 * seqlen**2,
    }
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = call.forward()
    dq, dk, dv = call.backward()
    torch.cuda.synchronize()
    entry["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
    call.workspace = None
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    entry["finite"] = all(bool(torch.isfinite(value).all()) for value in got.values())
    spans = chosen_documents(documents(case)[0], documents_to_check)
    found = [errors(inputs, got, span, head=(heads - 1) * number % heads) for number, span in enumerate(spans)]
    entry["checked_documents"] = [list(span) for span in spans]
    entry["largest_relative_errors"] = {
        name: float(f"{max(each[name] for each in found):.3g}") for name in (found[0] if found else ())
    }
    return entry


def show(rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="bytes beyond operands and results, MiB")
    for name in (
        "seqlen",
        "heads",
        "forward",
        "backward",
        "peak",
        "bytes a row and head",
        "bounds",
        "dense mask",
        "error",
    ):
        table.add_column(name, justify="right")

    def mib(size: int) -> str:
        return f"{size / 2**20:,.1f}"

    for row in rows:
        if "skipped" in row:
            table.add_row(str(row["seqlen"]), str(row["heads"]), row["skipped"])
            continue
        sizes = [row[f"{name}_bytes"] for name in ("forward_workspace", "backward_workspace", "peak_extra")]
        each = f"{row['peak_extra_bytes'] / row['seqlen'] / row['heads']:.1f}"
        error = f"{max(row['largest_relative_errors'].values(), default=0.0):.2g}" if row["finite"] else "not finite"
        masks = (mib(row["bounds_bytes"]), mib(row["dense_bf16_mask_bytes"]))
        table.add_row(str(row["seqlen"]), str(row["heads"]), *map(mib, sizes), each, *masks, error)
    Console(width=130).print(table)


def wrong(row: dict[str, Any], tolerance: float) -> bool:
    """NaN counts as wrong."""
    if "skipped" in row:
        return False
    return not (row["finite"] and all(value <= tolerance for value in row["largest_relative_errors"].values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--cases", default="131072:1,131072:32,1048576:1", metavar="SEQLEN:HEADS,...")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--documents", type=int, default=4, help="documents of each case checked against float64")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest relative error of a result, in norm")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "memory.json")
    arguments = parser.parse_args()
    try:
        pairs = [tuple(int(number) for number in each.split(":")) for each in arguments.cases.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        parser.error(f"--cases: expected SEQLEN:HEADS,..., got {arguments.cases!r}")
    arguments.pairs = pairs
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from device_tensors import why_not

    if reason := why_not():
        raise SystemExit(f"memory.py: {reason}")
    import torch

    machine = report.cuda_machine() | {"versions": {"torch": torch.__version__, "cuda": torch.version.cuda}}
    words = ["python", "benchmarks/cuda/memory.py", "--cases", arguments.cases, "--head-dim", str(arguments.head_dim)]
    result = report.header("cuda", " ".join(words), machine)
    rows: Rows = []
    for seqlen, heads in arguments.pairs:
        # Operands and results, float32 gradients of the queries, and the reference's blocks of rows.
        needed = seqlen * heads * arguments.head_dim * (8 * 2 + 4) + 4 * 1024 * 8 * seqlen
        if needed > torch.cuda.mem_get_info()[0]:
            place = {"seqlen": seqlen, "heads": heads, "head_dim": arguments.head_dim}
            rows.append(place | {"skipped": f"needs about {needed / 2**30:.0f} GiB"})
        else:
            rows.append(measure(seqlen, heads, arguments.head_dim, arguments.documents))
            torch.cuda.empty_cache()
        report.write(arguments.out, result | {"rows": rows})
    show(rows)
    print(f"written to {arguments.out}")
    return int(any(wrong(row, arguments.tolerance) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
