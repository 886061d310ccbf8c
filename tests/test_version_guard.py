"""A build for another Paddle is refused before it is loaded: loading it would end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

import paddle_flashmask
from paddle_flashmask import _build_info

PACKAGE = Path(paddle_flashmask.__file__).parent
HERE = (str(paddle.version.full_version), str(paddle.version.commit), str(paddle.version.cuda()))


# The hook of an editable install finds the modules that a linked package leaves out.
NO_HOOK = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    code, path = NO_HOOK + code, path or PACKAGE.parent
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=120)


def linked_package(folder: Path, leave_out: set[str]) -> Path:
    """The installed package by links, less some files; returns the folder to put on the path."""
    for source in PACKAGE.rglob("*"):
        name = source.relative_to(PACKAGE).as_posix()
        if source.is_file() and "__pycache__" not in name and name not in leave_out:
            target = folder / "paddle_flashmask" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    return folder


def build_info(version: str, commit: str, cuda: str) -> str:
    return f"PADDLE_VERSION = {version!r}\nPADDLE_COMMIT = {commit!r}\nPADDLE_CUDA = {cuda!r}\nCUDA_KERNELS = False\n"


def test_build_info_is_of_this_paddle():
    assert (_build_info.PADDLE_VERSION, _build_info.PADDLE_COMMIT, str(_build_info.PADDLE_CUDA)) == HERE


@pytest.mark.parametrize(
    ("built_for", "described"),
    [
        (("9.8.7", *HERE[1:]), "PaddlePaddle 9.8.7 (CPU"),
        ((HERE[0], "0123456789abcdef", HERE[2]), "commit 0123456789ab)"),
        ((*HERE[:2], "12.9"), "(CUDA 12.9, commit"),
    ],
)
def test_other_build_is_refused(tmp_path, built_for, described):
    path = linked_package(tmp_path, {"_build_info.py", "_C.so"})
    (path / "paddle_flashmask" / "_build_info.py").write_text(build_info(*built_for))
    # Were it loaded, this would be another error.
    (path / "paddle_flashmask" / "_C.so").write_bytes(b"not a library")
    code = """
from paddle_flashmask import masks
print(masks.causal())
try:
    from paddle_flashmask import flashmask_attention
except ImportError as error:
    print("refused:", error)
import paddle
print("alive", float(paddle.ones([1])))
"""
    result = python(code, path)
    assert result.returncode == 0, result.stderr
    assert "(None, True)" in result.stdout, "masks work without the op"
    assert f"paddle-flashmask was built for {'PaddlePaddle ' + built_for[0]}" in result.stdout
    assert described in result.stdout
    assert f"but PaddlePaddle {HERE[0]} (" in result.stdout
    assert f"commit {HERE[1][:12]}) is imported" in result.stdout
    assert "pip install --force-reinstall --no-deps --no-build-isolation ." in result.stdout
    assert "alive 1.0" in result.stdout


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("_build_info.py", "is not built"),
        ("_C.so", "_C.so is missing"),
        ("lib/libflashmask.so", "libflashmask.so is missing"),
    ],
)
def test_missing_files_are_named(tmp_path, missing, message):
    path = linked_package(tmp_path, {missing})
    result = python("from paddle_flashmask import flashmask_attention", path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: ")
    assert message in result.stderr
    assert "pip install" in result.stderr


def test_masks_and_core_need_no_paddle():
    """`paddle` set to None in sys.modules makes every import of it fail."""
    code = """
import sys
sys.modules["paddle"] = None
import numpy as np
import paddle_flashmask
from paddle_flashmask import _core, masks
indices, causal = masks.causal_document([[3, 5]])
ones = np.ones((1, 8, 1, 8), np.float32)
out, lse = _core.forward(ones, ones, ones, indices, causal=causal)
assert np.allclose(out, 1.0) and np.isfinite(lse).all()
assert paddle_flashmask.__version__
try:
    paddle_flashmask.flashmask_attention
except ImportError:
    print("fine")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fine"
