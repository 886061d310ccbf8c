"""Unpacks what prepare.py packed and runs the op's GPU checks: one process per test file, so that a crash costs one.

    python3 part1/run.py --parts part0 part1 --results results.json

Only the standard library is used. `--device cpu` runs the same checks on CPU tensors, to try the packing itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNPACKED = Path(tempfile.gettempdir()) / "flashmask_paddle_gpu"

SECONDS_PER_FILE = 150


def unpack(parts: list[Path], target: Path) -> None:
    """The archives in the folders `parts` into `target`. Paddle may be there from an earlier run."""
    files = sorted(file for folder in parts for file in folder.glob("*.tar.xz*"))
    if not any(file.name == "project.tar.xz" for file in files):
        raise SystemExit(f"--parts: project.tar.xz is in none of {[str(part) for part in parts]}")
    target.mkdir(parents=True, exist_ok=True)
    site = target / "site"
    site.mkdir(exist_ok=True)
    paddle = [str(file) for file in files if file.name.startswith("paddle.tar.xz.")]
    script = 'target=$1; shift; set -o pipefail; cat "$@" | xz -dc -T0 | tar xf - -C "$target"'
    if paddle:
        subprocess.run(["bash", "-c", script, "unpack", str(site), *paddle], check=True)
    elif not (site / "paddle").is_dir():
        raise SystemExit(f"--parts: paddle.tar.xz.* is in none of them, and {site} holds no Paddle from before")
    (project,) = (file for file in files if file.name == "project.tar.xz")
    subprocess.run(["bash", "-c", script, "unpack", str(target), str(project)], check=True)


def nccl(target: Path) -> Path:
    """A folder with the machine's NCCL, if it has one, under the name by which Paddle 2.6 loads it."""
    folder = target / "nccl"
    folder.mkdir(exist_ok=True)
    packages = [Path(path) / "nvidia" / "nccl" / "lib" for path in sys.path]
    found = [folder / "libnccl.so.2" for folder in (*packages, Path("/usr/lib/x86_64-linux-gnu"))]
    library = next((file for file in found if file.exists()), None)
    link = folder / "libnccl.so"
    link.unlink(missing_ok=True)
    if library is not None:
        link.symlink_to(library)
    return folder


def environment(target: Path, device: str, lines: Path) -> dict[str, str]:
    paddle = target / "site" / "paddle"
    libraries = [str(paddle / "libs"), str(paddle / "base"), str(nccl(target)), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": str(target / "site"),
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in libraries if path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other packages of the machine may not fit this NumPy
        "PYTHONDONTWRITEBYTECODE": "1",
        "FLASHMASK_PADDLE_DEVICE": device,
        "FLASHMASK_RESULT_LINES": str(lines),
        "GLOG_minloglevel": "2",
    }


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return f"not known ({error})"


def run_file(file: Path, target: Path, variables: dict[str, str]) -> dict[str, object]:
    """Runs one test file; what became of the process."""
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-W", "ignore", "--tb=short"]
    command += [
        "-p",
        "no:cacheprovider",
        "-o",
        "markers=slow: slow",
        f"--rootdir={target}",
        f"--confcutdir={file.parent}",
        str(file),
    ]
    start = time.monotonic()
    try:
        status: int | str = subprocess.run(command, env=variables, cwd=target, timeout=SECONDS_PER_FILE).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {SECONDS_PER_FILE} s"
    return {"file": file.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, nargs="+", required=True, help="the folders that prepare.py wrote")
    parser.add_argument("--target", type=Path, default=UNPACKED, help="where to unpack")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    options = parser.parse_args()
    target = options.target.resolve()
    start = time.monotonic()
    unpack(options.parts, target)
    print(f"unpacked in {time.monotonic() - start:.1f} s", flush=True)

    lines = target / "results.jsonl"
    lines.unlink(missing_ok=True)
    variables = environment(target, options.device, lines)
    folder = target / "tests" / "gpu" / "paddle_gpu"
    processes = [run_file(file, target, variables) for file in sorted(folder.glob("test_*.py"))]
    tests = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    outcomes = [test["outcome"] for test in tests]
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    head = {
        "measured": time.strftime("%Y-%m-%d"),
        **json.loads((target / "info.json").read_text()),
        "device": options.device,
        "gpu": gpu if options.device == "gpu" else None,
        "ran_with": sys.version.split()[0],
        "counts": counts,
        "processes": processes,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    one_a_line = ",\n".join(f"  {json.dumps(test)}" for test in tests)
    options.results.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "tests": [\n{one_a_line}\n ]\n}}\n')
    print(f"{counts} in {time.monotonic() - start:.1f} s; {options.results}")
    for process in processes:
        print(process)
    # 5: nothing in the file can run on this device.
    good = all(process["status"] in (0, 5) for process in processes) and "passed" in counts
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
