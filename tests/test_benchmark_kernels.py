"""benchmarks/kernels.py: what it writes, how rivals take turns, compile ahead and fail without ending the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def kernels(load):
    return load("benchmarks.kernels")


@pytest.fixture(scope="module")
def case(load):
    return load("benchmarks.workloads").Case("causal", 128, 64, 1, 1, "bfloat16")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/kernels.py", "--device", "cpu", "--rivals", "ours", "--heads", "1"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    out = tmp_path / "kernels.json"
    options = ["--masks", "causal,document", "--seconds", "0.5", "--rounds", "2,1", "--only", "ours:128"]
    (ready := tmp_path / "ready").touch()
    made = run("--seqlens", "128,256", *options, "--out", str(out), "--wait-for", str(ready))
    assert made.returncode == 0, made.stdout + made.stderr
    result = json.loads(out.read_text())
    assert [(row["mask"], row["seqlen"]) for row in result["rows"]] == [("causal", 128), ("document", 128)]
    for row in result["rows"]:
        assert row["fwd_ms"] > 0
        assert min(row["runs"]) >= 6, "three runs in each of two rounds"
        assert row["difference"] == 0
    assert {"measured", "commit", "command", "machine"} <= result.keys()
    assert str(tmp_path) not in result["command"]


def test_time_limit_is_named_in_the_results(tmp_path):
    out = tmp_path / "kernels.json"
    made = run("--seqlens", "128", "--masks", "causal", "--time-limit", "0", "--out", str(out))
    assert made.returncode == 0, made.stdout + made.stderr
    result = json.loads(out.read_text())
    assert result["rows"] == []
    assert result["not_measured"][0]["reason"] == "not begun after 0 s"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "1,2"], "--rounds: expected one number"),
        (["--rounds", "0"], "--rounds: expected one number"),
        (["--only", "flex:128"], "--only: 'flex' is not one of ours"),
        (["--masks", "triangle"], "--masks: 'triangle' is not one of"),
    ],
)
def test_bad_arguments(options, message):
    made = run("--seqlens", "128", *options)
    assert made.returncode == 2
    assert message in made.stderr


class FakePool:
    def __init__(self, rival: str, log: list[str], answers: list[dict[str, Any]]) -> None:
        self.rival, self.log, self.answers = rival, log, answers

    def ask(self, case: Any, seconds: float) -> dict[str, Any]:
        self.log.append(self.rival)
        return self.answers.pop(0)


def answer(*times: float) -> dict[str, Any]:
    return {"fwd_times": list(times), "bwd_times": [], "peak_mib": times[0]}


def test_rounds_alternate_and_a_failure_is_not_repeated(kernels, case):
    log: list[str] = []
    pools = [
        FakePool("a", log, [answer(1.0, 2.0), answer(9.0), answer(3.0, 4.0)]),
        FakePool("b", log, [{"failed": "it broke"}]),
        FakePool("c", log, [answer(5.0), answer(6.0), answer(7.0)]),
    ]
    answers = kernels.measure_case(case, pools, 3, 0.1)
    assert log == ["a", "b", "c", "c", "a", "a", "c"]
    assert answers["a"] == {"fwd_ms": 3.0, "bwd_ms": None, "runs": [5, 0], "peak_mib": 1.0}
    assert answers["b"] == {"failed": "it broke"}
    assert answers["c"]["fwd_ms"] == 6.0


class FakeRival(FakePool):
    """A pool that main() makes: every case gets the results that `found` has for the rival, one after the other."""

    found: ClassVar[dict[str, list[list[float]]]] = {}
    number = to_compile = None

    def __init__(self, device: str, rival: str, cases: list[Any], processes: int) -> None:
        given = [{**answer(1.0), "versions": {}, "sample": {"out": values}} for values in self.found[rival]]
        super().__init__(rival, [], given)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "second", "differences"),
    [
        ("bfloat16", [[1.0, 2.01], [3.0, 4.0]], []),
        ("bfloat16", [[1.0, 2.2], [3.0, 4.0]], ["sdpa on causal, 128, d = 64: 0.089"]),
        ("float16", [[1.0, 2.0], [3.0, float("nan")]], ["sdpa on document, 128, d = 64: nan"]),
        ("float32", [[1.0, 2.0], [3.0, 4.001]], ["sdpa on document, 128, d = 64: 0.0002"]),
        ("float32", [[float("inf"), 2.0], [4.0, 3.0]], ["sdpa on causal, 128, d = 64: inf", "sdpa on document"]),
    ],
)
def test_other_results_are_a_failure(kernels, monkeypatch, tmp_path, capsys, dtype, second, differences):
    """Said at the end, when everything has been measured and written."""
    monkeypatch.setattr(FakeRival, "found", {"ours": [[1.0, 2.0], [3.0, 4.0]], "sdpa": second})
    status, printed, rows = run_with_fakes(kernels, monkeypatch, tmp_path, capsys, dtype)
    assert len(rows) == 4
    assert bool(status) == bool(differences)
    assert printed.count("different results: ") == len(differences)
    for each in differences:
        assert f"different results: {each}" in printed
    if differences:
        assert status.startswith(f"{len(differences)} of 4 differ by more than")


def test_nan_of_the_first_rival_is_a_failure(kernels, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FakeRival, "found", {"ours": [[float("nan")], [1.0]], "sdpa": [[1.0], [1.0]]})
    status, printed, _ = run_with_fakes(kernels, monkeypatch, tmp_path, capsys, "bfloat16")
    assert status
    assert "different results: ours on causal, 128, d = 64: nan" in printed


def run_with_fakes(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> tuple[Any, str, list[dict[str, Any]]]:
    """main() on two masks: how it ended, what it printed, the rows that it wrote."""
    monkeypatch.setattr(kernels, "Pool", FakeRival)
    monkeypatch.setattr(kernels.report, "numpy_sgemm_tflops", lambda: 1.0)
    out = tmp_path / "kernels.json"
    options = ["--masks", "causal,document", "--seqlens", "128", "--head-dims", "64", "--dtype", dtype]
    monkeypatch.setattr(
        sys, "argv", ["kernels.py", "--device", "cpu", "--rivals", "ours,sdpa", *options, "--out", str(out)]
    )
    status = None
    try:
        kernels.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out, json.loads(out.read_text())["rows"]


def test_variants_are_dealt_out(kernels, load):
    case = load("benchmarks.workloads").Case
    cases = [case(mask, s, 64, 64, 1, "bfloat16") for s in (8192, 32768) for mask in ("full", "causal", "document")]
    flex = kernels.Pool("cuda", "flex", cases, 4)
    assert flex.to_compile == cases
    assert [flex.workers.index(flex.worker(each)) for each in cases] == [0, 1, 2, 3, 0, 1]
    # Masks of the same number of bounds run the same code.
    alike = [case(mask, 8192, 64, 64, 1, "bfloat16") for mask in ("share_question", "qk_sparse", "random_eviction")]
    assert kernels.Pool("cuda", "flex", alike, 4).to_compile == alike[:2]
    # One variant for all lengths: the process that compiled it measures them all.
    fa4 = kernels.Pool("cuda", "fa4", [each for each in cases if each.mask != "document"], 4)
    assert [each.mask for each in fa4.to_compile] == ["full", "causal"]
    assert len(fa4.workers) == 2
    assert fa4.worker(cases[0]) is fa4.worker(cases[3])
    assert fa4.worker(cases[0]) is not fa4.worker(cases[1])
    ours = kernels.Pool("cuda", "ours", cases, 4)
    assert ours.to_compile == []
    assert len(ours.workers) == 1


@pytest.mark.parametrize(
    ("program", "patience", "reason"),
    [("import time; time.sleep(60)", 0.3, "status -9"), ("raise SystemExit(3)", 30, "status 3")],
)
def test_a_process_that_hangs_or_ends_costs_one_figure(kernels, case, monkeypatch, program, patience, reason):
    monkeypatch.setattr(kernels, "PATIENCE_SECONDS", patience)
    worker = kernels.Worker("cpu", "ours")
    worker.command = [sys.executable, "-c", program]
    assert reason in worker.ask(case, 0.1)["failed"]
    worker.command = kernels.Worker("cpu", "ours").command
    monkeypatch.setattr(kernels, "PATIENCE_SECONDS", 60)  # for a machine with other things to do
    assert "fwd_times" in worker.ask(case, 0.01), "the next question starts another"
    worker.close()


def test_block_mask_is_flex_attentions_own(load):
    torch = pytest.importorskip("torch")
    attention = pytest.importorskip("torch.nn.attention.flex_attention")
    cuda, workloads = load("benchmarks.rivals.cuda"), load("benchmarks.workloads")
    flex = cuda.Flex.__new__(cuda.Flex)
    flex.torch = torch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        for mask in workloads.MASKS[1:]:
            case = workloads.Case(mask, 1024, 64, 1, 3, "bfloat16")
            visible = flex._visible(case)
            made = cuda.block_mask(visible, case, device="cpu", elements=1 << 20)  # in several parts
            want = attention.create_block_mask(visible, 3, None, 1024, 1024, device="cpu")
            for mine, theirs in zip(made.as_tuple(), want.as_tuple(), strict=True):
                assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs, mask


def test_the_commit_can_be_named(load, monkeypatch):
    """Where benchmarks run on a copy of the tree, its history is missing or another's."""
    monkeypatch.setenv("FLASHMASK_COMMIT", "0123456789ab")
    report = load("benchmarks.report")
    assert report.commit() == "0123456789ab"
    monkeypatch.delenv("FLASHMASK_COMMIT")
    assert report.commit() != "0123456789ab"
