"""Packs everything that the op's GPU checks need into folders small enough to carry to a machine without network.

    python3 tests/gpu/paddle_gpu/prepare.py build/paddle_gpu --python python3.12

Needs network, nvcc, g++ and git here; no GPU. Downloads paddlepaddle-gpu and what it imports, blanks its device code
(slim.py), builds this package from the committed sources with its own setup.py, and writes OUT/part0, OUT/part1, ...
On the GPU machine, with the same Python version (3.12): `python3 part1/run.py --parts part0 part1`.

Paddle is packed once; later calls pack the package and its tests alone, unless --fresh is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import slim

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
PADDLE = "paddlepaddle-gpu==2.6.2"
SETUPTOOLS = "setuptools==79.0.1"
# numpy and protobuf are held to what Paddle 2.6 works with; the rest is imported by it, or runs the checks.
RUNTIME = ("numpy==1.26.4", "protobuf==4.25.8", "opt_einsum==3.3.0", "decorator", "astor", "httpx", "pillow", "pytest")
BUILD = (SETUPTOOLS, "wheel", "cmake==3.31.10", "ninja==1.13.0")
# Needed to build against Paddle, not to run it.
NOT_CARRIED = ("paddle/include", "*/__pycache__", "paddle_flashmask*")


def run(*command: object, **options: object) -> str:
    """Runs a command and returns what it printed; its failure is this script's."""
    words = [str(word) for word in command]
    print("+", shlex.join(words), flush=True)
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, **options).stdout  # type: ignore[call-overload]


def make_site(work: Path, python: str) -> None:
    """work/site: Paddle without its device code, and what it imports; work/venv: the tools to build against it."""
    shutil.rmtree(work, ignore_errors=True)
    run(python, "-m", "venv", work / "venv")
    pip = (work / "venv" / "bin" / "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, *BUILD)
    run(*pip, "--target", work / "site", SETUPTOOLS, *RUNTIME)
    run(*pip, "--target", work / "site", "--no-deps", PADDLE)
    for library in sorted((work / "site" / "paddle").rglob("*.so*")):
        blanked = slim.blank_device_code(library)
        if blanked:
            print(f"{library.name}: {blanked >> 20} MiB of device code blanked", flush=True)


def pack_site(work: Path, part_mib: int) -> None:
    """work/paddle.tar.xz.00, .01, ...: the site folder as one compressed stream, cut into parts."""
    for old in work.glob("paddle.tar.xz*"):
        old.unlink()
    exclude = [f"--exclude=./{name}" for name in NOT_CARRIED]
    pipeline = (
        f"set -o pipefail; tar cf - {shlex.join(exclude)} -C {shlex.quote(str(work / 'site'))} . | xz -T0 -3"
        f" | split -d -b {part_mib}m - {shlex.quote(str(work / 'paddle.tar.xz.'))}"
    )
    run("bash", "-c", pipeline)


def build_options() -> dict[str, str]:
    """What the kernels are built for, unless the environment says otherwise. The checks need these head dims."""
    defaults = {"FLASHMASK_CUDA_ARCHS": "80;90", "FLASHMASK_HEAD_DIMS": "64;128"}
    return {name: os.environ.get(name, default) for name, default in defaults.items()}


def build_package(work: Path, sources: Path, log: Path) -> None:
    """work/package: this package, built by its setup.py against the Paddle in work/site."""
    shutil.rmtree(work / "package", ignore_errors=True)
    environment = {**os.environ, **build_options(), "FLASHMASK_CUDA": "1", "PYTHONPATH": str(work / "site")}
    pip = (work / "venv" / "bin" / "pip", "install", "-v", "--disable-pip-version-check", "--no-build-isolation")
    with log.open("w") as file:
        run(*pip, "--no-deps", "--target", work / "package", sources, env=environment, stderr=file)


def information(work: Path, commit: str) -> dict[str, str]:
    """What the results must say about the build."""
    version = run(work / "venv" / "bin" / "python", "--version").strip()
    nvcc = run("nvcc", "--version").strip().splitlines()[-1]
    return {"commit": commit, "paddle": PADDLE, "python": version, "nvcc": nvcc, **build_options()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to fill; git should ignore it")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the version that the GPU machine has")
    parser.add_argument("--commit", default="HEAD", help="what to build (default: HEAD)")
    parser.add_argument("--part-mib", type=int, default=60, help="largest size of a part")
    parser.add_argument("--fresh", action="store_true", help="fetch and pack Paddle again")
    options = parser.parse_args()
    out = options.out.resolve()
    work = out / "work"
    if options.fresh or not (work / "paddle.tar.xz.00").exists():
        make_site(work, options.python)
        pack_site(work, options.part_mib)

    commit = run("git", "-C", ROOT, "rev-parse", options.commit).strip()
    with tempfile.TemporaryDirectory() as temporary:
        sources = Path(temporary) / "sources"
        sources.mkdir()
        archive = Path(temporary) / "sources.tar"
        run("git", "-C", ROOT, "archive", "-o", archive, commit)
        with tarfile.open(archive) as tar:
            tar.extractall(sources, filter="data")
        build_package(work, sources, work / "build.log")
        (work / "info.json").write_text(json.dumps(information(work, commit), indent=2) + "\n")
        with tarfile.open(work / "project.tar.xz", "w:xz") as tar:
            tar.add(work / "package", "site")
            tar.add(sources / "tests", "tests")
            tar.add(work / "info.json", "info.json")

        parts = sorted(work.glob("paddle.tar.xz.*"))
        for old in out.glob("part[0-9]*"):
            shutil.rmtree(old)
        for number, part in enumerate(parts):
            folder = out / f"part{number}"
            folder.mkdir()
            os.link(part, folder / part.name)
        shutil.copy(work / "project.tar.xz", folder)
        shutil.copy(sources / HERE / "run.py", folder)
    for folder in sorted(out.glob("part[0-9]*")):
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
