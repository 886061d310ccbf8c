"""Builds the package against another Paddle, in an environment of its own, and runs the tests of the op there.

    python tools/test_paddle.py 2.6.2

The environment is kept in .venvs/paddle-VERSION. The sources are copied first: what is built here belongs to the Paddle
in .venv.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("custom_ops", "docs", "paddle_flashmask", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py", "*.egg-info", "build")
TESTS = (
    *("test_functional*.py", "test_op_modes.py", "test_bad_input.py", "test_version_guard.py", "test_threads.py"),
    "test_distributed.py",
)


def run(*command: object, cwd: Path = ROOT) -> None:
    """Runs a command; its failure is this script's."""
    print("+", *command, flush=True)
    status = subprocess.run([str(part) for part in command], cwd=cwd).returncode
    if status:
        raise SystemExit(status)


def pins(*names: str) -> list[str]:
    """The pinned versions of these packages in requirements/."""
    lines = [line for file in sorted((ROOT / "requirements").glob("*.txt")) for line in file.read_text().splitlines()]
    return [line for line in lines if re.split("[=<>]", line)[0] in names]


def environment(name: str, *packages: str) -> Path:
    """The bin folder of an environment with these packages; made anew where it has others, or is not there."""
    folder = ROOT / ".venvs" / name
    done, wanted = folder / ".installed", "\n".join(packages)
    if not done.exists() or done.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        run(folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", *packages)
        done.write_text(wanted)
    return folder / "bin"


def install_and_test(bin_folder: Path, *patterns: str) -> None:
    """Builds a copy of the sources into the environment, and runs the tests there that match, files or folders."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "paddle-flashmask"
        copy.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=NOT_COPIED)
            elif source.exists():
                shutil.copy(source, copy / name)
        pip = (bin_folder / "pip", "install", "-q", "--disable-pip-version-check", "--force-reinstall")
        run(*pip, "--no-deps", "--no-build-isolation", ".", cwd=copy)
        shutil.rmtree(copy / "paddle_flashmask")  # the tests must import what was installed
        tests = sorted(path for pattern in patterns for path in (copy / "tests").glob(pattern))
        run(bin_folder / "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=copy)


def main() -> None:
    """Command line: the version of paddlepaddle on PyPI."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="version of paddlepaddle, for instance 2.6.2 or 3.3.1")
    version = parser.parse_args().version
    if not re.fullmatch(r"\d+\.\d+\.\d+\w*", version):
        raise SystemExit(f"VERSION: expected a version such as 2.6.2, got {version!r}")
    packages = pins("setuptools", "wheel", "cmake", "ninja", "numpy", "pytest", "hypothesis")
    install_and_test(environment(f"paddle-{version}", f"paddlepaddle=={version}", *packages), *TESTS)
    print(f"paddle-flashmask builds and passes on paddlepaddle {version} with Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
