"""The package as a user installs it: built from a clean copy of the sources, used from another folder."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

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


@pytest.fixture
def build_script(monkeypatch) -> dict:
    """What setup.py defines, without a build."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("FLASHMASK_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("asked", "paddle_has_cuda", "has_nvcc", "decision", "reason"),
    [
        ("", True, True, True, "built with CUDA 12.9 and nvcc is "),
        ("1", True, True, True, "built with CUDA 12.9 and nvcc is "),
        ("0", True, True, False, "FLASHMASK_CUDA=0"),
        ("", True, False, False, "nvcc was not found"),
        ("", False, True, False, "a build without CUDA"),
        ("1", False, True, None, "FLASHMASK_CUDA=1, but the installed PaddlePaddle is a build without CUDA"),
        ("1", True, False, None, "FLASHMASK_CUDA=1, but nvcc was not found"),
        ("yes", True, True, None, "FLASHMASK_CUDA must be 0 or 1; got 'yes'"),
    ],
)
def test_cuda_decision(build_script, monkeypatch, tmp_path, asked, paddle_has_cuda, has_nvcc, decision, reason):
    if has_nvcc:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    else:
        monkeypatch.setitem(build_script["decide_cuda"].__globals__, "find_nvcc", lambda: None)
    monkeypatch.setenv("FLASHMASK_CUDA", asked)
    paddle = SimpleNamespace(
        is_compiled_with_cuda=lambda: paddle_has_cuda, version=SimpleNamespace(cuda=lambda: "12.9")
    )
    if decision is None:
        with pytest.raises(SystemExit, match=re.escape(reason)):
            build_script["decide_cuda"](paddle)
    else:
        nvcc, why = build_script["decide_cuda"](paddle)
        assert nvcc == (str(tmp_path / "bin" / "nvcc") if decision else "")
        assert reason in why


@pytest.mark.slow
def test_the_compiler_moves(build_script, monkeypatch, tmp_path):
    """CMake forgets its options where nvcc is another than in its cache; the library would have no CUDA kernels."""
    nvcc = build_script["find_nvcc"]()
    if nvcc is None:
        pytest.skip("CMake looks at the compiler, and there is no nvcc here")
    cache = tmp_path / "temp" / "core" / "CMakeCache.txt"
    run_command = subprocess.run

    def configure_only(command: list[str], **options: object) -> subprocess.CompletedProcess:
        if "--build" in command:
            (cache.parent / "libflashmask.so").touch()
            return subprocess.CompletedProcess(command, 0)
        return run_command(command, **options)

    def build(nvcc: str, *more: str) -> str:
        """The cache after a build."""
        monkeypatch.setenv("FLASHMASK_CMAKE_ARGS", " ".join(more))
        step = SimpleNamespace(build_temp=tmp_path / "temp", build_lib=tmp_path / "lib", nvcc=nvcc, with_cuda=True)
        build_script["BuildExt"].build_core(step)
        return cache.read_text()

    monkeypatch.setattr(subprocess, "run", configure_only)
    for home in ("first home", "second home"):
        (compiler := tmp_path / home / "bin" / "nvcc").parent.mkdir(parents=True)
        compiler.write_text(f'#!/bin/sh\nexec "{nvcc}" "$@"\n')
        compiler.chmod(0o755)
        text = build(str(compiler))
        assert "FLASHMASK_CUDA:BOOL=ON\n" in text
        assert f"={compiler}\n" in text
    kept = cache.parent / "kept"
    kept.touch()
    build(str(compiler))
    assert kept.exists(), "with the same compiler what is compiled stays"
    with pytest.raises(SystemExit, match=r"CMake did not keep FLASHMASK_CUDA=ON .* delete .* and build again"):
        build(str(compiler), "-DFLASHMASK_CUDA=OFF")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    # A compiler cache must not be needed, and the log must say what was decided about CUDA.
    result = run([*pip, "-v", "-w", str(folder), "."], sources)
    assert "paddle-flashmask: CUDA kernels " in result.stdout + result.stderr
    (wheel,) = folder.glob("paddle_flashmask-*.whl")
    return wheel


@pytest.mark.slow
def test_plain_install(wheel, tmp_path):
    """The wheel holds all that it needs and is used from elsewhere."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([*pip, "--target", str(target), str(wheel)], tmp_path)
    result = run([sys.executable, "-c", USE], tmp_path, PYTHONPATH=str(target))
    assert result.stdout.strip() == str(target / "paddle_flashmask" / "__init__.py")


@pytest.mark.slow
def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {"__init__.py", "_C.so", "_build_info.py", "lib/libflashmask.so", "py.typed", "masks/__init__.py"}
    assert {f"paddle_flashmask/{name}" for name in needed} <= names
    foreign = {name for name in names if not name.startswith(("paddle_flashmask/", "paddle_flashmask-"))}
    assert not foreign
    assert "-linux_" in wheel.name, "a compiled wheel must not claim to fit every machine"


@pytest.mark.slow
def test_editable_build(sources):
    """What `pip install -e .` runs: everything lands beside the Python files, and an edit needs no install."""
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], sources)
    result = run([sys.executable, "-c", USE], sources)
    assert result.stdout.strip() == str(sources / "paddle_flashmask" / "__init__.py")


@pytest.mark.slow
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
