"""Where helpers lie, which device is under test, and a line of JSON per test for run.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
for folder in (TESTS, TESTS / "core", TESTS.parent):
    # The package itself is installed, or found beside the tests in a checkout.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("FLASHMASK_RESULT_LINES")
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"test": report.nodeid.rsplit("/", 1)[-1], "outcome": report.outcome, "seconds": round(report.duration, 3)}
    line.update(report.user_properties)
    if report.outcome != "passed":
        # Of a skipped test (file, line, reason): the file lies wherever the archives were unpacked.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        line["message"] = str(reason)[-2000:]
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
