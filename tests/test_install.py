"""The package as a user installs it: built from a clean copy of the sources, used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

USE = """
import numpy as np, paddle, paddle_flashmask
from paddle_flashmask import flashmask_attention, masks
print(paddle_flashmask.__file__)
q = paddle.randn([1, 8, 2, 8])
q.stop_gradient = False
indices, causal = masks.causal_document([[3, 5]])
out = flashmask_attention(q, q, q, paddle.to_tensor(indices), causal=causal)
out.sum().backward()
# The first token of each document sees itself only.
assert np.allclose(out[0, [0, 3]].numpy(), q[0, [0, 3]].numpy(), atol=1e-6)
assert np.isfinite(q.grad.numpy()).all()
"""


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What a checkout holds, without anything built, under a path with spaces."""
    copy = tmp_path_factory.mktemp("with spaces") / "paddle flashmask"
    built = shutil.ignore_patterns(".*", "__pycache__", "*.so", "_build_info.py", "*.egg-info", "build", "runs", "dist")
    copy.mkdir()
    for name in ("custom_ops", "paddle_flashmask"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    # A compiler cache must not be needed, and the log must say what was decided about CUDA.
    result = run([*pip, "-v", "-w", str(folder), "."], sources)
    assert "paddle-flashmask: CUDA kernels " in result.stdout + result.stderr
    (wheel,) = folder.glob("paddle_flashmask-*.whl")
    return wheel


def test_plain_install(wheel, tmp_path):
    """The wheel holds all that it needs and is used from elsewhere."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([*pip, "--target", str(target), str(wheel)], tmp_path)
    result = run([sys.executable, "-c", USE], tmp_path, PYTHONPATH=str(target))
    assert result.stdout.strip() == str(target / "paddle_flashmask" / "__init__.py")


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {"__init__.py", "_C.so", "_build_info.py", "lib/libflashmask.so", "py.typed", "masks/__init__.py"}
    assert {f"paddle_flashmask/{name}" for name in needed} <= names
    foreign = {name for name in names if not name.startswith(("paddle_flashmask/", "paddle_flashmask-"))}
    assert not foreign
    assert "-linux_" in wheel.name, "a compiled wheel must not claim to fit every machine"


def test_editable_build(sources):
    """What `pip install -e .` runs: everything lands beside the Python files, and an edit needs no install."""
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], sources)
    result = run([sys.executable, "-c", USE], sources)
    assert result.stdout.strip() == str(sources / "paddle_flashmask" / "__init__.py")


def test_missing_tools_are_named(sources, tmp_path):
    """No cmake anywhere: the build says what to install."""
    code = """
import runpy, sys
sys.modules["cmake"] = None
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "gcc", "which"):
        (tools / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env={**os.environ, "PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "needs cmake, which was not found: pip install cmake ninja" in result.stderr
