"""custom_ops/cuda.cmake: what its options choose, and how long the environment's word holds. Configured, not built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("FLASHMASK_CUDA_ARCHS", "FLASHMASK_HEAD_DIMS", "FLASHMASK_CUDA_DTYPES")

Configure = Callable[..., subprocess.CompletedProcess]


def tool(name: str) -> str | None:
    """Of pip's package, whose folder need not be on the PATH, or the system's."""
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def nvcc_release() -> tuple[int, ...]:
    if shutil.which("nvcc") is None:
        return (0,)
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", said)[0]))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (tool("cmake") and tool("ninja")), reason="needs cmake and ninja"),
    pytest.mark.skipif(nvcc_release() < (12, 3), reason="needs nvcc of CUDA 12.3 or newer"),
]


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory) -> Path:
    """One for all tests: CMake looks at the compilers only once. Each must do whatever came before."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def configure(build_folder) -> Configure:
    def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
        command = [tool("cmake"), "-S", ROOT / "custom_ops", "-B", build_folder, "-G", "Ninja", "-DFLASHMASK_CUDA=ON"]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=300)

    return run


def kernels(folder: Path) -> list[tuple[str, int, int, str, int]]:
    """Folder, the range of compute capabilities, dtype and head dim of the forward kernels in the table."""
    text = (folder / "cuda_instances" / "built_kernels.inc").read_text()
    rows = re.findall(r"FLASHMASK_FORWARD\((\w+), (\d+), (\d+), FLASHMASK_(\w+), \w+, (\d+)\)", text)
    return [(arch, int(low), int(high), dtype, int(dim)) for arch, low, high, dtype, dim in rows]


def made(configure: Configure, folder: Path, *options: str, **environment: str) -> list[tuple[str, int, int, str, int]]:
    done = configure(*options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return kernels(folder)


def test_the_environment_holds_for_one_run(configure, build_folder):
    forget = [f"-U{name}" for name in VARIABLES]
    everything = made(configure, build_folder, *forget)
    assert {(arch, low, high) for arch, low, high, *_ in everything} == {("sm80", 80, 9999), ("sm90", 90, 90)}
    assert {dim for *_, dim in everything} == {32, 64, 96, 128, 192, 256}
    assert {dtype for *_, dtype, _ in everything} == {"BFLOAT16", "FLOAT16"}
    narrow = {"FLASHMASK_HEAD_DIMS": "64,128", "FLASHMASK_CUDA_DTYPES": "bf16", "FLASHMASK_CUDA_ARCHS": "80"}
    narrowed = [("sm80", 80, 9999, "BFLOAT16", 64), ("sm80", 80, 9999, "BFLOAT16", 128)]
    assert made(configure, build_folder, **narrow) == narrowed
    assert made(configure, build_folder) == everything, "the variables are gone"
    assert made(configure, build_folder, **dict.fromkeys(VARIABLES, "")) == everything, "or empty"


def test_what_the_command_line_says_stays(configure, build_folder):
    told = ["-DFLASHMASK_HEAD_DIMS=96", "-DFLASHMASK_CUDA_DTYPES=fp16", "-DFLASHMASK_CUDA_ARCHS=80"]
    narrowed = [("sm80", 80, 9999, "FLOAT16", 96)]
    assert made(configure, build_folder, *told) == narrowed
    assert made(configure, build_folder) == narrowed
    assert made(configure, build_folder, FLASHMASK_HEAD_DIMS="64")[0][-1] == 64, "the environment wins"
    assert made(configure, build_folder) == narrowed
    # The same words from both: gone from the environment, they still stand on the command line.
    assert made(configure, build_folder, FLASHMASK_HEAD_DIMS="64")[0][-1] == 64
    assert made(configure, build_folder, "-DFLASHMASK_HEAD_DIMS=64")[0][-1] == 64


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        ("90", {("sm80", 90, 9999), ("sm90", 90, 90)}),
        ("90;80", {("sm80", 80, 9999), ("sm90", 90, 90)}),
        ("86", {("sm80", 86, 9999)}),
        ("80;100", {("sm80", 80, 9999)}),
        ("90a", {("sm80", 90, 90)}),
        ("80;90a", {("sm80", 80, 90)}),
        ("100f", {("sm80", 100, 109)}),
    ],
)
def test_the_table_knows_for_which_devices_there_is_code(configure, build_folder, architectures, expected):
    rows = made(configure, build_folder, FLASHMASK_CUDA_ARCHS=architectures, FLASHMASK_HEAD_DIMS="64")
    assert {(arch, low, high) for arch, low, high, *_ in rows} == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLASHMASK_CUDA_ARCHS", "80-real"),
        ("FLASHMASK_CUDA_ARCHS", "native"),
        ("FLASHMASK_HEAD_DIMS", "48"),
        ("FLASHMASK_CUDA_DTYPES", "fp32"),
    ],
)
def test_other_values_are_refused(configure, name, value):
    done = configure(**{name: value})
    assert done.returncode != 0
    assert re.search(rf"{name}:\s+expected\s+[^']*got\s+'{value}'", done.stderr), done.stderr
