"""Builds the package beside PaddleFormers, in an environment of its own, and runs the tests of that integration.

    python tools/test_paddleformers.py

The environment is kept in .venvs/paddleformers. The sources are copied first, as tools/test_paddle.py does.
"""

from __future__ import annotations

from test_paddle import environment, install_and_test, pins

PADDLEFORMERS = "paddleformers==1.2.0"
PINNED = ("paddlepaddle", "pyarrow", "numpy", "setuptools", "wheel", "cmake", "ninja", "pytest", "hypothesis")


def main() -> None:
    """Build, install, test."""
    install_and_test(environment("paddleformers", PADDLEFORMERS, *pins(*PINNED)), "paddleformers")
    print(f"paddle-flashmask works with {PADDLEFORMERS}")


if __name__ == "__main__":
    main()
