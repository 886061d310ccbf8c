"""Builds the package beside PaddleFormers, in an environment of its own, and runs the tests of that integration.

    python tools/test_paddleformers.py

The environment is kept in .venvs/paddleformers. The sources are copied first, as tools/test_paddle.py does.
"""

from __future__ import annotations

import shutil
import tempfile
import venv
from pathlib import Path

from test_paddle import COPIED, NOT_COPIED, ROOT, pins, run

PADDLEFORMERS = "paddleformers==1.2.0"
PINNED = ("paddlepaddle", "pyarrow", "numpy", "setuptools", "wheel", "cmake", "ninja", "pytest", "hypothesis")


def environment() -> Path:
    """The bin folder of the environment; made if it is not there."""
    folder = ROOT / ".venvs" / "paddleformers"
    done = folder / ".installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = (folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check")
        run(*pip, PADDLEFORMERS, *pins(*PINNED))
        done.touch()
    return folder / "bin"


def main() -> None:
    """Build, install, test."""
    bin_folder = environment()
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
        run(bin_folder / "pytest", "-q", "-p", "no:cacheprovider", copy / "tests" / "paddleformers", cwd=copy)
    print(f"paddle-flashmask works with {PADDLEFORMERS}")


if __name__ == "__main__":
    main()
